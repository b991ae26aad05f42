"""What each patch and each pooled token shows, exactly, from the draw lists; and the losses that
teach the tower (and the decoder's lower half) to say so. Heads and losses exist only in training.
"""

import torch
import torch.nn.functional as F

import render
from stream import DOWN, LEFT, RECOLOURED, RIGHT, STILL, UNKNOWN, UP

NAMES, COLOURS = 72, 8
BACKGROUND = NAMES  # the class of a token that shows no object
MEASURES = 5  # offset to the centre (x, y), centre (x, y), size
PATCH_OUT = NAMES + 1 + COLOURS + MEASURES
# Motion classes: those of stream.py for objects, then the background's.
GROUND_STILL, GROUND_LEFT, GROUND_RIGHT, GROUND_UP, GROUND_DOWN, GROUND_LEFT_BEHIND = range(7, 13)
MOTIONS = 13
HEADS = {"patch": PATCH_OUT, "pooled": PATCH_OUT, "motion": MOTIONS}
IGNORE = -100


def head_weights(shape, seed, device):
    g = torch.Generator().manual_seed(seed)
    width = {"patch": shape.vision_width, "pooled": shape.width, "motion": shape.width}
    heads = {}
    for name, out in HEADS.items():
        heads[f"head.{name}.w"] = (0.02 * torch.randn(out, width[name], generator=g)).to(device)
        heads[f"head.{name}.b"] = torch.zeros(out, device=device)
    return heads


def covering(draws, count, grid):
    """Which draw, counted from one, a cell of a grid x grid division of the canvas shows: the
    front-most whose square holds the cell's centre, or whose centre the cell holds. 0 for none.
    draws [N, 8, 16], count [N] -> [N, grid*grid]."""
    wide, high = render.WIDTH / grid, render.HEIGHT / grid
    at = torch.arange(grid, device=draws.device) + 0.5
    x = (at * wide).repeat(grid)
    y = (at * high).repeat_interleave(grid)
    half = 0.45 * draws[..., render.SIZE, None]
    hit = ((x - draws[..., render.CX, None]).abs() <= half.clamp_min(wide / 2))
    hit &= ((y - draws[..., render.CY, None]).abs() <= half.clamp_min(high / 2))
    order = torch.arange(1, draws.shape[1] + 1, device=draws.device)
    hit &= order[:, None] <= count[:, None, None]
    return (hit * order[:, None]).amax(1)


def patch_targets(draws, count, grid):
    """name [N, G] i64 (BACKGROUND where there is nothing), colour [N, G] i64 (IGNORE for things),
    measures [N, G, 5] f32, all of about unit size."""
    top = covering(draws, count, grid)
    row = (top - 1).clamp_min(0)[..., None].expand(-1, -1, draws.shape[-1])
    shown = torch.gather(draws, 1, row)
    nothing = top == 0
    name = torch.where(nothing, BACKGROUND, shown[..., render.NAME].long())
    colour = shown[..., render.COLOR].long()
    colour = torch.where(nothing | (colour < 0), IGNORE, colour)
    at = torch.arange(grid, device=draws.device) + 0.5
    x = (at * (render.WIDTH / grid)).repeat(grid)
    y = (at * (render.HEIGHT / grid)).repeat_interleave(grid)
    cx, cy = shown[..., render.CX], shown[..., render.CY]
    measures = torch.stack([(cx - x) / 64, (cy - y) / 64, (cx - 320) / 160, (cy - 180) / 90,
                            (shown[..., render.SIZE] - 120) / 40], -1)
    return name, colour, measures


def motion_targets(draws, frames, grid, frames_per_clip):
    """[N, G] i64: how what a cell shows has moved since the frame before; IGNORE in the first."""
    count = frames[:, 5]
    top = covering(draws, count, grid)
    row = (top - 1).clamp_min(0)
    motion = torch.gather(draws[..., render.MOTION], 1, row)
    before = draws.roll(1, 0)
    was = covering(before, count.roll(1, 0), grid)
    gone = torch.gather(before[..., render.GONE], 1, (was - 1).clamp_min(0)) * (was > 0)
    camera = frames[:, 6, None].expand_as(motion)
    ground = torch.where(gone > 0, float(GROUND_LEFT_BEHIND), camera + GROUND_STILL)
    motion = torch.where(top > 0, motion, ground)
    first = torch.arange(draws.shape[0], device=draws.device) % frames_per_clip == 0
    return torch.where(first[:, None] | (motion < 0), float(IGNORE), motion).long()


assert (STILL, LEFT, RIGHT, UP, DOWN) == (0, 1, 2, 3, 4) and RECOLOURED == 6 and UNKNOWN < 0


def patch_loss(features, w, b, name, colour, measures):
    """features [N, G, D] -> (loss, [share of objects named right, of colours right, mean error of
    the measures])."""
    out = F.linear(features, w, b).float().flatten(0, 1)
    name, colour, measures = name.flatten(), colour.flatten(), measures.flatten(0, 1)
    object_ = (name != BACKGROUND).float()
    objects = object_.sum() + 1
    weight = object_ / objects + (1 - object_) * (0.3 / (name.numel() - objects + 2))
    named = out[:, :NAMES + 1]
    loss = (F.cross_entropy(named, name, reduction="none") * weight).sum()
    tinted = (colour >= 0).float()
    tints = tinted.sum() + 1
    said = out[:, NAMES + 1:NAMES + 1 + COLOURS]
    loss = loss + 0.5 * F.cross_entropy(said, colour, ignore_index=IGNORE, reduction="sum") / tints
    error = out[:, NAMES + 1 + COLOURS:] - measures
    measured = F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none", beta=0.1).sum(-1)
    loss = loss + (measured * object_).sum() / objects
    with torch.no_grad():
        right = ((named.argmax(-1) == name).float() * object_).sum() / objects
        hue = ((said.argmax(-1) == colour).float() * tinted).sum() / tints
        off = (error.abs().mean(-1) * object_).sum() / objects
    return loss, torch.stack([right, hue, off])


# How often what moves, comes or goes is seen; a still background is most of every picture.
MOTION_WEIGHTS = [0.5, 1, 1, 1, 1, 1, 2, 0.05, 0.2, 0.2, 0.2, 0.2, 1]


def motion_loss(features, w, b, motion, weights):
    """features [T, D], motion [T], weights [MOTIONS] f32 on the device -> (loss, [share of
    moving, new or lost tokens told right])."""
    out = F.linear(features, w, b).float()
    known = motion >= 0
    weight = weights[motion.clamp_min(0)] * known
    loss = F.cross_entropy(out, motion, ignore_index=IGNORE, reduction="none")
    loss = (loss * weight).sum() / (weight.sum() + 1)
    with torch.no_grad():
        lively = known & (motion != STILL) & (motion != GROUND_STILL)
        right = ((out.argmax(-1) == motion) & lively).float().sum() / (lively.float().sum() + 1)
    return loss, right[None]
