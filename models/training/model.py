"""LLaVA-OneVision, written for training small models fast.

The arithmetic is that of transformers' LlavaOnevisionForConditionalGeneration (SigLIP tower, last
layer's output before the post layer norm; linear-gelu-linear projector; bilinear pooling of each
frame's grid by two; Qwen2 decoder with tied embeddings); `recipe_test.py` compares logits.
Differences are only in the form: weights are a flat dictionary, q/k/v and gate/up are fused, and
what lies between two attentions is one function, so that torch.compile makes three graphs a tower
and three a decoder whatever the depth. Shapes that change from step to step (frames, tokens) are
marked dynamic: nothing is compiled again when they change.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F

import methods


@dataclasses.dataclass(frozen=True)
class Shape:
    image: int = 224
    patch: int = 16
    vision_width: int = 256
    vision_layers: int = 6
    vision_heads: int = 4
    vision_mlp: int = 1024
    width: int = 320
    layers: int = 8
    heads: int = 5
    kv_heads: int = 1
    head_dim: int = 64
    mlp: int = 960
    vocabulary: int = 1024
    rope_theta: float = 1e6
    eps: float = 1e-6

    @property
    def grid(self):
        return self.image // self.patch

    @property
    def pooled(self):
        return -(-self.grid // 2)

    @property
    def qkv(self):
        return (self.heads + 2 * self.kv_heads) * self.head_dim


def init_weights(shape, seed, device="cpu"):
    """Float32 weights by name, on `device`."""
    g = torch.Generator().manual_seed(seed)
    w = {}

    def matrix(name, rows, columns, scale=1.0):
        w[name] = torch.randn(rows, columns, generator=g) * (scale / math.sqrt(columns))

    def constant(name, *size, value=0.0):
        w[name] = torch.full(size, value)

    v, d = shape.vision_width, shape.width
    # Outputs of residual branches begin small, so that the stream keeps its scale with depth.
    out_scale = 0.5 / math.sqrt(2 * shape.vision_layers)
    matrix("tower.patch.w", v, 3 * shape.patch**2)
    constant("tower.patch.b", v)
    w["tower.pos"] = 0.5 * sincos_grid(shape.grid, v) + 0.02 * torch.randn(
        shape.grid**2, v, generator=g)
    for i in range(shape.vision_layers):
        p = f"tower.{i}."
        constant(p + "ln1.w", v, value=1.0), constant(p + "ln1.b", v)
        matrix(p + "qkv.w", 3 * v, v), constant(p + "qkv.b", 3 * v)
        matrix(p + "out.w", v, v, out_scale), constant(p + "out.b", v)
        constant(p + "ln2.w", v, value=1.0), constant(p + "ln2.b", v)
        matrix(p + "fc1.w", shape.vision_mlp, v), constant(p + "fc1.b", shape.vision_mlp)
        matrix(p + "fc2.w", v, shape.vision_mlp, out_scale), constant(p + "fc2.b", v)
    matrix("proj.1.w", d, v), constant("proj.1.b", d)
    matrix("proj.2.w", d, d), constant("proj.2.b", d)
    w["newline"] = 0.05 * torch.randn(d, generator=g)
    w["embed"] = 0.03 * torch.randn(shape.vocabulary, d, generator=g)
    out_scale = 0.5 / math.sqrt(2 * shape.layers)
    for i in range(shape.layers):
        p = f"text.{i}."
        constant(p + "norm1", d, value=1.0)
        matrix(p + "qkv.w", shape.qkv, d), constant(p + "qkv.b", shape.qkv)
        matrix(p + "o.w", d, shape.heads * shape.head_dim, out_scale)
        constant(p + "norm2", d, value=1.0)
        matrix(p + "gu.w", 2 * shape.mlp, d)
        matrix(p + "down.w", d, shape.mlp, out_scale)
    constant("text.norm", d, value=1.0)
    return {name: t.to(device) for name, t in w.items()}


def sincos_grid(grid, width):
    """[grid*grid, width]: sines and cosines of row and column; positions readable from step one."""
    quarter = width // 4
    freq = math.pi * 2.0 ** (torch.arange(quarter) * (5.0 / quarter) - 1.0)
    at = (torch.arange(grid) + 0.5) / grid
    axis = torch.cat([torch.sin(at[:, None] * freq), torch.cos(at[:, None] * freq)], 1)
    rows = axis[:, None, :].expand(grid, grid, -1)
    columns = axis[None, :, :].expand(grid, grid, -1)
    return torch.cat([rows, columns], -1).reshape(grid * grid, width).contiguous()


# ---- the pieces between attentions ---------------------------------------------------------------


def _ln(x, w, b, eps):
    return F.layer_norm(x, (x.shape[-1],), w, b, eps)


def _rms(x, w, eps):
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * w


def _tower_first(pixels, w, b, pos, ln_w, ln_b, qkv_w, qkv_b):
    x = F.linear(pixels, w, b) + pos
    return x, F.linear(_ln(x, ln_w, ln_b, 1e-6), qkv_w, qkv_b)


def _tower_mlp(x, a, out_w, out_b, ln_w, ln_b, fc1_w, fc1_b, fc2_w, fc2_b):
    x = x + F.linear(a, out_w, out_b)
    h = F.gelu(F.linear(_ln(x, ln_w, ln_b, 1e-6), fc1_w, fc1_b), approximate="tanh")
    return x + F.linear(h, fc2_w, fc2_b)


def _tower_mid(x, a, out_w, out_b, ln2_w, ln2_b, fc1_w, fc1_b, fc2_w, fc2_b, ln1_w, ln1_b, qkv_w,
               qkv_b):
    x = _tower_mlp(x, a, out_w, out_b, ln2_w, ln2_b, fc1_w, fc1_b, fc2_w, fc2_b)
    return x, F.linear(_ln(x, ln1_w, ln1_b, 1e-6), qkv_w, qkv_b)


def _tower_last(x, a, out_w, out_b, ln2_w, ln2_b, fc1_w, fc1_b, fc2_w, fc2_b, *projector):
    x = _tower_mlp(x, a, out_w, out_b, ln2_w, ln2_b, fc1_w, fc1_b, fc2_w, fc2_b)
    return x, _project(x, *projector)


def _project(x, p1_w, p1_b, p2_w, p2_b):
    y = F.linear(F.gelu(F.linear(x, p1_w, p1_b)), p2_w, p2_b)
    # For an even grid, bilinear interpolation to half the size without anti-aliasing is the mean
    # of each 2x2 block.
    n, half = x.shape[0], math.isqrt(x.shape[1]) // 2
    blocks = y.view(n, half, 2, half, 2, y.shape[-1]).float()
    return blocks.mean((2, 4)).to(y.dtype).view(n, half * half, y.shape[-1])


# With a cache: x and a are [G, n, P, V], the first of each n frames is the reference of the others,
# and where `fresh` [G, n, P, 1] is false, what the layer adds to a patch is what it adds there.


def _tower_mlp_reusing(x, a, fresh, *mlp):
    added = _tower_mlp(x, a, *mlp) - x
    return x + torch.where(fresh, added, added[:, :1])


def _tower_mid_reusing(x, a, fresh, out_w, out_b, ln2_w, ln2_b, fc1_w, fc1_b, fc2_w, fc2_b, ln1_w,
                       ln1_b, qkv_w, qkv_b):
    x = _tower_mlp_reusing(x, a, fresh, out_w, out_b, ln2_w, ln2_b, fc1_w, fc1_b, fc2_w, fc2_b)
    return x, F.linear(_ln(x, ln1_w, ln1_b, 1e-6), qkv_w, qkv_b)


def _tower_last_reusing(x, a, fresh, out_w, out_b, ln2_w, ln2_b, fc1_w, fc1_b, fc2_w, fc2_b,
                        *projector):
    x = _tower_mlp_reusing(x, a, fresh, out_w, out_b, ln2_w, ln2_b, fc1_w, fc1_b, fc2_w, fc2_b)
    x = x.flatten(0, 1)
    return x, _project(x, *projector)


def _qkv_rope(x, norm, qkv_w, qkv_b, cos, sin):
    head = 2 * cos.shape[-1]
    q_and_k_and_v = F.linear(_rms(x, norm, 1e-6), qkv_w, qkv_b)
    total = q_and_k_and_v.shape[-1] // head
    kv = (total - x.shape[-1] // head) // 2
    heads = q_and_k_and_v.view(x.shape[0], total, head)
    turned = heads[:, : total - kv].float()
    first, second = turned.chunk(2, -1)
    c, s = cos[:, None, :], sin[:, None, :]
    turned = torch.cat([first * c - second * s, second * c + first * s], -1).to(x.dtype)
    return turned[:, : total - 2 * kv], turned[:, total - 2 * kv:], heads[:, total - kv:]


def _text_first(x, norm, qkv_w, qkv_b, cos, sin):
    return _qkv_rope(x, norm, qkv_w, qkv_b, cos, sin)


def _text_mlp(x, a, o_w, norm2, gu_w, down_w):
    x = x + F.linear(a, o_w)
    gate, up = F.linear(_rms(x, norm2, 1e-6), gu_w).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, down_w)


def _text_mid(x, a, o_w, norm2, gu_w, down_w, norm1, qkv_w, qkv_b, cos, sin):
    x = _text_mlp(x, a, o_w, norm2, gu_w, down_w)
    return (x, *_qkv_rope(x, norm1, qkv_w, qkv_b, cos, sin))


def _text_last(x, a, o_w, norm2, gu_w, down_w, norm):
    return _rms(_text_mlp(x, a, o_w, norm2, gu_w, down_w), norm, 1e-6)


class Pieces:
    """The functions above, compiled or not. The first dimension of activations is dynamic."""

    def __init__(self, compiled):
        self.tower_first = dynamic(_tower_first, compiled, 1)
        self.tower_mid = dynamic(_tower_mid, compiled, 2)
        self.tower_last = dynamic(_tower_last, compiled, 2)
        self.tower_mid_reusing = dynamic(_tower_mid_reusing, compiled, 3)
        self.tower_last_reusing = dynamic(_tower_last_reusing, compiled, 3)
        self.text_first = dynamic(_text_first, compiled, 1, extra=(4, 5))
        self.text_mid = dynamic(_text_mid, compiled, 2, extra=(9, 10))
        self.text_last = dynamic(_text_last, compiled, 2)


def dynamic(function, compiled, leading, extra=()):
    """`function`, compiled once for any size of dimension 0 of its first `leading` arguments and
    of the arguments `extra`. All of them must be larger than one."""
    if not compiled:
        return function
    fast = torch.compile(function, fullgraph=True, dynamic=None)
    marked = (*range(leading), *extra)

    def call(*args):
        for i in marked:
            torch._dynamo.mark_dynamic(args[i], 0)
        return fast(*args)

    return call


# ---- the model -----------------------------------------------------------------------------------


class Attention:
    """softmax(q k^T / sqrt(D)) v. q [B, H, S, D], k and v [B, K, S, D] -> [B, S, H*D].

    `kernel` is a torch.nn.attention.SDPBackend or None for torch's own choice; `expand` repeats
    the key heads for kernels that want as many as there are query heads.
    """

    def __init__(self, causal, kernel=None, expand=False):
        self.causal, self.kernel, self.expand = causal, kernel, expand

    def __call__(self, q, k, v):
        grouped = k.shape[1] != q.shape[1]
        if grouped and self.expand:
            repeat = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
            grouped = False
        if self.kernel is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal,
                                                 enable_gqa=grouped)
        else:
            with torch.nn.attention.sdpa_kernel(self.kernel):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal,
                                                     enable_gqa=grouped)
        return out.transpose(1, 2).flatten(2)


class Model:
    """Runs the weights it is given; keeps no state but the rotary table."""

    def __init__(self, shape, compiled=False, device="cpu", max_positions=4608):
        self.shape = shape
        self.pieces = Pieces(compiled)
        self.see = Attention(causal=False)
        self.think = Attention(causal=True)
        half = torch.arange(0, shape.head_dim, 2, device=device).float() / shape.head_dim
        angle = torch.arange(max_positions, device=device).float()[:, None] / shape.rope_theta**half
        self.cos, self.sin = angle.cos(), angle.sin()  # [max_positions, head_dim / 2] f32

    def tower(self, w, patches, reuse=None):
        """patches [N, P, 3*patch*patch] in the order (channel, y, x) -> features [N, P, V] as the
        projector gets them, and the projected and pooled rows [N, pooled*pooled, D].
        `reuse` (methods.Reuse): as STC-Cacher computes them; N must be so many whole intervals."""
        assert self.shape.grid == 2 * self.shape.pooled, "odd grids need the general interpolation"
        s, piece = self.shape, self.pieces
        n, p = patches.shape[:2]
        mid, last, fresh = piece.tower_mid, piece.tower_last, None
        if reuse:
            patches = patches.view(n // reuse.interval, reuse.interval, p, -1)
            mid, last = piece.tower_mid_reusing, piece.tower_last_reusing
        first = [w[k] for k in ("tower.patch.w", "tower.patch.b", "tower.pos", "tower.0.ln1.w",
                                "tower.0.ln1.b", "tower.0.qkv.w", "tower.0.qkv.b")]
        x, qkv = piece.tower_first(patches, *first)
        for i in range(s.vision_layers):
            parts = qkv.unflatten(-1, (3, s.vision_width)).unbind(-2)
            if reuse:
                q, k, v = parts
                if i == 0 or not reuse.shared:
                    fresh = methods.fresh_patches(k, reuse.ratio)
                parts = q, k, torch.where(fresh, v, v[:, :1])
            a = self.see(*(t.reshape(n, p, s.vision_heads, -1).transpose(1, 2) for t in parts))
            state = (x, a.view(x.shape), fresh) if reuse else (x, a)
            mlp = [w[f"tower.{i}.{k}"] for k in ("out.w", "out.b", "ln2.w", "ln2.b", "fc1.w",
                                                 "fc1.b", "fc2.w", "fc2.b")]
            if i + 1 < s.vision_layers:
                after = [w[f"tower.{i + 1}.{k}"] for k in ("ln1.w", "ln1.b", "qkv.w", "qkv.b")]
                x, qkv = mid(*state, *mlp, *after)
            else:
                after = [w[k] for k in ("proj.1.w", "proj.1.b", "proj.2.w", "proj.2.b")]
                return last(*state, *mlp, *after)

    def splice(self, w, visual, prefix, tokens):
        """visual [B, M, D], prefix [P] ids, tokens [B, L] ids -> [B, P + M + 1 + L, D]: the prefix,
        the visual rows, the newline row, the text."""
        b = visual.shape[0]
        return torch.cat([F.embedding(prefix, w["embed"]).expand(b, -1, -1), visual,
                          w["newline"].expand(b, 1, -1), F.embedding(tokens, w["embed"])], 1)

    def decode(self, w, x, tap=None, ranking=None):
        """x [B, S, D] -> normalised last hidden states [B, S, D], and those before layer `tap`.
        `ranking` (methods.Ranking): text sees fewer visual rows with every stage."""
        s, piece = self.shape, self.pieces
        b, length, d = x.shape
        cos = self.cos[:length].repeat(b, 1)
        sin = self.sin[:length].repeat(b, 1)
        x, tapped, seen = x.reshape(b * length, d), None, None
        if ranking:
            seen = torch.arange(ranking.end - ranking.begin, device=x.device).expand(b, -1)
        q, k, v = piece.text_first(x, *(w[f"text.0.{n}"] for n in ("norm1", "qkv.w", "qkv.b")),
                                   cos, sin)
        for i in range(s.layers):
            q, k, v = (t.reshape(b, length, -1, s.head_dim).transpose(1, 2) for t in (q, k, v))
            if ranking and i in ranking.boundaries:
                seen = ranking.keep(q, k, seen)
            if seen is None or seen.shape[1] == ranking.end - ranking.begin:
                a = self.think(q, k, v)
            else:
                a = self.think_through(q, k, v, ranking, seen)
            a = a.reshape(b * length, -1)
            mlp = [w[f"text.{i}.{n}"] for n in ("o.w", "norm2", "gu.w", "down.w")]
            if i + 1 < s.layers:
                after = [w[f"text.{i + 1}.{n}"] for n in ("norm1", "qkv.w", "qkv.b")]
                x, q, k, v = piece.text_mid(x, a, *mlp, *after, cos, sin)
                if tap == i + 1:
                    tapped = x.view(b, length, d)
            else:
                x = piece.text_last(x, a, *mlp, w["text.norm"])
        return x.view(b, length, d), tapped

    def think_through(self, q, k, v, ranking, seen):
        """Attention where what stands behind the visual rows sees only those in `seen` [B, n]."""
        def view(t):
            visual = methods.take(t[:, :, ranking.begin:ranking.end],
                                  seen[:, None].expand(-1, t.shape[1], -1))
            return torch.cat([t[:, :, :ranking.begin], visual, t[:, :, ranking.end:]], 2)

        before = self.think(*(t[:, :, :ranking.end] for t in (q, k, v)))
        behind = self.think(view(q), view(k), view(v))[:, ranking.begin + seen.shape[1]:]
        return torch.cat([before, behind], 1)
