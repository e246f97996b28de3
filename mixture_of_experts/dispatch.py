"""Moving tokens to the rows that experts compute, and their results back.

Axes: t tokens of the whole call, k choices, a assignments (t * k for token choice), r rows, d model dim, e experts,
b groups, c slots of an expert for each group.

A `Plan` says which row belongs to which assignment. Rows lie expert by expert, either in fixed slots (`b * c` for each
expert) or, with `counts`, one after the other without gaps. Both directions, forward and backward, are gathers: no two
writes meet, so every run gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mixture_of_experts.queues import queue_positions
from mixture_of_experts.routing import Routing
from mixture_of_experts.tracing import exporting, smallest

# from the rows of each expert, `(e,)` and in all, to those it is given
Widen = Callable[[Tensor, int], tuple[Tensor, int]]


class Plan(NamedTuple):
    """Where every assignment's row is, for a whole call; no groups and no levels.

    Attributes:
        row: `(a,)` int64, row of each assignment; `num_rows` where it has none.
        assignment: `(r,)` int64, assignment of each row; a where the row is empty.
        weight: `(a,)` weight of each assignment, 0 where it has no row.
        token: `(r,)` int64, token of each row; t where the row is empty.
        counts: `(e,)` int64 rows of each expert when rows lie without gaps; None for slots.
        choices: k when assignment i belongs to token i // k; None for expert choice.
        num_tokens, num_rows: t and r.
        num_experts: e, as a tuple (two numbers for a hierarchy).
    """

    row: Tensor
    assignment: Tensor
    weight: Tensor
    token: Tensor
    counts: Tensor | None
    choices: int | None
    num_tokens: int
    num_rows: int
    num_experts: tuple[int, ...]

    def row_weight(self) -> Tensor:
        """`(r,)` the weight of each row, 0 where it is empty."""
        weight = self.weight.new_zeros(self.num_rows + 1).scatter(0, self.row, self.weight)
        return weight[: self.num_rows]  # those without a row all write to the last entry

    def packed(self) -> Plan:
        """The same in fewer bytes, for a backward to keep: without tokens that follow from the assignments, of which
        int32 holds all but the longest."""
        short = statically_known_true(self.row.shape[0] < 1 << 31)
        assignment = self.assignment.to(torch.int32) if short else self.assignment
        return self._replace(assignment=assignment, token=self.token if self.choices is None else None)

    def unpacked(self) -> Plan:
        """What `packed` was called on, if it was; the tables by row in the dtype that they were packed in."""
        if self.token is not None or self.choices is None:
            return self
        return self._replace(token=_tokens_of(self.assignment, self.choices))


class ChosenExperts(NamedTuple):
    """The experts that the tokens of a call chose: of the first token all k, then of the next one, in any shape."""

    expert: Tensor
    weight: Tensor
    kept: Tensor
    k: int


class Decision:
    """What the gates of all levels decided on the tokens of a call, as experts read it.

    An object that pytrees do not open: FSDP2's mixed precision casts the tensors it finds in arguments, and would cast
    the weights of a router too.
    """

    def __init__(self, levels: Sequence[Routing]) -> None:
        self.levels = levels

    @property
    def dropless(self) -> bool:
        """Whether experts compute every choice."""
        return self.levels[-1].capacity is None

    @property
    def choices(self) -> ChosenExperts | None:
        """The choices of one level of token choice; None otherwise."""
        first = self.levels[0]
        if len(self.levels) > 1 or first.choices is None:
            return None
        return ChosenExperts(first.expert, first.weight, first.kept, first.choices)

    def plan(self, *, ragged: bool = False, widen: Widen | None = None) -> Plan:
        """Rows of one level or two: in slots, or without gaps if `ragged`.

        `widen` gives experts more rows than they have tokens for.
        """
        make = plan_level if len(self.levels) == 1 else plan_two_levels
        return make(*self.levels, ragged=ragged, widen=widen)

    def prefers_rows(self) -> bool:
        """Whether rows without gaps are sure to be fewer than slots; always so when dropless."""
        if self.dropless:
            return True
        first, last = self.levels[0], self.levels[-1]
        if exporting() or last.choices is None:
            return False
        num_slots = math.prod(last.expert.shape[:-1]) * last.num_experts * last.slots
        num_rows = math.prod(first.expert.shape[:-1]) * first.num_tokens
        for routing in self.levels:
            num_rows = num_rows * (routing.choices or 1)
        # while a graph is traced the answer must not depend on a length that the graph leaves open
        return statically_known_true(num_rows < num_slots)


class GivenChoices(Decision):
    """The same for experts and weights `(t, k)` that somebody else chose; ids other than 0 to e - 1 are nobody's."""

    def __init__(self, expert: Tensor, weight: Tensor, num_experts: int) -> None:
        super().__init__(())
        self.given = ChosenExperts(expert, weight, (expert >= 0) & (expert < num_experts), expert.shape[1])
        self.num_experts = num_experts

    dropless = True  # type: ignore[assignment]

    @property
    def choices(self) -> ChosenExperts:
        return self.given

    def plan(self, *, ragged: bool = True, widen: Widen | None = None) -> Plan:
        (t, k), e = self.given.expert.shape, self.num_experts
        expert, weight, kept = (tensor.flatten() for tensor in self.given[:3])
        expert = torch.where(kept, expert, 0)
        place, counts = queue_positions(expert, kept, e, k, "token")
        first, counts, num_rows = _starts(counts.view(1, e, 1), t * k, widen)
        row = torch.where(kept, first.flatten()[expert] + place, num_rows)
        return _plan(row, torch.where(kept, weight, 0), None, k, counts, t, num_rows, (e,))


