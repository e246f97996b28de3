"""Blocks similar to those of the schedule, and the time of each kernel alone with them.

`tests/support/triton_machine_code.py` compiles them ahead of time for each card: none of them spills registers or needs
more shared memory than the card has.

Axes: t tokens, k choices, e experts, d model dim, h hidden dim.
"""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.gpu_device import Device
from benchmarks.gpu_shapes import Shape
from benchmarks.tasks import describe_exception
from mixture_of_experts.dispatch.assignments import assign_experts
from mixture_of_experts.ops.network import Call, Network
from mixture_of_experts.ops.triton import self_check
from mixture_of_experts.ops.triton.schedule import Schedule, WeightBlockSizes

KERNELS = Schedule._fields[2:]
#: factors of n, c and warps, and the number of additional stages
BLOCK_VARIATIONS = (
    *((1, 1, 1, 0), (2, 1, 1, 0), (0.5, 1, 1, 0), (1, 0.5, 1, 0), (1, 0.5, 1, 1), (1, 2, 1, 0), (1, 1, 1, 1)),
    *((1, 1, 1, -1), (1, 1, 0.5, 0), (1, 1, 2, 0), (0.5, 1, 0.5, 0), (0.5, 1, 1, 1), (2, 0.5, 1, 0), (2, 1, 2, 0)),
)


class Launch(NamedTuple):
    """A launch of a kernel. Tensors are represented by their dtypes."""

    module: str
    kernel: str
    arguments: dict[str, Any]


def list_candidates(kernel: str, entry: Schedule, capability: tuple[int, int], shared: int) -> list[Any]:
    """Return the blocks of a kernel in an entry of the schedule, and similar ones that fit a card whose programs have
    `shared` bytes of shared memory."""
    own, found = getattr(entry, kernel), []
    for n, c, warps, stages in BLOCK_VARIATIONS:
        sizes = {"c": int(own.c * c), "warps": int(own.warps * warps), "stages": own.stages + stages}
        found.append(own._replace(n=int(own.n * n), **sizes))
        if isinstance(own, WeightBlockSizes) and n != 1:
            found.append(own._replace(m=int(own.m * n), **sizes))
    fitting = (blocks for blocks in found if can_run_blocks(kernel, blocks, entry.rows, capability, shared))
    return list(dict.fromkeys([own, *fitting]))


def can_run_blocks(kernel: str, blocks: Any, height: int, capability: tuple[int, int], shared: int) -> bool:
    """Return whether the blocks fit into registers and shared memory, and the self-check covers such programs."""
    m, by_weights = getattr(blocks, "m", height), kernel == "weight_grads"
    summed = self_check.MIN_ROWS * self_check.BUSIEST_EXPERT_SHARE if by_weights else self_check.MIN_DIM
    by_groups = capability[0] in (9, 10) and m >= 64  # of warps: their operands take no registers
    most = 128 if by_weights or (by_groups and kernel in ("down", "row_grads")) else 64
    return (
        all(32 <= n <= 256 for n in ((m, blocks.n) if by_weights else (blocks.n,)))
        and blocks.c in (32, 64)
        and blocks.warps in (4, 8)
        and blocks.stages >= 2
        and summed >= (blocks.stages + 1) * blocks.c
        and m * blocks.n <= most * 32 * blocks.warps
        and count_shared_bytes(blocks, m, by_groups) <= shared
    )


def count_shared_bytes(blocks: Any, m: int, by_groups: bool) -> int:
    """Return the shared memory of a program with 2-byte operands. Groups of warps use a buffer for one more step."""
    return (blocks.stages - (not by_groups)) * blocks.c * (m + blocks.n) * 2


def list_neighbouring_entries(entry: Schedule, *card: Any) -> Iterator[tuple[Schedule, tuple[str, ...]]]:
    """Yield the entry and the names of all kernels, then entries with other blocks and the names of the kernels that
    these are for."""
    for blocks in itertools.zip_longest(*(list_candidates(kernel, entry, *card) for kernel in KERNELS)):
        changed = {kernel: tried for kernel, tried in zip(KERNELS, blocks, strict=True) if tried is not None}
        yield entry._replace(**changed), tuple(changed)


# ---- launches ----


