#!/usr/bin/env python3
"""Compares sluice's greedy answers with those of transformers' own generate(), token for token.

    sluice eval --model DIR --clips 20 --seed 7 --dtype f32 --dump /tmp/answers --json
    scripts/compare_generate.py --model DIR --dump /tmp/answers --pairs 100

Frames go through the checkpoint's own processor and prompts through its chat template, in fp32 on the CPU.
`--resize pillow` resizes with Pillow instead, as the processors of older releases did: the two differ by at most
one level on a few values in a thousand.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dump", required=True, type=pathlib.Path)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--resize", choices=("processor", "pillow"), default="processor")
    args = parser.parse_args()

    model = LlavaOnevisionForConditionalGeneration.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="eager").eval()
    processor = AutoProcessor.from_pretrained(args.model)
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    # Rows of the embedding without a token are never chosen by sluice; transformers does not mask them by itself.
    tokenless = list(range(len(processor.tokenizer), model.config.text_config.vocab_size)) or None
    side = model.config.vision_config.image_size

    lines = [json.loads(line) for line in open(args.dump / "answers.jsonl", encoding="utf-8")]
    # Evenly spread over the file, so that every clip and kind of question has its share.
    chosen = sorted({i * len(lines) // args.pairs for i in range(args.pairs)})
    equal = 0
    for i in chosen:
        line = lines[i]
        video = np.fromfile(args.dump / line["frames"], np.uint8).reshape(line["shape"])
        if args.resize == "pillow":
            video = np.stack([np.asarray(Image.fromarray(f).resize((side, side), Image.BICUBIC)) for f in video])
        text = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": line["question"]}]}],
            add_generation_prompt=True)
        inputs = processor(text=text, videos=[list(video)], return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=128, do_sample=False, suppress_tokens=tokenless)
        ids = out[0, inputs["input_ids"].shape[1]:].tolist()
        while ids and ids[-1] in stops:
            ids.pop()
        if ids == line["ids"]:
            equal += 1
        else:
            print(f"{line['frames']} {line['question']!r}: sluice {line['ids']} ({line['answer']!r}), "
                  f"transformers {ids} ({processor.decode(ids)!r})")
    print(f"{equal} of {len(chosen)} answers equal token for token")
    sys.exit(equal != len(chosen))


if __name__ == "__main__":
    main()
