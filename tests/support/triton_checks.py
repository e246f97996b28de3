"""Checks that run in the process of Triton's interpreter: the kernels compared with a plain network in float64.

Axes: t tokens, k choices, r rows, e experts, d model dim, h hidden dim, o output dim.
"""

from __future__ import annotations

import itertools
import math
import mmap
import warnings
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mixture_of_experts import (
    GatedExperts,
    HeirarchicalMoE,
    MoE,
    Top2Gating,
    TopKGating,
    ops,
)
from mixture_of_experts.dispatch import queues
from mixture_of_experts.dispatch.assignments import count_queue_rows, join_groups
from mixture_of_experts.dispatch.permutation import Permutation, permute_to_slots, permute_without_gaps
from mixture_of_experts.gating import Choices, recomputing, top2_by_kernel, topk_by_kernel
from mixture_of_experts.gating.levels import dispatch_to_inner_gate, join_levels
from mixture_of_experts.gating.logits import RouterLogits
from mixture_of_experts.kernels import check_process, launching, queueing, top_2, top_k
from mixture_of_experts.kernels import ffn as kernels
from mixture_of_experts.ops import autograd
from mixture_of_experts.ops.activations import ClampedSwiGLU
from mixture_of_experts.ops.network import Network
from mixture_of_experts.ops.triton import operators, schedule, self_check
from mixture_of_experts.ops.triton.forward_backward import make_operands, triton_backward, triton_forward
from mixture_of_experts.ops.triton.network_spec import NetworkSpec
from mixture_of_experts.ops.triton.row_permutation import (
    permute_by_kernel,
    queued_choices,
    triton_permute,
    triton_permute_few,
)
from mixture_of_experts.ops.triton.schedule import BlockSizes, WeightBlockSizes
from support import isolation
from support.checks_in_this_process import run_here
from support.triton_memory import watch_memory

autograd.select_tables_to_save = Permutation.tensors_to_save  # tensors are on a CPU, and are saved as on a GPU
compute = partial(autograd.run_differentiable, triton_forward, triton_backward)

#: of clamped ones with a limit that many pre-activations pass
run_in_process, check_process.run_in_process = check_process.run_in_process, run_here
ACTIVATIONS = self_check.KERNEL_ACTIVATIONS | {"clamped": lambda: ClampedSwiGLU(1.702, 1.0)}
#: relative norms of the errors; the interpreter truncates to bfloat16 where hardware rounds
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 3e-2}