def plan_level(routing: Routing, *, ragged: bool = False, widen: Widen | None = None) -> Plan:
    """Plan of one level: slots, or rows without gaps if `ragged`."""
    row, num_rows, counts = _rows(routing, ragged, widen)
    num_tokens = row.shape[0] * routing.num_tokens
    token = None
    if routing.choices is None:
        first = torch.arange(row.shape[0], device=row.device).unsqueeze(-1) * routing.num_tokens
        token = (routing.token + first).flatten()
    experts = (routing.num_experts,)
    return _plan(row.flatten(), routing.weight.flatten(), token, routing.choices, counts, num_tokens, num_rows, experts)


def plan_two_levels(outer: Routing, inner: Routing, *, ragged: bool = False, widen: Widen | None = None) -> Plan:
    """Plan of two levels: the tokens of `inner` are the slots that `plan_level(outer)` makes.

    A token's choices are those of its slots, in order, and their weights the products of both levels', so that tokens
    move once. `inner` has one router for each expert of `outer`.
    """
    if outer.choices is None or inner.choices is None:
        raise ValueError("only routers of token choice can be composed: in expert choice a slot has no list of choices")
    slot, num_slots, _ = _rows(outer, False)
    slot, num_tokens = slot.flatten(), math.prod(outer.expert.shape[:-1]) * outer.num_tokens
    # most slots may be empty: tokens bound the rows too
    row_of_slot, num_rows, counts = _rows(inner, ragged, widen, most=slot.shape[0] * inner.choices)
    row = _with_sentinel(row_of_slot.reshape(num_slots, inner.choices), num_rows)[slot]  # (t k1, k2)
    weight = outer.weight.flatten().unsqueeze(-1) * _with_zero(inner.weight.reshape(num_slots, inner.choices))[slot]
    experts, choices = (outer.num_experts, inner.num_experts), outer.choices * inner.choices
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
    """Add the tables that are read by row; `token` `(a,)` is that of each assignment in expert choice."""
    num_assignments = row.shape[0]
    index = torch.arange(num_assignments, device=row.device)
    empty = row.new_full((num_rows + 1,), num_assignments)
    assignment = empty.scatter(0, row, index)[:num_rows]  # those without a row all write to the last entry
    of_row = _tokens_of(assignment, choices or 1) if token is None else _with_sentinel(token, num_tokens)[assignment]
    return Plan(row, assignment, weight, of_row, counts, choices, num_tokens, num_rows, num_experts)


def _tokens_of(assignment: Tensor, choices: int) -> Tensor:
    """Whose assignments these are, where every token has k of them."""
    return assignment if choices == 1 else assignment // choices


def _rows(
    routing: Routing, ragged: bool, widen: Widen | None = None, most: int | None = None
) -> tuple[Tensor, int, Tensor | None]:
    """Row of every assignment `(b, a)` (the number of rows where it has none), number of rows, counts if ragged.

    `most`: how many rows without gaps there can be, if fewer than assignments.
    Outer experts' groups stand before b in the result, so that it is `(outer b, a)`.
    """
    *outer, b, a = routing.expert.shape
    e, routers = routing.num_experts, math.prod(outer)
    expert = routing.expert.reshape(routers, b, a)
    slot, kept = routing.slot.reshape(routers, b, a), routing.kept.reshape(routers, b, a)
    if ragged:
        size = num_slots_held(routing).reshape(routers, b, e).transpose(1, 2)  # rows lie by outer expert, expert, group
        num_rows = routers * b * a if most is None else smallest(routers * b * a, most)
        first, counts, num_rows = _starts(size, num_rows, widen)
        row = first.transpose(1, 2).gather(-1, expert) + slot
    else:
        c = routing.slots
        router = torch.arange(routers, device=expert.device).view(-1, 1, 1)
        group = torch.arange(b, device=expert.device).view(-1, 1)
        row = ((router * e + expert) * b + group) * c + slot
        num_rows, counts = routers * e * b * c, None
    return torch.where(kept, row, num_rows).flatten(0, 1), num_rows, counts


