"""The pieces of the first hour on a card: what each measures, as tasks whose results are kept one by one.

Axes: t tokens, d model dim, h hidden dim, e experts, k choices.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import blocks, gpu
from benchmarks.gpu_device import Device, Shape
from benchmarks.results_file import Tasks
from mixture_of_experts import Top2Gating, TopKGating, ops
from mixture_of_experts.dispatch.assignments import assign_experts
from mixture_of_experts.dispatch.permutation import permute_without_gaps
from mixture_of_experts.dispatch.queues import queue_up
from mixture_of_experts.ops.triton import schedule, self_check
from mixture_of_experts.ops.triton.network_spec import NetworkSpec
from mixture_of_experts.ops.triton.self_check import CallKind

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = ("plain", "gated", "concatenated", "interleaved")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MEANS = (1, 4, 8, 16, 32, 64, 128, 256)  # rows of an expert for which tiles are compared, beside a shape's own
DECODED = (1, 8, 64, 256)  # tokens
PRODUCTS = {"up": 2, "down": 1, "hidden_grads": 1, "row_grads": 2, "weight_grads": 3}  # of rows, d and h
ASSIGNMENTS = (64, 512, 1024, 2048, 4096, 8192)  # that a kernel compares with each other


def pieces(device: Device) -> dict[str, Callable[[Device], Tasks]]:
    """All pieces by name, in the order in which they run: what decides most comes first."""
    made: dict[str, Callable[[Device], Tasks]] = {"checks/default": partial(check_kernels, kinds=default_kinds)}
    shapes = list(enumerate(shape.name for shape in device.shapes()))
    for group in (shapes[:2], shapes[2:]):
        for index, name in group:
            made |= {f"cases/{name}/{mode}": partial(case, index=index, mode=mode) for mode in gpu.MODES}
        made |= {f"decoding/{name}": partial(decoding, index=index) for index, name in group}
        made |= {f"kernels/{name}": partial(kernels, index=index) for index, name in group}
        made["small kernels"] = small_kernels
    made |= {f"checks/{layout}": partial(check_kernels, kinds=partial(all_kinds, layout)) for layout in LAYOUTS}
    return made | {"tests": tests}


def tests(device: Device) -> Tasks:
    """The tests that need a card; what pytest says is in the log of the piece."""
    command = [sys.executable, "-m", "pytest", "-v", *device.tests()]
    yield "tests", lambda: subprocess.run(command, cwd=ROOT, check=True).returncode


def case(device: Device, index: int, mode: str) -> Tasks:
    """A shape and mode, beside rivals and yardsticks."""
    yield "record", lambda: gpu.run(device.shapes()[index], mode, device)


# ---- checks ----


def default_kinds(device: Device) -> Iterator[tuple[str, CallKind]]:
    """What the shapes need."""
    on, both = torch.device(device.name), (False, False)
    for k, decoding in itertools.product(sorted({shape.k for shape in device.shapes()}), (False, True)):
        kind = CallKind(on, torch.bfloat16, NetworkSpec("gated", "silu"), both, both, (0, 0, 0), k, decoding)
        yield f"{k} choices, {'decoding' if decoding else 'training'}", kind


def all_kinds(layout: str, device: Device) -> Iterator[tuple[str, CallKind]]:
    """Every form of one layout."""
    names = list(self_check.KERNEL_ACTIVATIONS) if layout in ("plain", "gated") else ["silu", "gelu"]
    names += ["clamped_swiglu"] if layout != "plain" else []
    for dtype, activation, odd in itertools.product(DTYPES, names, (0, 16)):
        options = ((bool(odd), bool(odd)), (bool(odd), not odd), (odd, odd, odd), 0 if odd else 2, False)
        kind = CallKind(torch.device(device.name), dtype, NetworkSpec(layout, activation, 1.702, 7.0), *options)
        yield f"{dtype}, {activation}, sizes {odd} past 64", kind


def check_kernels(device: Device, kinds: Callable[[Device], Iterator[tuple[str, CallKind]]]) -> Tasks:
    """What the kernels' own check says of some kinds of calls, entry by entry of the schedule."""

    def judge(kind: CallKind, entries: Any, entry: Any) -> str:
        self_check.EXPERTS_SELF_CHECK.verdicts.clear()  # one that is wrong is not to hide the others
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self_check.check_entries(kind, entries, (entry,)) or "right"

    def launches(kind: CallKind, entries: Any, entry: Any) -> list[blocks.Launch]:
        call = self_check.make_call(kind, *self_check.find_call_size(entries, entry))
        return blocks.record_launches(
            lambda: (self_check.compute_by_kernels(call, kind), self_check.are_permutations_equal(call.assignments))
        )

    checks = {
        f"{name}, tiles of {entry.rows}": (kind, schedule.find_entries(kind.device, kind.dtype), entry)
        for name, kind in kinds(device)
        for entry in schedule.find_entries(kind.device, kind.dtype)
    }
    yield "programs", lambda: device.compile([one for check in checks.values() for one in launches(*check)])
    for name, check in checks.items():
        yield name, partial(judge, *check)