@torch.no_grad()
def build_permutation(routing: str, t: int, d: int, e: int, k: int) -> Permutation:
    """Return rows without gaps for the choices of a gate. Some experts have no rows, and one has many.

    With "zeros", some choices that occupy a row have weight 0, so that the row is unused.
    """
    x = torch.randn(1, t, d)
    routing, _, zeros = routing.partition(", ")
    if routing == "two levels":
        outer = Top2Gating(d, 2, capacity_factor_train=None)(x)
        slots = permute_to_slots(join_groups(outer, in_slots=True))
        factor = 1.0 if zeros else None
        inner_gate = TopKGating(d, e // 2, 2, outer_expert_dims=(2,), capacity_factor_train=factor)
        inner_gate.w_gating.data *= 300 if zeros else 1
        grouped = torch.cat([x[0], x.new_zeros(1, d)])[slots.token].view(2, 1, -1, d)
        mask = (slots.token < t).view(2, 1, -1)
        return add_unused_rows(
            permute_without_gaps(join_levels(outer, slots, inner_gate(grouped, mask=mask))), bool(zeros)
        )
    gate = TopKGating(d, e, k, capacity_factor_train=1.0 if routing == "capacity" else None, priority="token")
    gate.w_gating.data *= 5
    mask = torch.rand(1, t) < 0.8 if routing == "masked" else None
    return permute_without_gaps(join_groups(gate(x, mask=mask)))


def add_unused_rows(permutation: Permutation, wanted: bool) -> Permutation:
    assert permutation.rows_per_expert is not None
    empty = permutation.assignment[: int(permutation.rows_per_expert.sum())] == permutation.weight.shape[0]
    assert bool(empty.any()) == wanted
    return permutation


def make_network(
    layout: str, activation: str, e: int, d: int, h: int, o: int, *, bias: bool = False, transposed: bool = False
) -> Network:
    """Return a network of unit scale, whose outputs are about as large as its inputs. `transposed` weights are stored
    as `(e, h, d)` and `(e, o, h)`."""

    def draw(p: int, q: int) -> Tensor:
        weight = torch.randn(e, q, p).mT if transposed else torch.randn(e, p, q)
        return weight / math.sqrt(p)

    halves = layout if layout in ("concatenated", "interleaved") else None
    width, number = h if halves is None else 2 * h, 2 if layout == "gated" else 1
    b_in = tuple(torch.randn(e, width) if bias else None for _ in range(number))
    w_in = tuple(draw(d, width) for _ in range(number))
    return Network(w_in, draw(h, o), ACTIVATIONS[activation](), b_in, torch.randn(e, o) if bias else None, halves)


def compute_reference(x: Tensor, where: Permutation, network: Network) -> Tensor:
    """Compute the network one expert at a time."""
    assert where.rows_per_expert is not None
    out, start = x.new_zeros(x.shape[0], network.w_out.shape[-1]), 0
    for expert, count in enumerate(where.rows_per_expert.tolist()):
        rows = torch.arange(start, start + count)
        rows, start = rows[where.token[rows] < x.shape[0]], start + count  # some may be nobody's
        its = network.map(lambda tensor, expert=expert: tensor[expert])
        tokens = x[where.token[rows]]
        pre = [tokens @ w + (0 if b is None else b) for w, b in zip(its.w_in, its.b_in, strict=True)]
        y = network.hidden(pre) @ its.w_out + (0 if its.b_out is None else its.b_out)
        out = out.index_add(0, where.token[rows], y * where.weight[where.assignment[rows]].unsqueeze(-1))
    return out


def relative_error(value: Tensor, wanted: Tensor) -> float:
    """Return the norm of the error divided by the norm of the wanted values; no error is 0 even if these are zeros."""
    error = (value.double() - wanted).norm()
    return float(error / wanted.norm()) if error else 0.0


def check_values(
    layout: str,
    activation: str,
    *,
    routing: str = "top k",
    sizes: tuple[int, int, int, int, int, int] = (37, 20, 28, 24, 6, 2),
    bias: bool = False,
    transposed: bool = False,
    dtype: torch.dtype = torch.float32,
    kind: str | None = None,
) -> None:
    """Compare outputs and all gradients. `sizes` are t, d, h, o, e, k; `kind` selects entries of a card's schedule."""
    torch.manual_seed(0)
    t, d, h, o, e, k = sizes
    where = build_permutation(routing, t, d, e, k)
    network = make_network(layout, activation, e, d, h, o, bias=bias, transposed=transposed)
    x, grad, network = torch.randn(t, d).to(dtype), torch.randn(t, o).to(dtype), network.map(lambda w: w.to(dtype))
    with pytest.MonkeyPatch.context() as patch:
        if kind is not None:
            entries = schedule.HALF_SCHEDULES[9, 0] if kind == "half" else schedule.FLOAT32_SCHEDULES[kind]
            patch.setattr(schedule, "INTERPRETER_SCHEDULES", entries)
        found = compute_with_gradients(compute, x, where, network, grad)
    double = where._replace(weight=where.weight.double())
    wanted = compute_with_gradients(
        compute_reference, x.double(), double, network.map(torch.Tensor.double), grad.double()
    )
    for name in wanted:
        assert relative_error(found[name], wanted[name]) < TOLERANCE[dtype], (
            name,
            relative_error(found[name], wanted[name]),
        )


def compute_with_gradients(
    function: Any, x: Tensor, where: Permutation, network: Network, grad: Tensor
) -> dict[str, Tensor]:
    """Return the output and all gradients by name."""
    x, weight = x.detach().requires_grad_(), where.weight.detach().requires_grad_()
    network = network.map(lambda w: w.detach().requires_grad_())
    out = function(x, where._replace(weight=weight), network)
    gradients = torch.autograd.grad(out, [x, weight, *network.tensors().values()], grad)
    return {"out": out, **{f"gradient {i}": gradient for i, gradient in enumerate(gradients)}}


def check_tiles(e: int, height: int) -> None:
    """Check the table of tiles for counts with empty and overfull experts."""
    torch.manual_seed(e)
    counts = torch.randint(0, 3 * height, (e,)) * (torch.rand(e) < 0.6)
    rows = int(counts.sum()) + 5
    with watch_memory(operators):
        tiles = operators.launch_find_tiles(counts, rows, height)
    wanted, start = [], 0
    for expert, count in enumerate(counts.tolist()):
        wanted += [(expert, start + i, min(start + i + height, start + count)) for i in range(0, count, height)]
        start += count
    more = len(tiles.table) - len(wanted)
    assert more >= 0
    assert list(map(tuple, tiles.table.tolist())) == wanted + [(-1, 0, 0)] * more
    assert tiles.expert_ends.tolist() == counts.cumsum(0).tolist()


def check_first_hour() -> None:
    """The pieces of the first hour that run kernels, on a CPU in place of a GPU."""
    from benchmarks import blocks, decisions, gpu_device, gpu_shapes, gpu_tasks
    from support import cpu_device

    device, entries = cpu_device.CPUDevice(), schedule.INTERPRETER_SCHEDULES
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (self_check, "MIN_ROWS", 48),
            (self_check, "MIN_DIM", 16),
            (self_check, "TILES_PER_PROGRAM", 1),
            (operators, "TILES_PER_PROGRAM", 1),
            (gpu_tasks, "DTYPES", (torch.bfloat16,)),
            (gpu_tasks, "MEANS", (4, 8)),
            (gpu_tasks, "ASSIGNMENTS", (8,)),
            (gpu_device, "ROUNDS", 1),
            (gpu_device, "WARMUP", 1),
        ):
            patch.setattr(module, name, value)
        patch.setattr(device, "shapes", lambda: [gpu_shapes.Shape(n, 40, 16, 16, 2, 1) for n in gpu_shapes.MAIN_SHAPES])
        found = cpu_device.run_tasks(gpu_tasks.check_kernels(device, gpu_tasks.default_kinds))
        assert found == {"programs": [], **{name: "right" for name in found if name != "programs"}}
        assert len(found) == 1 + 2 * len(entries)  # training and decoding of one choice
        assert len(list(gpu_tasks.all_kinds("interleaved", device))) == 3 * 2  # activations, sizes

        half = entries[1].down._replace(n=32)
        patch.setattr(
            blocks,
            "list_candidates",
            lambda kernel, entry, *_: [getattr(entry, kernel), half][: 1 + (kernel == "down")],
        )
        patch.setattr(
            device, "exclusion_reason", lambda kernel, grid, arguments: "no" if arguments.get("BLOCK_N") == 64 else None
        )
        found = {f"kernels/{i}": cpu_device.run_tasks(gpu_tasks.kernels(device, i)) for i in (0, 1)}
        profile = "\n".join(found["kernels/0"]["each kernel of a training step"])
        assert all(f"{name} " in profile for name in ("find_tiles_kernel", "sum_rows_kernel", "rank_rows_kernel"))
        few, many = (found["kernels/0"][f"{rows} rows, tiles of 32"] for rows in (8, 20))
        assert set(few) == {"up", "down"}  # the forward alone, where low tiles decode
        assert set(many) == set(blocks.KERNELS)
        assert [time for _, time in many["up"]] == ["no"]
        assert [type(time) for _, time in many["down"]] == [str, float]
        described = "\n".join(decisions.lines(found, [], entries))
        assert "- tiles of 32, down: (32, 16, 1, 1) ÷ (64, 16, 1, 1): the latter do not run" in described
        assert "down=BlockSizes(n=32, c=16, warps=1, stages=1)" in described

        found = cpu_device.run_tasks(gpu_tasks.small_kernels(device))
        assert all(pair["kernels"] > 0 and pair["host of operators"] > 0 for pair in found.values()), found
        wanted = {"top_k.py", "top_2.py", "rank_rows_kernel", "find_rows_kernel", "queueing.py"}
        assert {name.split(":")[0] for name in found} == wanted


#: kernels that multiply: the operand on the left, by the blocks of which they step along their sums
LEFT_OPERANDS = {"grouped_matmul_kernel": "x", "hidden_grads": "grad", "row_grads": "grad_pre", "weight_grads": "token"}
KERNELS = [
    "find_rows_kernel",
    "rank_rows_kernel",
    "find_tiles_kernel",
    "sum_rows_kernel",
    "bias_grads_kernel",
    *LEFT_OPERANDS,
]


