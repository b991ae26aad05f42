"""Draws the clips of world_feed on the GPU and turns them into the tower's patches.

frame records -> 640x360 pictures (u8 values) -> some are spoiled the way a video codec does it
-> 224x224 as Pillow's bicubic resize makes them -> light noise and colour error -> patches.

Pictures are kept as whole numbers in float16, planes first, so that both passes of the resize are
plain matrix products; float16 weights cost at most one level in a few per cent of the pixels.
The kernels also run on the CPU under TRITON_INTERPRET=1, which is how they are tested.
"""

import math

import numpy as np
import torch
import triton
import triton.language as tl

WIDTH, HEIGHT = 640, 360
TEX_WIDTH, TEX_HEIGHT = 256, 144
CELL = 128
MAX_DRAWS = 8
# Columns of a draw's row; stream.py fills them.
CX, CY, SIZE, OPACITY, RED, GREEN, BLUE, MIP, SPRITE, NAME, COLOR, MOTION, GONE = range(13)
DRAW_COLUMNS = 16
FRAME_COLUMNS = 8  # tex_x0, tex_y0, tex_x1, tex_y1, gain, draws, camera, 0


def load_atlas(path, device):
    """The sprite sheet as premultiplied RGBA words: all sprites at 128, then at 64, then at 32."""
    from PIL import Image
    sheet = np.asarray(Image.open(path).convert("RGBA"), dtype=np.uint32)
    rows, columns = sheet.shape[0] // CELL, sheet.shape[1] // CELL
    cells = sheet.reshape(rows, CELL, columns, CELL, 4).swapaxes(1, 2).reshape(-1, CELL, CELL, 4)
    alpha = cells[..., 3:]
    level = np.concatenate([(cells[..., :3] * alpha + 127) // 255, alpha], -1)
    words = []
    for _ in range(3):
        words.append((level[..., 0] | level[..., 1] << 8 | level[..., 2] << 16
                      | level[..., 3] << 24).astype(np.uint32).reshape(-1))
        level = (level[:, 0::2, 0::2] + level[:, 0::2, 1::2] + level[:, 1::2, 0::2]
                 + level[:, 1::2, 1::2] + 2) >> 2
    return torch.from_numpy(np.concatenate(words).view(np.int32)).to(device), cells.shape[0]


@triton.jit
def _texel(pointer, at, inside):
    word = tl.load(pointer + at, mask=inside, other=0)
    return ((word & 255).to(tl.float32), ((word >> 8) & 255).to(tl.float32),
            ((word >> 16) & 255).to(tl.float32), ((word >> 24) & 255).to(tl.float32))


@triton.jit
def _draw_kernel(textures, frames, draws, atlas, out, frame0, frames_per_clip, sprites,
                 W: tl.constexpr, H: tl.constexpr, TW: tl.constexpr, TH: tl.constexpr,
                 BX: tl.constexpr, BY: tl.constexpr, CELLS: tl.constexpr, D: tl.constexpr,
                 DC: tl.constexpr, FC: tl.constexpr):
    """One tile of BX x BY pixels of one frame. textures [B, TH, TW] RGBX words, frames [N, FC],
    draws [N, D, DC], atlas see load_atlas, out [n, 3, H, W] f16 for the frames from frame0 on."""
    tile = tl.program_id(0)
    slot = tl.program_id(1)
    frame = frame0 + slot
    x0 = (tile % (W // BX)) * BX
    y0 = (tile // (W // BX)) * BY
    column = x0 + tl.arange(0, BX)[None, :]
    row = y0 + tl.arange(0, BY)[:, None]
    px = (column + 0.5) + tl.zeros([BY, BX], tl.float32)
    py = (row + 0.5) + tl.zeros([BY, BX], tl.float32)

    head = frames + frame * FC
    tx0, ty0, tx1, ty1 = tl.load(head), tl.load(head + 1), tl.load(head + 2), tl.load(head + 3)
    gain = tl.load(head + 4)
    count = tl.load(head + 5).to(tl.int32)
    u = tx0 + (tx1 - tx0) * px / W - 0.5
    v = ty0 + (ty1 - ty0) * py / H - 0.5
    fu, fv = tl.floor(u), tl.floor(v)
    wu, wv = u - fu, v - fv
    ua = tl.minimum(tl.maximum(fu.to(tl.int32), 0), TW - 1)
    ub = tl.minimum(tl.maximum(fu.to(tl.int32) + 1, 0), TW - 1)
    va = tl.minimum(tl.maximum(fv.to(tl.int32), 0), TH - 1)
    vb = tl.minimum(tl.maximum(fv.to(tl.int32) + 1, 0), TH - 1)
    texture = textures + (frame // frames_per_clip).to(tl.int64) * (TW * TH)
    everywhere = px >= 0
    r00, g00, b00, _ = _texel(texture, va * TW + ua, everywhere)
    r01, g01, b01, _ = _texel(texture, va * TW + ub, everywhere)
    r10, g10, b10, _ = _texel(texture, vb * TW + ua, everywhere)
    r11, g11, b11, _ = _texel(texture, vb * TW + ub, everywhere)
    w00, w01 = (1 - wu) * (1 - wv), wu * (1 - wv)
    w10, w11 = (1 - wu) * wv, wu * wv
    red = r00 * w00 + r01 * w01 + r10 * w10 + r11 * w11
    green = g00 * w00 + g01 * w01 + g10 * w10 + g11 * w11
    blue = b00 * w00 + b01 * w01 + b10 * w10 + b11 * w11

    for d in range(D):
        draw = draws + (frame * D + d) * DC
        cx, cy, size = tl.load(draw), tl.load(draw + 1), tl.load(draw + 2)
        mip = tl.load(draw + 7).to(tl.int32)
        side = CELLS >> mip
        reach = size * 0.5 + size / side  # half a texel beyond the square still blends in
        hit = (d < count) & (cx + reach > x0) & (cx - reach < x0 + BX)
        if hit & (cy + reach > y0) & (cy - reach < y0 + BY):
            opacity = tl.load(draw + 3)
            tr = tl.load(draw + 4) / 255.0
            tg = tl.load(draw + 5) / 255.0
            tb = tl.load(draw + 6) / 255.0
            sprite = tl.load(draw + 8).to(tl.int32)
            # Levels lie one after another: 1, then 1/4, then 1/16 of the first's size.
            base = tl.where(mip == 0, 0, tl.where(mip == 1, 4, 5)) * (CELLS * CELLS // 4) * sprites
            base += sprite * side * side
            su = ((px - cx) / size + 0.5) * side - 0.5
            sv = ((py - cy) / size + 0.5) * side - 0.5
            fu2, fv2 = tl.floor(su), tl.floor(sv)
            a, b = su - fu2, sv - fv2
            iu, iv = fu2.to(tl.int32), fv2.to(tl.int32)
            left, right = (iu >= 0) & (iu < side), (iu >= -1) & (iu < side - 1)
            top, bottom = (iv >= 0) & (iv < side), (iv >= -1) & (iv < side - 1)
            at = base + iv * side + iu
            r0, g0, b0, a0 = _texel(atlas, at, left & top)
            r1, g1, b1, a1 = _texel(atlas, at + 1, right & top)
            r2, g2, b2, a2 = _texel(atlas, at + side, left & bottom)
            r3, g3, b3, a3 = _texel(atlas, at + side + 1, right & bottom)
            q0, q1 = (1 - a) * (1 - b), a * (1 - b)
            q2, q3 = (1 - a) * b, a * b
            keep = 1 - (a0 * q0 + a1 * q1 + a2 * q2 + a3 * q3) * (opacity / 255.0)
            red = red * keep + (r0 * q0 + r1 * q1 + r2 * q2 + r3 * q3) * (tr * opacity)
            green = green * keep + (g0 * q0 + g1 * q1 + g2 * q2 + g3 * q3) * (tg * opacity)
            blue = blue * keep + (b0 * q0 + b1 * q1 + b2 * q2 + b3 * q3) * (tb * opacity)

    plane = out + slot.to(tl.int64) * (3 * H * W) + row * W + column
    red = tl.minimum(tl.maximum(tl.floor(red * gain + 0.5), 0.0), 255.0)
    green = tl.minimum(tl.maximum(tl.floor(green * gain + 0.5), 0.0), 255.0)
    blue = tl.minimum(tl.maximum(tl.floor(blue * gain + 0.5), 0.0), 255.0)
    tl.store(plane, red.to(out.dtype.element_ty))
    tl.store(plane + H * W, green.to(out.dtype.element_ty))
    tl.store(plane + 2 * H * W, blue.to(out.dtype.element_ty))


@triton.jit
def _round_level(x):
    return tl.minimum(tl.maximum(tl.floor(x + 0.5), 0.0), 255.0)


@triton.jit
def _chroma_kernel(picture, blocks, W: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr):
    """Every 2x2 pixels share one chroma, as in 4:2:0 video. picture [n, 3, H, W], in place."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < blocks
    x = at % (W // 2)
    y = (at // (W // 2)) % (H // 2)
    n = (at // ((W // 2) * (H // 2))).to(tl.int64)
    corner = picture + n * (3 * H * W) + y * (2 * W) + x * 2
    cb = tl.zeros([BLOCK], tl.float32)
    cr = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(4):
        p = corner + (k // 2) * W + k % 2
        r = tl.load(p, mask=inside, other=0).to(tl.float32)
        g = tl.load(p + H * W, mask=inside, other=0).to(tl.float32)
        b = tl.load(p + 2 * H * W, mask=inside, other=0).to(tl.float32)
        luma = 0.299 * r + 0.587 * g + 0.114 * b
        cb += (b - luma) * (0.25 / 1.772)
        cr += (r - luma) * (0.25 / 1.402)
    cb, cr = tl.floor(cb + 0.5), tl.floor(cr + 0.5)
    for k in tl.static_range(4):
        p = corner + (k // 2) * W + k % 2
        r = tl.load(p, mask=inside, other=0).to(tl.float32)
        g = tl.load(p + H * W, mask=inside, other=0).to(tl.float32)
        b = tl.load(p + 2 * H * W, mask=inside, other=0).to(tl.float32)
        luma = tl.floor(0.299 * r + 0.587 * g + 0.114 * b + 0.5)
        kind = picture.dtype.element_ty
        tl.store(p, _round_level(luma + 1.402 * cr).to(kind), mask=inside)
        tl.store(p + H * W, _round_level(luma - 0.344136 * cb - 0.714136 * cr).to(kind),
                 mask=inside)
        tl.store(p + 2 * H * W, _round_level(luma + 1.772 * cb).to(kind), mask=inside)


@triton.jit
def _level_kernel(x, size, BLOCK: tl.constexpr):
    """Rounds and clamps to 0..255 in place: what Pillow keeps between its two passes."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    tl.store(x + at, _round_level(value).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _patch_kernel(picture, spoil, out, frame0, frames_per_clip, seed, SIDE: tl.constexpr,
                  PATCH: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):
    """ROWS lines of pixels of a row of patches: rounds to levels, applies the clip's colour matrix, offset and noise
    (spoil [B, 16]: 3x3 matrix, 3 offsets, sigma), rounds again, normalises to -1..1.
    picture [n, 3, SIDE, SIDE] -> out [N, (SIDE/PATCH)^2, 3*PATCH*PATCH] from frame0 on."""
    band = tl.program_id(0) // (PATCH // ROWS)
    slot = tl.program_id(1)
    frame = frame0 + slot
    x = tl.arange(0, WIDE)[None, :]
    ky = (tl.program_id(0) % (PATCH // ROWS)) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = (x < SIDE) & (ky < PATCH)
    p = picture + slot.to(tl.int64) * (3 * SIDE * SIDE) + (band * PATCH + ky) * SIDE + x
    r = _round_level(tl.load(p, mask=inside, other=0).to(tl.float32))
    g = _round_level(tl.load(p + SIDE * SIDE, mask=inside, other=0).to(tl.float32))
    b = _round_level(tl.load(p + 2 * SIDE * SIDE, mask=inside, other=0).to(tl.float32))
    m = spoil + (frame // frames_per_clip) * 16
    sigma = tl.load(m + 12)
    n0 = tl.zeros([ROWS, WIDE], tl.float32)
    n1 = tl.zeros([ROWS, WIDE], tl.float32)
    n2 = tl.zeros([ROWS, WIDE], tl.float32)
    if sigma > 0:
        n0, n1, n2, _ = tl.randn4x(seed, (frame * SIDE + band * PATCH + ky) * SIDE + x)
    red = r * tl.load(m) + g * tl.load(m + 1) + b * tl.load(m + 2) + tl.load(m + 9) + n0 * sigma
    green = (r * tl.load(m + 3) + g * tl.load(m + 4) + b * tl.load(m + 5) + tl.load(m + 10)
             + n1 * sigma)
    blue = (r * tl.load(m + 6) + g * tl.load(m + 7) + b * tl.load(m + 8) + tl.load(m + 11)
            + n2 * sigma)
    across: tl.constexpr = SIDE // PATCH
    q = (out + (frame.to(tl.int64) * (across * across) + band * across + x // PATCH)
         * (3 * PATCH * PATCH) + ky * PATCH + x % PATCH)
    kind = out.dtype.element_ty
    tl.store(q, ((_round_level(red) - 127.5) / 127.5).to(kind), mask=inside)
    tl.store(q + PATCH * PATCH, ((_round_level(green) - 127.5) / 127.5).to(kind), mask=inside)
    tl.store(q + 2 * PATCH * PATCH, ((_round_level(blue) - 127.5) / 127.5).to(kind), mask=inside)


def bicubic(size_in, size_out, blur=0.0):
    """[size_out, size_in] f64: Pillow's antialiased bicubic (Keys, a = -0.5), after an optional
    Gaussian blur of `blur` source pixels."""
    scale = size_in / size_out
    widen = max(scale, 1.0)
    matrix = np.zeros((size_out, size_in))
    for i in range(size_out):
        centre = (i + 0.5) * scale
        low = max(int(centre - 2 * widen + 0.5), 0)
        high = min(int(centre + 2 * widen + 0.5), size_in)
        t = np.abs((np.arange(low, high) - centre + 0.5) / widen)
        weight = np.where(t < 1, (1.5 * t - 2.5) * t * t + 1,
                          np.where(t < 2, ((-0.5 * t + 2.5) * t - 4) * t + 2, 0))
        matrix[i, low:high] = weight / weight.sum()
    if blur > 0:
        d = np.arange(size_in)
        gauss = np.exp(-0.5 * ((d[:, None] - d[None, :]) / blur)**2)
        matrix = matrix @ (gauss / gauss.sum(1, keepdims=True))
    return matrix


def block_dct(size):
    """[size, size]: orthonormal 8-point DCT of each run of eight samples."""
    k = np.arange(8)
    dct = np.cos((2 * k[None, :] + 1) * k[:, None] * math.pi / 16) * math.sqrt(0.25)
    dct[0] *= math.sqrt(0.5)
    matrix = np.zeros((size, size))
    for i in range(0, size, 8):
        matrix[i:i + 8, i:i + 8] = dct
    return matrix


class Renderer:
    """Frame records to patches. Owns the pictures' scratch memory, for `chunk` frames at a time."""

    BLURS = (0.0, 0.0, 0.0, 0.6, 1.0)

    def __init__(self, atlas, device, side=224, patch=16, chunk=480, dtype=torch.bfloat16):
        self.atlas, self.sprites = load_atlas(atlas, device)
        self.device, self.side, self.patch, self.chunk, self.dtype = (device, side, patch, chunk,
                                                                      dtype)
        # The CPU has no float16 matrix product worth waiting for.
        self.kind = torch.float16 if device != "cpu" else torch.float32

        def on_device(m):
            return torch.from_numpy(m).to(device, self.kind).contiguous()

        self.across = [on_device(bicubic(WIDTH, side, b).T) for b in self.BLURS]
        self.down = [on_device(bicubic(HEIGHT, side, b)) for b in self.BLURS]
        self.dct_x, self.dct_y = on_device(block_dct(WIDTH)), on_device(block_dct(HEIGHT))
        self.picture = torch.empty(chunk, 3, HEIGHT, WIDTH, dtype=self.kind, device=device)
        self.random = np.random.default_rng(1)

    def draw(self, textures, frames, draws, frames_per_clip, frame0, count):
        """Pictures [count, 3, 360, 640] of the frames from frame0 on, whole levels. Overwritten by
        the next call. textures [B, 144, 256] words, frames [N, 8] and draws [N, 8, 16] f32."""
        picture = self.picture[:count]
        bx, by = 128, 8
        _draw_kernel[((WIDTH // bx) * (HEIGHT // by), count)](
            textures, frames, draws, self.atlas, picture, frame0, frames_per_clip, self.sprites,
            W=WIDTH, H=HEIGHT, TW=TEX_WIDTH, TH=TEX_HEIGHT, BX=bx, BY=by, CELLS=CELL, D=MAX_DRAWS,
            DC=DRAW_COLUMNS, FC=FRAME_COLUMNS)
        return picture

    def subsample_chroma(self, picture):
        blocks = picture.shape[0] * (HEIGHT // 2) * (WIDTH // 2)
        _chroma_kernel[(triton.cdiv(blocks, 1024),)](picture, blocks, W=WIDTH, H=HEIGHT, BLOCK=1024)

    def quantise(self, picture, steps):
        """Rounds 8x8 DCT coefficients to multiples of `steps` [n], towards zero below half a step:
        what is left of fine detail in a compressed video."""
        n = picture.shape[0]
        x = (picture - 128).view(n * 3, HEIGHT, WIDTH)
        c = torch.bmm(self.dct_y.expand(n * 3, -1, -1), x @ self.dct_x.T)
        step = steps.to(c.dtype).repeat_interleave(3).view(-1, 1, 1)
        c = (c / step).round_() * step
        x = torch.bmm(self.dct_y.T.expand(n * 3, -1, -1), c) @ self.dct_x
        picture.copy_(x.view_as(picture) + 128)
        self.level(picture)

    def level(self, x):
        _level_kernel[(triton.cdiv(x.numel(), 4096),)](x, x.numel(), BLOCK=4096)

    def resize(self, picture, blur=0):
        """[n, 3, 360, 640] -> [n, 3, side, side], not yet rounded after the second pass."""
        n = picture.shape[0]
        x = (picture.view(-1, WIDTH) @ self.across[blur]).view(n * 3, HEIGHT, self.side)
        self.level(x)
        return torch.bmm(self.down[blur].expand(n * 3, -1, -1), x).view(n, 3, self.side, self.side)

    def patches(self, textures, frames, draws, frames_per_clip, spoiled=True):
        """[N, P, 3*patch^2] of all N frames. With `spoiled`, part of the clips look as cameras and
        codecs make them. `textures` is [B, 144, 256, 3] u8."""
        count, clips = frames.shape[0], textures.shape[0]
        words = torch.nn.functional.pad(textures, (0, 1)).view(torch.int32).squeeze(-1)
        grid = self.side // self.patch
        out = torch.empty(count, grid**2, 3 * self.patch**2, dtype=self.dtype, device=self.device)
        spoil = self.colour_errors(clips, spoiled)
        for frame0 in range(0, count, self.chunk):
            n = min(self.chunk, count - frame0)
            picture = self.draw(words, frames, draws, frames_per_clip, frame0, n)
            blur = 0
            if spoiled:
                # Clips are independent draws, so "the first third of a chunk" is a random third.
                self.subsample_chroma(picture[: n * 2 // 5])
                if n // 5:
                    steps = torch.from_numpy(np.exp(self.random.uniform(
                        math.log(3), math.log(28), n // 5 // 8 + 1)).astype(np.float32))
                    steps = steps.to(self.device, non_blocking=True).repeat_interleave(8)
                    self.quantise(picture[: n // 5], steps[: n // 5])
                blur = int(self.random.integers(len(self.BLURS)))
            small = self.resize(picture, blur)
            rows = 4
            _patch_kernel[(grid * (self.patch // rows), n)](
                small, spoil, out, frame0, frames_per_clip, int(self.random.integers(1 << 30)),
                SIDE=self.side, PATCH=self.patch, WIDE=triton.next_power_of_2(self.side),
                ROWS=rows)
        return out

    def colour_errors(self, clips, spoiled):
        """[clips, 16]: a colour matrix near one, offsets and noise; nothing for half the clips."""
        table = np.zeros((clips, 16), np.float32)
        table[:, [0, 4, 8]] = 1
        if spoiled:
            rng = self.random
            some = rng.random(clips) < 0.5
            error = rng.normal(0, 0.02, (clips, 3, 3)) + np.eye(3)
            error *= rng.uniform(0.92, 1.08, (clips, 1, 1))
            table[some, :9] = error.reshape(clips, 9)[some]
            table[some, 9:12] = rng.uniform(-6, 6, (clips, 1))[some] + rng.normal(
                0, 1.5, (clips, 3))[some]
            table[:, 12] = np.where(rng.random(clips) < 0.4, rng.uniform(0.5, 4, clips), 0)
        return torch.from_numpy(table).to(self.device)
