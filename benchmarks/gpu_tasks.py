"""The pieces of the first hour on a GPU: what each measures, as tasks.

Axes: t tokens, d model dim, h hidden dim, e experts, k choices.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import blocks, gpu_contestants
from benchmarks.contestants import MissingError
from benchmarks.gpu_cases import list_cases
from benchmarks.gpu_comparison import compare
from benchmarks.gpu_device import Device
from benchmarks.gpu_shapes import MAIN_SHAPES, Shape
from benchmarks.task_processes import ROOT
from benchmarks.tasks import Task, Tasks, describe_exception, list_tasks
from mixture_of_experts import Top2Gating, TopKGating, ops
from mixture_of_experts.dispatch.assignments import assign_experts
from mixture_of_experts.dispatch.permutation import permute_without_gaps
from mixture_of_experts.dispatch.queues import queue_up
from mixture_of_experts.ops.triton import schedule, self_check
from mixture_of_experts.ops.triton.network_spec import NetworkSpec
from mixture_of_experts.ops.triton.self_check import CallKind

LAYOUTS = ("plain", "gated", "concatenated", "interleaved")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: mean rows per expert for which tiles are compared, in addition to a shape's own; shapes that are not main ones take
#: every other number, and so with decoded tokens
MEANS = (1, 4, 16, 64, 256)
DECODED = (1, 8, 64, 256)
PRODUCTS = {"up": 2, "down": 1, "hidden_grads": 1, "row_grads": 2, "weight_grads": 3}  # of rows, d and h
ASSIGNMENTS = (64, 512, 1024, 2048, 4096, 8192)  # numbers that a kernel compares with each other
#: estimated seconds of tasks on an H100 and 16 cores
START_SECONDS, CHECK_SECONDS, FAR_CHECK_SECONDS, PROGRAMS_SECONDS, TESTS_SECONDS = 8.0, 0.6, 15.0, 45.0, 240.0
KERNEL_SECONDS, DECODING_SECONDS, SMALL_SECONDS = 3.0, 2.5, 1.5

Piece = Callable[[Device], Tasks]


def pieces(device: Device) -> dict[str, Piece]:
    """Return all pieces by name, in the order in which they run. The most decisive ones are first."""
    made: dict[str, Piece] = {"checks/default": partial(check_kernels, kinds=default_kinds)}
    shapes = [shape.name for shape in device.shapes()]
    cases = list(list_cases(device.shapes()))
    for is_main in (True, False):
        group = [(index, name) for index, name in enumerate(shapes) if (name in MAIN_SHAPES) == is_main]
        names = [name for _, name in group]
        made |= {f"cases/{case.name}": partial(compare, case) for case in cases if case.shape.name in names}
        made |= {f"decoding/{name}": partial(decoding, index=index) for index, name in group}
        made |= {f"kernels/{name}": partial(kernels, index=index) for index, name in group}
        made["small kernels"] = small_kernels
    made |= {"tests": tests, "checks/far": partial(check_kernels, kinds=far_kinds, seconds=FAR_CHECK_SECONDS)}
    return made | {f"checks/{layout}": partial(check_kernels, kinds=partial(all_kinds, layout)) for layout in LAYOUTS}


def get_path(folder: Path, name: str, machine: dict[str, Any]) -> Path:
    """Return the file of a piece's results."""
    return folder / f"{re.sub('[^A-Za-z0-9]+', '-', machine['card'])}.{re.sub('[ /]', '.', name)}.jsonl"


def estimate_seconds(piece: Piece, device: Device) -> float:
    """Return how long a piece is expected to take: the start of its process, and the estimates of its tasks."""
    return START_SECONDS + sum(task.seconds for task in list_tasks(piece(device)))


def tests(device: Device) -> Tasks:
    """Yield the tests that need a GPU. The log of the piece contains the output of pytest."""
    command = [sys.executable, "-m", "pytest", "-v", *device.tests()]
    yield Task("tests", lambda: subprocess.run(command, cwd=ROOT, check=True).returncode, TESTS_SECONDS)


# ---- checks ----


def default_kinds(device: Device) -> Iterator[tuple[str, CallKind]]:
    """Yield the kinds of calls that the shapes need."""
    on, both = torch.device(device.name), (False, False)
    for k, decoding in itertools.product(sorted({shape.k for shape in device.shapes()}), (False, True)):
        kind = CallKind(on, torch.bfloat16, NetworkSpec("gated", "silu"), both, both, (0, 0, 0), k, decoding)
        yield f"{k} choices, {'decoding' if decoding else 'training'}", kind


def far_kinds(device: Device) -> Iterator[tuple[str, CallKind]]:
    """Yield a kind of calls whose tensors have more elements than int32 can index."""
    (name, kind), *_ = default_kinds(device)
    yield f"{name}, more than 2^31 elements", kind._replace(far=True)


