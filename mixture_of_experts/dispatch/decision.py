"""`Decision`: the assignments of a whole call, by which tokens move.

Axes: t tokens of the call, k choices, a assignments (t k for token choice), r rows, e experts, b groups, c slots of an
expert for each group.

Gates tell what they decide by groups (`Routing`). Experts read a `Decision`, which knows no groups and no levels:
`decision_of` makes it from one gate, `compose` from the gates of two levels, `decision_on` from experts and weights
that somebody else chose.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixture_of_experts.dispatch.plan import Plan, append, tokens_of
from mixture_of_experts.dispatch.queues import queue_up
from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.support.private_torch import is_exporting, statically_known_true
from mixture_of_experts.support.tracing import add_scaled, symbolic_min


class Decision:
    """The assignments of a call: which expert computes which token, with which weight.

    It is no pytree and no dataclass: FSDP2's mixed precision casts all tensors that it finds in such arguments, and
    would cast a router's weights too.

    Attributes:
        stored_expert: `(a,)` int64, expert of each assignment, any number where it is not kept; None: it follows from
            the queues.
        weight: `(a,)`, weight of each assignment; 0 where it is not kept.
        kept: `(a,)` bool, the assignments that experts compute.
        chosen: `(a,)` bool, the assignments that queue; with limited capacity some of them are not kept.
        k: choices of a token: assignment i belongs to token i // k; None for expert choice.
        token: `(a,)` int64, token of each assignment in expert choice; None otherwise.
        num_tokens: t.
        num_experts: e, as a tuple (two numbers for two levels).
        dropless: whether experts compute every assignment that a gate made.
        routing: of the gate whose slots the assignments take, level two's of two levels; None if they queue at their
            experts in the order of tokens.
        slot: `(t k1,)` int64, of two levels: the slot of each choice of level one, which is a token of level two; the
            number of slots for a choice without one. None for one level.
    """

    stored_expert: Tensor | None
    weight: Tensor
    kept: Tensor
    chosen: Tensor
    k: int | None
    token: Tensor | None
    num_tokens: int
    num_experts: tuple[int, ...]
    dropless: bool
    routing: Routing | None
    slot: Tensor | None

    def __init__(
        self,
        expert: Tensor | None,
        weight: Tensor,
        kept: Tensor,
        chosen: Tensor,
        *,
        k: int | None,
        token: Tensor | None = None,
        num_tokens: int,
        num_experts: tuple[int, ...],
        dropless: bool = True,
        routing: Routing | None = None,
        slot: Tensor | None = None,
    ) -> None:
        self.stored_expert, self.weight, self.kept, self.chosen = expert, weight, kept, chosen
        self.k, self.token, self.num_tokens, self.num_experts = k, token, num_tokens, num_experts
        self.dropless, self.routing, self.slot = dropless, routing, slot

    @property
    def expert(self) -> Tensor:
        """`(a,)` int64, expert of each assignment, outer-major for two levels; any number where it is not kept."""
        return self.queues()[0] // self.queues_per_expert if self.stored_expert is None else self.stored_expert

    @property
    def queues_per_expert(self) -> int:
        """The queues of an expert: queue i b + g is that of expert i and group g."""
        return 1 if self.routing is None else self.routing.expert.shape[-2]

    @property
    def capacity(self) -> int:
        """The slots of a queue: as many as tokens if the assignments take none."""
        return self.num_tokens if self.routing is None else self.routing.slots

    @property
    def num_slots(self) -> int:
        """The number of slots of all experts."""
        return math.prod(self.num_experts) * self.queues_per_expert * self.capacity

    @property
    def most_rows(self) -> int:
        """An upper bound on the rows without gaps; at most a."""
        if self.slot is None or self.routing is None:
            return self.weight.shape[0]
        # the choices of all slots (most of them may be empty), or of all tokens, whichever are fewer
        return symbolic_min(math.prod(self.routing.expert.shape), self.weight.shape[0])

    def queues(self) -> tuple[Tensor, Tensor, Tensor]:
        """The queue `(a,)` of each assignment and its position `(a,)` there, any number where it is not kept; and how
        many rows each queue needs, `(e b,)`."""
        if self.routing is None:
            assert self.stored_expert is not None
            expert, k = self.stored_expert, self.k or 1  # in the order in which they are stored
            queues = queue_up(expert, self.kept, math.prod(self.num_experts), k, "token")
            return expert, queues.position, queues.length
        length = rows_of_queues(self.routing)
        if self.slot is None:
            return queue_of(self.routing), self.routing.slot.flatten(), length
        cell = self._cell()
        queue = (cell // self.capacity).clamp(0, length.shape[0] - 1)
        return queue, add_scaled(cell, queue, -self.capacity), length

    def _cell(self) -> Tensor:
        """`(a,)` int64, the slot of each assignment among those of the call; any number where it is not kept."""
        if self.routing is None:
            queue, position, _ = self.queues()
        else:
            queue, position = queue_of(self.routing), self.routing.slot.flatten()
        cell = add_scaled(position, queue, self.capacity)
        return cell if self.slot is None or self.routing is None else of_choices(cell, self.routing, self.slot)

    def rows_per_expert(self, length: Tensor) -> Tensor:
        """`(e,)` int64, the rows that each expert needs, from those that its queues need, `(e b,)`."""
        by_expert = length.view(math.prod(self.num_experts), -1)
        return by_expert.flatten() if statically_known_true(by_expert.shape[1] == 1) else by_expert.sum(dim=-1)

    def in_slots(self) -> Plan:
        """The plan whose rows are all slots, `(e, b, c)`; some are empty. Experts that read slots take it."""
        return self._plan(self._cell(), self.num_slots, None)

    def without_gaps(self, spare: int = 0) -> Plan:
        """The plan whose rows lie sorted by expert, without empty rows between them, for grouped products. The last
        `spare` rows are never used: experts may fill all others."""
        queue, position, length = self.queues()
        row = (length.cumsum(0) - length).gather(0, queue) + position
        return self._plan(row, self.most_rows + spare, self.rows_per_expert(length))

    def with_rows(
        self, queue: Tensor, position: Tensor, length: Tensor, rows_per_expert: Tensor, num_rows: int
    ) -> Plan:
        """The plan that gives each expert a number of rows of the caller's choice, for batched products; some of them
        are empty.

        Args:
            queue, position, length: what `queues` returned.
            rows_per_expert: `(e,)` int64, at least `rows_per_expert(length)`.
            num_rows: all rows, at least the sum of `rows_per_expert`.
        """
        start = rows_per_expert.cumsum(0) - rows_per_expert
        by_expert = length.view(start.shape[0], -1)
        if not statically_known_true(by_expert.shape[1] == 1):
            start = (start.unsqueeze(-1) + by_expert.cumsum(dim=-1) - by_expert).flatten()
        return self._plan(start.gather(0, queue) + position, num_rows, rows_per_expert)

    def _plan(self, row: Tensor, num_rows: int, rows_per_expert: Tensor | None) -> Plan:
        """The plan in which kept assignments have these rows."""
        row = torch.where(self.kept, row, num_rows)
        number = row.shape[0]
        empty = row.new_full((num_rows + 1,), number)
        assignment = empty.scatter(0, row, torch.arange(number, device=row.device))[:num_rows]  # the last is nobody's
        if self.token is None:
            token = tokens_of(assignment, self.k or 1)
        else:
            token = append(self.token, self.num_tokens)[assignment]
        sizes = (self.k, self.num_tokens, num_rows, self.num_experts)
        return Plan(row, assignment, self.weight, token, rows_per_expert, *sizes)

    def prefers_rows(self) -> bool:
        """Whether rows without gaps are the better layout: dropless, or surely fewer than slots."""
        if self.dropless:
            return True
        if is_exporting() or self.k is None:
            return False
        # in a traced graph the answer must not depend on a dynamic length
        return statically_known_true(self.weight.shape[0] < self.num_slots)


def decision_on(expert: Tensor, weight: Tensor, num_experts: int) -> Decision:
    """The decision from given experts and weights `(t, k)`; an id outside 0 to e - 1 means that nobody computes it."""
    kept = (expert >= 0) & (expert < num_experts)
    (t, k), expert, weight = expert.shape, torch.where(kept, expert, 0), torch.where(kept, weight, 0)
    kept = kept.flatten()
    return Decision(expert.flatten(), weight.flatten(), kept, kept, k=k, num_tokens=t, num_experts=(num_experts,))


def of_first_experts(decision: Decision, num_experts: int) -> Decision:
    """The decision without the assignments to experts behind the first `num_experts`."""
    kept = decision.kept & (decision.expert < num_experts)
    expert, weight = torch.where(kept, decision.expert, 0), torch.where(kept, decision.weight, 0)
    k, token, num_tokens = decision.k, decision.token, decision.num_tokens
    return Decision(expert, weight, kept, kept, k=k, token=token, num_tokens=num_tokens, num_experts=(num_experts,))


def decision_of(routing: Routing, *, in_slots: bool = False) -> Decision:
    """The decision of one gate; a limited capacity has slots, and so has a dropless gate if they are asked for."""
    weight, kept, chosen, token = routing.weight, routing.kept, routing.chosen, routing.token_index
    if routing.uncounted is not None:
        computed = routing.uncounted != 0
        weight, kept, chosen = weight + routing.uncounted, kept | computed, chosen | computed
    if token is not None:  # from indices in groups to those in the call
        token = (token + torch.arange(token.shape[0], device=token.device).unsqueeze(-1) * routing.num_tokens).flatten()
    return Decision(
        routing.expert.flatten(),
        weight.flatten(),
        kept.flatten(),
        chosen.flatten(),
        k=routing.k,
        token=token,
        num_tokens=math.prod(routing.expert.shape[:-1]) * routing.num_tokens,
        num_experts=(routing.num_experts,),
        dropless=routing.capacity is None,
        routing=routing if in_slots or routing.capacity is not None else None,
    )


def plan_slots_of(routing: Routing) -> Plan:
    """The plan of one gate in slots `(..., e, b, c)`; c is n for a dropless gate."""
    return decision_of(routing, in_slots=True).in_slots()


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
    kept = of_choices(inner.kept, inner, slots.row)
    return Decision(
        None,
        weight.flatten(),
        kept,
        kept,
        k=slots.k * inner.k,
        num_tokens=slots.num_tokens,
        num_experts=(outer.num_experts, inner.num_experts),
        dropless=inner.capacity is None,
        routing=inner,
        slot=slots.row,
    )


def of_choices(values: Tensor, inner: Routing, slot: Tensor) -> Tensor:
    """Values of the choices of level two for the assignments of the call, `(t k1 k2,)`, by the `slot` of each choice of
    level one; 0 where that has no slot."""
    return append(values.reshape(-1, inner.k or 1), 0)[slot].flatten()


def queue_of(routing: Routing) -> Tensor:
    """`(a,)` int64, the queue of each assignment of a gate: `(router e + expert) b + group`."""
    *outer, b, a = routing.expert.shape
    e, routers, device = routing.num_experts, math.prod(outer), routing.expert.device
    first = torch.arange(b, device=device).view(-1, 1)  # queue of expert 0
    if outer:
        first = add_scaled(first, torch.arange(routers, device=device).view(-1, 1, 1), e * b)
    return add_scaled(first, routing.expert.reshape(routers, b, a), b).flatten()


def rows_of_queues(routing: Routing) -> Tensor:
    """`(e b,)` int64, how many rows each queue of a gate needs: its occupied slots."""
    return routing.slots_held(routing.group_queues()).transpose(-2, -1).flatten()