def inject_fault(fault: str, kernel: str, launch: Any, arguments: dict[str, Any]) -> None:
    """Change what a launch has written."""
    out = next(arguments[key] for key in ("out", "grad_pre", "tiles", "row") if arguments.get(key) is not None)
    if fault == "slightly":
        out.mul_(1.2) if out.is_floating_point() else (out[:, 2] if out.ndim == 2 else out).sub_(1).clamp_(min=0)
        return
    assert kernel in LEFT_OPERANDS
    if kernel == "weight_grads":
        tile = out[0, : arguments["BLOCK_M"], : arguments["BLOCK_N"]]
    else:
        _, start, stop = arguments["tiles"][0].tolist()
        tile = out[start:stop, : arguments["BLOCK_N"] // 2]
    if fault == "a vector":
        tile[1, 8 : 8 + 16 // out.element_size()] *= -1
    elif fault == "a lost tile":
        tile.zero_()
    elif fault == "now and then":
        tile[1, 1] += tile[1, 1].abs() / 100
    else:
        assert fault == "a stale buffer"
        others = [
            value for name, value in arguments.items() if isinstance(value, Tensor) and name != LEFT_OPERANDS[kernel]
        ]
        right, left, c = [value.clone() for value in others], arguments[LEFT_OPERANDS[kernel]], arguments["BLOCK_C"]
        stale = left.clone()
        steps, source = (stale.T, left.T) if left.ndim == 2 else (stale, left)
        steps[c : 2 * c] = source[:c]
        launch(**arguments | {LEFT_OPERANDS[kernel]: stale})
        spoiled = tile.clone()
        for value, saved in zip(others, right, strict=True):
            value.copy_(saved)
        tile.copy_(spoiled)


def check_self_check(layout: str, activation: str, dtype: torch.dtype, choices: int) -> None:
    """Right kernels pass with all entries of the schedule. Each planted fault or error is detected and disables the
    implementation for the process, except for kinds that passed. A lack of memory is a verdict for one kind."""
    form, entries = NetworkSpec(layout, activation, 1.702, 7.0), schedule.INTERPRETER_SCHEDULES
    kind = self_check.CallKind(
        torch.device("cpu"), dtype, form, (True, True), (False, True), (0, 0, 16), choices, False
    )
    launch, times = operators.launch_kernel, [0]

    def judge(entry: int = 0) -> str | None:
        return self_check.check_entries(kind, entries, entries[entry : entry + 1])

    def planted(name: str, fault: str) -> Any:
        def wrong(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
            is_it = kernel.fn.__name__ == name
            times[0] += is_it
            if is_it and fault == "memory":
                raise torch.OutOfMemoryError("no memory")
            if is_it and fault == "raises":
                raise RuntimeError("a compiler gives up")
            launch(kernel, grid, **arguments)
            if is_it and (fault != "now and then" or times[0] == self_check.NUM_REPEATS):
                inject_fault(fault, name, partial(launch, kernel, grid), arguments)

        return wrong

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_check, "MIN_ROWS", 48)
        patch.setattr(self_check, "MIN_DIM", 32)
        for module in (self_check, operators):
            patch.setattr(module, "TILES_PER_PROGRAM", 1)
        patch.setattr(self_check.EXPERTS_SELF_CHECK, "verdicts", {})
        assert judge(0) is None
        assert judge(1) is None
        assert len(self_check.EXPERTS_SELF_CHECK.verdicts) == 2
        check_far_pointers(kind)
        hardware = ("a vector", "a lost tile", "a stale buffer")
        for name, fault in (
            *((name, "slightly") for name in KERNELS),
            *(("row_grads", fault) for fault in ("raises", "now and then")),
            *itertools.product(LEFT_OPERANDS, hardware),
        ):
            patch.setattr(self_check.EXPERTS_SELF_CHECK, "verdicts", {(kind.device, (*kind[1:], entries[1])): None})
            times[0] = 0
            patch.setattr(operators, "launch_kernel", planted(name, fault))
            with pytest.warns(UserWarning, match="disabled in this process"):
                wrong = judge()
            assert wrong is not None, (name, fault)
            described = {"raises": "they raised RuntimeError", "now and then": "between two identical"}
            assert described.get(fault, "differ") in wrong
            patch.setattr(operators, "launch_kernel", launch)
            assert judge(0) == wrong  # nothing is asked again
            assert judge(1) is None  # what was right serves on: a recomputation takes the way of its forward
            self_check.EXPERTS_SELF_CHECK.verdicts.pop((kind.device, (*kind[1:], entries[1])))
            assert judge(1) == wrong
        patch.setattr(self_check.EXPERTS_SELF_CHECK, "verdicts", {})
        patch.setattr(operators, "launch_kernel", planted("row_grads", "memory"))
        times[0] = 0
        with pytest.warns(UserWarning, match="disabled for calls of one kind.*ops.prepare"):
            assert "not enough memory" in str(judge())
        assert "not enough memory" in str(judge())
        assert times == [1]
        patch.setattr(operators, "launch_kernel", launch)
        assert judge(1) is None
        launching.clear_out_of_memory_verdicts()
        assert judge(0) is None
        for name, seen in (("grouped_matmul_kernel", True), ("row_grads", False)):  # decoding has no backward
            patch.setattr(self_check.EXPERTS_SELF_CHECK, "verdicts", {})
            patch.setattr(operators, "launch_kernel", planted(name, "a vector"))
            with pytest.warns(UserWarning, match="disabled in this process") if seen else nullcontext():
                found = self_check.check_entries(kind._replace(decoding=True), entries, entries[:1])
            assert (found is not None) == seen


def check_far_pointers(kind: self_check.CallKind) -> None:
    """Kernels read weights and write their gradients correctly where int32 cannot index them."""
    entries = schedule.INTERPRETER_SCHEDULES
    near = self_check.make_call(kind, *self_check.find_call_size(entries, entries[1]))
    weights = [copy_to_far_memory(weight) for weight in (*near.network.w_in, near.network.w_out)]
    far = near._replace(network=replace(near.network, w_in=tuple(weights[:-1]), w_out=weights[-1]))
    found = self_check.compute_by_kernels(far, kind)
    assert all(torch.equal(value, found[name]) for name, value in self_check.compute_by_kernels(near, kind).items())
    given = make_operands(near.x, permute_by_kernel(near.assignments), near.network)
    tiles = operators.launch_find_tiles(given.counts, given.token.shape[0], entries[1].rows)
    grads = [torch.zeros_like(weight) for weight in given.w_in]
    y = [torch.randn(given.token.shape[0], grad.shape[-1]).to(grad.dtype) for grad in grads]
    outs = grads, list(map(copy_to_far_memory, grads))
    for out in outs:
        operators.launch_weight_grads(entries[1].weight_grads, tiles, given.token, given.x, y, out, of_inputs=True)
    assert all(torch.equal(one, other) for one, other in zip(*outs, strict=True))


def count_tiles(kind: self_check.CallKind, rows: int, experts: int, height: int) -> int:
    """Count the tiles that a generated call needs, without its weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_check, "MIN_DIM", 16)
        call = self_check.make_call(kind._replace(spec=NetworkSpec("plain", "silu")), rows, experts)
    counts = call.assignments.expert[call.assignments.kept].bincount(minlength=experts)
    return int((-(-counts // height)).sum())


FAR_OUTPUTS = {"grouped_matmul_kernel": "out", "hidden_grads": "grad_pre", "row_grads": "out", "weight_grads": "out"}


def check_far_self_check(layout: str) -> None:
    """Faults planted beyond a number of elements are detected by the far check only."""
    bound, entries = 1 << 13, schedule.INTERPRETER_SCHEDULES
    near = self_check.CallKind(
        torch.device("cpu"),
        torch.float32,
        NetworkSpec(layout, "silu"),
        (True, True),
        (False, True),
        (0, 0, 16),
        2,
        False,
    )
    launch, lost = operators.launch_kernel, [0]

    def forget_far_elements(names: Collection[str], kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        launch(kernel, grid, **arguments)
        if (name := kernel.fn.__name__) in names and (output := arguments[FAR_OUTPUTS[name]]) is not None:
            elements = output.untyped_storage().nbytes() // output.itemsize
            far = output.detach().as_strided((elements,), (1,), 0)[bound:]
            lost[0] += len(far)
            far.zero_()

    def judge(kind: self_check.CallKind, *names: str) -> str | None:
        lost[0] = 0
        patch.setattr(operators, "launch_kernel", partial(forget_far_elements, names))
        return self_check.find_fault(kind, entries, entries[1], torch.backends.cuda.matmul.fp32_precision)

    with pytest.MonkeyPatch.context() as patch:
        for module in (self_check, operators):
            patch.setattr(module, "TILES_PER_PROGRAM", 2)
        for name, value in dict(MIN_ROWS=96, MIN_DIM=32, INT32_ELEMENTS=bound, NUM_REPEATS=1).items():
            patch.setattr(self_check, name, value)
        far = near._replace(far=True)
        assert judge(near, *FAR_OUTPUTS) is None
        assert lost == [0]
        assert judge(far) is None
        assert judge(far._replace(decoding=True)) is None
        for name in FAR_OUTPUTS:
            assert "differs from the batched" in str(judge(far, name)), name
            assert lost[0] > 0


def copy_to_far_memory(tensor: Tensor) -> Tensor:
    """Return a copy of `(e, ., .)` whose last matrix is where int32 cannot index it."""
    between = -(-(1 << 31) // (len(tensor) - 1) // 64) * 64
    memory = make_untouched_rows(between * (len(tensor) - 1) + tensor[0].numel(), tensor.dtype)
    return memory.as_strided(tensor.shape, (between, *tensor.stride()[1:])).copy_(tensor)


def check_lengths_of_the_self_check() -> None:
    """With all entries of all cards, the sums of the self-check have more steps than there are buffers, and several
    programs write the table of tiles. A wrong vector of 16 bytes is detected by the norms of rows, while the norm of
    the whole tensor hides 96 wrong values."""
    tables = [*schedule.HALF_SCHEDULES.values(), *schedule.FLOAT32_SCHEDULES.values()]
    for entries in schedule.HALF_SCHEDULES.values():
        assert all(schedule.find_schedule(entries, mean).rows <= 32 for mean in range(schedule.MAX_LOW_MEAN_ROWS + 1))
    for entries, entry in ((table, entry) for table in tables for entry in table):
        rows, experts = self_check.find_call_size(entries, entry)
        assert schedule.find_schedule(entries, rows // experts) is entry
        assert experts >= 3
        kind = self_check.CallKind(torch.device("cpu"), torch.bfloat16, None, *3 * [(0,) * 3], 2, False)
        assert count_tiles(kind, rows, experts, entry.rows) > schedule.TILES_PER_PROGRAM
        for blocks in entry[2:]:
            length = (
                self_check.MIN_ROWS * self_check.BUSIEST_EXPERT_SHARE
                if isinstance(blocks, WeightBlockSizes)
                else self_check.MIN_DIM
            )
            assert length >= (blocks.stages + 1) * blocks.c, entry
    torch.manual_seed(0)
    wanted = torch.randn(8, self_check.MIN_DIM, self_check.MIN_DIM)
    for dtype, tolerance in self_check.MAX_ROW_ERRORS.items():
        right, lost, turned, nan = (wanted.to(dtype, copy=True) for _ in range(4))
        lost[3, 5, 96 : 96 + 16 // dtype.itemsize] = 0
        turned[3, 5, :96] *= -1
        nan[0, 0, 0] = torch.nan
        errors = [self_check.compute_max_row_error(found, wanted) for found in (right, lost, turned, nan)]
        assert errors[0] < tolerance / 5
        assert errors[1] > 2 * tolerance
        assert relative_error(turned, wanted.double()) < self_check.MAX_ROW_ERRORS[torch.bfloat16] < errors[2]
        assert not errors[3] < tolerance


def check_memory(*args: Any, **options: Any) -> None:
    """Do the same as `check_values`, and check all accesses to memory."""
    with watch_memory(operators):
        check_values(*args, **options)


@triton.jit
def kernel_with_fault(x, out, READ_AT: tl.constexpr, WRITE_AT: tl.constexpr, STEP: tl.constexpr):
    """Copies 16 numbers in two programs, correctly with 0, 0 and 8."""
    line = tl.program_id(0) * STEP + tl.arange(0, 8)
    tl.store(out + line + WRITE_AT, tl.load(x + line + READ_AT))


def check_faults() -> None:
    """Planted faults of memory accesses are detected."""
    x, out, column = torch.randn(16), torch.empty(16), torch.randn(16, 2)[:, 0]

    def launch(x: Tensor, out: Tensor, read_at: int, write_at: int, step: int) -> None:
        operators.launch_kernel(kernel_with_fault, (2,), x=x, out=out, READ_AT=read_at, WRITE_AT=write_at, STEP=step)

    faults = [
        ("x has no such element", (x, out, 1, 0, 8)),
        ("x has no such element", (x, out, -1, 0, 8)),
        ("x has no such element", (column, out, 0, 0, 8)),
        ("out has no such element", (x, out, 0, 1, 8)),
        ("out has no such element", (x, column, 0, 0, 8)),
        ("no tensor of the launch", (x, out, 1 << 20, 0, 8)),
        ("nobody has written what is read of x", (torch.empty(16), out, 0, 0, 8)),
        ("a place of out is written twice", (x, out, 0, 0, 7)),
        ("a place of out is written, and read as one of x", (x, x, 0, 0, 8)),
    ]
    with watch_memory(operators):
        for message, arguments in faults:
            with pytest.raises(Exception, match=message):
                launch(*arguments)
        launch(x, out, 0, 0, 8)
    assert torch.equal(x, out)


@torch.no_grad()
def check_permutation(e: int, groups: int, routing: str) -> None:
    """The kernel's permutation equals that of torch's operators, and rows with weight 0 that occupy a slot have a
    token."""
    torch.manual_seed(e)
    k = min(3, e)
    gate = TopKGating(8, e, k, capacity_factor_train=0.7 if "capacity" in routing else None, priority="choice")
    gate.w_gating.data *= 5
    x = torch.randn(groups, 90, 8)
    decided = gate(x, mask=torch.rand(groups, 90) < 0.7 if "mask" in routing else None)
    if "zeros" in routing:
        unused = torch.rand(decided.weight.shape) < 0.2
        weight = decided.weight.masked_fill(unused, 0)
        expert, weight = decided.expert.view(groups, 90, k), weight.view(groups, 90, k)
        decided = gate.route(gate.read(x), Choices(expert, weight, decided.probs, decided.losses))
    if routing == "dropless, zeros":  # as a gate of one's own may say it
        decided = replace(decided, sent=torch.ones_like(decided.kept))
    assignments = join_groups(decided)
    wanted: Any = permute_without_gaps(assignments)
    a = len(assignments.weight)
    rows = a if assignments.routing is None else min(a, assignments.num_slots)
    with watch_memory(operators):
        found: Any = permute_by_kernel(assignments, max_compared=0)
    assert found.without_tensors() == wanted._replace(num_rows=rows).without_tensors()
    assert torch.equal(found.row, wanted.row.where(wanted.row < a, rows))
    assert torch.equal(found.weight, wanted.weight)
    assert torch.equal(found.rows_per_expert, wanted.rows_per_expert)
    held = ((wanted.assignment == a) & (torch.arange(a) < wanted.rows_per_expert.sum()))[:rows]
    assert bool(held.any()) == (routing == "capacity, zeros")
    for got, want in ((found.assignment, wanted.assignment), (found.token, wanted.token)):
        assert torch.equal(got[~held], want[:rows][~held])
    assert (wanted.weight[found.assignment[held]] == 0).all()
    assert torch.equal(found.token[held], found.assignment[held] // k)

    with watch_memory(operators):
        few: Any = permute_by_kernel(assignments)  # rows of what is kept alone, by expert and in the order of tokens
    kept, expert = decided.kept.flatten().tolist(), decided.expert.flatten().tolist()
    order = sorted((i for i in range(a) if kept[i]), key=expert.__getitem__)
    assert few.without_tensors() == wanted.without_tensors()
    assert few.assignment.tolist() == order + [a] * (a - len(order))
    assert few.token.tolist() == [i // k for i in few.assignment.tolist()]
    assert few.row[order].tolist() == list(range(len(order)))
    assert (few.row == a).equal(~decided.kept.flatten())
    assert few.rows_per_expert.tolist() == [sum(expert[i] == j for i in order) for j in range(e)]


def decide_twice(outer: Top2Gating, inner: Top2Gating, mask: Tensor | None = None) -> tuple[Permutation, Any]:
    """Return the slots of level one, and the assignments of two levels."""
    groups = torch.randn(2, 45, 8)
    decided = outer(groups, mask=mask)
    slots = permute_to_slots(join_groups(decided, in_slots=True))
    return slots, join_levels(decided, slots, inner(**dispatch_to_inner_gate(groups, decided, slots, None, {})))


def check_plan_of_two_levels(limited: bool, mask: bool) -> None:
    """Assignments without a slot at level one have no row, and all rows have a token."""
    torch.manual_seed(0)
    factors = dict(capacity_factor_train=0.7 if limited else None, second_policy_train="all")
    outer, inner = Top2Gating(8, 3, **factors), Top2Gating(8, 5, outer_expert_dims=(3,), **factors)
    slots, assignments = decide_twice(outer, inner, torch.rand(2, 45) < 0.7 if mask else None)
    wanted = permute_without_gaps(assignments)
    rows = min(assignments.max_rows, assignments.num_slots)
    with watch_memory(operators):
        found = permute_by_kernel(assignments, max_compared=0)
    used = int(wanted.rows_per_expert.sum())
    assert 0 < used <= rows
    assert (wanted.row.view(-1, 2)[slots.row == slots.num_rows] == wanted.num_rows).all()
    assert (slots.row == slots.num_rows).any()
    assert torch.equal(found.row, wanted.row.where(assignments.kept, rows))
    assert torch.equal(found.rows_per_expert, wanted.rows_per_expert)
    for got, want in ((found.assignment, wanted.assignment), (found.token, wanted.token)):
        assert torch.equal(got[:used], want[:used])
        assert (got[used:] == want[used:rows]).all()


class Unmasked(Top2Gating):
    """Fills slots that have no token, as a custom gate may."""

    def forward(self, x: Tensor, importance: Any = None, mask: Any = None, length: Any = None, **others: Any) -> Any:
        return super().forward(x)


def check_plan_with_unused_slots() -> None:
    """Rows of unused slots have no token and no weight, and are within the last row."""
    torch.manual_seed(0)
    inner = Unmasked(8, 5, outer_expert_dims=(3,), second_policy_train="all", capacity_factor_train=None)
    for factor in (2.0, 8.0):  # with as many slots of level one as choices, and with more
        outer = Top2Gating(8, 3, second_policy_train="all", capacity_factor_train=factor)
        _, assignments = decide_twice(outer, inner)
        with watch_memory(operators):
            found = permute_by_kernel(assignments, max_compared=0)
        assert (found.assignment == len(assignments.weight)).any()
        if factor == 2:
            wanted = permute_without_gaps(assignments)
            assert torch.equal(found.assignment, wanted.assignment[: found.num_rows])
            assert torch.equal(found.token, wanted.token[: found.num_rows])
            assert torch.equal(found.row, wanted.row.where(assignments.kept, found.num_rows))
        else:
            assert count_queue_rows(assignments.routing).sum() > found.num_rows
            assert int(found.rows_per_expert.sum()) == found.num_rows >= found.row.max()


def check_isolated(name: str) -> None:
    """A token that is not finite does not change the results of other tokens."""
    torch.manual_seed(0)
    for of in ("x", "grad"):
        isolation.check_isolated(isolation.LAYERS[name](), "triton", math.nan, of, tokens=(0, 5, 7))


def check_queues(e: int, k: int, n: int) -> None:
    """The kernels' queues equal those of torch's operators in all orders, also for some of the choices. Choices that do
    not queue have separate memory for their position."""
    torch.manual_seed(e)
    expert, score = torch.randint(e, (2, 3, n * k)), torch.rand(2, 3, n).round(decimals=1)
    expert[1] = expert[1] % 2  # most experts have no queue, and some a long one
    queued, queue_in_line = [], queueing.queue_assignments
    for chosen, priority in itertools.product((None, torch.rand(expert.shape) < 0.6), queues.PRIORITIES):
        with pytest.MonkeyPatch.context() as patch, watch_memory(queueing), ops.use("triton"):
            patch.setattr(queueing, "queue_assignments", lambda *args: queued.append(1) or queue_in_line(*args))
            patch.setattr(queues.QUEUES_SELF_CHECK, "verdicts", {(expert.device, None): None})
            found = queues.queue_up(expert, chosen, e, k, priority, score)
        with ops.use("batched"):
            wanted = queues.queue_up(expert, chosen, e, k, priority, score)
        same = found.position == wanted.position
        assert (same if chosen is None else same | ~chosen).all()
        assert torch.equal(found.length, wanted.length)
        assert found.position.dtype == found.length.dtype == torch.int64
        assert found.length.untyped_storage().nbytes() == found.length.nbytes  # no larger table stays alive
        if priority == "token" and chosen is None:
            with ops.use("triton"):
                alone = queues.queue_up(expert[0, 0], None, e, k, priority)  # of a call, which has no groups
                turned = queues.queue_up(expert[1].T.contiguous().T, None, e, k, priority)  # stored token by token
            for got, group in ((alone, (0, 0)), (turned, 1)):
                assert torch.equal(got.position, wanted.position[group])
                assert torch.equal(got.length, wanted.length[group])
    assert len(queued) == 6
    assert not queues._kernels_support(expert, queues.MAX_KERNEL_EXPERTS + 1)


TOPK_GATES = {
    "softmax": dict(k=3),
    "sigmoid, biased": dict(k=4, score="sigmoid", expert_bias=True, scale=2.5, eps=1e-3, bias=True),
    "of the chosen": dict(k=2, weigh="softmax", normalize=False, balance_over="batch"),
    "of the unlikely": dict(k=2, weigh="softmax", expert_bias=True),
    "one": dict(k=1, capacity_factor_eval=1.0, min_expert_capacity=1),
    "module": dict(k=2, normalize=False, logits="module"),
}


@torch.no_grad()
def check_topk_kernel(name: str, e: int, dtype: torch.dtype) -> None:
    """The kernel of gates decides the same as torch's operators: choices, weights, losses, ties and NaN."""
    torch.manual_seed(e)
    options = dict(TOPK_GATES[name])
    options |= dict(logits=RouterLogits(8, e, norm_eps=1e-6)) if "logits" in options else {}
    options["k"] = min(options["k"], e)
    gate = TopKGating(8, e, **options).to(dtype).eval()
    if gate.expert_bias is not None:
        gate.expert_bias.normal_(std=0.1)
    if name == "of the unlikely":  # the bias chooses experts whose scores round to 0
        gate.w_gating.mul_(100)
        gate.expert_bias.mul_(100)
    calls, choose = [], top_k.launch_kernel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk_by_kernel.SELF_CHECK, "verdicts", {})
        assert topk_by_kernel._self_check_failure(gate, torch.zeros(1, 1, 8, dtype=dtype)) is None
        patch.setattr(top_k, "launch_kernel", lambda *args, **kwargs: calls.append(args) or choose(*args, **kwargs))
        for b, n in (
            (1, 1),
            (3, 1),
            (2, topk_by_kernel.MAX_TOKENS),
            (1, 3),
            (1, topk_by_kernel.MAX_TOKENS + 1),
            (0, 1),
        ):
            x = torch.randn(b, n, 8, dtype=dtype)
            for tokens in (x, torch.zeros_like(x), torch.where(torch.rand(b, n, 1) < 0.3, torch.nan, x)):
                calls.clear()
                # NaN is what nobody has written
                with ops.use("triton"), watch_memory(top_k, queueing) if tokens.isfinite().all() else nullcontext():
                    found = gate(tokens)
                assert len(calls) == (n <= topk_by_kernel.MAX_TOKENS and b > 0)
                with ops.use("plain"):
                    wanted = gate(tokens)
                assert len(calls) <= 1
                for field in ("expert", "kept", "sent", "weight", "probs", "balance_loss", "z_loss"):
                    got, want = getattr(found, field), getattr(wanted, field)
                    assert (got.dtype, got.shape) == (want.dtype, want.shape), field
                    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True, msg=field)