def make_step(shape: Shape, mean_rows: int, device: Device, training: bool) -> Callable[[], Any]:
    """Return a step of the experts alone, by the kernels and with balanced routing: a forward, in training also the
    backward with random gradients."""
    from mixture_of_experts.ops.triton.forward_backward import run

    torch.manual_seed(0)
    t, options = max(mean_rows * shape.e // shape.k, 1), {"device": device.name, "dtype": torch.bfloat16}
    x = torch.randn(t, shape.d, **options)
    sizes = [(shape.e, shape.d, shape.h)] * 2 + [(shape.e, shape.h, shape.d)]
    w1, w3, w2 = (torch.randn(size, **options).mul_(size[1] ** -0.5).requires_grad_(training) for size in sizes)
    expert = torch.rand(t, shape.e, device=device.name).topk(shape.k).indices
    assignments = assign_experts(expert, torch.full(expert.shape, 1 / shape.k, device=device.name), shape.e)
    call = Call(x.requires_grad_(training), assignments, Network((w1, w3), w2, nn.SiLU(), (None, None)), training)
    leaves, grad = [x, w1, w3, w2], torch.randn_like(x)

    def step() -> Any:
        with torch.set_grad_enabled(training):
            out = run(call)
        return torch.autograd.grad(out, leaves, grad) if training else out

    return step


@contextmanager
def force_schedule(launch: Callable[..., None], entry: Schedule | None = None) -> Iterator[None]:
    """Context manager in which kernels are launched by `launch`, with this entry of the schedule in every call."""
    from mixture_of_experts.ops.triton import operators

    before = operators.get_schedule, operators.launch_kernel
    operators.launch_kernel = launch
    if entry is not None:
        operators.get_schedule = lambda x, mean_rows: entry
    try:
        yield
    finally:
        operators.get_schedule, operators.launch_kernel = before


def record_launches(step: Callable[[], Any], entry: Schedule | None = None) -> list[Launch]:
    """Return the launches of a step, without launching anything."""
    found = []

    def note(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        types = {name: value.dtype if isinstance(value, Tensor) else value for name, value in arguments.items()}
        found.append(Launch(kernel.fn.__module__, kernel.fn.__name__, types))

    with force_schedule(note, entry):
        step()
    return found


def kernel_seconds(
    step: Callable[[], Any], device: Device, entry: Schedule, wanted: tuple[str, ...] | None = None
) -> dict[str, float | str]:
    """Return the seconds of the wanted kernels of a step (all by default) with this entry of the schedule, or the
    reason why a kernel is excluded."""
    from mixture_of_experts.ops.triton import operators

    launch, found = operators.launch_kernel, {}

    def timed(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        name, fault = get_kernel_name(kernel, arguments), None
        if wanted is None or name in wanted:
            print(f"{name} with {getattr(entry, name, 'its only blocks')}", flush=True)  # the log names a fatal launch
            fault = device.exclusion_reason(kernel, grid, arguments)
            if fault is None and not isinstance(found.get(name), str):
                found[name] = (
                    found.get(name, 0.0) + device.time_step(partial(launch, kernel, grid, **arguments)).card.median
                )
            else:
                found[name] = fault or found[name]
        if fault is None:
            launch(kernel, grid, **arguments)

    with force_schedule(timed, entry):
        step()
    return found


def get_kernel_name(kernel: Any, arguments: dict[str, Any]) -> str:
    """Return the name of the kernel's blocks in the schedule, or its own name if it has none."""
    name = kernel.fn.__name__
    return name if name != "grouped_matmul_kernel" else "up" if arguments["token"] is not None else "down"


# ---- compiling ----


def fake_compiler_target(capability: tuple[int, int]) -> Any:
    """Return a replacement for Triton's driver of a card, with which programs can be compiled but not launched."""
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    asked = {"get_current_device": lambda: 0, "get_current_stream": lambda _: 0, "get_current_target": lambda: target}
    return SimpleNamespace(**asked)


def compile_one(launch: Launch, capability: tuple[int, int]) -> str | None:
    """Compile the program of a launch into Triton's cache, without a card. Return the reason if that fails."""
    from triton.runtime import driver
    from triton.runtime.jit import MockTensor

    driver.set_active(fake_compiler_target(capability))
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    types = {name: MockTensor(v) if isinstance(v, torch.dtype) else v for name, v in launch.arguments.items()}
    try:
        kernel.warmup(grid=(1,), enable_fp_fusion=True, **types)
    except Exception as reason:  # compilers may raise anything
        return f"{launch.kernel}: {describe_exception(reason)}"
    return None


def compile_all(launches: list[Launch], capability: tuple[int, int]) -> list[str]:
    """Compile programs in as many processes as there are cores, and return why some cannot be compiled."""
    distinct = list({str(launch): launch for launch in launches}.values())
    workers = min(os.cpu_count() or 1, len(distinct), 32)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = []
        for launch, reason in zip(distinct, pool.map(compile_one, distinct, itertools.repeat(capability)), strict=True):
            print(f"compiled {launch.kernel}", flush=True)
            found += [reason] if reason else []
        return found
