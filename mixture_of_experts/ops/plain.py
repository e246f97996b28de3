"""The definition: dispatch, products, activation and combine in plain torch operators.

Axes: t tokens, r rows (sorted by expert), e experts, s slots of an expert, p inner and q outer dimension of a weight.

It runs on any device and in any dtype, compiles, exports, maps (`vmap`) and differentiates, in reverse mode, as often
as one likes. Every other way is compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mixture_of_experts.decision import Decision
from mixture_of_experts.dispatch import combine, dispatch
from mixture_of_experts.ops.call import Call
from mixture_of_experts.ops.network import Network
from mixture_of_experts.plan import Plan, append
from mixture_of_experts.tracing import largest, smallest

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def why_not(call: Call) -> None:
    """It takes every call."""


def run(call: Call) -> Tensor:
    """Tokens `(t, d)` to `(t, o)`."""
    return compute(call.x, plan_of(call.decision), call.network)


def plan_of(decision: Decision) -> Plan:
    """Rows without gaps where they are sure to be fewer than slots, else slots."""
    return decision.without_gaps() if decision.prefers_rows() else decision.in_slots()


def compute(x: Tensor, plan: Plan, network: Network, product: Product | None = None) -> Tensor:
    """Tokens `(t, d)` to `(t, o)`, in rows without gaps or in slots as the plan has it."""
    rows, num_tokens_per_expert = dispatch(x, plan), plan.rows_per_expert
    if num_tokens_per_expert is None:
        experts = math.prod(plan.num_experts)
        rows = rows.view(experts, plan.num_rows // experts, rows.shape[-1])
    out = feed_forward(rows, network, num_tokens_per_expert, product)
    return combine(out.flatten().view(plan.num_rows, out.shape[-1]), plan)


def feed_forward(
    x: Tensor, network: Network, num_tokens_per_expert: Tensor | None = None, product: Product | None = None
) -> Tensor:
    """Slots `(e, s, d)` to `(e, s, o)`; with num_tokens_per_expert `(e,)` rows `(r, d)` to `(r, o)`."""
    product = product or expert_product

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = product(x, weight, num_tokens_per_expert)
        return out if bias is None else out + bias_of_rows(bias, num_tokens_per_expert, x.shape[-2])

    pre = [linear(x, w, b) for w, b in zip(network.w_in, network.b_in, strict=True)]
    return linear(network.hidden(pre), network.w_out, network.b_out)


class RowBlocks(NamedTuple):
    """Rows without gaps in blocks of equal size, each of one expert: as many as experts of any load can need.

    Attributes:
        expert: `(blocks,)` the expert of each block.
        row: `(blocks, size)` the row in each place, r where there is none.
        place: `(r,)` the place of each row, `blocks * size` for rows past the last expert's.
    """

    expert: Tensor
    row: Tensor
    place: Tensor


def block_sizes(rows: int, experts: int) -> tuple[int, int]:
    """Rows of a block, about what an expert has, and how many blocks there can be: at most about 2 e."""
    size = largest(2, rows // experts)  # never 1, which torch would take for the size of every length
    return size, smallest(rows, rows // size + experts)


def in_blocks(num_tokens_per_expert: Tensor, rows: int) -> RowBlocks:
    """How `rows` rows lie in blocks.

    By comparisons and gathers: without a host sync no shape may depend on how many tokens an expert has.
    """
    size, num_blocks = block_sizes(rows, num_tokens_per_expert.shape[0])
    blocks = (num_tokens_per_expert + size - 1) // size  # (e,) blocks of each expert
    last_block, last_row = blocks.cumsum(0), num_tokens_per_expert.cumsum(0)
    block = torch.arange(num_blocks, device=num_tokens_per_expert.device)
    expert = _owner(last_block, block)

    first = (last_row - num_tokens_per_expert)[expert] + (block - (last_block - blocks)[expert]) * size
    row = first.unsqueeze(-1) + torch.arange(size, device=num_tokens_per_expert.device)
    inside = (row < last_row[expert].unsqueeze(-1)) & (block < last_block[-1]).unsqueeze(-1)
    row = torch.where(inside, row, rows)

    places = num_blocks * size
    place = torch.full((rows + 1,), places, device=num_tokens_per_expert.device)
    place = place.scatter(0, row.flatten(), torch.arange(places, device=num_tokens_per_expert.device))[:rows]
    return RowBlocks(expert, row, place)


def expert_product(x: Tensor, weight: Tensor, num_tokens_per_expert: Tensor | None = None) -> Tensor:
    """Product of every expert's rows with its own weight, without a host sync: rows go in blocks.

    Args:
        x: slots `(e, s, p)`, or rows `(r, p)` sorted by expert.
        weight: `(e, p, q)`, of the same dtype.
        num_tokens_per_expert: `(e,)` int64, the rows of each expert, when x is rows; rows past their sum give zeros.

    Returns:
        `(e, s, q)` or `(r, q)`.
    """
    if num_tokens_per_expert is None:
        return torch.matmul(x, weight)
    blocks = in_blocks(num_tokens_per_expert, x.shape[0])
    rows = _take(append(x, 0), blocks.row.flatten()).unflatten(0, blocks.row.shape)
    out = torch.bmm(rows, _take(weight, blocks.expert))
    return _take(append(out.flatten(0, 1), 0), blocks.place)


def outer_product(x: Tensor, y: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
    """For every expert `x^T y` over its rows `(r, p)` and `(r, q)`, zeros where it has none: `(e, p, q)`."""
    weight = x.new_zeros(num_tokens_per_expert.shape[0], x.shape[-1], y.shape[-1])
    return torch.func.vjp(lambda weight: expert_product(x, weight, num_tokens_per_expert), weight)[1](y)[0]


def gradients(x: Tensor, plan: Plan, network: Network, grad: Tensor) -> tuple[Tensor, ...]:
    """Gradients of x, of the assignments' weights and of all weights, by operators that can be differentiated again
    and mapped: of ways whose own gradients cannot."""

    def function(x: Tensor, weight: Tensor, *weights: Tensor) -> Tensor:
        return compute(x, plan._replace(weight=weight), network.with_tensors(dict(zip(tensors, weights, strict=True))))

    tensors = network.tensors()
    return torch.func.vjp(function, x, plan.weight, *tensors.values())[1](grad)


def bias_of_rows(bias: Tensor, num_tokens_per_expert: Tensor | None, rows: int) -> Tensor:
    """Biases `(e, q)` as `(e, 1, q)` for slots, or as `(r, q)` for `rows` rows."""
    if num_tokens_per_expert is None:
        return bias.unsqueeze(-2)
    return _take(bias, _owner(num_tokens_per_expert.cumsum(0), torch.arange(rows, device=bias.device)))


def _owner(ends: Tensor, index: Tensor) -> Tensor:
    """Which range holds each index, if range i ends before `ends[i]`; the last one for those past the end.

    By comparisons, not searchsorted, which ONNX does not have.
    """
    return (ends <= index.unsqueeze(-1)).sum(dim=-1).clamp(max=ends.shape[0] - 1)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """`values[index]` with a gradient that adds in the same order on every run."""
    return values[index] if values.is_cuda else values.index_select(0, index)
