"""Time training steps on a CPU with other values of the batching constants, relative to the package's own values.

python -m experiments.cpu_constants              # all constants, on one thread: six minutes of processor time
python -m experiments.cpu_constants --threads 2  # also THREADED_PADDING_FACTOR, in wall time: needs an idle CPU
python -m experiments.cpu_constants --rows       # only `decode.prefers_row_sums`: one row as a sum or as a product

A ratio above 1 means that a value is slower than the package's value. The package's value is timed twice, and the
difference between its two ratios is the noise. The last table shows each value's median over all shapes, and marks
values that are faster than the package's by more than the noise. To simulate a CPU without AVX-512, set
`ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 FBGEMM_ENABLE_INSTRUCTIONS=AVX2`.
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
from mixture_of_experts.ops.cpu import batches, decode
from mixture_of_experts.ops.grouped import multiply_by_expert

Shape = tuple[int, int, int, int, int, bool]  # tokens, dim, experts, hidden dim, k (0: top-2 with capacity), gated
SHAPES: dict[str, Shape] = {
    "4x1024, 512, 16": (4096, 512, 16, 2048, 0, False),
    "4x1024, 256, 64": (4096, 256, 64, 1024, 0, False),
    "4x1024, 128, 128": (4096, 128, 128, 512, 0, False),
    "dropless 4x1024, 256, 64": (4096, 256, 64, 1024, 2, False),
    "SwiGLU k8 2x1024, 256, 64, h 128": (2048, 256, 64, 128, 8, True),
    "SwiGLU k2 2x1024, 32, 32, h 64": (2048, 32, 32, 64, 2, True),  # the layer in `scaling`
}
VALUES = {
    "MAX_CHUNK_BYTES": [2 << 20, 3 << 20, 8 << 20, 32 << 20],
    "PADDING_WORK": [0, 1 << 20, 1 << 23],
    "MAX_PADDING_ROWS": [8, 128],
    "FREE_PADDING_ROWS": [0, 8],
}
FOR_THREADS = {"THREADED_PADDING_FACTOR": [1, 8, 64, 128]}


def make_layer(
    tokens: int, dim: int, num_experts: int, hidden: int, k: int, gated: bool
) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    kind = GatedExperts if gated else Experts
    gate = TopKGating(dim, num_experts, k, bias=True) if k else None
    if gate is not None and gate.b_gating is not None:
        nn.init.normal_(gate.b_gating)  # unequal expert loads, as with trained routers
    layer = MoE(dim, num_experts, gate=gate, experts=kind(dim, num_experts, hidden))
    return layer, torch.randn(4, tokens // 4, dim, requires_grad=True)


def seconds(layer: nn.Module, x: torch.Tensor, changed: dict[str, int], now: Callable[[], float]) -> float:
    """Return the seconds of one forward and backward, with some constants changed."""
    own = {name: getattr(batches, name) for name in changed}
    try:
        for name, value in changed.items():
            setattr(batches, name, value)
        torch.manual_seed(1)  # draw the same second choices in each run
        start = now()
        out, aux_loss = layer(x)
        torch.autograd.backward((out, aux_loss), (torch.ones_like(out), torch.ones(())))
        return now() - start
    finally:
        x.grad = None
        layer.zero_grad()
        for name, value in own.items():
            setattr(batches, name, value)


ONE_ROW = ((512, 2048), (2048, 512), (576, 1536), (1536, 576), (2048, 768), (768, 2048))
COLD = 256 << 20  # bytes of weights: more than the caches hold


def time_one_row(dtype: torch.dtype, p: int, q: int, rounds: int) -> dict[str, float]:
    """Return the median microseconds of a row times a weight `(p, q)`, computed as a sum of bags and as a product."""
    weights = torch.randn(COLD // (p * q * dtype.itemsize), p, q).to(dtype)
    x, expert, decision = torch.randn(1, p).to(dtype), torch.zeros(1, dtype=torch.int64), random.Random(0)
    ways: dict[str, Callable[[int], object]] = {
        "sum": lambda i: decode.GatherIndices.from_experts(expert + i, weights).multiply_rows(x, weights),
        "product": lambda i: multiply_by_expert(x, weights, [(i, 1)]),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name in decision.sample(sorted(ways), len(ways)):
            i = decision.randrange(len(weights))
            start = time.perf_counter()
            ways[name](i)
            times[name].append((time.perf_counter() - start) * 1e6)
    return {name: median(spent) for name, spent in times.items()}


@torch.no_grad()
def time_rows(rounds: int) -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    for dtype in (torch.float32, torch.bfloat16):
        faster = "sum" if dtype in decode.ROW_SUM_DTYPES else "product"
        for p, q in ONE_ROW:
            found = time_one_row(dtype, p, q, rounds)
            agrees = min(found, key=found.__getitem__) == faster
            told = ", ".join(f"{name} {spent:.0f} us" for name, spent in found.items())
            print(
                f"{capability}, {dtype}, {p} x {q}: {told}; selected: {faster}{'' if agrees else ', which is slower'}",
                flush=True,
            )


def main(arguments: list[str] | None = None, shapes: Mapping[str, Shape] = SHAPES) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="number of interleaved rounds (default 15)")
    parser.add_argument("--only", default="", help="time only shapes whose name contains this text")
    parser.add_argument("--threads", type=int, default=1, help="number of torch threads (default 1)")
    known = [*VALUES, *FOR_THREADS]
    parser.add_argument("--constants", nargs="+", default=known, choices=known, help="constants to vary (default all)")
    parser.add_argument("--rows", action="store_true", help="time only the products of one row")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    time_rows(options.rounds * 20)
    if options.rows:
        return
    now, tried = (time.process_time, VALUES) if options.threads == 1 else (time.perf_counter, VALUES | FOR_THREADS)
    variants: dict[str, dict[str, int]] = {"as it is": {}, "again": {}}
    for name in options.constants:
        variants |= {f"{name} {value}": {name: value} for value in tried.get(name, [])}
    ratios: dict[str, list[float]] = {name: [] for name in variants}
    for shape, sizes in shapes.items():
        if options.only not in shape:
            continue
        layer, x = make_layer(*sizes)
        times: dict[str, list[float]] = {name: [] for name in variants}
        for turn in range(options.rounds + 1):
            for name in random.Random(turn).sample(sorted(variants), len(variants)):
                spent = seconds(layer, x, variants[name], now)
                if turn:  # the first round is a warm-up
                    times[name].append(spent)
        print(f"{shape}: {median(times['as it is']) * 1e3:.1f} ms")
        for name, spent in times.items():
            ratio = median(one / other for one, other in zip(spent, times["as it is"], strict=True))
            ratios[name].append(ratio)
            print(f"  {name:20} {ratio:.3f}", flush=True)
    least = 1 - max(abs(ratio - 1) for ratio in ratios["again"])
    print("all shapes")
    for name, found in ratios.items():
        print(f"  {name:20} {median(found):.3f}{', faster' if median(found) < least else ''}")


if __name__ == "__main__":
    main()