# ---- the kernels of experts ----


def kernels(device: Device, index: int) -> Tasks:
    """Each kernel alone, for few to many rows of an expert: with tiles of every height that may serve them, and the
    blocks of the schedule and others around them."""
    shape = device.shapes()[index]
    entries = schedule.find_entries(torch.device(device.name), torch.bfloat16)
    card = device.describe()["capability"], device.get_shared_memory()
    tried = {entry.rows: list(blocks.list_neighbouring_entries(entry, *card)) for entry in entries}

    def compile_all() -> list[str]:
        steps = [blocks.make_step(shape, schedule.MAX_LOW_MEAN_ROWS, device, training) for training in (False, True)]
        around = [entry for some in tried.values() for entry, _ in some]
        return device.compile(
            [one for step in steps for entry in around for one in blocks.record_launches(step, entry)]
        )

    def profile() -> list[str]:
        step, entry = blocks.make_step(shape, shape.mean_rows, device, training=True), entries[-1]
        found, flops = blocks.kernel_seconds(step, device, entry), shape.t * shape.k * shape.d * shape.h
        return [
            f"{name} {1e6 * time:.0f} us, {2 * PRODUCTS.get(name, 0) * flops / time / 1e12:.0f} TFLOP/s"
            for name, time in found.items()
            if isinstance(time, float)
        ]

    yield "programs", compile_all
    yield "each kernel of a training step", profile

    def time_all(rows: int, height: int) -> dict[str, Any]:
        step = blocks.make_step(shape, rows, device, training=rows > schedule.MAX_LOW_MEAN_ROWS)
        found: dict[str, Any] = {}
        for entry, changed in tried[height]:
            for name, time in blocks.kernel_seconds(step, device, entry, changed).items():
                found.setdefault(name, []).append([getattr(entry, name), time])
        return found

    for rows in sorted({*(rows for rows in MEANS if rows <= shape.mean_rows), shape.mean_rows}):
        for height in tried:
            if is_candidate_height(height, rows, min(tried), max(tried)):
                yield f"{rows} rows, tiles of {height}", partial(time_all, rows, height)


def is_candidate_height(height: int, rows: int, lowest: int, highest: int) -> bool:
    """Whether tiles of a height may be the fastest for experts of so many rows."""
    return (height == lowest or height <= 32 * rows) and (height == highest or rows <= 2 * height)


# ---- decoding, and small kernels ----


