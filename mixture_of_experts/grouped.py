"""Matrix products of experts: the one place where a kernel is chosen.

Axes: e experts, r rows (sorted by expert), s slots of an expert, p inner and q outer dimension of a weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mixture_of_experts.batches import takes_steps
from mixture_of_experts.tracing import largest, smallest


def expert_matmul(x: Tensor, weight: Tensor, counts: Tensor | None = None) -> Tensor:
    """Product of every expert's rows with its own weight.

    Args:
        x: slots `(e, s, p)`, or rows `(r, p)` sorted by expert.
        weight: `(e, p, q)`.
        counts: `(e,)` int64, the rows of each expert; rows past their sum give zeros.

    Returns:
        `(e, s, q)` or `(r, q)`. Operands have one dtype; see `matching`.
    """
    if counts is None:
        return torch.matmul(x, weight)
    if _has_kernel(x, weight):
        return _Grouped.apply(x, weight, counts)
    return _in_blocks(x, weight, counts)


def matching(x: Tensor, *weights: Tensor) -> list[Tensor]:
    """Operands in one dtype: autocast's where it is on (it knows no grouped products), else the weights'."""
    device = x.device.type
    dtype = weights[0].dtype
    if device != "meta" and torch.is_autocast_enabled(device) and torch.float64 not in (x.dtype, dtype):
        dtype = torch.get_autocast_dtype(device)
    return [operand.to(dtype) for operand in (x, *weights)]


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether `_Grouped` can take it; the products in blocks, plain operators, can take anything."""
    if x.is_cuda:
        return x.dtype == torch.bfloat16 and all(size % 8 == 0 for size in weight.shape[-2:])
    return x.device.type == "cpu" and not torch.compiler.is_exporting()


class _Grouped(torch.autograd.Function):
    """Rows times their expert's weight; its gradients are products of the same two kinds."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        return _rows_by_weights(x, weight, counts)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, counts = ctx.saved_tensors
        grad_x = _Grouped.apply(grad, weight.mT, counts) if ctx.needs_input_grad[0] else None
        grad_weight = _Outer.apply(x, grad, counts) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None

    @staticmethod
    def vmap(info, in_dims, x: Tensor, weight: Tensor, counts: Tensor):
        return torch.vmap(_in_blocks, in_dims, randomness=info.randomness)(x, weight, counts), 0


class _Outer(torch.autograd.Function):
    """For every expert `x^T y` over its rows: the gradient of a weight."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
        return _rows_by_rows(x, y, counts)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, y, counts = ctx.saved_tensors
        grad_x = _Grouped.apply(y, grad.mT, counts) if ctx.needs_input_grad[0] else None
        grad_y = _Grouped.apply(x, grad, counts) if ctx.needs_input_grad[1] else None
        return grad_x, grad_y, None

    @staticmethod
    def vmap(info, in_dims, x: Tensor, y: Tensor, counts: Tensor):
        return torch.vmap(_outer_in_blocks, in_dims, randomness=info.randomness)(x, y, counts), 0


