#!/usr/bin/env python3
"""Times `sluice bench` and transformers with PyTorch on the same cores or the same GPU, the same
checkpoint and the same shapes, one after the other, and prints both side by side. Needs torch and
transformers.

    scripts/bench_peer.py --model models/sluice-mini
    scripts/bench_peer.py --model build/random-0.5b
    scripts/bench_peer.py --model build/random-0.5b --device cuda --torch-dtypes bf16 --batch 1

PyTorch runs in every dtype asked for and its faster one counts, stage by stage, next to the one in
sluice's own dtype. Each figure is the fastest of several repetitions on either side. Encoding is
tower, projector and pooling; prefill is the language model over the visual tokens of the context,
for PyTorch in one piece or in sluice's chunks, whichever is faster; decode is one token after
another behind that context, with the product over the vocabulary.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

import torch
import transformers

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
DECODED = 16


def fastest_seconds(work, budget):
    def finish():
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    finish()
    fastest, total, runs = float("inf"), 0.0, 0
    while runs < 3 or total < budget:
        begin = time.perf_counter()
        finish()
        seconds = time.perf_counter() - begin
        fastest, total, runs = min(fastest, seconds), total + seconds, runs + 1
    return fastest


def measure_torch(args, dtype, frames, chunk):
    model = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
        args.model, dtype=dtype, attn_implementation="sdpa").eval().to(args.device)
    config = model.config
    side = config.vision_config.image_size
    torch.manual_seed(0)
    pixels = torch.rand(1, frames, 3, side, side, dtype=dtype, device=args.device) * 2 - 1

    def encode():
        return model.model.get_video_features(
            pixels, vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy)

    encode_seconds = fastest_seconds(encode, args.seconds)

    text = model.model.language_model
    patches = side // config.vision_config.patch_size
    tokens = args.context_frames * (-(-patches // 2)) ** 2
    rows = torch.randn(1, tokens, config.text_config.hidden_size, dtype=dtype, device=args.device)

    def prefill(step):
        cache = transformers.DynamicCache(config=config.text_config)
        for begin in range(0, tokens, step):
            text(inputs_embeds=rows[:, begin:begin + step], past_key_values=cache, use_cache=True)
        return cache

    prefill_seconds = min(fastest_seconds(lambda: prefill(tokens), args.seconds),
                          fastest_seconds(lambda: prefill(chunk), args.seconds))
    cache, row = prefill(tokens), rows[:, :1]

    def decode():
        for _ in range(DECODED):
            out = text(inputs_embeds=row, past_key_values=cache, use_cache=True)
            model.lm_head(out.last_hidden_state)
        cache.crop(-DECODED)

    return {"encode_frames_per_s": frames / encode_seconds,
            "prefill_tokens_per_s": tokens / prefill_seconds,
            "decode_tokens_per_s": DECODED / fastest_seconds(decode, args.seconds)}


def main():
    root = pathlib.Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(root / "models" / "sluice-mini"))
    parser.add_argument("--sluice", default=str(root / "build" / "release" / "bin" / "sluice"))
    parser.add_argument("--dtype", choices=DTYPES, help="sluice's (default: the machine's best)")
    parser.add_argument("--torch-dtypes", nargs="+", choices=DTYPES, default=["bf16", "f32"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="default: what sluice chooses")
    parser.add_argument("--batch", type=int, default=8, help="frames encoded together")
    parser.add_argument("--context-frames", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=2.0, help="a figure")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()

    command = [args.sluice, "bench", "--json", "--model", args.model, "--device", args.device,
               "--batch", str(args.batch),
               "--context-frames", str(args.context_frames), "--seconds", str(args.seconds)]
    command += ["--dtype", args.dtype] if args.dtype else []
    command += ["--threads", str(args.threads)] if args.threads else []
    ours_full = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    ours = {"encode_frames_per_s": ours_full["encode"]["frames_per_s"],
            "prefill_tokens_per_s": ours_full["prefill"]["tokens_per_s"],
            "decode_tokens_per_s": ours_full["decode"]["tokens_per_s"]}

    threads = ours_full["machine"]["threads"]
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    transformers.utils.logging.disable_progress_bar()
    peers = {}
    for dtype in dict.fromkeys([ours_full["dtype"]] + args.torch_dtypes):
        peers[dtype] = measure_torch(args, DTYPES[dtype], args.batch,
                                     ours_full["prefill"]["chunk_tokens"])

    rows = []
    for stage, rate in ours.items():
        best = max(peers, key=lambda dtype: peers[dtype][stage])
        rows.append({"stage": stage, "sluice": rate, "sluice_dtype": ours_full["dtype"],
                     "torch_same_dtype": peers[ours_full["dtype"]][stage],
                     "torch_best": peers[best][stage], "torch_best_dtype": best,
                     "times_same_dtype": rate / peers[ours_full["dtype"]][stage],
                     "times_best": rate / peers[best][stage]})
    commit = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"],
                            capture_output=True, text=True).stdout.strip()
    report = {"model": args.model, "threads": threads, "commit": commit,
              "machine": ours_full["machine"], "torch": torch.__version__,
              "transformers": transformers.__version__, "sluice": ours_full, "stages": rows}
    if args.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{args.model} on {threads} threads of {ours_full['machine']['model']} "
          f"({ours_full['machine']['isa']}); commit {commit}, torch {torch.__version__}, "
          f"transformers {transformers.__version__}")
    own = ours_full["dtype"]
    print(f"{'stage':24}{'sluice ' + own:>14}{'torch ' + own:>14}{'times':>8}"
          f"{'torch best':>14}{'times':>8}")
    for row in rows:
        print(f"{row['stage']:24}{row['sluice']:14.2f}{row['torch_same_dtype']:14.2f}"
              f"{row['times_same_dtype']:8.2f}{row['torch_best']:14.2f}{row['times_best']:8.2f}"
              f"  ({row['torch_best_dtype']})")


if __name__ == "__main__":
    sys.exit(main())
