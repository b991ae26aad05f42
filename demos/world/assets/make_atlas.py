#!/usr/bin/env python3
"""Makes atlas.png, the sprite sheet of the demo world.

Cells are 128x128 RGBA (straight alpha), 8 a row, in the order of demos/world/names.h:
  row 0     the eight shapes, white with a dark outline: the renderer multiplies them by a colour
  row 1     the same shapes in black with a light outline (a product cannot make an outline lighter)
  row 2..   named things from Noto Color Emoji, each with a light outline

Usage: make_atlas.py [--font NotoColorEmoji.ttf] [--out atlas.png] [--preview sheet.png]
Needs Pillow and numpy. The font is Debian's fonts-noto-color-emoji (CBDT bitmaps, OFL-1.1).
"""

import argparse
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

CELL = 128
COLUMNS = 8
OUTLINE = 5.0  # pixels of a cell: about one pixel of a small object seen at 224x224
SUPERSAMPLE = 4

SHAPES = [
    "circle", "cross", "diamond", "heart", "ring", "square", "star", "triangle",
]

THINGS = [
    # animals
    ("bee", "\U0001F41D"), ("butterfly", "\U0001F98B"), ("cat", "\U0001F431"),
    ("chick", "\U0001F424"), ("crab", "\U0001F980"), ("dog", "\U0001F436"),
    ("elephant", "\U0001F418"), ("fish", "\U0001F420"), ("frog", "\U0001F438"),
    ("giraffe", "\U0001F992"), ("ladybug", "\U0001F41E"), ("octopus", "\U0001F419"),
    ("owl", "\U0001F989"), ("panda", "\U0001F43C"), ("penguin", "\U0001F427"),
    ("pig", "\U0001F437"), ("snail", "\U0001F40C"), ("snake", "\U0001F40D"),
    ("turtle", "\U0001F422"), ("whale", "\U0001F433"),
    # vehicles
    ("airplane", "\u2708"), ("bicycle", "\U0001F6B2"), ("bus", "\U0001F68C"),
    ("car", "\U0001F697"), ("helicopter", "\U0001F681"), ("rocket", "\U0001F680"),
    ("sailboat", "\u26F5"), ("tractor", "\U0001F69C"), ("train", "\U0001F682"),
    ("truck", "\U0001F69A"),
    # food
    ("apple", "\U0001F34E"), ("banana", "\U0001F34C"), ("broccoli", "\U0001F966"),
    ("cake", "\U0001F382"), ("carrot", "\U0001F955"), ("cheese", "\U0001F9C0"),
    ("corn", "\U0001F33D"), ("donut", "\U0001F369"), ("grape", "\U0001F347"),
    ("hamburger", "\U0001F354"), ("lemon", "\U0001F34B"), ("mushroom", "\U0001F344"),
    ("pineapple", "\U0001F34D"), ("pizza", "\U0001F355"), ("strawberry", "\U0001F353"),
    ("watermelon", "\U0001F349"),
    # tools, household, plants
    ("ball", "\u26BD"), ("balloon", "\U0001F388"), ("bell", "\U0001F514"),
    ("cactus", "\U0001F335"), ("camera", "\U0001F4F7"), ("chair", "\U0001FA91"),
    ("clock", "\u23F0"), ("cup", "\u2615"), ("drum", "\U0001F941"), ("gift", "\U0001F381"),
    ("guitar", "\U0001F3B8"), ("hammer", "\U0001F528"), ("hat", "\U0001F3A9"),
    ("key", "\U0001F511"), ("robot", "\U0001F916"), ("sunflower", "\U0001F33B"),
    ("tree", "\U0001F333"), ("umbrella", "\u2602"),
]


def polygon(points):
    """Mask of a polygon whose points are in [-1, 1]^2."""
    def draw(size, margin):
        image = Image.new("L", (size, size), 0)
        half = size / 2
        scale = half - margin
        ImageDraw.Draw(image).polygon([(half + x * scale, half + y * scale) for x, y in points],
                                      fill=255)
        return image
    return draw


def star_points():
    points = []
    for i in range(10):
        radius = 1.08 if i % 2 == 0 else 0.46
        angle = math.pi * i / 5
        points.append((radius * math.sin(angle), -radius * math.cos(angle) + 0.08))
    return points


def heart_points():
    points = []
    for i in range(256):
        a = 2 * math.pi * i / 256
        x = 16 * math.sin(a) ** 3
        y = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
        points.append((x / 16.5, -(y + 2.5) / 15.5))
    return points


def ellipse(inner):
    def draw(size, margin):
        image = Image.new("L", (size, size), 0)
        pen = ImageDraw.Draw(image)
        pen.ellipse([margin, margin, size - margin, size - margin], fill=255)
        if inner:
            half = size / 2
            r = (half - margin) * inner
            pen.ellipse([half - r, half - r, half + r, half + r], fill=0)
        return image
    return draw


