#!/usr/bin/env python3
"""Golden results of Pillow's bicubic resize for vision/preprocess.

    python3 tests/golden/make_resize_golden.py tests/golden/resize.json

Pictures are computed from the byte's number, so only hashes of the results (64-bit FNV-1a) and the bytes of small
results are kept.
"""

import json
import sys

import numpy as np
import PIL
from PIL import Image

SIZES = [  # in width, in height, out width, out height
    (640, 480, 384, 384), (1280, 720, 384, 384), (200, 100, 384, 384), (33, 97, 384, 384), (1920, 1080, 384, 384),
    (641, 359, 224, 224), (384, 384, 384, 384), (384, 200, 384, 384), (200, 384, 384, 384), (1, 1, 9, 5), (2, 3, 5, 4),
    (1, 50, 3, 7), (7, 5, 3, 2), (50, 1, 7, 1), (4000, 3, 5, 4), (3, 3000, 4, 5), (97, 61, 74, 74),
]


def picture(width, height):
    """Noise between runs of black and white, whose edges overshoot."""
    i = np.arange(width * height * 3, dtype=np.uint64)
    h = i * 2654435761 & 0xFFFFFFFF
    h = (h ^ h >> 15) * 2246822519 & 0xFFFFFFFF
    run = i // 97 % 4
    return np.where(run == 0, 0, np.where(run == 1, 255, h >> 24)).astype(np.uint8).reshape(height, width, 3)


def fnv1a(data):
    h = 0xCBF29CE484222325
    for byte in data:
        h = (h ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{h:016x}"


def main():
    cases = []
    for in_width, in_height, out_width, out_height in SIZES:
        # One axis a call: from 13 on Pillow begins with the vertical axis when that is cheaper (tall pictures), while
        # earlier releases and the reference's video processor (torchvision) always begin with the horizontal one.
        image = Image.fromarray(picture(in_width, in_height)).resize((out_width, in_height), Image.BICUBIC)
        image = image.resize((out_width, out_height), Image.BICUBIC)
        data = image.tobytes()
        case = {"in": [in_width, in_height], "out": [out_width, out_height], "fnv1a": fnv1a(data)}
        if len(data) <= 300:
            case["bytes"] = list(data)
        cases.append(case)
    with open(sys.argv[1], "w") as file:
        json.dump({"pillow": PIL.__version__, "cases": cases}, file)
        file.write("\n")


if __name__ == "__main__":
    main()
