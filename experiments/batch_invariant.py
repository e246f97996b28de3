"""What the same bits in any batch cost: a layer of SmolLM2's size by `batch_invariant`, against the fastest way.

    python -m experiments.batch_invariant  # a minute of a core

Times are those of the processor, of one thread; a ratio is the median over pairs of runs.
"""

from __future__ import annotations

import argparse
import random
import time
from statistics import median

import torch
from torch import nn

from mixture_of_experts import GatedExperts, MoE, TopKGating, ops

CASES = {"a decoded token": (1, False), "512 tokens": (512, False), "a step of 512 tokens": (512, True)}


def seconds(layer: nn.Module, x: torch.Tensor, way: str) -> float:
    start = time.process_time()
    with ops.use(way), torch.set_grad_enabled(layer.training):
        out, aux_loss = layer(x)
        if layer.training:
            (out.sum() + aux_loss).backward()
    return time.process_time() - start


def main(arguments: list[str] | None = None, dim: int = 576, hidden_dim: int = 1536) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=20, help="pairs of runs (default 20; of a token 10 times as many)"
    )
    rounds = parser.parse_args(arguments).rounds
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        experts = GatedExperts(dim, 4, hidden_dim, nn.SiLU)
        layer = MoE(dim, gate=TopKGating(dim, 4, k=2), experts=experts).to(dtype)
        for name, (tokens, training) in CASES.items():
            layer.train(training)
            x = torch.randn(1, tokens, dim, dtype=dtype, requires_grad=training)
            ratios = []
            for turn in range(2 + rounds * (10 if tokens == 1 else 1)):
                ways = random.Random(turn).sample(["auto", "batch_invariant"], 2)
                took = {way: seconds(layer, x, way) for way in ways}
                if turn > 1:  # the first two warm up
                    ratios.append(took["batch_invariant"] / took["auto"])
            print(f"{dtype}, {name}: {median(ratios):.2f} of the fastest way's time", flush=True)


if __name__ == "__main__":
    main()
