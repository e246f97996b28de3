"""The reference implementation, which uses plain torch operators for dispatch, products, activation and combine.

Axes: t (tokens), r (rows, sorted by expert), e (experts), s (slots per expert), p and q (inner and outer dimensions of
a weight).

The reference implementation supports any device and dtype, compiled and exported graphs, `vmap`, and reverse-mode
derivatives of any order. All other implementations are tested against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mixture_of_experts.dispatch.assignments import Assignments, append
from mixture_of_experts.dispatch.permutation import Permutation, permute_to_slots, permute_without_gaps
from mixture_of_experts.dispatch.rows import combine, dispatch
from mixture_of_experts.ops.network import Call, Network
from mixture_of_experts.support.tracing import symbolic_max, symbolic_min

ProductFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def unsupported_reason(call: Call) -> None:
    """Return None, because this implementation supports all calls."""


def run(call: Call) -> Tensor:
    """Compute the outputs `(t, o)` of a call."""
    return run_permuted(call.x, choose_permutation(call.assignments), call.network)


def choose_permutation(assignments: Assignments) -> Permutation:
    """Permute tokens to rows without gaps if there are always fewer rows than slots, and to slots otherwise."""
    return permute_without_gaps(assignments) if assignments.prefers_rows() else permute_to_slots(assignments)


def run_permuted(
    x: Tensor, permutation: Permutation, network: Network, product: ProductFunction | None = None
) -> Tensor:
    """Compute the outputs `(t, o)` for tokens x `(t, d)` with the given `product` function. The permutation determines
    whether rows or slots are used."""
    rows, num_tokens_per_expert = dispatch(x, permutation), permutation.rows_per_expert
    if num_tokens_per_expert is None:
        experts = math.prod(permutation.expert_dims)
        rows = rows.view(experts, permutation.num_rows // experts, rows.shape[-1])
    out = feed_forward(rows, network, num_tokens_per_expert, product)
    return combine(out.flatten().view(permutation.num_rows, out.shape[-1]), permutation)


def feed_forward(
    x: Tensor, network: Network, num_tokens_per_expert: Tensor | None = None, product: ProductFunction | None = None
) -> Tensor:
    """Map slots `(e, s, d)` to `(e, s, o)`. If `num_tokens_per_expert` `(e,)` is passed, map rows `(r, d)` to `(r, o)`
    instead."""
    product = product or expert_product

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = product(x, weight, num_tokens_per_expert)
        return out if bias is None else out + expand_bias(bias, num_tokens_per_expert, x.shape[-2])

    pre = [linear(x, w, b) for w, b in zip(network.w_in, network.b_in, strict=True)]
    return linear(network.hidden(pre), network.w_out, network.b_out)


def choose_block_sizes(rows: int, experts: int) -> tuple[int, int]:
    """Return the number of rows per block and the number of blocks. A block has about as many rows as the average
    expert, so there are at most about 2 e blocks."""
    size = symbolic_max(2, rows // experts)  # a graph would treat a size of 1 as static
    return size, symbolic_min(rows, rows // size + experts)


def expert_product(x: Tensor, weight: Tensor, num_tokens_per_expert: Tensor | None = None) -> Tensor:
    """Multiply each expert's rows by its weight without a host sync.

    Rows are arranged in blocks of equal size, and each block contains rows of one expert. The maximum number of blocks
    is always used, so no shape depends on the number of rows per expert.

    Args:
        x: slots `(e, s, p)`, or rows `(r, p)` sorted by expert.
        weight: `(e, p, q)`, in the same dtype as `x`.
        num_tokens_per_expert: number of rows for each expert, `(e,)` int64, if `x` contains rows. The result is 0 for
            rows beyond the total count.

    Returns:
        `(e, s, q)` or `(r, q)`.
    """
    if num_tokens_per_expert is None:
        return torch.matmul(x, weight)
    rows, device = x.shape[0], x.device
    size, number = choose_block_sizes(rows, weight.shape[0])
    stop, row = num_tokens_per_expert.cumsum(0), torch.arange(rows, device=device)
    blocks = (num_tokens_per_expert + size - 1) // size  # number of blocks of each expert
    first = stop - num_tokens_per_expert  # first row of each expert, and its position in the blocks
    first_place = (blocks.cumsum(0) - blocks) * size
    places = number * size
    place = torch.where(row < stop[-1], row + (first_place - first)[_find_range(stop, row)], places)
    row_at = torch.full((places + 1,), rows, device=device).scatter(0, place, row)[:places]  # the last entry is unused
    expert = _find_range(blocks.cumsum(0), torch.arange(number, device=device))

    in_blocks = _take_rows(append(x, 0), row_at).unflatten(0, (number, size))
    out = torch.bmm(in_blocks, _take_rows(weight, expert))
    return _take_rows(append(out.flatten(0, 1), 0), place)


def outer_product(x: Tensor, y: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
    """Return `x^T y` for each expert's rows of x `(r, p)` and y `(r, q)`, as `(e, p, q)`. The result is 0 for experts
    without rows."""
    weight = x.new_zeros(num_tokens_per_expert.shape[0], x.shape[-1], y.shape[-1])
    return torch.func.vjp(lambda weight: expert_product(x, weight, num_tokens_per_expert), weight)[1](y)[0]


def compute_gradients(x: Tensor, permutation: Permutation, network: Network, grad: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of x, the assignment weights, and all tensors of the network.

    Unlike the gradients of other implementations, these gradients support vmap and second derivatives.
    """

    def function(x: Tensor, weight: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip(tensors, weights, strict=True))
        return run_permuted(x, permutation._replace(weight=weight), network.with_tensors(named).merged())

    tensors = network.tensors()
    return torch.func.vjp(function, x, permutation.weight, *tensors.values())[1](grad)


def expand_bias(bias: Tensor, num_tokens_per_expert: Tensor | None, rows: int) -> Tensor:
    """Expand biases `(e, q)` so that they can be added to slots or rows. The result has the shape `(e, 1, q)` for slots
    and `(rows, q)` for rows."""
    if num_tokens_per_expert is None:
        return bias.unsqueeze(-2)
    return _take_rows(bias, _find_range(num_tokens_per_expert.cumsum(0), torch.arange(rows, device=bias.device)))


def _find_range(ends: Tensor, index: Tensor) -> Tensor:
    """Return the range that contains each index. Range i ends before `ends[i]`. If no range contains an index, return
    the last range.

    Ranges are found by comparison because ONNX has no searchsorted.
    """
    return (ends <= index.unsqueeze(-1)).sum(dim=-1).clamp(max=ends.shape[0] - 1)


def _take_rows(values: Tensor, index: Tensor) -> Tensor:
    """Return `values[index]`, with a gradient that is summed in a deterministic order."""
    return values[index] if values.is_cuda else values.index_select(0, index)