@torch.no_grad()
def decode(device: Device, shape: Shape, tokens: int, way: Any) -> dict[str, float]:
    """Seconds of a layer on some tokens in eval: as a graph on the card, and of the host without one."""
    layer = gpu.make_layer(shape, device.name, torch.bfloat16).eval()
    x = torch.randn(tokens, 1, shape.d, device=device.name, dtype=torch.bfloat16)
    with ops.use(way):
        host = device.time_step(lambda: layer(x))[1]
        graph = device.time_step(device.capture_graph(lambda: layer(x)))[0]
    return {"graph": graph, "host": host, "rows": tokens * shape.k / shape.e}


def decoding(device: Device, index: int) -> Tasks:
    """Decoding by every way."""
    shape = device.shapes()[index]
    for tokens in DECODED:
        for way in ("auto", *gpu.IMPLEMENTATIONS):
            yield f"{tokens} tokens, {way}", partial(decode, device, shape, tokens, way)


def small_kernels(device: Device) -> Tasks:
    """Kernels of gates, queues and plans beside torch's operators: seconds on the card, and of the host."""

    def compare(steps: Callable[[], tuple[Callable[[], Any], ...]]) -> dict[str, float]:
        found = {}
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of kernels that were turned off: operators would be timed twice
            for name, step in zip(("kernels", "operators"), steps(), strict=True):
                found[name], found[f"host of {name}"] = device.time_step(step)
        return found

    large, small = device.shapes()[:2]
    for tokens in (1, 8, 64):
        yield f"top_k.py: {tokens} tokens", partial(compare, partial(gates, device, large, tokens, False))
    for shape in (small, large):
        yield f"top_2.py: {shape.t} tokens, {shape.e} experts", partial(compare, partial(gates, device, shape, shape.t))
    for number in (*ASSIGNMENTS, large.t * large.k):
        for kernel in ("rank_rows_kernel", "find_rows_kernel", "queueing.py")[number > max(ASSIGNMENTS) :]:
            yield f"{kernel}: {number} assignments", partial(compare, partial(plans, device, large, number, kernel))


def run_by_implementation(way: Any, step: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        with ops.use(way):
            return step()

    return call


def gates(device: Device, shape: Shape, tokens: int, training: bool = True) -> tuple[Callable[[], Any], ...]:
    """What a gate decides: in training of top 2 with the gradient, else of top k."""
    gate: nn.Module = Top2Gating(shape.d, shape.e) if training else TopKGating(shape.d, shape.e, shape.k)
    gate = gate.to(device.name, torch.bfloat16).train(training)
    sizes = (4, tokens // 4, shape.d) if training else (tokens, 1, shape.d)
    x = torch.randn(sizes, device=device.name, dtype=torch.bfloat16, requires_grad=training)

    def step() -> Any:
        with torch.set_grad_enabled(training):
            made = gate.decide(gate.read(x))  # type: ignore[operator]
            total = made.weight.square().sum() + sum(made.losses.values())
            return torch.autograd.grad(total, [x, *gate.parameters()]) if training else made

    return run_by_implementation("triton", step), run_by_implementation("batched", step)


def plans(device: Device, shape: Shape, number: int, kernel: str) -> tuple[Callable[[], Any], ...]:
    """The permutation of some assignments: without queues and with them, with queues and by torch; or the queues
    alone."""
    from mixture_of_experts.ops.triton.row_permutation import permute_by_kernel

    expert = torch.randint(shape.e, (number // shape.k, shape.k), device=device.name)
    assignments = assign_experts(expert, torch.ones(expert.shape, device=device.name), shape.e)
    queues = partial(queue_up, expert.flatten(), None, shape.e, shape.k, "token")
    by_queues = run_by_implementation("triton", partial(permute_by_kernel, assignments, 0))
    return {
        "rank_rows_kernel": (
            run_by_implementation("triton", partial(permute_by_kernel, assignments, number)),
            by_queues,
        ),
        "find_rows_kernel": (by_queues, run_by_implementation("batched", partial(permute_without_gaps, assignments))),
        "queueing.py": (run_by_implementation("triton", queues), run_by_implementation("batched", queues)),
    }[kernel]