def check_two_choices(policy: Any, e: int, dtype: torch.dtype) -> None:
    """The kernels of `Top2Gating` decide the same as torch's operators, with the same derivatives and random
    numbers."""
    torch.manual_seed(e)
    settings = dict(second_policy_train=policy, second_policy_eval="all")
    settings |= dict(capacity_factor_train=None, capacity_factor_eval=None, dtype=dtype)
    gate, other = Top2Gating(8, e, **settings), Top2Gating(8, e, **settings).eval()
    inner = Top2Gating(8, e, outer_expert_dims=3, **settings)
    assert top2_by_kernel._find_fault(Top2Gating, torch.device("cpu"), 0.2, e, policy, True, gate.eps) is None
    for layer, shape in ((gate, (1, 1)), (gate, (2, 45)), (other, (3, 7)), (inner, (3, 2, 9))):
        x, mask = torch.randn(*shape, 8, dtype=dtype), torch.rand(shape) < 0.7
        importance = torch.randint(3, shape).to(dtype) / 2
        mask.view(-1, shape[-1])[0], importance.view(-1, shape[-1])[-1] = False, 0
        lost, both = torch.where(torch.rand(*shape, 1) < 0.3, torch.nan, x), dict(importance=importance, mask=mask)
        for tokens, masks in ((x, {}), (x, both), (torch.zeros_like(x), dict(importance=importance)), (lost, both)):
            with watch_memory(top_2) if tokens is not lost else nullcontext():
                found = compute_choices("triton", layer, tokens, masks, anew=layer is other)
            wanted = compute_choices("plain", layer, tokens, masks)
            for name, want in wanted.items():
                got, is_gradient = found[name], name.startswith("gradient")
                assert (got.dtype, got.shape) == (want.dtype, want.shape), name
                if not is_gradient or tokens is not lost:
                    limit = 1e-5 if got.dtype in (torch.float32, torch.int64, torch.bool) else 1e-2
                    atol = limit * float(want.double().nan_to_num().abs().max().clamp(min=0.1))
                    torch.testing.assert_close(got, want, rtol=limit, atol=atol, equal_nan=True, msg=name)


