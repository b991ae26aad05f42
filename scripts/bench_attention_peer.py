#!/usr/bin/env python3
"""Attention on a Hopper GPU beside PyTorch's cuDNN and flash backends, in one run.

  scripts/bench_attention_peer.py BUILD/bin/cuda_attention_bench [REGEX]

REGEX chooses among the names of the benchmark's shapes.
For every shape of the benchmark it times, in turn: cuDNN, ours in bf16, ours quantised, the flash
backend, and cuDNN again. Times are medians in milliseconds; ratios are to the mean of both cuDNN
times, because the card's speed drifts with its temperature. `spread` is how far those two differ.
Needs PyTorch with CUDA and cuDNN."""
import json
import re
import statistics
import subprocess
import sys
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

QUEUED = 10  # calls between two waits, as in the benchmark


def time_torch(backend, sizes):
    torch.manual_seed(0)

    def heads(count):
        shape = (sizes["batch"], sizes["length"], count, sizes["head_dim"])
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    q, k, v = heads(sizes["heads"]), heads(sizes["kv_heads"]), heads(sizes["kv_heads"])
    grouped = sizes["heads"] != sizes["kv_heads"]
    times = []
    with sdpa_kernel([backend]), torch.no_grad():
        begun = time.perf_counter()
        while len(times) < 8 or time.perf_counter() - begun < 0.4:
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(QUEUED):
                torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=bool(sizes["causal"]), enable_gqa=grouped)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) / QUEUED * 1e3)
    return statistics.median(times[2:])


def time_ours(program, name):
    out = subprocess.run(
        [program, f"--benchmark_filter=^{name}$", "--benchmark_format=json",
         "--benchmark_repetitions=3"], check=True, capture_output=True, text=True).stdout
    runs = json.loads(out)["benchmarks"]
    return next(run["real_time"] for run in runs if run.get("aggregate_name") == "median")


def main():
    if len(sys.argv) not in (2, 3):
        print(__doc__, file=sys.stderr)
        return 2
    program = sys.argv[1]
    names = subprocess.run([program, "--benchmark_list_tests"], check=True, capture_output=True,
                           text=True).stdout.split()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, "
          f"cuDNN {torch.backends.cudnn.version()}")
    print(f"{'shape':34} {'TFLOP':>7} {'cuDNN':>9} {'flash':>9} {'bf16':>9} {'quant.':>9} "
          f"{'bf16':>6} {'quant.':>6} {'spread':>6}   TFLOP/s of cuDNN, bf16, quantised")
    for name in names:
        if "quantised:0" not in name or not re.search(sys.argv[2] if sys.argv[2:] else "", name):
            continue
        sizes = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", name)}
        flop = (4 * sizes["batch"] * sizes["heads"] * sizes["length"] ** 2 * sizes["head_dim"] /
                (2 if sizes["causal"] else 1))
        cudnn = [time_torch(SDPBackend.CUDNN_ATTENTION, sizes)]
        exact = time_ours(program, name)
        quantised = time_ours(program, name.replace("quantised:0", "quantised:1"))
        flash = time_torch(SDPBackend.FLASH_ATTENTION, sizes)
        cudnn.append(time_torch(SDPBackend.CUDNN_ATTENTION, sizes))
        peer = statistics.mean(cudnn)
        shape = (f"{sizes['batch']}x{sizes['length']} heads {sizes['heads']}/{sizes['kv_heads']} "
                 f"D {sizes['head_dim']}{' causal' if sizes['causal'] else ''}")
        rates = "  ".join(f"{flop / t / 1e9:5.0f}" for t in (peer, exact, quantised))
        print(f"{shape:34} {flop / 1e12:7.3f} {peer:9.4f} {flash:9.4f} {exact:9.4f} "
              f"{quantised:9.4f} {peer / exact:6.2f} {peer / quantised:6.2f} "
              f"{max(cudnn) / min(cudnn) - 1:6.1%}   {rates}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
