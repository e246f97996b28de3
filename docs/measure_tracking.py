"""Measures what `track_routing` costs: training steps with and without it, in turn.

    python docs/measure_tracking.py [--pairs 40]

Prints, for each model, the median step without tracking, the median with it, and the median of the ratios of neighbours
with its quartiles. Wall time says what a user waits; the processor's time of this process is steadier where other
programs run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median, quantiles

import torch
from torch import Tensor, nn

from mixture_of_experts import GatedExperts, HeirarchicalMoE, MoE, NoisyTopKGating, TopKGating
from mixture_of_experts.stats import track_routing

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


class Block(nn.Module):
    """What stands around a layer in a transformer: norm, attention, residual paths."""

    def __init__(self, dim: int, layer: nn.Module):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])
        self.attention = nn.MultiheadAttention(dim, dim // 64, batch_first=True)
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        out, aux_loss = self.layer(self.norms[1](x))
        return x + out, aux_loss


class Model(nn.Module):
    """Two blocks."""

    def __init__(self, dim: int, make_layer: Callable[[], nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, make_layer()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for block in self.blocks:
            x, aux_loss = block(x)
            total = total + aux_loss
        return x.square().mean() + total


def top_k(dim: int, num_experts: int, k: int, **more: float) -> MoE:
    gate = TopKGating(dim, num_experts, k, **more)
    return MoE(dim, gate=gate, experts=GatedExperts(dim, num_experts, hidden_dim=dim))


# name: model dimension, batch and length, the layer
CASES: dict[str, tuple[int, tuple[int, int], Callable[[], nn.Module]]] = {
    "Top2, 8 experts, 512 tokens of 128": (128, (2, 256), lambda: MoE(128, 8)),
    "Top2, 16 experts, 1024 tokens of 256": (256, (4, 256), lambda: MoE(256, 16)),
    "top 8 of 64, dropless, 512 tokens of 256": (256, (2, 256), lambda: top_k(256, 64, 8)),
    "noisy top 2 of 16, 512 tokens of 256": (
        256,
        (2, 256),
        lambda: MoE(256, gate=NoisyTopKGating(256, 16)),
    ),
    "hierarchy of 4 x 4, 1024 tokens of 256": (256, (4, 256), lambda: HeirarchicalMoE(256, (4, 4))),
}


def time_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, tracked: bool) -> dict[str, float]:
    """Seconds of one training step by each clock; `stats.step()` is a part of it."""
    with track_routing(model, keep=10) if tracked else nullcontext() as stats:
        begin = {name: clock() for name, clock in CLOCKS.items()}
        model(x).backward()
        optimizer.step()
        optimizer.zero_grad()
        if stats is not None:
            stats.step()
        return {name: clock() - begin[name] for name, clock in CLOCKS.items()}


def measure(name: str, pairs: int) -> None:
    dim, shape, make_layer = CASES[name]
    torch.manual_seed(0)
    model = Model(dim, make_layer)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.randn(*shape, dim)
    times: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for pair in range(pairs + 2):
        for tracked in (False, True) if pair % 2 else (True, False):
            times[tracked].append(time_step(model, optimizer, x, tracked))
    print(name)
    for clock in CLOCKS:
        without, tracked = ([step[clock] for step in times[key][2:]] for key in (False, True))
        low, middle, high = quantiles([b / a for a, b in zip(without, tracked, strict=True)], n=4)
        seconds = f"{1000 * median(without):8.2f} ms, tracked {1000 * median(tracked):8.2f} ms"
        print(f"  {clock:<9} {seconds}, ratio {middle:.3f} ({low:.3f} to {high:.3f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=40, help="steps with tracking, and as many without")
    parser.add_argument("--only", help="cases whose name contains this")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.pairs} pairs of steps")
    for name in CASES:
        if not args.only or args.only in name:
            measure(name, args.pairs)


if __name__ == "__main__":
    main()