def all_kinds(layout: str, device: Device) -> Iterator[tuple[str, CallKind]]:
    """Yield all kinds of calls with one layout of weights."""
    names = list(self_check.KERNEL_ACTIVATIONS) if layout in ("plain", "gated") else ["silu", "gelu"]
    names += ["clamped_swiglu"] if layout != "plain" else []
    for dtype, activation, odd in itertools.product(DTYPES, names, (0, 16)):
        options = ((bool(odd), bool(odd)), (bool(odd), not odd), (odd, odd, odd), 0 if odd else 2, False)
        kind = CallKind(torch.device(device.name), dtype, NetworkSpec(layout, activation, 1.702, 7.0), *options)
        yield f"{dtype}, {activation}, sizes {odd} past 64", kind


def check_kernels(
    device: Device, kinds: Callable[[Device], Iterator[tuple[str, CallKind]]], seconds: float = CHECK_SECONDS
) -> Tasks:
    """Yield the self-checks of the kernels for some kinds of calls, one for each entry of the schedule."""

    def judge(kind: CallKind, entries: Any, entry: Any) -> str:
        # here and not in a process of its own, as check_entries does: a piece already survives what ends a process
        precision = torch.backends.cuda.matmul.fp32_precision
        try:
            return self_check.find_fault(kind, entries, entry, precision) or "right"
        except torch.OutOfMemoryError as reason:
            raise MissingError(describe_exception(reason)) from reason

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
    programs = partial(compile_launches, device, lambda: (one for check in checks.values() for one in launches(*check)))
    yield Task("programs", programs, PROGRAMS_SECONDS)
    for name, check in checks.items():
        yield Task(name, partial(judge, *check), seconds)


def compile_launches(device: Device, launches: Callable[[], Iterator[blocks.Launch]]) -> list[str]:
    """Compile the programs of launches, and return why some cannot be compiled."""
    return device.compile_programs(list(launches()))


# ---- the kernels of experts ----


def kernels(device: Device, index: int) -> Tasks:
    """Yield the times of each kernel alone, for few to many rows per expert: with tiles of all suitable heights, with
    the blocks of the schedule and with similar ones."""
    shape = device.shapes()[index]
    entries = schedule.find_entries(torch.device(device.name), torch.bfloat16)
    card = device.describe()["capability"], device.get_shared_memory()
    tried = {entry.rows: list(blocks.list_neighbouring_entries(entry, *card)) for entry in entries}

    def launches() -> Iterator[blocks.Launch]:
        for training in (False, True):
            step = blocks.make_step(shape, schedule.MAX_LOW_MEAN_ROWS, device, training)
            for entry, _ in itertools.chain.from_iterable(tried.values()):
                yield from blocks.record_launches(step, entry)

    def profile() -> list[str]:
        step, entry = blocks.make_step(shape, shape.mean_rows, device, training=True), entries[-1]
        found, flops = blocks.kernel_seconds(step, device, entry), shape.t * shape.k * shape.d * shape.h
        return [
            f"{name} {1e6 * time:.0f} us, {2 * PRODUCTS.get(name, 0) * flops / time / 1e12:.0f} TFLOP/s"
            for name, time in found.items()
            if isinstance(time, float)
        ]

    yield Task("programs", partial(compile_launches, device, launches), PROGRAMS_SECONDS)
    yield Task("each kernel of a training step", profile, KERNEL_SECONDS)

    def time_all(rows: int, height: int) -> dict[str, Any]:
        step = blocks.make_step(shape, rows, device, training=rows > schedule.MAX_LOW_MEAN_ROWS)
        found: dict[str, Any] = {}
        for entry, changed in tried[height]:
            for name, time in blocks.kernel_seconds(step, device, entry, changed).items():
                found.setdefault(name, []).append([getattr(entry, name), time])
        return found

    means = MEANS[:: get_stride(shape)]
    for rows in sorted({*(rows for rows in means if rows <= shape.mean_rows), shape.mean_rows}):
        for height in tried:
            if is_candidate_height(height, rows, min(tried), max(tried)):
                yield Task(f"{rows} rows, tiles of {height}", partial(time_all, rows, height), KERNEL_SECONDS)


def get_stride(shape: Shape) -> int:
    """Return which of the numbers of rows or tokens are measured: all, or every other one."""
    return 1 if shape.name in MAIN_SHAPES else 2


def is_candidate_height(height: int, rows: int, lowest: int, highest: int) -> bool:
    """Return whether tiles of a height may be the fastest for experts with this number of rows."""
    return (height == lowest or height <= 32 * rows) and (height == highest or rows <= 2 * height)


# ---- decoding, and small kernels ----