def compute_choices(
    implementation: Any, gate: Top2Gating, x: Tensor, masks: dict[str, Tensor], anew: bool = False
) -> dict[str, Tensor]:
    """Return the results of a gate, their gradients and second derivatives. With `anew`, the backward recomputes."""
    torch.manual_seed(1)
    launch, calls = top_2.launch_kernel, []
    leaves, names = [x.detach().requires_grad_(), gate.w_gating], ("weight", "probs", "balance_loss", "z_loss")
    with pytest.MonkeyPatch.context() as patch, ops.use(implementation):
        patch.setattr(top2_by_kernel, "_self_check_failure", lambda *_: None)
        patch.setattr(top_2, "launch_kernel", lambda *args, **kwargs: calls.append(args) or launch(*args, **kwargs))
        if anew:  # as of many experts on a GPU
            for name, value in (("_on_gpu", lambda x: True), ("MAX_SAVED_SHARE", 0.0), ("MIN_ROUTER_WEIGHTS", 0)):
                patch.setattr(recomputing, name, value)
        described = gate(leaves[0], **masks)
        total = sum((getattr(described, name) * getattr(described, name).detach().cos()).sum() for name in names)
        plain = torch.autograd.grad(total, leaves, retain_graph=True)
        assert len(calls) == (2 + anew if implementation == "triton" else 0)
        first = torch.autograd.grad(total, leaves, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves, retain_graph=True)
        many = torch.autograd.grad(
            described.weight, leaves, torch.stack(2 * [described.weight.detach().cos()]), is_grads_batched=True
        )
    fields = ("expert", "kept", "sent", "importance", *names)
    results = {name: getattr(described, name) for name in fields} | {"random": torch.rand(3)}
    grads = {f"gradient {i}": gradient for i, gradient in enumerate((*plain, *first, *second, *many))}
    return {name: value.detach() for name, value in (results | grads).items()}


