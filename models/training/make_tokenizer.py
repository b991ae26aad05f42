#!/usr/bin/env python3
"""Makes tokenizer.json: Qwen2's byte-level BPE (NFC, Qwen2's splitting pattern) whose merges are
learned from the demo world's own sentences, so that nearly every word of the world is one token.
All 256 bytes are tokens too: any text survives a round trip.

Usage: make_tokenizer.py --feed ./world_feed --out tokenizer.json
"""

import argparse
import json
import struct
import subprocess

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers, processors, trainers

PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIAL = ["<|im_end|>", "<|endoftext|>", "<|im_start|>", "<image>", "<video>"]
ROWS = 1024  # of the embedding; the tokenizer may use fewer


def empty():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def sentences(feed, clips, seed):
    """Question and answer texts of `clips` clips."""
    command = [feed, "--seed", str(seed), "--frames-list", "8,16,24", "--questions", "16",
               "--clips", str(clips)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        while head := process.stdout.read(8):
            magic, size = struct.unpack("<II", head)
            assert magic == 0x444C5257, "not a record of world_feed"
            body = process.stdout.read(size)
            frames, questions = struct.unpack_from("<II", body)
            at = 8 + 144 * 256 * 3
            for _ in range(frames):
                at += 24 + 24 * struct.unpack_from("<I", body, at + 20)[0]
            for _ in range(questions):
                _, _, q, a = struct.unpack_from("<BBHH", body, at)
                text = body[at + 6:at + 6 + q + a].decode()
                yield text[:q]
                yield text[q:]
                at += 6 + q + a


def vocabulary(feed):
    lines = subprocess.run([feed, "--vocabulary"], capture_output=True, text=True, check=True)
    return [line.split(" ", 2) for line in lines.stdout.splitlines()]


def train(feed, clips=2000, seed=700_000_000_000):
    corpus = []
    # What stands at the beginning of a question or an answer has no space before it.
    for text in sentences(feed, clips, seed):
        corpus.append("\n" + text)
    words = [entry for kind, _, entry in vocabulary(feed) if kind in ("name", "color")]
    numbers = "zero one two three four five six seven eight".split()
    corpus += [f"user \nthe {w} a {w}, an {w}.\nassistant\nuser " for w in words + numbers] * 50
    corpus += [f"\n{w}" for w in words[-8:] + numbers] * 50
    tokenizer = empty()
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS - len(SPECIAL), min_frequency=2, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--feed", required=True)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    tokenizer = train(args.feed)
    tokenizer.save(args.out)
    size = tokenizer.get_vocab_size()
    ids = sorted(tokenizer.get_vocab().values())
    assert ids == list(range(size)) and size <= ROWS, "ids must be 0..n-1 and fit the embedding"
    split = sorted({w for kind, _, w in vocabulary(args.feed) if kind in ("name", "color")
                    and len(tokenizer.encode(" " + w).ids) > 1})
    print(json.dumps({"vocabulary": size, "words_of_more_than_one_token": split}))


if __name__ == "__main__":
    main()