def num_slots_held(routing: Routing) -> Tensor:
    """`(..., b, e)` slots of every group and expert that a choice holds, computed or not."""
    held = routing.queued if routing.capacity is None else routing.queued.clamp(max=routing.capacity)
    return held if routing.limit is None else torch.minimum(held, routing.limit.unsqueeze(-1))


def _starts(size: Tensor, num_rows: int, widen: Widen | None) -> tuple[Tensor, Tensor, int]:
    """For sizes `(outer, e, b)` of every expert and group: first rows, each expert's number of them, and that of all.

    `num_rows` is what there are at most without `widen`.
    """
    one_group = statically_known_true(size.shape[-1] == 1)
    counts = size.flatten() if one_group else size.sum(dim=-1).flatten()
    if widen is not None:
        counts, num_rows = widen(counts, num_rows)
        start = (counts.cumsum(0) - counts).view(*size.shape[:-1], 1)
        return start if one_group else start + size.cumsum(dim=-1) - size, counts, num_rows
    return size.flatten().cumsum(0).view(size.shape) - size, counts, num_rows


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
        return _Combine.apply(grad, None, token, row, None, ctx.choices, ctx.num_tokens), None, None, None


class _Combine(torch.autograd.Function):
    """Sum of each token's rows, weighted if there are weights."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: Tensor,
        weight: Tensor | None,
        token: Tensor,
        row: Tensor,
        assignment: Tensor | None,
        choices: int | None,
        num_tokens: int,
    ) -> Tensor:
        if choices is None and weight is not None:
            weight = _with_zero(weight)[assignment]
        return sum_rows(rows, weight, token, row, choices, num_tokens)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        rows, weight, token, row, assignment, ctx.choices, _ = inputs
        ctx.save_for_backward(None if weight is None else rows, weight, token, row, assignment)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, weight, token, row, assignment = ctx.saved_tensors
        spread = _Dispatch.apply(grad, token, row, ctx.choices)  # (r, d), zeros where empty
        if weight is None:
            return spread, None, None, None, None, None, None
        spread, empty = spread.to(weight.dtype), (assignment == weight.shape[0]).unsqueeze(-1)
        grad_row_weight = (spread * rows.masked_fill(empty, 0)).sum(dim=-1)
        grad_rows = (spread * _with_zero(weight)[assignment].unsqueeze(-1)).to(rows.dtype)
        return grad_rows, _with_zero(grad_row_weight)[row], None, None, None, None, None


def read_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x by index, zeros where the index is the sentinel `len(x)`."""
    length = x.shape[0]
    if length == 0:
        return x.new_zeros(index.shape[0], *x.shape[1:])
    rows = x.index_select(0, index.clamp(max=length - 1))
    return rows.masked_fill((index == length).unsqueeze(-1), 0)


def sum_rows(
    rows: Tensor, weight: Tensor | None, token: Tensor, row: Tensor, choices: int | None, num_tokens: int
) -> Tensor:
    """`(t, d)` sum of each token's rows, in float32 (float64 stays), times `weight` by assignment.

    Without `choices` (expert choice) the weight is by row, and `token` says whose row it is.
    """
    dtype = rows.dtype if rows.dtype == torch.float64 else torch.float32
    if weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
    if choices is None:
        rows_in = rows.to(dtype)
        if weight is not None:
            empty = (token == num_tokens).unsqueeze(-1)
            rows_in = (rows_in * weight.unsqueeze(-1)).masked_fill(empty, 0)
        total = rows_in.new_zeros(num_tokens + 1, rows.shape[-1])
        return add_rows(total, token, rows_in)[:-1].to(rows.dtype)
    terms = []
    for choice in range(choices):
        term = read_rows(rows, row.view(num_tokens, choices)[:, choice]).to(dtype)
        if weight is not None:
            term = term * weight.view(num_tokens, choices)[:, choice].unsqueeze(-1)
        terms.append(term)
    return sum(terms[1:], terms[0]).to(rows.dtype)


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """`total[index] += rows`, in an order that is the same on every run (on CUDA `index_add` is not)."""
    if total.is_cuda:
        return total.index_put((index,), rows, accumulate=True)
    return total.index_add(0, index, rows)
