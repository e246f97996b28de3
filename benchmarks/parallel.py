"""What expert parallelism sends and where its time goes: `python -m benchmarks.parallel`.

For 1, 2 and 4 ranks on gloo, one thread each, a layer's forward and backward are run on the same number of tokens a
rank, dropless and with limited capacity. Counted are the bytes of tokens that leave a rank, beside the least that can
be (every choice travels there and back, and its gradient too: `k * d * 2 * 2 * element size * share of remote experts`
a token). Timed are the exchange (waiting for the other ranks included) and the experts; the rest is routing, dispatch
and combine.

    python -m benchmarks.parallel --tokens 4096 --dim 512 --hidden 2048 --experts 16 --json parallel.json
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from benchmarks import timing
from mixture_of_experts import Experts, MoE, TopKGating
from mixture_of_experts.parallel import ExpertParallel, ExpertParallelExperts, parallelize_module
from mixture_of_experts.parallel.exchange import Channel

MODES = {"dropless": None, "capacity 1.0": 1.0, "capacity 1.25": 1.25}
CHOICES, WARMUP = 2, 2


@dataclass
class Step:
    """What one forward and backward on one rank came to."""

    seconds: float = 0.0
    exchange: float = 0.0
    experts: float = 0.0
    tokens_sent: int = 0  # bytes of rows that left for other ranks
    sizes_sent: int = 0  # bytes of headers and counts that did


@dataclass
class Meter:
    """Counts and times by standing around the two functions that do the work."""

    step: Step = field(default_factory=Step)
    _began: float = 0.0

    @contextmanager
    def installed(self) -> Iterator[None]:
        transfer, compute = Channel.transfer, ExpertParallelExperts._compute

        def metered_transfer(channel: Channel, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
            start = time.perf_counter()
            result = transfer(channel, x, send, receive)
            self.step.exchange += time.perf_counter() - start
            row = x[:1].numel() * x.element_size() if len(x) else 0
            leaving = row * (sum(send) - send[channel.group.rank()])
            if x.is_floating_point():
                self.step.tokens_sent += leaving
            else:
                self.step.sizes_sent += leaving
            return result

        def metered_compute(experts: ExpertParallelExperts, x: Tensor, *counts: Tensor) -> Tensor:
            x.register_hook(self._end)
            self._begin()
            result = compute(experts, x, *counts)
            self._end()
            result.register_hook(self._begin)
            return result

        Channel.transfer = metered_transfer  # type: ignore[method-assign]
        ExpertParallelExperts._compute = metered_compute  # type: ignore[method-assign]
        yield
        Channel.transfer, ExpertParallelExperts._compute = transfer, compute  # type: ignore[method-assign]

    def _begin(self, *_: object) -> None:
        self._began = time.perf_counter()

    def _end(self, *_: object) -> None:
        self.step.experts += time.perf_counter() - self._began


def run_rank(rank: int, ranks: int, store: str, options: argparse.Namespace, results: Any) -> None:
    """All modes on one rank; rank 0 hands the numbers over."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(minutes=5)
    )
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",))
    for mode in MODES:
        gathered: list[Any] = [None] * ranks
        dist.all_gather_object(gathered, run_mode(mode, mesh, options))
        if rank == 0:
            results.put((mode, gathered))
    dist.destroy_process_group()


def run_mode(mode: str, mesh: Any, options: argparse.Namespace) -> list[Step]:
    """The steps of one mode on this rank."""
    torch.manual_seed(0)
    gate = TopKGating(options.dim, options.experts, k=CHOICES, capacity_factor_train=MODES[mode])
    moe = MoE(options.dim, gate=gate, experts=Experts(options.dim, options.experts, options.hidden))
    parallelize_module(moe, mesh, ExpertParallel())
    torch.manual_seed(1 + dist.get_rank())
    x = torch.randn(1, options.tokens, options.dim, requires_grad=True)
    meter, steps = Meter(), []
    with meter.installed():
        for _ in range(WARMUP + options.steps):
            dist.barrier()
            meter.step = Step()
            start = time.perf_counter()
            out, aux_loss = moe(x)
            (out.square().mean() + aux_loss).backward()
            meter.step.seconds = time.perf_counter() - start
            moe.zero_grad()
            steps.append(meter.step)
    return steps[WARMUP:]


def summary(mode: str, ranks: int, gathered: list[list[Step]], options: argparse.Namespace) -> dict[str, Any]:
    """Medians over steps, means over ranks."""

    def typical(name: str) -> float:
        return sum(median(getattr(step, name) for step in steps) for steps in gathered) / len(gathered)

    element = torch.finfo(torch.get_default_dtype()).bits // 8
    least = CHOICES * options.dim * 2 * 2 * element * (ranks - 1) / ranks
    return {
        "ep": ranks,
        "mode": mode,
        "bytes_per_token": typical("tokens_sent") / options.tokens,
        "least_bytes_per_token": least,
        "bytes_of_sizes_per_token": typical("sizes_sent") / options.tokens,
        "step_ms": 1000 * typical("seconds"),
        "exchange_ms": 1000 * typical("exchange"),
        "experts_ms": 1000 * typical("experts"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| ep | mode | bytes a token | least | ratio | sizes | step ms | exchange ms | experts ms | rest ms |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        least, sent = row["least_bytes_per_token"], row["bytes_per_token"]
        ratio = f"{sent / least:.3f}" if least else "-"
        rest = row["step_ms"] - row["exchange_ms"] - row["experts_ms"]
        lines.append(
            f"| {row['ep']} | {row['mode']} | {sent:.0f} | {least:.0f} | {ratio} "
            f"| {row['bytes_of_sizes_per_token']:.2f} | {row['step_ms']:.1f} | {row['exchange_ms']:.1f} "
            f"| {row['experts_ms']:.1f} | {rest:.1f} |"
        )
    return "\n".join(lines)


def measure(ranks: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Start the ranks, and collect."""
    results = mp.get_context("spawn").Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, os.path.join(folder, "store"), options, results)
        processes = mp.spawn(run_rank, arguments, nprocs=ranks, join=False)
        found = [results.get(timeout=600) for _ in MODES]
        while not processes.join():  # type: ignore[union-attr]
            pass
    return [summary(mode, ranks, gathered, options) for mode, gathered in found]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.parallel", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a rank")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--json", metavar="FILE", help="save everything")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    sizes = f"{options.tokens} tokens a rank, d={options.dim}, h={options.hidden}, e={options.experts}, k={CHOICES}"
    about = timing.machine() | {"threads": 1}
    print(f"{about['processor']}, {about['cores']} cores, torch {about['torch']}; {sizes}, float32, one thread a rank")
    rows = [row for ranks in options.ranks for row in measure(ranks, options)]
    print(table(rows))
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": about, "sizes": vars(options), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