def check_wrong_two_choices(fault: str) -> None:
    """Wrong or failing kernels of `Top2Gating` are disabled for the process, or for one kind if memory is missing."""
    gate, x, launch, calls = Top2Gating(8, 5), torch.randn(2, 9, 8), top_2.launch_kernel, []

    def wrong(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        calls.append(fault)
        if fault in ("raises", "memory"):
            raise RuntimeError("a compiler gives up") if fault == "raises" else torch.OutOfMemoryError("no memory")
        launch(kernel, grid, **arguments)
        if (described := arguments.get(fault)) is not None:
            described.copy_(
                described * 1.01
                if described.is_floating_point()
                else ~described
                if described.dtype == torch.bool
                else (described + 1) % 5
            )

    def decide() -> Any:
        torch.manual_seed(1)
        return gate(x)

    with ops.use("plain"):
        wanted = decide()
    with pytest.MonkeyPatch.context() as patch, ops.use("triton"):
        patch.setattr(top2_by_kernel.SELF_CHECK, "verdicts", {})
        patch.setattr(top_2, "launch_kernel", wrong)
        with pytest.warns(UserWarning, match="Top2Gating are disabled " + ("for" if fault == "memory" else "in")):
            found = decide()
        number, again = len(calls), decide()
        for made in (found, again):
            assert torch.equal(made.expert, wanted.expert)
            assert torch.equal(made.weight, wanted.weight)
        assert len(calls) == number


def check_first_call_in_checkpoint(selective: bool) -> None:
    """A self-check during activation checkpointing launches nothing in this process."""
    save = torch.ops.aten.mm.default

    def policy(_, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator == save else CheckpointPolicy.PREFER_RECOMPUTE

    gate, x = Top2Gating(8, 5, second_policy_train="all"), torch.randn(2, 9, 8, requires_grad=True)
    options = dict(context_fn=partial(create_selective_checkpoint_contexts, policy)) if selective else {}
    (wanted,) = torch.autograd.grad(gate(x).weight.square().sum(), x)
    with pytest.MonkeyPatch.context() as patch, ops.use("triton"):
        patch.setattr(top2_by_kernel.SELF_CHECK, "verdicts", {})
        patch.setattr(check_process, "run_in_process", run_in_process)
        weight = checkpoint(lambda x: gate(x).weight, x, use_reentrant=False, **options)
        assert list(top2_by_kernel.SELF_CHECK.verdicts.values()) == [None]
        (found,) = torch.autograd.grad(weight.square().sum(), x)
        top2_by_kernel.SELF_CHECK.verdicts.clear()
        with disable_saved_tensors_hooks("no hooks"):
            gate(x)
        assert list(top2_by_kernel.SELF_CHECK.verdicts.values()) == [None]
    torch.testing.assert_close(found, wanted)


def check_small_batches(name: str) -> None:
    """A layer in inference on few tokens equals plain operators: masked, with capacity, with two levels."""
    torch.manual_seed(0)
    layer = LAYERS[name]().eval()
    if isinstance(layer, MoE):
        layer.gate.capacity_factor_eval = 1.0 if "capacity" in name else None
    for shape in ((1, 1), (64, 1), (3, 5), (0, 1)):
        x, mask = torch.randn(*shape, 16), torch.rand(shape) < 0.8
        for masked in (None, mask):
            results: dict[Any, Any] = {}
            for implementation in ("triton", "plain"):
                torch.manual_seed(1)
                with ops.use(implementation), torch.no_grad(), warnings.catch_warnings():
                    warnings.filterwarnings("ignore", ".* received one token per sequence in eval")
                    results[implementation] = layer(x, mask=masked)
            torch.testing.assert_close(results["triton"], results["plain"], rtol=1e-4, atol=1e-5)


def misalign(tensor: Tensor) -> Tensor:
    """Return a copy that starts one element after the start of its memory."""
    return tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)


def check_operand_layouts() -> None:
    """Operands or rows that are not aligned, and row weights in bfloat16, have the same results."""
    torch.manual_seed(0)
    where, network = build_permutation("top k", 24, 16, 4, 2), make_network("gated", "silu", 4, 16, 32, 16, bias=True)
    where = where._replace(weight=where.weight.to(torch.bfloat16).float())
    x, grad = torch.randn(24, 16), torch.randn(24, 16)
    wanted = compute_with_gradients(compute, x, where, network, grad)
    narrow = compute_with_gradients(compute, x, where._replace(weight=where.weight.to(torch.bfloat16)), network, grad)
    rows_apart = network.map(lambda w: torch.cat([w, w[..., :3]], dim=-1)[..., : w.shape[-1]])
    for found in (
        compute_with_gradients(compute, misalign(x), where, network.map(misalign), misalign(grad)),
        compute_with_gradients(compute, x, where._replace(weight=misalign(where.weight)), rows_apart, grad),
        narrow,
    ):
        for name, value in found.items():
            assert torch.equal(value, wanted[name].to(value.dtype)), name
    assert narrow["gradient 1"].dtype == torch.bfloat16


def check_empty_inputs() -> None:
    """Without tokens, outputs have no rows, and gradients of weights are zeros."""
    where = permute_by_kernel(join_groups(TopKGating(16, 4, 2)(torch.randn(1, 0, 16))))
    network = make_network("gated", "silu", 4, 16, 16, 16, bias=True)
    found = compute_with_gradients(compute, torch.randn(0, 16), where, network, torch.randn(0, 16))
    assert found.pop("out").shape == (0, 16)
    assert not any(gradient.any() for gradient in found.values())


def check_frozen() -> None:
    """Gradients that are not requested are not computed, and the others do not change."""
    torch.manual_seed(0)
    where = build_permutation("top k", 24, 16, 4, 2)
    tensors = {"x": torch.randn(24, 16), "w_in": torch.randn(4, 16, 16), "w_out": torch.randn(4, 16, 16)}
    grad = torch.randn(24, 16)
    gradients = {}
    for wanted in ("x", "w_in", "w_out", "all"):
        leaves = {name: tensor.clone().requires_grad_(wanted in (name, "all")) for name, tensor in tensors.items()}
        network = Network((leaves["w_in"],), leaves["w_out"], nn.SiLU())
        compute(leaves["x"], where, network).backward(grad)
        gradients[wanted] = {name: leaf.grad for name, leaf in leaves.items()}
    for name in tensors:
        assert torch.equal(gradients[name][name], gradients["all"][name])
        assert all(gradients[name][other] is None for other in tensors if other != name)


def check_operators() -> None:
    """Run torch's own check of custom operators: schema, fakes, autograd, tracing."""
    torch.manual_seed(0)
    network = make_network("interleaved", "clamped", 4, 16, 16, 16, bias=True)
    x = torch.randn(20, 16)
    arguments = make_operands(x, build_permutation("top k", 20, 16, 4, 2), network).flatten()
    torch.use_deterministic_algorithms(False)  # fresh memory as it comes: NaN is not equal to itself
    _, pre = operators.triton_ffn(*arguments, True)
    torch.library.opcheck(operators.triton_ffn, (*arguments, True))
    torch.library.opcheck(operators.triton_ffn_backward, (x, pre, *arguments, True, True, False))
    assignments = join_groups(TopKGating(16, 4, 2, capacity_factor_train=1.0)(torch.randn(2, 10, 16)))
    torch.library.opcheck(triton_permute, (*queued_choices(assignments), 4, 2, 40))
    torch.library.opcheck(triton_permute_few, (assignments.expert, assignments.kept, 4, 2))
    line = assignments.expert.view(2, 20)
    order = torch.stack([torch.randperm(10), torch.randperm(10)])
    torch.library.opcheck(queueing.queue_assignments, (line, line > 0, order, 4, 2, True))
    options = (3, False, False, True, 2.5, 1e-6, 0.5, 0.25)
    torch.library.opcheck(top_k.choose_top_k, (torch.randn(2, 3, 5), torch.randn(5), *options))
    torch.use_deterministic_algorithms(True)


LAYERS = {
    "top 2, capacity": lambda: MoE(16, 4, 32),
    "top 3, gated, biases": lambda: MoE(
        16, 4, gate=TopKGating(16, 4, 3), experts=GatedExperts(16, 4, 32, bias=True, dim_out=16)
    ),
    "two levels": lambda: HeirarchicalMoE(16, (2, 2), 32, capacity_factor_train=None),
}


def check_layer(name: str) -> None:
    """A layer computed by the kernels equals that of plain operators: outputs, loss, gradients and second
    derivatives."""
    torch.manual_seed(0)
    layer = LAYERS[name]()
    x, mask = torch.randn(2, 11, 16, requires_grad=True), torch.rand(2, 11) < 0.8
    leaves = [x, *layer.parameters()]

    def results(way: Any) -> list[Tensor]:
        torch.manual_seed(1)
        with ops.use(way):
            out, loss = layer(x, mask=mask)
            first = torch.autograd.grad((out.square().sum() + loss), leaves, create_graph=True)
            second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves)
            torch.manual_seed(1)
            out, loss = layer(x, mask=mask)
            return [out, loss, *torch.autograd.grad(out.square().sum() + loss, leaves), *second]

    for got, wanted in zip(results("triton"), results("plain"), strict=True):
        assert relative_error(got, wanted.double()) < 1e-4


