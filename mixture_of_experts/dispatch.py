"""Moving tokens to the rows that experts compute, and their results back.

Axes: t tokens of the whole call, k choices, a assignments (t * k for token choice), r rows, d model dim, e experts,
b groups, c slots of an expert for each group.

A `Plan` says which row belongs to which assignment. Rows lie expert by expert, either in fixed slots (`b * c` for each
expert) or, with `counts`, one after the other without gaps. Both directions, forward and backward, are gathers: no two
writes meet, so every run gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixture_of_experts.routing import Routing
from mixture_of_experts.tracing import smallest


@dataclass(frozen=True)
class Plan:
    """Where every assignment's row is, for a whole call; no groups and no levels.

    Attributes:
        row: `(a,)` int64, row of each assignment; `num_rows` where it has none.
        assignment: `(r,)` int64, assignment of each row; a where the row is empty.
        weight: `(a,)` weight of each assignment, 0 where it has no row.
        token: `(r,)` int64, token of each row; t where the row is empty.
        choices: k when assignment i belongs to token i // k; None for expert choice.
        counts: `(e,)` int64 rows of each expert when rows lie without gaps; None for slots.
        num_tokens, num_rows: t and r.
        num_experts: e, as a tuple (two numbers for a hierarchy).
    """

    row: Tensor
    assignment: Tensor
    weight: Tensor
    token: Tensor
    choices: int | None
    counts: Tensor | None
    num_tokens: int
    num_rows: int
    num_experts: tuple[int, ...]

    def row_weight(self) -> Tensor:
        """`(r,)` the weight of each row, 0 where it is empty."""
        return _with_zero(self.weight)[self.assignment]


class Decision:
    """What the gates of all levels decided, for experts that do dispatch and combine themselves.

    An object and not tensors: FSDP2's mixed precision casts the tensors it finds in arguments, weights of routers too.
    """

    def __init__(self, levels: Sequence[Routing]) -> None:
        self.levels = levels

    def plan(self, *, ragged: bool = False) -> Plan:
        """Plan of one level or two."""
        return compose(*self.levels, ragged=ragged) if len(self.levels) == 2 else plan(*self.levels, ragged=ragged)


def plan(routing: Routing, *, ragged: bool = False) -> Plan:
    """Plan of one level: slots, or rows without gaps if `ragged`."""
    row, num_rows, counts = _rows(routing, ragged)
    num_tokens = row.shape[0] * routing.num_tokens
    if routing.choices is not None:
        token = None
    else:
        first = torch.arange(row.shape[0], device=row.device).unsqueeze(-1) * routing.num_tokens
        token = (routing.token + first).flatten()
    experts = (routing.num_experts,)
    return _plan(row.flatten(), routing.weight.flatten(), token, routing.choices, counts, num_tokens, num_rows, experts)


def compose(outer: Routing, inner: Routing, *, ragged: bool = False) -> Plan:
    """Plan of two levels: the tokens of `inner` are the slots that `plan(outer)` makes.

    A token's choices are those of its slots, in order, and their weights the products of both levels', so that tokens
    move once. `inner` has one router for each expert of `outer`.
    """
    if outer.choices is None or inner.choices is None:
        raise ValueError("only routers of token choice can be composed: in expert choice a slot has no list of choices")
    slot, num_slots, _ = _rows(outer, False)
    row_of_slot, most_rows, counts = _rows(inner, ragged)
    slot = slot.flatten()
    row = _with_sentinel(row_of_slot.reshape(num_slots, inner.choices), most_rows)[slot]  # (t k1, k2)
    weight = outer.weight.flatten().unsqueeze(-1) * _with_zero(inner.weight.reshape(num_slots, inner.choices))[slot]
    choices = outer.choices * inner.choices
    num_tokens = math.prod(outer.expert.shape[:-1]) * outer.num_tokens
    num_rows = most_rows
    if ragged:  # most slots may be empty: tokens bound the rows too
        num_rows = smallest(most_rows, row.numel())
        row = torch.where(row < most_rows, row, num_rows)
    experts = (outer.num_experts, inner.num_experts)
    return _plan(row.flatten(), weight.flatten(), None, choices, counts, num_tokens, num_rows, experts)


def _plan(
    row: Tensor,
    weight: Tensor,
    token: Tensor | None,
    choices: int | None,
    counts: Tensor | None,
    num_tokens: int,
    num_rows: int,
    num_experts: tuple[int, ...],
) -> Plan:
    """Add the tables that are read by row."""
    num_assignments = row.shape[0]
    index = torch.arange(num_assignments, device=row.device)
    empty = torch.full((num_rows + 1,), num_assignments, dtype=torch.int64, device=row.device)
    assignment = empty.scatter(0, row, index)[:num_rows]  # those without a row all write to the last entry
    if choices is not None:
        token = assignment // choices
    else:
        assert token is not None
        token = _with_sentinel(token, num_tokens)[assignment]
    return Plan(row, assignment, weight, token, choices, counts, num_tokens, num_rows, num_experts)


def _rows(routing: Routing, ragged: bool) -> tuple[Tensor, int, Tensor | None]:
    """Row of every assignment `(b, a)` (the number of rows where it has none), number of rows, counts if ragged.

    Outer experts' groups stand before b in the result, so that it is `(outer b, a)`.
    """
    *outer, b, a = routing.expert.shape
    e, routers = routing.num_experts, math.prod(outer)
    expert = routing.expert.reshape(routers, b, a)
    slot, kept = routing.slot.reshape(routers, b, a), routing.kept.reshape(routers, b, a)
    if ragged:
        size = routing.queued if routing.capacity is None else routing.queued.clamp(max=routing.capacity)
        if routing.limit is not None:
            size = torch.minimum(size, routing.limit.unsqueeze(-1))
        size = size.reshape(routers, b, e).transpose(1, 2)  # rows lie by outer expert, expert, group
        first = size.flatten().cumsum(0).view(routers, e, b) - size
        row = first.transpose(1, 2).gather(-1, expert) + slot
        num_rows, counts = routers * b * a, size.sum(dim=-1).flatten()
    else:
        c = routing.slots
        router = torch.arange(routers, device=expert.device).view(-1, 1, 1)
        group = torch.arange(b, device=expert.device).view(-1, 1)
        row = ((router * e + expert) * b + group) * c + slot
        num_rows, counts = routers * e * b * c, None
    return torch.where(kept, row, num_rows).flatten(0, 1), num_rows, counts


def _with_zero(values: Tensor) -> Tensor:
    """One more entry, of zeros, for the sentinel index."""
    return torch.cat([values, values.new_zeros(1, *values.shape[1:])])


def _with_sentinel(index: Tensor, sentinel: int) -> Tensor:
    """One more entry, the next table's sentinel, for the sentinel index."""
    return torch.cat([index, index.new_full((1, *index.shape[1:]), sentinel)])