def _rows_by_weights(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """`(r, q)`; on CUDA by torch's grouped kernel."""
    if not x.is_cuda:
        return rows_by_weights(x, weight, counts)
    ends = counts.cumsum(0).to(torch.int32)
    out = F.grouped_mm(x.contiguous(), weight, offs=ends)
    return out.masked_fill_(_past(ends[-1], x), 0)


def _rows_by_rows(x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """`(e, p, q)`, zeros for experts without rows."""
    if not x.is_cuda:
        return rows_by_rows(x, y, counts)
    ends = counts.cumsum(0).to(torch.int32)
    return F.grouped_mm(x.mT, y.contiguous(), offs=ends)


def _past(end: Tensor, x: Tensor) -> Tensor:
    """`(r, 1)` bool: rows past the last expert's."""
    return (torch.arange(x.shape[0], device=x.device) >= end).unsqueeze(-1)


@torch.library.custom_op("mixture_of_experts::rows_by_weights", mutates_args=(), device_types="cpu")
def rows_by_weights(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """On the CPU a product for each expert that has rows; an operator of its own, as a compiled graph knows no loop
    over numbers that are in a tensor."""
    return product_by_expert(x, weight, [(expert, count) for expert, count in enumerate(counts.tolist()) if count])


def product_by_expert(x: Tensor, weight: Tensor, used: list[tuple[int, int]]) -> Tensor:
    """`(r, q)`: rows of x, sorted by expert, times their expert's weight; rows past the last expert's are zeros.

    Args:
        used: expert and number of rows, of each that has rows, in ascending order.

    A product of a few rows runs on one thread. So two experts with equally many rows are one batched product, which
    gives each a thread of its own: any two weights of a stack are a slice of it with a step.
    """
    out = x.new_empty(x.shape[0], weight.shape[-1])
    pairs = weight.is_contiguous() or takes_steps(weight)
    start = index = 0
    while index < len(used):
        expert, count = used[index]
        if pairs and index + 1 < len(used) and used[index + 1][1] == count:
            other, stop, shape = used[index + 1][0], start + 2 * count, (2, count, -1)
            matrices = weight[expert : other + 1 : other - expert]
            torch.bmm(x[start:stop].view(shape), matrices, out=out[start:stop].view(shape))
            index += 2
        else:
            stop = start + count
            torch.mm(x[start:stop], weight[expert], out=out[start:stop])
            index += 1
        start = stop
    if start < x.shape[0]:
        out[start:] = 0
    return out


@rows_by_weights.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[-1])


@torch.library.custom_op("mixture_of_experts::rows_by_rows", mutates_args=(), device_types="cpu")
def rows_by_rows(x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """The same for the gradient of the weights."""
    out = x.new_empty(counts.shape[0], x.shape[-1], y.shape[-1])
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            torch.mm(x[start : start + count].mT, y[start : start + count], out=out[expert])
            start += count
        else:
            out[expert] = 0
    return out


@rows_by_rows.register_fake
def _(x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], x.shape[-1], y.shape[-1])


@register_flop_formula([torch.ops.mixture_of_experts.rows_by_weights, torch.ops.mixture_of_experts.rows_by_rows])
def _flops(x: tuple[int, ...], y: tuple[int, ...], *_, **__) -> int:
    """2 r p q, of the shapes of `x (r, p)` and of `weight (..., p, q)` or `y (r, q)`."""
    return 2 * x[0] * x[1] * y[-1]


def _in_blocks(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The same product with plain operators: no host sync, any dtype; compiles, exports and maps.

    Every expert's rows are padded to whole blocks, and a block reads its expert's weight. `r / size + e` blocks are
    enough whatever the counts, so that no shape depends on them.
    """
    rows, experts = x.shape[0], weight.shape[0]
    # about what an expert has: at most about 2 e blocks; never 1, which torch would take for the size of every length
    size = largest(2, rows // experts)
    num_blocks = smallest(rows, rows // size + experts)
    blocks = (counts + size - 1) // size  # (e,) blocks of each expert
    last_block, last_row = blocks.cumsum(0), counts.cumsum(0)
    block = torch.arange(num_blocks, device=x.device)
    expert = _owner(last_block, block)

    # (blocks, size): the row of x in each place, `rows` where there is none
    first = (last_row - counts)[expert] + (block - (last_block - blocks)[expert]) * size
    row = first.unsqueeze(-1) + torch.arange(size, device=x.device)
    inside = (row < last_row[expert].unsqueeze(-1)) & (block < last_block[-1]).unsqueeze(-1)
    row = torch.where(inside, row, rows)
    out = torch.bmm(_take(_with_zero(x), row.flatten()).unflatten(0, (num_blocks, size)), _take(weight, expert))

    places = num_blocks * size
    place = torch.full((rows + 1,), places, device=x.device)
    place = place.scatter(0, row.flatten(), torch.arange(places, device=x.device))[:rows]
    return _take(_with_zero(out.flatten(0, 1)), place)


def _outer_in_blocks(x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """For every expert `x^T y`, by the gradient of the product in blocks."""
    weight = x.new_zeros(counts.shape[0], x.shape[-1], y.shape[-1])
    return torch.func.vjp(lambda weight: _in_blocks(x, weight, counts), weight)[1](y)[0]


def _owner(ends: Tensor, index: Tensor) -> Tensor:
    """Which range holds each index, if range i ends before `ends[i]`; the last one for those past the end.

    By comparisons, not searchsorted, which ONNX does not have.
    """
    return (ends <= index.unsqueeze(-1)).sum(dim=-1).clamp(max=ends.shape[0] - 1)


def _with_zero(rows: Tensor) -> Tensor:
    """One more row, of zeros."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[-1])])


def _take(values: Tensor, index: Tensor) -> Tensor:
    """`values[index]` with a gradient that adds in the same order on every run."""
    return values[index] if values.is_cuda else values.index_select(0, index)


def bias_of_rows(bias: Tensor, counts: Tensor | None, rows: int) -> Tensor:
    """`(e, q)` biases as `(e, 1, q)` for slots or `(r, q)` for rows."""
    if counts is None:
        return bias.unsqueeze(-2)
    return _take(bias, _owner(counts.cumsum(0), torch.arange(rows, device=bias.device)))
