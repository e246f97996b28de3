"""Experts of sparse blocks in `transformers` by each of its backends, interleaved, and by this package's.

    OMP_NUM_THREADS=1 python -m benchmarks.experts_backends [--rounds 15]

A round times every backend once, in an order drawn anew, as what ran before decides which memory is at hand. The table
has the medians over rounds of processor time by backend, as ratios to the best of their own; the last column is this
package's, with its quartiles. One thread, float32.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import mixture_of_experts.huggingface  # noqa: F401  (registers the backend)

OURS = "mixture_of_experts"
THEIRS = ("eager", "grouped_mm", "batched_mm")
MOST_BATCHED = 64  # choices: batched_mm copies the weights of each
CASES = {  # tokens, experts, choices, dim, hidden
    "training, e16 k2": (512, 16, 2, 256, 512),
    "training, e64 k8": (512, 64, 8, 256, 128),
    "prefill, e16 k2": (512, 16, 2, 256, 512),
    "prefill, e64 k8": (512, 64, 8, 256, 128),
    "decode, e16 k2": (1, 16, 2, 256, 512),
    "decode, e64 k8": (1, 64, 8, 256, 128),
    "decode 8, e16 k2": (8, 16, 2, 256, 512),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    print(f"{'case':18}{'best of theirs':>20}" + "".join(f"{name:>12}" for name in THEIRS) + f"{'ours':>22}")
    for case, (tokens, e, k, dim, hidden) in CASES.items():
        experts = build(e, k, dim, hidden).train(case.startswith("training"))
        score, index = torch.randn(tokens, e).softmax(-1).topk(k)
        x = torch.randn(tokens, dim)
        names = [name for name in (*THEIRS, OURS) if name != "batched_mm" or tokens * k <= MOST_BATCHED]
        runs = {name: run(experts, name, x, index, score) for name in names}
        seconds = measure(runs, rounds)
        best = min((name for name in names if name != OURS), key=lambda name: median(seconds[name]))
        ratios = {name: [a / b for a, b in zip(seconds[name], seconds[best], strict=True)] for name in names}
        cells = "".join(f"{median(ratios[name]):12.2f}" if name in ratios else f"{'-':>12}" for name in THEIRS)
        low, middle, high = quantiles(ratios[OURS], n=4)
        of_best = f"{best} {1000 * median(seconds[best]):.2f} ms"
        print(f"{case:18}{of_best:>20}{cells}{f'{middle:.2f} ({low:.2f} to {high:.2f})':>22}", flush=True)


def build(e: int, k: int, dim: int, hidden: int) -> nn.Module:
    config: Any = MixtralConfig(
        hidden_size=dim, intermediate_size=hidden, num_local_experts=e, num_experts_per_tok=k, num_attention_heads=4
    )
    experts = MixtralExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return experts


def run(experts: Any, name: str, x: Tensor, index: Tensor, score: Tensor) -> Callable[[], None]:
    """A function that computes forward, and in training backward, by one backend."""
    leaves, cotangent = [x.requires_grad_(experts.training), *experts.parameters()], torch.randn_like(x)

    def once() -> None:
        experts.config._experts_implementation = name
        if experts.training:
            torch.autograd.grad(experts(x, index, score), leaves, cotangent)
            return
        with torch.no_grad():
            for _ in range(1 if len(x) > 64 else 20):
                experts(x, index, score)

    return once


def measure(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each in every round; the first two rounds are left out."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name in random.Random(turn).sample(sorted(runs), len(runs)):
            begun = time.process_time()
            runs[name]()
            seconds[name].append(time.process_time() - begun)
    return {name: values[2:] for name, values in seconds.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