@torch.no_grad()
def decode(device: Device, shape: Shape, tokens: int, implementation: Any) -> dict[str, float]:
    """Return the seconds of a layer on some tokens in eval mode: on the GPU as a CUDA graph, and of the host without
    one. Router and queues use kernels with all implementations of experts."""
    layer = gpu_contestants.make_layer(shape, device.name, torch.bfloat16).eval()
    x = torch.randn(tokens, 1, shape.d, device=device.name, dtype=torch.bfloat16)
    context = partial(ops.use, implementation, router_kernels=True)
    try:
        with context():
            layer(x)
    except ValueError as reason:
        raise MissingError(str(reason)) from reason
    with context():
        host = device.time_step(lambda: layer(x)).host.median
        graph = device.time_step(device.capture_graph(lambda: layer(x))).card.median
    return {"graph": graph, "host": host, "rows": tokens * shape.k / shape.e}


def decoding(device: Device, index: int) -> Tasks:
    """Yield the times of decoding with each implementation."""
    shape = device.shapes()[index]
    for tokens in DECODED[:: get_stride(shape)]:
        for implementation in ("auto", *gpu_contestants.IMPLEMENTATIONS):
            compute = partial(decode, device, shape, tokens, implementation)
            yield Task(f"{tokens} tokens, {implementation}", compute, DECODING_SECONDS)


def small_kernels(device: Device) -> Tasks:
    """Yield the times of the kernels of gates, queues and permutations, and of torch's operators, on the GPU and of the
    host."""

    def compare_steps(steps: Callable[[], tuple[Callable[[], Any], ...]]) -> dict[str, float]:
        found = {}
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # kernels that were turned off would be timed as operators
            for name, step in zip(("kernels", "operators"), steps(), strict=True):
                times = device.time_step(step)
                found |= {name: times.card.median, f"host of {name}": times.host.median}
        return found

    def task(name: str, steps: Callable[..., Any], *arguments: Any) -> Task:
        return Task(name, partial(compare_steps, partial(steps, device, *arguments)), SMALL_SECONDS)

    large, small = device.shapes()[:2]
    for tokens in (1, 8, 64):
        yield task(f"top_k.py: {tokens} tokens", gates, large, tokens, False)
    for shape in (small, large):
        yield task(f"top_2.py: {shape.t} tokens, {shape.e} experts", gates, shape, shape.t)
    for number in (*ASSIGNMENTS, large.t * large.k):
        for kernel in ("rank_rows_kernel", "find_rows_kernel", "queueing.py")[number > max(ASSIGNMENTS) :]:
            yield task(f"{kernel}: {number} assignments", plans, large, number, kernel)


def with_router_kernels(enabled: bool, step: Callable[[], Any]) -> Callable[[], Any]:
    """Return a step that runs with or without the kernels of routers and queues."""

    def call() -> Any:
        with ops.use("auto", router_kernels=enabled):
            return step()

    return call


def gates(device: Device, shape: Shape, tokens: int, training: bool = True) -> tuple[Callable[[], Any], ...]:
    """Return steps that compute the choices of a gate with kernels and with operators: of top 2 in training, with its
    gradient, or of top k."""
    gate: nn.Module = Top2Gating(shape.d, shape.e) if training else TopKGating(shape.d, shape.e, shape.k)
    gate = gate.to(device.name, torch.bfloat16).train(training)
    sizes = (4, tokens // 4, shape.d) if training else (tokens, 1, shape.d)
    x = torch.randn(sizes, device=device.name, dtype=torch.bfloat16, requires_grad=training)

    def step() -> Any:
        with torch.set_grad_enabled(training):
            made = gate.decide(gate.read(x))  # type: ignore[operator]
            total = made.weight.square().sum() + sum(made.losses.values())
            return torch.autograd.grad(total, [x, *gate.parameters()]) if training else made

    return with_router_kernels(True, step), with_router_kernels(False, step)


def plans(device: Device, shape: Shape, number: int, kernel: str) -> tuple[Callable[[], Any], ...]:
    """Return steps that compute a permutation, or only its queues, with a kernel and without it."""
    from mixture_of_experts.ops.triton.row_permutation import permute_by_kernel

    expert = torch.randint(shape.e, (number // shape.k, shape.k), device=device.name)
    assignments = assign_experts(expert, torch.ones(expert.shape, device=device.name), shape.e)
    queues = partial(queue_up, expert.flatten(), None, shape.e, shape.k, "token")
    by_comparison = with_router_kernels(True, partial(permute_by_kernel, assignments, number))
    by_queues = with_router_kernels(True, partial(permute_by_kernel, assignments, 0))
    by_operators = with_router_kernels(False, partial(permute_without_gaps, assignments))
    return {
        "rank_rows_kernel": (by_comparison, by_queues),
        "find_rows_kernel": (by_queues, by_operators),
        "queueing.py": (with_router_kernels(True, queues), with_router_kernels(False, queues)),
    }[kernel]
