"""Muon for the matrices inside the network, Adam for everything else.

Muon (Keller Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024): momentum,
then the nearest semi-orthogonal matrix by five Newton-Schulz steps, scaled by
sqrt(max(1, rows/columns)). Matrices of equal shape go through in one stack; fused weights (q/k/v,
gate/up) are orthogonalised part by part, as if they were separate.
Master weights, moments and the running average are float32; the network reads copies in its own
type. A step whose gradients are not finite changes nothing but the count: no host synchronisation.
"""

import torch


def orthogonalise(g, steps=5):
    """[n, r, c] with r <= c, any scale -> about U V^T of each, bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.to(torch.bfloat16)
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True).to(x.dtype) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x


def matrix_parts(weights, shape):
    """{name: row counts of the matrices it is made of} of everything Muon trains."""
    v, d, h = shape.vision_width, shape.width, shape.head_dim
    parts = {"proj.1.w": [d], "proj.2.w": [d]}
    for i in range(shape.vision_layers):
        parts |= {f"tower.{i}.qkv.w": [v] * 3, f"tower.{i}.out.w": [v],
                  f"tower.{i}.fc1.w": [shape.vision_mlp], f"tower.{i}.fc2.w": [v]}
    for i in range(shape.layers):
        parts |= {f"text.{i}.qkv.w": [shape.heads * h] + [shape.kv_heads * h] * 2,
                  f"text.{i}.o.w": [d], f"text.{i}.gu.w": [shape.mlp] * 2, f"text.{i}.down.w": [d]}
    assert all(sum(rows) == weights[name].shape[0] for name, rows in parts.items())
    return parts


class Optimiser:
    """Owns the float32 masters of `weights` {name: tensor}; `live` are the trained copies."""

    def __init__(self, weights, parts, dtype, muon_decay=0.02, average=0.995):
        self.live = {k: t.to(dtype).clone().requires_grad_() for k, t in weights.items()}
        self.muon_decay, self.average_rate = muon_decay, average
        slices = {}
        for name, rows in parts.items():
            at = 0
            for r in rows:
                c = weights[name].shape[1]
                slices.setdefault((min(r, c), max(r, c)), []).append((name, at, at + r, r > c))
                at += r
        self.groups = []
        for _, members in sorted(slices.items()):
            master = torch.stack([self.oriented(weights[n][a:b], t) for n, a, b, t in members])
            grow = torch.tensor([max(1, (b - a) / weights[n].shape[1])**0.5
                                 for n, a, b, _ in members], device=master.device)
            self.groups.append({"members": members, "master": master.float().contiguous(),
                                "average": master.float().clone(), "scale": grow[:, None, None],
                                "momentum": torch.zeros_like(master, dtype=torch.float32)})
        self.small = [k for k in weights if k not in parts]
        self.sizes = [weights[k].numel() for k in self.small]
        flat = torch.cat([weights[k].float().flatten() for k in self.small])
        self.flat, self.flat_average = flat, flat.clone()
        self.first, self.second = torch.zeros_like(flat), torch.zeros_like(flat)
        self.steps = torch.zeros((), device=flat.device)
        self.skipped = torch.zeros((), device=flat.device)
        self.norm = torch.zeros((), device=flat.device)

    @staticmethod
    def oriented(matrix, transposed):
        return matrix.mT if transposed else matrix

    @torch.no_grad()
    def step(self, muon_rate, adam_rate, betas=(0.9, 0.98), clip=1.0):
        """Takes the gradients of `live` and forgets them. Rates are numbers of this step."""
        grads = {k: t.grad for k, t in self.live.items()}
        missing = [k for k, g in grads.items() if g is None]
        assert not missing, f"[optim] no gradient for {missing}"
        norms = torch.stack(torch._foreach_norm(list(grads.values()), dtype=torch.float32))
        self.norm = norms.norm()
        good = torch.isfinite(self.norm)
        self.skipped += ~good
        self.steps += good
        rate = torch.where(good, 1.0, 0.0)
        # A young average follows closely, or it would remember the random beginning.
        follow = (1 - (1 + self.steps) / (10 + self.steps)).clamp_min(1 - self.average_rate)

        for group in self.groups:
            g = torch.stack([self.oriented(grads[n][a:b], t) for n, a, b, t in group["members"]])
            g = torch.where(good, g, 0).float()
            momentum = group["momentum"]
            momentum.lerp_(g, 0.05)
            update = orthogonalise(g.lerp_(momentum, 0.95)).float()
            master = group["master"]
            master.mul_(1 - rate * (muon_rate * self.muon_decay))
            master.sub_(update * group["scale"] * (rate * muon_rate))
            group["average"].lerp_(master, follow)

        g = torch.cat([grads[k].flatten() for k in self.small])
        g = torch.where(good, g, 0).float()
        g *= (clip / (g.norm() + 1e-6)).clamp_max(1.0)
        self.first.lerp_(g, 1 - betas[0])
        self.second.lerp_(g * g, 1 - betas[1])
        count = self.steps.clamp_min(1)
        mean = self.first / (1 - betas[0]**count)
        deviation = (self.second / (1 - betas[1]**count)).sqrt_().add_(1e-8)
        self.flat.sub_(mean.div_(deviation) * (rate * adam_rate))
        self.flat_average.lerp_(self.flat, follow)
        self.publish()
        for t in self.live.values():
            t.grad = None

    @torch.no_grad()
    def publish(self, average=False):
        """Writes the masters, or their running average, to `live`."""
        to, values = [], []
        for group in self.groups:
            source = group["average" if average else "master"]
            for (name, a, b, t), matrix in zip(group["members"], source.unbind(0)):
                to.append(self.live[name].detach()[a:b])
                values.append(self.oriented(matrix, t))
        flat = self.flat_average if average else self.flat
        for name, value in zip(self.small, flat.split(self.sizes)):
            to.append(self.live[name].detach())
            values.append(value.view_as(to[-1]))
        torch._foreach_copy_(to, values)

    @torch.no_grad()
    def weights(self, average=False):
        """Float32 copies by name."""
        out = {name: torch.empty_like(t, dtype=torch.float32) for name, t in self.live.items()}
        for group in self.groups:
            source = group["average" if average else "master"]
            for (name, a, b, t), matrix in zip(group["members"], source.unbind(0)):
                out[name][a:b] = self.oriented(matrix, t)
        flat = self.flat_average if average else self.flat
        for name, value in zip(self.small, flat.split(self.sizes)):
            out[name].copy_(value.view_as(out[name]))
        return out

    def tensors(self):
        for group in self.groups:
            yield from (group[k] for k in ("master", "average", "momentum"))
        yield from (self.flat, self.flat_average, self.first, self.second, self.steps)

    @torch.no_grad()
    def snapshot(self):
        return [t.clone() for t in self.tensors()]

    @torch.no_grad()
    def restore(self, snapshot):
        for t, saved in zip(self.tensors(), snapshot):
            t.copy_(saved)
        self.publish()