W = 0.36  # half the width of the cross's bars
SHAPE_MASKS = {
    "circle": ellipse(0.0),
    "cross": polygon([(-W, -1), (W, -1), (W, -W), (1, -W), (1, W), (W, W), (W, 1), (-W, 1),
                      (-W, W), (-1, W), (-1, -W), (-W, -W)]),
    "diamond": polygon([(0, -1), (0.72, 0), (0, 1), (-0.72, 0)]),
    "heart": polygon(heart_points()),
    "ring": ellipse(0.5),
    "square": polygon([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]),
    "star": polygon(star_points()),
    "triangle": polygon([(0, -0.95), (1, 0.85), (-1, 0.85)]),
}


def grow(mask, radius):
    """Dilates a mask by a disc: the union of copies moved along a circle, soft edges kept."""
    grown = np.asarray(mask, dtype=np.float32)
    out = grown.copy()
    reach = int(math.ceil(radius))
    padded = np.pad(grown, reach)
    height, width = grown.shape
    for step in range(48):
        dx = int(round(radius * math.cos(2 * math.pi * step / 48)))
        dy = int(round(radius * math.sin(2 * math.pi * step / 48)))
        out = np.maximum(out, padded[reach + dy:reach + dy + height, reach + dx:reach + dx + width])
    return out


def shape_sprite(name, fill, outline):
    big = CELL * SUPERSAMPLE
    margin = (OUTLINE + 4) * SUPERSAMPLE
    inside = np.asarray(SHAPE_MASKS[name](big, margin), dtype=np.float32) / 255
    around = np.minimum(grow(inside, OUTLINE * SUPERSAMPLE), 1)
    rgb = inside[..., None] * np.array(fill) + (1 - inside[..., None]) * np.array(outline)
    premultiplied = np.dstack([rgb * around[..., None], around * 255])
    small = premultiplied.reshape(CELL, SUPERSAMPLE, CELL, SUPERSAMPLE, 4).mean(axis=(1, 3))
    return unpremultiply(small)


def unpremultiply(pixels):
    alpha = pixels[..., 3:4] / 255
    rgb = np.where(alpha > 0, pixels[..., :3] / np.maximum(alpha, 1e-6), 0)
    out = np.dstack([np.clip(rgb, 0, 255), pixels[..., 3:4]])
    return Image.fromarray(np.round(out).astype(np.uint8), "RGBA")


def thing_sprite(font, text):
    canvas = Image.new("RGBA", (200, 200), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((20, 20), text, font=font, embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    if box is None:
        raise SystemExit(f"[make_atlas] the font has no glyph for {text!r}")
    glyph = canvas.crop(box)
    room = CELL - 2 * (int(OUTLINE) + 2)
    scale = room / max(glyph.size)
    size = (max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale)))
    glyph = glyph.convert("RGBa").resize(size, Image.LANCZOS)
    cell = Image.new("RGBa", (CELL, CELL), (0, 0, 0, 0))
    cell.paste(glyph, ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    pixels = np.asarray(cell, dtype=np.float32)
    alpha = pixels[..., 3] / 255
    around = grow(Image.fromarray((alpha * 255).astype(np.uint8)).filter(
        ImageFilter.GaussianBlur(0.6)), OUTLINE - 1) / 255
    around = np.maximum(around, alpha)
    light = 245 * (around * (1 - alpha))[..., None]
    return unpremultiply(np.dstack([pixels[..., :3] + light,
                                    (alpha + around * (1 - alpha))[..., None] * 255]))


def make_sheet(font):
    cells = [shape_sprite(n, (255, 255, 255), (40, 40, 40)) for n in SHAPES]
    cells += [shape_sprite(n, (22, 22, 22), (235, 235, 235)) for n in SHAPES]
    cells += [thing_sprite(font, text) for _, text in THINGS]
    rows = -(-len(cells) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL), (0, 0, 0, 0))
    for i, cell in enumerate(cells):
        sheet.paste(cell, (i % COLUMNS * CELL, i // COLUMNS * CELL))
    return sheet


def make_preview(sheet):
    """The sheet over grey as it is, and each cell squeezed to 28x50, three times enlarged."""
    grey = Image.new("RGBA", sheet.size, (120, 130, 120, 255))
    grey.alpha_composite(sheet)
    rows = sheet.height // CELL
    small = grey.resize((28 * COLUMNS, 50 * rows), Image.LANCZOS)
    small = small.resize((small.width * 3, small.height * 3), Image.NEAREST)
    out = Image.new("RGB", (sheet.width + small.width, max(sheet.height, small.height)))
    out.paste(grey, (0, 0))
    out.paste(small, (sheet.width, 0))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--font", default="/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    parser.add_argument("--out", default="atlas.png")
    parser.add_argument("--preview")
    args = parser.parse_args()
    names = [name for name, _ in THINGS]
    if len(set(names + SHAPES)) != len(names) + len(SHAPES):
        raise SystemExit("[make_atlas] two sprites have one name")
    font = ImageFont.truetype(args.font, 109)  # the only size of the CBDT strike
    sheet = make_sheet(font)
    sheet.save(args.out, optimize=True)
    if args.preview:
        make_preview(sheet).save(args.preview)


if __name__ == "__main__":
    main()
