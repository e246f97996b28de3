"""What moves tokens: the assignments of a whole call, whoever made them.

Axes: t tokens of the call, k choices, a assignments (t k for token choice), r rows, e experts, b groups, c slots of an
expert for each group.

Gates tell what they decide by groups (`Routing`). Experts read a `Decision`, which knows no groups and no levels:
`decision_of` makes it from one gate, `compose` from the gates of two levels, `decision_on` from experts and weights
that somebody else chose.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mixture_of_experts.plan import Plan, append, plan_rows
from mixture_of_experts.private_torch import statically_known_true
from mixture_of_experts.queues import Queues, queue_up
from mixture_of_experts.routing import Routing
from mixture_of_experts.tracing import exporting, smallest


class SlotLayout:
    """Where limited capacity puts assignments.

    Every expert has one queue for each group; queue `expert * num_groups + group` has `capacity` slots.

    Args:
        num_groups, capacity: b and c.
        find: makes the queue `(a,)` of each assignment, and the `Queues`: positions `(a,)`, and the length of each
            queue, no longer than there are slots. It is called when somebody needs them.
    """

    num_groups: int
    capacity: int
    find: Callable[[], tuple[Tensor, Queues]]

    def __init__(self, num_groups: int, capacity: int, find: Callable[[], tuple[Tensor, Queues]]) -> None:
        self.num_groups, self.capacity, self.find = num_groups, capacity, find


class Decision:
    """The assignments of a call: which expert computes which token, with which weight.

    Pytrees do not open it: FSDP2's mixed precision casts the tensors it finds in arguments, and would cast the weights
    of a router too.

    Attributes:
        weight: `(a,)`, of each assignment; 0 where it is not kept.
        kept: `(a,)` bool, the assignments that experts compute.
        chosen: `(a,)` bool, the assignments that queue; of limited capacity some of them are not kept.
        k: assignment i belongs to token i // k; None for expert choice.
        token: `(a,)` int64, token of each assignment in expert choice; None where `k` tells it.
        num_tokens: t.
        num_experts: e, as a tuple (two numbers for two levels).
        dropless: whether experts compute every assignment that a gate made.
        slots: where limited capacity puts assignments; None if they queue at their experts in the order of tokens.
        most_rows: rows without gaps that there can be; at most a.
    """

    weight: Tensor
    kept: Tensor
    chosen: Tensor
    k: int | None
    token: Tensor | None
    num_tokens: int
    num_experts: tuple[int, ...]
    slots: SlotLayout | None
    dropless: bool
    most_rows: int

    def __init__(
        self,
        expert: Tensor | None,
        weight: Tensor,
        kept: Tensor,
        *,
        k: int | None,
        chosen: Tensor | None = None,
        token: Tensor | None = None,
        num_tokens: int,
        num_experts: tuple[int, ...],
        slots: SlotLayout | None = None,
        dropless: bool = True,
        most_rows: int | None = None,
    ) -> None:
        self._expert, self.weight, self.kept, self.chosen = expert, weight, kept, kept if chosen is None else chosen
        self.k, self.token, self.num_tokens, self.num_experts = k, token, num_tokens, num_experts
        self.slots, self.dropless = slots, dropless
        self.most_rows = weight.shape[0] if most_rows is None else most_rows

    @property
    def expert(self) -> Tensor:
        """`(a,)` int64, expert of each assignment, of two levels outer-major; any expert where it is not kept."""
        if self._expert is not None:
            return self._expert
        assert self.slots is not None
        queue, _ = self.slots.find()
        return queue // self.slots.num_groups

    @property
    def num_slots(self) -> int:
        """Rows of a plan in slots."""
        of_expert = self.num_tokens if self.slots is None else self.slots.num_groups * self.slots.capacity
        return math.prod(self.num_experts) * of_expert

    def queues(self) -> tuple[Tensor, Queues]:
        """The queue `(a,)` that each assignment is in, and all queues: positions `(a,)` and lengths `(e b,)`."""
        if self.slots is not None:
            return self.slots.find()
        assert self.k is not None
        return self.expert, queue_up(self.expert, self.kept, math.prod(self.num_experts), self.k, "token")

    def in_slots(self) -> Plan:
        """The plan whose rows are all slots: `(e, b, c)`, some of them empty."""
        queue, queues = self.queues()
        capacity = self.num_tokens if self.slots is None else self.slots.capacity
        return self._plan(queue * capacity + queues.position, self.num_slots, None)

    def rows_per_expert(self, queues: Queues) -> Tensor:
        """`(e,)` int64, the rows that each expert needs: one for each assignment that holds a place in `queues()`."""
        by_expert = queues.length.view(math.prod(self.num_experts), -1)
        return by_expert.flatten() if statically_known_true(by_expert.shape[1] == 1) else by_expert.sum(dim=-1)

    def without_gaps(self) -> Plan:
        """The plan whose rows are those of tokens alone, sorted by expert."""
        queue, queues = self.queues()
        first = queues.length.cumsum(0) - queues.length
        row = first.gather(0, queue) + queues.position
        return self._plan(row, self.most_rows, self.rows_per_expert(queues))

    def with_rows(self, queue: Tensor, queues: Queues, rows_per_expert: Tensor, num_rows: int) -> Plan:
        """The plan that gives each expert more rows than it has tokens for; its last ones are empty.

        Args:
            queue, queues: what `queues` returned.
            rows_per_expert: `(e,)` int64, at least `rows_per_expert(queues)`.
            num_rows: rows in all, at least the sum of those.
        """
        start = rows_per_expert.cumsum(0) - rows_per_expert
        by_expert = queues.length.view(start.shape[0], -1)
        if not statically_known_true(by_expert.shape[1] == 1):
            start = (start.unsqueeze(-1) + by_expert.cumsum(dim=-1) - by_expert).flatten()
        return self._plan(start.gather(0, queue) + queues.position, num_rows, rows_per_expert)

    def _plan(self, row: Tensor, num_rows: int, rows_per_expert: Tensor | None) -> Plan:
        row = torch.where(self.kept, row, num_rows)
        sizes = (self.k, self.num_tokens, num_rows, self.num_experts)
        return plan_rows(row, self.weight, self.token, rows_per_expert, *sizes)

    def prefers_rows(self) -> bool:
        """Whether rows without gaps are sure to be fewer than slots; always so when dropless."""
        if self.dropless:
            return True
        if exporting() or self.k is None:
            return False
        # while a graph is traced the answer must not depend on a length that the graph leaves open
        return statically_known_true(self.weight.shape[0] < self.num_slots)


def decision_on(expert: Tensor, weight: Tensor, num_experts: int) -> Decision:
    """The decision of experts and weights `(t, k)` that somebody chose; ids other than 0 to e - 1 are nobody's."""
    kept = (expert >= 0) & (expert < num_experts)
    (t, k), expert, weight = expert.shape, torch.where(kept, expert, 0), torch.where(kept, weight, 0)
    return Decision(expert.flatten(), weight.flatten(), kept.flatten(), k=k, num_tokens=t, num_experts=(num_experts,))