def dispatch(x: Tensor, plan: Plan) -> Tensor:
    """Tokens `(t, d)` to rows `(r, d)`; empty rows are zeros."""
    return _Dispatch.apply(x, plan.token, plan.row, plan.choices)


def combine(rows: Tensor, plan: Plan) -> Tensor:
    """Rows `(r, d)` to tokens `(t, d)`: each token's weighted sum, taken in float32 and cast once."""
    return _Combine.apply(rows, plan.weight, plan.token, plan.row, plan.assignment, plan.choices, plan.num_tokens)


class _Dispatch(torch.autograd.Function):
    """Rows of tokens; its gradient is the sum of each token's rows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, token: Tensor, row: Tensor, choices: int | None) -> Tensor:
        return read_rows(x, token)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, token, row, ctx.choices = inputs
        ctx.num_tokens = x.shape[0]
        ctx.save_for_backward(token, row)

    @staticmethod
    def backward(ctx, grad: Tensor):
        token, row = ctx.saved_tensors
        return _Sum.apply(grad, token, row, ctx.choices, ctx.num_tokens), None, None, None


class _Sum(torch.autograd.Function):
    """Unweighted sum of each token's rows; its gradient is the rows of the tokens."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, token: Tensor, row: Tensor, choices: int | None, num_tokens: int) -> Tensor:
        return sum_rows(rows, None, token, row, choices, num_tokens)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, token, row, ctx.choices, _ = inputs
        ctx.save_for_backward(token, row)

    @staticmethod
    def backward(ctx, grad: Tensor):
        token, row = ctx.saved_tensors
        return _Dispatch.apply(grad, token, row, ctx.choices), None, None, None, None


class _Combine(torch.autograd.Function):
    """Weighted sum of each token's rows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: Tensor,
        weight: Tensor,
        token: Tensor,
        row: Tensor,
        assignment: Tensor,
        choices: int | None,
        num_tokens: int,
    ) -> Tensor:
        row_weight = _with_zero(weight)[assignment] if choices is None else None
        return sum_rows(rows, weight if row_weight is None else row_weight, token, row, choices, num_tokens)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        rows, weight, token, row, assignment, ctx.choices, _ = inputs
        ctx.save_for_backward(rows, weight, token, row, assignment)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, weight, token, row, assignment = ctx.saved_tensors
        spread = _Dispatch.apply(grad, token, row, ctx.choices).to(weight.dtype)  # (r, d), zeros where empty
        empty = (assignment == weight.shape[0]).unsqueeze(-1)
        grad_row_weight = (spread * rows.masked_fill(empty, 0)).sum(dim=-1)
        grad_weight = _with_zero(grad_row_weight)[row]
        grad_rows = (spread * _with_zero(weight)[assignment].unsqueeze(-1)).to(rows.dtype)
        return grad_rows, grad_weight, None, None, None, None, None


def read_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x by index, zeros where the index is the sentinel `len(x)`."""
    length = x.shape[0]
    if length == 0:
        return x.new_zeros(index.shape[0], *x.shape[1:])
    rows = x.index_select(0, index.clamp(max=length - 1))
    return rows.masked_fill((index == length).unsqueeze(-1), 0)


def sum_rows(
    rows: Tensor, weight: Tensor | None, token: Tensor | None, row: Tensor, choices: int | None, num_tokens: int
) -> Tensor:
    """`(t, d)` sum of each token's rows, in float32 (float64 stays), times `weight` by assignment.

    Without `choices` (expert choice) the weight is by row, and `token` says whose row it is.
    """
    dtype = rows.dtype if rows.dtype == torch.float64 else torch.float32
    if weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
    if choices is None:
        assert token is not None
        rows_in = rows.to(dtype)
        if weight is not None:
            empty = (token == num_tokens).unsqueeze(-1)
            rows_in = (rows_in * weight.unsqueeze(-1)).masked_fill(empty, 0)
        total = rows_in.new_zeros(num_tokens + 1, rows.shape[-1])
        return _add_rows(total, token, rows_in)[:-1].to(rows.dtype)
    row = row.view(num_tokens, choices)
    total = None
    for choice in range(choices):
        term = read_rows(rows, row[:, choice]).to(dtype)
        if weight is not None:
            term = term * weight.view(num_tokens, choices)[:, choice].unsqueeze(-1)
        total = term if total is None else total + term
    assert total is not None
    return total.to(rows.dtype)


def _add_rows(total: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """`total[index] += rows`, in an order that is the same on every run (on CUDA `index_add` is not)."""
    if total.is_cuda:
        return total.index_put((index,), rows, accumulate=True)
    return total.index_add(0, index, rows)
