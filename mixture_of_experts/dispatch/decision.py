"""`Decision`: the assignments of a whole call, by which tokens move.

Axes: t tokens of the call, k choices, a assignments (t k for token choice), r rows, e experts, b groups, c slots of an
expert for each group.

Gates tell what they decide by groups (`Routing`). Experts read a `Decision`, which knows no groups and no levels:
`decision_of` makes it from one gate, `compose` from the gates of two levels, `decision_on` from experts and weights
that somebody else chose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mixture_of_experts.dispatch.plan import Plan, append, plan_rows
from mixture_of_experts.dispatch.queues import Queues, queue_up
from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.support.private_torch import statically_known_true
from mixture_of_experts.support.tracing import add_times, exporting, smallest


class Waiting(NamedTuple):
    """The choices of a gate in the queues of its experts.

    Attributes:
        expert, position: `(a,)` int64, the expert of each choice, and its position in the queue of its group.
        chosen, kept: `(a,)` bool, the choices that queue, and those of them that are computed.
        length: `(e b,)` int64, number of rows that each queue needs, by router, expert and group.
        slot: as in `SlotsOfTwoLevels`; None for one level.
        num_tokens, k, num_experts: tokens of a group, choices of a token, and experts of one router of the gate.
    """

    expert: Tensor
    position: Tensor
    chosen: Tensor
    kept: Tensor
    length: Tensor
    slot: Tensor | None
    num_tokens: int
    k: int
    num_experts: int


@dataclass(frozen=True, eq=False)
class SlotLayout:
    """The slots of a call with limited capacity, and which assignment lies in which.

    Every expert has one queue for each group; queue `expert * num_groups + group` has `capacity` slots.

    Attributes:
        routing: the routing of the gate.
    """

    routing: Routing

    @property
    def num_groups(self) -> int:
        return self.routing.expert.shape[-2]

    @property
    def capacity(self) -> int:
        return self.routing.slots

    def cell(self) -> Tensor:
        """`(a,)` int64, the slot of each assignment among those of the call; any number where it is not kept."""
        return add_times(self.routing.group_queues().position.flatten(), self._queue(), self.capacity)

    def queues(self) -> tuple[Tensor, Queues]:
        """The queue `(a,)` of each assignment, and the `Queues`, cut off at capacity: positions `(a,)` and lengths
        `(e b,)`."""
        queues = self.routing.group_queues()
        return self._queue(), Queues(queues.position.flatten(), self.length(queues))

    def waiting(self) -> Waiting:
        """The choices of the gate, as `Decision.waiting` gives them."""
        gate, queues = self.routing, self.routing.group_queues()
        assert gate.k is not None
        return Waiting(
            gate.expert.flatten(),
            queues.position.flatten(),
            gate.chosen.flatten(),
            gate.kept.flatten(),
            self.length(queues),
            None,
            gate.num_tokens,
            gate.k,
            gate.num_experts,
        )

    def length(self, queues: Queues) -> Tensor:
        """`(e b,)` int64, the number of occupied slots of each queue."""
        return self.routing.slots_held(queues).transpose(-2, -1).flatten()

    def _queue(self) -> Tensor:
        """The queue of each assignment of the gate, `(router * e + expert) * b + group`."""
        *outer, b, a = self.routing.expert.shape
        e, routers, device = self.routing.num_experts, math.prod(outer), self.routing.expert.device
        first = torch.arange(b, device=device).view(-1, 1)  # queue of expert 0
        if outer:
            first = add_times(first, torch.arange(routers, device=device).view(-1, 1, 1), e * b)
        return add_times(first, self.routing.expert.reshape(routers, b, a), b).flatten()


@dataclass(frozen=True, eq=False)
class SlotsOfTwoLevels(SlotLayout):
    """The slots of level two, whose tokens are the slots of level one.

    Attributes:
        routing: the routing of level two.
        slot: `(t k1,)`, the slot of each assignment of level one; the number of slots for an assignment without one.
    """

    slot: Tensor

    def cell(self) -> Tensor:
        return of_choices(super().cell(), self.routing, self.slot)

    def queues(self) -> tuple[Tensor, Queues]:
        cell, length = self.cell(), self.length(self.routing.group_queues())
        queue = (cell // self.capacity).clamp(0, length.shape[0] - 1)
        return queue, Queues(add_times(cell, queue, -self.capacity), length)

    def waiting(self) -> Waiting:
        return super().waiting()._replace(slot=self.slot)


class Decision:
    """The assignments of a call: which expert computes which token, with which weight.

    It is not a pytree: FSDP2's mixed precision casts all tensors that it finds in arguments, and would cast a router's
    weights too.

    Attributes:
        weight: `(a,)`, weight of each assignment; 0 where it is not kept.
        kept: `(a,)` bool, the assignments that experts compute.
        chosen: `(a,)` bool, the assignments that queue; with limited capacity some of them are not kept.
        k: choices of a token: assignment i belongs to token i // k; None for expert choice.
        token: `(a,)` int64, token of each assignment in expert choice; None otherwise.
        num_tokens: t.
        num_experts: e, as a tuple (two numbers for two levels).
        dropless: whether experts compute every assignment that a gate made.
        slots: the layout of slots with limited capacity; None if assignments queue at their experts in the order of
            tokens.
        most_rows: an upper bound on the rows without gaps; at most a.
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
        """`(a,)` int64, expert of each assignment, outer-major for two levels; any number where it is not kept."""
        if self._expert is not None:
            return self._expert
        assert self.slots is not None
        queue, _ = self.slots.queues()
        return queue // self.slots.num_groups

    @property
    def num_slots(self) -> int:
        """The number of slots of all experts."""
        of_expert = self.num_tokens if self.slots is None else self.slots.num_groups * self.slots.capacity
        return math.prod(self.num_experts) * of_expert

    def queues(self) -> tuple[Tensor, Queues]:
        """The queue `(a,)` that each assignment is in, and all queues: positions `(a,)` and lengths `(e b,)`."""
        if self.slots is not None:
            return self.slots.queues()
        k = 1 if self.k is None else self.k  # in the order in which they are stored
        return self.expert, queue_up(self.expert, self.kept, math.prod(self.num_experts), k, "token")

    def waiting(self) -> Waiting:
        """The choices that queue; for two levels those of level two. Without slots all tokens are one group."""
        if self.slots is not None:
            return self.slots.waiting()
        (expert, queues), k = self.queues(), self.k
        assert k is not None
        queued = expert, queues.position, self.kept, self.kept, queues.length
        return Waiting(*queued, slot=None, num_tokens=self.num_tokens, k=k, num_experts=math.prod(self.num_experts))

    def in_slots(self) -> Plan:
        """The plan whose rows are all slots, `(e, b, c)`; some are empty."""
        if self.slots is not None:
            return self._plan(self.slots.cell(), self.num_slots, None)
        queue, queues = self.queues()
        return self._plan(add_times(queues.position, queue, self.num_tokens), self.num_slots, None)

    def rows_per_expert(self, queues: Queues) -> Tensor:
        """`(e,)` int64, the rows that each expert needs: the lengths of its queues in `queues()`, added up."""
        by_expert = queues.length.view(math.prod(self.num_experts), -1)
        return by_expert.flatten() if statically_known_true(by_expert.shape[1] == 1) else by_expert.sum(dim=-1)

    def without_gaps(self) -> Plan:
        """The plan whose rows lie sorted by expert, without empty rows between them."""
        queue, queues = self.queues()
        first = queues.length.cumsum(0) - queues.length
        row = first.gather(0, queue) + queues.position
        return self._plan(row, self.most_rows, self.rows_per_expert(queues))

    def with_rows(self, queue: Tensor, queues: Queues, rows_per_expert: Tensor, num_rows: int) -> Plan:
        """The plan that gives each expert a number of rows of the caller's choice; those it does not need are empty.

        Args:
            queue, queues: what `queues` returned.
            rows_per_expert: `(e,)` int64, at least `rows_per_expert(queues)`.
            num_rows: all rows, at least the sum of `rows_per_expert`.
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
        """Whether rows without gaps are the better layout: dropless, or surely fewer than slots."""
        if self.dropless:
            return True
        if exporting() or self.k is None:
            return False
        # in a traced graph the answer must not depend on a dynamic length
        return statically_known_true(self.weight.shape[0] < self.num_slots)


def decision_on(expert: Tensor, weight: Tensor, num_experts: int) -> Decision:
    """The decision from given experts and weights `(t, k)`; an id outside 0 to e - 1 means that nobody computes it."""
    kept = (expert >= 0) & (expert < num_experts)
    (t, k), expert, weight = expert.shape, torch.where(kept, expert, 0), torch.where(kept, weight, 0)
    return Decision(expert.flatten(), weight.flatten(), kept.flatten(), k=k, num_tokens=t, num_experts=(num_experts,))


def of_first_experts(decision: Decision, num_experts: int) -> Decision:
    """The decision without the assignments to experts behind the first `num_experts`."""
    kept = decision.kept & (decision.expert < num_experts)
    expert, weight = torch.where(kept, decision.expert, 0), torch.where(kept, decision.weight, 0)
    k, token, num_tokens = decision.k, decision.token, decision.num_tokens
    return Decision(expert, weight, kept, k=k, token=token, num_tokens=num_tokens, num_experts=(num_experts,))


def decision_of(routing: Routing) -> Decision:
    """The decision of one gate."""
    return _decision_of(routing, routing.capacity is not None)


def plan_slots_of(routing: Routing) -> Plan:
    """The plan of one gate in slots `(..., e, b, c)`; c is n for a dropless gate."""
    return _decision_of(routing, True).in_slots()


def _decision_of(routing: Routing, by_group: bool) -> Decision:
    weight, kept, chosen = routing.weight, routing.kept, routing.chosen
    if routing.uncounted is not None:
        computed = routing.uncounted != 0
        weight, kept, chosen = weight + routing.uncounted, kept | computed, chosen | computed
    return Decision(
        routing.expert.flatten(),
        weight.flatten(),
        kept.flatten(),
        k=routing.k,
        chosen=chosen.flatten(),
        token=None if routing.token_index is None else _in_call(routing.token_index, routing.num_tokens).flatten(),
        num_tokens=math.prod(routing.expert.shape[:-1]) * routing.num_tokens,
        num_experts=(routing.num_experts,),
        slots=SlotLayout(routing) if by_group else None,
        dropless=routing.capacity is None,
    )


def _in_call(token: Tensor, num_tokens: int) -> Tensor:
    """Indices of tokens within the whole call, from indices `(b, a)` within groups."""
    return token + torch.arange(token.shape[0], device=token.device).unsqueeze(-1) * num_tokens


def compose(outer: Routing, slots: Plan, inner: Routing) -> Decision:
    """The decision of two levels.

    `inner` has one router for each expert of `outer`; its tokens are the slots of level one. In the decision a token
    has the choices of all its slots, in order. A weight is the product of both levels' weights. So tokens move once.

    Args:
        outer, inner: what the gates of level one and two tell.
        slots: `plan_slots_of(outer)`, the plan of level one.
    """
    if slots.k is None or inner.k is None:
        raise ValueError("only routers of token choice can be composed: expert choice makes no list of k choices")
    weight = slots.weight.unsqueeze(-1) * of_choices(inner.weight, inner, slots.row).view(-1, inner.k)
    return Decision(
        None,
        weight.flatten(),
        of_choices(inner.kept, inner, slots.row),
        k=slots.k * inner.k,
        num_tokens=slots.num_tokens,
        num_experts=(outer.num_experts, inner.num_experts),
        slots=SlotsOfTwoLevels(inner, slots.row),
        dropless=inner.capacity is None,
        # the choices of all slots (most of them may be empty), or of all tokens, whichever are fewer
        most_rows=smallest(math.prod(inner.expert.shape), weight.numel()),
    )


def of_choices(values: Tensor, inner: Routing, slot: Tensor) -> Tensor:
    """Values of the choices of level two for the assignments of the call, `(t k1 k2,)`, by the `slot` of each choice of
    level one; 0 where that has no slot."""
    return append(values.reshape(-1, inner.k or 1), 0)[slot].flatten()
