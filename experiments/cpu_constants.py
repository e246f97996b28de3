"""What the constants of the CPU's batches cost: training steps with other values of one, against those of the package.

python -m experiments.cpu_constants              # CHUNK, PADDING and FREE_ROWS, on one thread by processor time
python -m experiments.cpu_constants --threads 2  # and SHARING, by the clock on the wall: on a quiet machine

A ratio above 1 is slower than the package's value, which is timed twice: how far its two ratios are apart is the noise.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import nn

from mixture_of_experts import Experts, GatedExperts, MoE, TopKGating
from mixture_of_experts.ops.cpu import batches

Shape = tuple[int, int, int, int, int, bool]  # tokens, dim, experts, hidden dim, k (0: top-2 with capacity), gated
SHAPES: dict[str, Shape] = {
    "4x1024, 512, 16": (4096, 512, 16, 2048, 0, False),
    "4x1024, 256, 64": (4096, 256, 64, 1024, 0, False),
    "4x1024, 128, 128": (4096, 128, 128, 512, 0, False),
    "dropless 4x1024, 256, 64": (4096, 256, 64, 1024, 2, False),
    "SwiGLU k8 2x1024, 256, 64, h 128": (2048, 256, 64, 128, 8, True),
    "SwiGLU k2 2x1024, 32, 32, h 64": (2048, 32, 32, 64, 2, True),  # of `scaling`
}
VALUES = {
    "CHUNK": [2 << 20, 3 << 20, 6 << 20, 8 << 20, 32 << 20],
    "PADDING": [0, 1 << 16, 1 << 20, 1 << 23],
    "FREE_ROWS": [0, 8],
}
FOR_THREADS = {"SHARING": [8, 64, 128, 512]}


def layer_of(
    tokens: int, dim: int, num_experts: int, hidden: int, k: int, gated: bool
) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    kind = GatedExperts if gated else Experts
    gate = TopKGating(dim, num_experts, k) if k else None
    layer = MoE(dim, num_experts, gate=gate, experts=kind(dim, num_experts, hidden))
    return layer, torch.randn(4, tokens // 4, dim, requires_grad=True)


def seconds(layer: nn.Module, x: torch.Tensor, changed: dict[str, int], now: Callable[[], float]) -> float:
    """Of one forward and backward."""
    own = {name: getattr(batches, name) for name in changed}
    try:
        for name, value in changed.items():
            setattr(batches, name, value)
        torch.manual_seed(1)  # the same second choices
        start = now()
        out, aux_loss = layer(x)
        torch.autograd.backward((out, aux_loss), (torch.ones_like(out), torch.ones(())))
        return now() - start
    finally:
        x.grad = None
        layer.zero_grad()
        for name, value in own.items():
            setattr(batches, name, value)


def main(arguments: list[str] | None = None, shapes: Mapping[str, Shape] = SHAPES) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default 15)")
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    known = [*VALUES, *FOR_THREADS]
    parser.add_argument("--constants", nargs="+", default=known, choices=known, help="which (default all)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    now, tried = (time.process_time, VALUES) if options.threads == 1 else (time.perf_counter, VALUES | FOR_THREADS)
    variants: dict[str, dict[str, int]] = {"as it is": {}, "again": {}}
    for name in options.constants:
        variants |= {f"{name} {value}": {name: value} for value in tried.get(name, [])}
    for shape, sizes in shapes.items():
        if options.only not in shape:
            continue
        layer, x = layer_of(*sizes)
        times: dict[str, list[float]] = {name: [] for name in variants}
        for turn in range(options.rounds + 1):
            for name in random.Random(turn).sample(sorted(variants), len(variants)):
                spent = seconds(layer, x, variants[name], now)
                if turn:  # the first round warms up
                    times[name].append(spent)
        print(f"{shape}: {median(times['as it is']) * 1e3:.1f} ms")
        for name, spent in times.items():
            ratio = median(one / other for one, other in zip(spent, times["as it is"], strict=True))
            print(f"  {name:20} {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