def decision_of(routing: Routing) -> Decision:
    """The decision of one gate."""
    return _decision_of(routing, routing.capacity is not None)


def plan_slots_of(routing: Routing) -> Plan:
    """The plan of one gate in slots `(..., e, b, c)` of each group, also where it drops nothing: then c is n."""
    return _decision_of(routing, True).in_slots()


def _decision_of(routing: Routing, by_group: bool) -> Decision:
    groups = routing.expert.shape[-2]
    return Decision(
        routing.expert.flatten(),
        routing.weight.flatten(),
        routing.kept.flatten(),
        k=routing.k,
        chosen=routing.chosen.flatten(),
        token=None if routing.token_index is None else _in_call(routing.token_index, routing.num_tokens).flatten(),
        num_tokens=math.prod(routing.expert.shape[:-1]) * routing.num_tokens,
        num_experts=(routing.num_experts,),
        slots=SlotLayout(groups, routing.slots, partial(_queue_by_group, routing)) if by_group else None,
        dropless=routing.capacity is None,
    )


def _in_call(token: Tensor, num_tokens: int) -> Tensor:
    """Tokens `(b, a)` of groups as tokens of the call."""
    return token + torch.arange(token.shape[0], device=token.device).unsqueeze(-1) * num_tokens


def _queue_by_group(routing: Routing) -> tuple[Tensor, Queues]:
    """The queue of every assignment (by outer expert, expert, group), and the queues as far as slots go."""
    *outer, b, a = routing.expert.shape
    e, routers = routing.num_experts, math.prod(outer)
    expert = routing.expert.reshape(routers, b, a)
    if outer:
        expert = expert + torch.arange(routers, device=expert.device).view(-1, 1, 1) * e
    queue = expert * b + torch.arange(b, device=expert.device).view(-1, 1)
    queues = routing.group_queues()
    length = routing.slots_held(queues).reshape(routers, b, e).transpose(1, 2)
    return queue.flatten(), Queues(queues.position.flatten(), length.flatten())


def compose(outer: Routing, slots: Plan, inner: Routing) -> Decision:
    """The decision of two levels. The tokens of `inner`, which has one router for each expert of `outer`, are slots.

    A token's choices are those of its slots, in order, and their weights the products of both levels', so that tokens
    move once.

    Args:
        outer, inner: what the gates of level one and two tell.
        slots: the slots of level one, as `plan_slots_of(outer)` plans them.
    """
    if slots.k is None or inner.k is None:
        raise ValueError("only routers of token choice can be composed: in expert choice a slot has no list of choices")
    groups, capacity, num_slots = inner.expert.shape[-2], inner.slots, slots.num_rows
    queue, queues = _queue_by_group(inner)
    nobodys = outer.num_experts * inner.num_experts * groups * capacity  # the cell of what is not kept
    cell = torch.where(inner.kept.flatten(), queue * capacity + queues.position, nobodys).view(num_slots, inner.k)
    cell = append(cell, nobodys)[slots.row]  # (t k1, k2)
    weight = slots.weight.unsqueeze(-1) * append(inner.weight.reshape(num_slots, inner.k), 0)[slots.row]
    cell = cell.flatten()
    return Decision(
        None,
        weight.flatten(),
        cell < nobodys,
        k=slots.k * inner.k,
        num_tokens=slots.num_tokens,
        num_experts=(outer.num_experts, inner.num_experts),
        slots=SlotLayout(groups, capacity, partial(_queue_by_cell, cell, capacity, queues.length)),
        dropless=inner.capacity is None,
        # most slots may be empty: tokens bound the rows too
        most_rows=smallest(math.prod(inner.expert.shape), cell.shape[0]),
    )


def _queue_by_cell(cell: Tensor, capacity: int, length: Tensor) -> tuple[Tensor, Queues]:
    """Queues of assignments whose slot `cell` `(a,)` counts all slots of the call, from 0."""
    queue = cell.clamp(max=length.shape[0] * capacity - 1) // capacity
    return queue, Queues(cell - queue * capacity, length)
