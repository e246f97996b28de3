"""`dispatch` moves tokens to rows, and `combine` sums the results. Both functions are used for level two, custom
experts and `ops.plain`.

Axes: t (tokens per call), k (choices), a (assignments, t k for token choice), r (rows), d (model dimension).

The forward and backward passes of both functions gather rows at the indices of a `Permutation`. No two writes overlap,
so the results are deterministic. The other implementations in `ops` gather and combine rows themselves
(`ops/row_network.py`).
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from mixture_of_experts.dispatch.assignments import append
from mixture_of_experts.dispatch.permutation import Permutation


def dispatch(x: Tensor, permutation: Permutation) -> Tensor:
    """Move tokens `(t, d)` to rows `(r, d)`. Empty rows are filled with zeros."""
    return _Dispatch.apply(x, permutation.token, permutation.row, permutation.k)


def combine(rows: Tensor, permutation: Permutation) -> Tensor:
    """Compute the weighted sum `(t, d)` of each token's rows `(r, d)` in float32, and return it in the dtype of the
    rows."""
    # with one choice per token, both are the same tensor, and a graph does not accept a tensor twice
    assignment = None if permutation.token is permutation.assignment else permutation.assignment
    return _Combine.apply(
        rows, permutation.weight, permutation.token, permutation.row, assignment, permutation.k, permutation.num_tokens
    )


class _Dispatch(torch.autograd.Function):
    """Gathers tokens into rows. The gradient of a token is the sum of its rows' gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, token: Tensor, row: Tensor, k: int | None) -> Tensor:
        return read_rows(x, token)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, token, row, ctx.k = inputs
        ctx.num_tokens = x.shape[0]
        ctx.save_for_backward(token, row)

    @staticmethod
    def backward(ctx, grad: Tensor):
        token, row = ctx.saved_tensors
        return _Combine.apply(grad, None, token, row, None, ctx.k, ctx.num_tokens), None, None, None


class _Combine(torch.autograd.Function):
    """Sums each token's rows, multiplied by `weight` unless it is None. If `assignment` is None, `token` is used
    instead."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: Tensor,
        weight: Tensor | None,
        token: Tensor,
        row: Tensor,
        assignment: Tensor | None,
        k: int | None,
        num_tokens: int,
    ) -> Tensor:
        if k is None and weight is not None:
            weight = append(weight, 0)[token if assignment is None else assignment]
        return sum_rows(rows, weight, token, row, k, num_tokens)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        rows, weight, token, row, assignment, ctx.k, _ = inputs
        ctx.save_for_backward(None if weight is None else rows, weight, token, row, assignment)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, weight, token, row, assignment = ctx.saved_tensors
        spread = _Dispatch.apply(grad, token, row, ctx.k)  # shape (r, d); empty rows contain zeros
        if weight is None:
            return spread, None, None, None, None, None, None
        assignment = token if assignment is None else assignment
        spread = spread.to(promote_with_float32(rows.dtype, weight.dtype))
        empty = (assignment == weight.shape[0]).unsqueeze(-1)
        grad_row_weight = (spread * rows.masked_fill(empty, 0)).sum(dim=-1).to(weight.dtype)
        grad_rows = (spread * append(weight, 0)[assignment].unsqueeze(-1)).to(rows.dtype)
        return grad_rows, append(grad_row_weight, 0)[row], None, None, None, None, None


def promote_with_float32(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype to which the given dtypes and float32 are promoted."""
    return reduce(torch.promote_types, dtypes, torch.float32)


def read_rows(x: Tensor, index: Tensor) -> Tensor:
    """Return the rows of `x` at `index`. The index `len(x)` means "none" and yields zeros."""
    length = x.shape[0]
    if length == 0:
        return x.new_zeros(index.shape[0], *x.shape[1:])
    rows = x.index_select(0, index.clamp(max=length - 1))
    return rows.masked_fill((index == length).unsqueeze(-1), 0)


def sum_rows(rows: Tensor, weight: Tensor | None, token: Tensor, row: Tensor, k: int | None, num_tokens: int) -> Tensor:
    """Multiply rows by the weights of their assignments, and return the sum `(t, d)` of each token's rows. The sum is
    computed in at least float32.

    For expert choice, `k` is None, `weight` has one entry per row, and `token` contains the token of each row.
    """
    dtype = promote_with_float32(rows.dtype, *([] if weight is None else [weight.dtype]))
    if k is None:
        rows_in = rows.to(dtype)
        if weight is not None:
            empty = (token == num_tokens).unsqueeze(-1)
            rows_in = (rows_in * weight.unsqueeze(-1)).masked_fill(empty, 0)
        total = rows_in.new_zeros(num_tokens + 1, rows.shape[-1])
        return add_rows(total, token, rows_in)[:-1].to(rows.dtype)
    terms = []
    for choice in range(k):
        term = read_rows(rows, row.view(num_tokens, k)[:, choice]).to(dtype)
        if weight is not None:
            term = term * weight.view(num_tokens, k)[:, choice].unsqueeze(-1)
        terms.append(term)
    return sum(terms[1:], terms[0]).to(rows.dtype)


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Add `rows` to `total` at `index` in a deterministic order. On CUDA, `index_add` does not guarantee a
    deterministic order."""
    if total.is_cuda:
        return total.index_put((index,), rows, accumulate=True)
    return total.index_add(0, index, rows)
