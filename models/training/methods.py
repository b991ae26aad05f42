"""What the runtime's training-free methods do to a picture's rows, for training and evaluation.

The definitions are those of `compression/` (STC-Cacher, STC-Pruner, bipartite merging, PyramidDrop's
ranking). What is chosen is chosen without gradients; gradients flow through what was chosen.
"""

import dataclasses

import torch
import torch.nn.functional as F


@dataclasses.dataclass(frozen=True)
class Reuse:
    """STC-Cacher: one frame of `interval` is computed whole, `ratio` of the others' patches."""
    interval: int
    ratio: float
    shared: bool = False  # the first layer chooses for all


@torch.no_grad()
def fresh_patches(keys, ratio):
    """keys [G, n, P, V], the first of each n being the reference -> [G, n, P, 1] bool: the share
    of patches whose keys resemble the reference's least."""
    k = keys.float()
    cosines = F.cosine_similarity(k, k[:, :1], dim=-1)
    count = max(1, int(keys.shape[2] * ratio))
    least = cosines.topk(count, -1, largest=False).indices
    return torch.zeros_like(cosines, dtype=torch.bool).scatter_(-1, least, True)[..., None]


@torch.no_grad()
def pruner_keeps(rows, keep):
    """STC-Pruner, Gaussian score: rows [clips, F, M, D] -> [clips, F, keep] increasing indices."""
    x = rows.float()
    calm = x.var(2, correction=0).topk(x.shape[-1] // 2, -1, largest=False).indices
    past = F.normalize(x.mean(2).cumsum(1).gather(-1, calm), dim=-1)
    y = F.normalize(x.gather(-1, calm[:, :, None].expand(-1, -1, x.shape[2], -1)), dim=-1)
    redundancy = 0
    for anchor in (past[:, :, None], y.mean(2, keepdim=True)):
        distance = (y - anchor).square().sum(-1)
        redundancy += sum(torch.exp(-distance / (2 * 2.0**j)) for j in range(-3, 2))
    return redundancy.topk(keep, -1, largest=False).indices.sort(-1).values


def take(rows, at):
    """rows [..., M, D], at [..., K] -> [..., K, D]"""
    return rows.gather(-2, at[..., None].expand(*at.shape, rows.shape[-1]))


def merge(rows, keep):
    """ToMe's bipartite merging: rows [B, M, D] -> [B, keep, D] and the place of each, [B, keep]."""
    b, m, _ = rows.shape
    sizes = torch.ones(b, m, 1, device=rows.device, dtype=rows.dtype)
    places = torch.arange(m, device=rows.device).expand(b, m)
    while m > keep:
        even, odd = rows[:, 0::2], rows[:, 1::2]
        with torch.no_grad():
            alike = F.normalize(even.float(), dim=-1) @ F.normalize(odd.float(), dim=-1).mT
            best, partner = alike.max(-1)
            order = best.argsort(dim=-1, descending=True, stable=True)
            gone = order[:, :min(m - keep, m // 2)]
            stay = order[:, gone.shape[1]:].sort(-1).values
            to = F.one_hot(partner.gather(1, gone), odd.shape[1]).to(rows.dtype)
        weight = to * take(sizes[:, 0::2], gone)
        total = sizes[:, 1::2] + weight.sum(1)[..., None]
        odd = (odd * sizes[:, 1::2] + weight.mT @ take(even, gone)) / total
        rows = torch.cat([take(even, stay), odd], 1)
        sizes = torch.cat([take(sizes[:, 0::2], stay), total], 1)
        places = torch.cat([places[:, 0::2].gather(1, stay), places[:, 1::2]], 1)
        m = rows.shape[1]
    places, order = places.sort(-1)
    return take(rows, order), places


@dataclasses.dataclass
class Ranking:
    """PyramidDrop, mode question: from each boundary on, text sees the share `ratio` of the visual
    rows that it saw before, those to which the rows before an answer attend most."""
    boundaries: tuple  # decoder layers
    ratio: float
    begin: int  # of the visual rows in the sequence
    end: int
    asking: torch.Tensor  # [B, T] text positions that rank; weight 0: none
    weight: torch.Tensor  # [B, T]

    @torch.no_grad()
    def keep(self, q, k, seen):
        """q [B, H, S, D], k [B, K, S, D], seen [B, n] visual rows -> fewer of them, increasing."""
        keys = take(k[:, :, self.begin:self.end], seen[:, None].expand(-1, k.shape[1], -1))
        at = (self.end + self.asking)[:, None].expand(-1, q.shape[1], -1)
        asks = take(q, at).view(q.shape[0], k.shape[1], -1, q.shape[-1])
        share = torch.softmax((asks @ keys.mT).float() / q.shape[-1]**0.5, -1)
        weight = self.weight.repeat(1, q.shape[1] // k.shape[1])[:, None, :, None]
        best = (share * weight).sum((1, 2)).topk(max(1, int(seen.shape[1] * self.ratio)), -1)
        return seen.gather(1, best.indices).sort(-1).values