def check_compiled() -> None:
    """A layer is one graph without breaks for all lengths, forward and backward."""
    torch.manual_seed(0)
    layer = MoE(16, 4, gate=TopKGating(16, 4, 2), experts=GatedExperts(16, 4, 32))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for length in (12, 17, 30):
        x = torch.randn(2, length, 16, requires_grad=True)
        with ops.use("triton"):
            out, loss = compiled(x)
            found = torch.autograd.grad(out.square().sum() + loss, [x, *layer.parameters()])
        out, loss = layer(x)
        wanted = torch.autograd.grad(out.square().sum() + loss, [x, *layer.parameters()])
        for got, want in zip(found, wanted, strict=True):
            assert relative_error(got, want.double()) < 1e-5
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3


@triton.jit
def select_rows(ends, expert):
    """Replace `kernels.load_row_range`, for an expert whose preceding rows are not computed."""
    return tl.load(ends), tl.load(ends + 1)


def make_untouched_rows(rows: int, dtype: torch.dtype) -> Tensor:
    """Return numbers `(rows, 1)` that use memory only where they are written."""
    no_reserve = 0x4000  # of Linux; Python has its name since 3.13
    memory = mmap.mmap(-1, rows * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(memory, dtype=dtype).view(rows, 1)


def check_last_rows() -> None:
    """No index overflows int32 for the last rows that are supported."""
    torch.manual_seed(0)
    stop, number = operators.MAX_KERNEL_ROWS, 20
    first, d = stop - number, 16
    token, far = make_untouched_rows(stop, torch.int32), make_untouched_rows(stop, torch.float32)
    token[first:, 0], far[first:] = torch.arange(number) % 4, torch.randn(number, 1)
    x, rows, token = torch.randn(4, d), far[first:], token[:, 0]
    gathered, ends = x[token[first:]], torch.tensor([first, stop], dtype=torch.int32)
    tiles = operators.TileTable(torch.tensor([[0, first, stop]], dtype=torch.int32), ends, 128)
    blocks = WeightBlockSizes(16, 16, 64, 1, 1)  # the largest c there is
    assert blocks.c == max(entry.weight_grads.c for entries in schedule.HALF_SCHEDULES.values() for entry in entries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "load_row_range", select_rows)
        for of_inputs, left, right in ((True, x, far), (False, far, x)):
            found = torch.empty(1, left.shape[1], right.shape[1])
            operators.launch_weight_grads(blocks, tiles, token, left, [right], [found], of_inputs=of_inputs)
            wanted = gathered.T @ rows if of_inputs else rows.T @ gathered
            torch.testing.assert_close(found[0], wanted)
        found = torch.empty(1, 1)
        operators.launch_bias_grads(tiles, far, found)
        torch.testing.assert_close(found[0], rows.sum(0))
    weight, out = torch.randn(1, d, 1), make_untouched_rows(stop, torch.float32)
    operators.launch_grouped_matmul(BlockSizes(16, 16, 1, 1), tiles, x, [weight], [], out, token=token)
    torch.testing.assert_close(out[first:], gathered @ weight[0])


def check_devices() -> None:
    """Tensors on two devices are rejected before a launch, as torch's own operators do."""
    network = make_network("plain", "silu", 4, 16, 16, 16)
    network = replace(network, w_out=network.w_out.to("meta"))
    arguments = make_operands(torch.randn(20, 16), build_permutation("top k", 20, 16, 4, 2), network).flatten()
    for operator, given in (
        (operators.triton_ffn, (*arguments, True)),
        (operators.triton_ffn_backward, (torch.randn(20, 16), torch.empty(1, 40, 16), *arguments, *[True] * 3)),
    ):
        with pytest.raises(RuntimeError, match="the same device, got cpu and meta"):
            operator._init_fn(*given)


def check_nan(activation: str) -> None:
    """NaN stays NaN in outputs and gradients exactly where it does in torch."""
    torch.manual_seed(0)
    where, network = build_permutation("top k", 20, 16, 4, 2), make_network("plain", activation, 4, 16, 16, 16)
    x, grad = torch.randn(20, 16), torch.randn(20, 16)
    x[3] = torch.nan
    found, wanted = (
        compute_with_gradients(implementation, x, where, network, grad)
        for implementation in (compute, compute_reference)
    )
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5, equal_nan=True)
