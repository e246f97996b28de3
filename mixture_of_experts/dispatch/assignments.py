"""Defines `Assignments`, which assign the tokens of a whole call to experts, regardless of groups and gating levels.

Axes: t (tokens per call), k (choices), a (assignments, t k for token choice), e (experts), b (groups), c (slots per
expert and group). Each pair of an expert and a group has one queue, so there are e b queues.

Gates return a `Routing` for each group, while experts receive `Assignments`. `join_groups` constructs assignments from
the routing of a single gate, and `join_levels` in `gating/levels.py` constructs them from both levels' routings.
`assign_experts` constructs them from experts and weights specified by the caller.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixture_of_experts.dispatch.queues import queue_up
from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.support.private_torch import is_exporting, statically_known_true
from mixture_of_experts.support.tracing import add_scaled, symbolic_min


class Assignments:
    """The assignments of one call. They specify which experts process each token, and the weights of the experts'
    outputs.

    This class is neither a pytree nor a dataclass, because FSDP2's mixed precision would otherwise cast its tensors,
    although the weights must remain in float32.

    Attributes:
        stored_expert: `(a,)` int64, the expert of each assignment, or None for two levels, because experts are then
            derived from the slots. The expert is arbitrary for assignments that are not kept.
        weight: `(a,)`, the weight of each assignment, which is 0 for assignments that are not kept.
        kept: `(a,)` bool mask of the assignments that experts compute. In addition to the assignments that are kept in
            the routing, the mask includes computed padding.
        sent: `(a,)` bool mask of the assignments in the experts' queues. If the capacity is limited, some of them may
            not be kept. For two levels, `sent` equals `kept`, because the capacities have already been applied.
        k: number of choices per token, or None for expert choice. Assignment i belongs to token i // k.
        token: `(a,)` int64, the token of each assignment for expert choice, otherwise None.
        num_tokens: number of tokens, t.
        expert_dims: number of experts, or the numbers of outer and inner experts for two levels.
        dropless: whether the assignments do not use slots. This is the case if the gate is dropless. It is also the
            case for packed rows, because each document's capacity has already been applied to `kept`.
        routing: the routing that assigned the slots. For two levels, this is the routing of the level-two gate. If
            there are no slots, `routing` is None, and each expert's queue is in token order.
        slot_of_outer_choice: `(t k1,)` int64, the slot of each level-one choice, or None for a single level. Each slot
            is a token at level two. For choices without a slot, the index is the number of slots.
    """

    stored_expert: Tensor | None
    weight: Tensor
    kept: Tensor
    sent: Tensor
    k: int | None
    token: Tensor | None
    num_tokens: int
    expert_dims: tuple[int, ...]
    dropless: bool
    routing: Routing | None
    slot_of_outer_choice: Tensor | None

    def __init__(
        self,
        expert: Tensor | None,
        weight: Tensor,
        kept: Tensor,
        sent: Tensor,
        *,
        k: int | None,
        token: Tensor | None = None,
        num_tokens: int,
        expert_dims: tuple[int, ...],
        dropless: bool = True,
        routing: Routing | None = None,
        slot_of_outer_choice: Tensor | None = None,
    ) -> None:
        self.stored_expert, self.weight, self.kept, self.sent = expert, weight, kept, sent
        self.k, self.token, self.num_tokens, self.expert_dims = k, token, num_tokens, expert_dims
        self.dropless, self.routing, self.slot_of_outer_choice = dropless, routing, slot_of_outer_choice

    @property
    def expert(self) -> Tensor:
        """The expert of each assignment, as an int64 tensor `(a,)`. Experts are in outer-major order if there are two
        levels. Experts are arbitrary for assignments that are not kept."""
        return self.locate()[0] // self.queues_per_expert if self.stored_expert is None else self.stored_expert

    @property
    def queues_per_expert(self) -> int:
        """The number of queues per expert. Queue i b + g belongs to expert i and group g."""
        return 1 if self.routing is None else self.routing.expert.shape[-2]

    @property
    def slots_per_queue(self) -> int:
        """The number of slots per queue, which is the number of tokens if the capacity is not limited."""
        return self.num_tokens if self.routing is None else self.routing.slots_per_queue

    @property
    def num_slots(self) -> int:
        """The total number of slots of all experts."""
        return math.prod(self.expert_dims) * self.queues_per_expert * self.slots_per_queue

    @property
    def max_rows(self) -> int:
        """An upper bound on the number of kept assignments. The bound is at most a."""
        if self.slot_of_outer_choice is None or self.routing is None:
            return self.weight.shape[0]
        # use the smaller count: the choices of all slots (most may be empty), or the choices of all tokens
        return symbolic_min(math.prod(self.routing.expert.shape), self.weight.shape[0])

    def locate(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queue of each assignment `(a,)`, its position in the queue `(a,)`, and the number of rows that
        each queue needs `(e b,)`. Queues and positions are arbitrary for assignments that are not kept."""
        if self.routing is None:
            assert self.stored_expert is not None
            expert, k = self.stored_expert, self.k or 1  # with priority "token", the order does not depend on k
            queues = queue_up(expert, self.kept, math.prod(self.expert_dims), k, "token")
            return expert, queues.position, queues.length
        length = count_queue_rows(self.routing)
        if self.slot_of_outer_choice is None:
            return flatten_queue_index(self.routing), self.routing.position.flatten(), length
        slot = self.find_slots()
        queue = (slot // self.slots_per_queue).clamp(0, length.shape[0] - 1)
        return queue, add_scaled(slot, queue, -self.slots_per_queue), length

    def find_slots(self) -> Tensor:
        """Return the index of each assignment's slot among all experts' slots, as an int64 tensor `(a,)`. Slots are
        arbitrary for assignments that are not kept."""
        if self.routing is None:
            queue, position, _ = self.locate()
        else:
            queue, position = flatten_queue_index(self.routing), self.routing.position.flatten()
        slot = add_scaled(position, queue, self.slots_per_queue)
        if self.routing is None or self.slot_of_outer_choice is None:
            return slot
        return gather_choices(slot, self.routing.k, self.slot_of_outer_choice)

    def prefers_rows(self) -> bool:
        """Return whether rows without gaps are preferable to slots. This is the case if the call is dropless or is
        guaranteed to have fewer rows than slots. The `cpu` implementation never uses slots and does not call this
        method."""
        if self.dropless:
            return True
        if is_exporting() or self.k is None:
            return False
        # in a traced graph, the result must not depend on a dynamic length
        return statically_known_true(self.weight.shape[0] < self.num_slots)


def assign_experts(expert: Tensor, weight: Tensor, num_experts: int) -> Assignments:
    """Create assignments from experts and weights `(t, k)`. An expert id outside the range from 0 to e - 1 means that
    no choice is made."""
    kept = (expert >= 0) & (expert < num_experts)
    (t, k), expert, weight = expert.shape, torch.where(kept, expert, 0), torch.where(kept, weight, 0)
    kept = kept.flatten()
    return Assignments(expert.flatten(), weight.flatten(), kept, kept, k=k, num_tokens=t, expert_dims=(num_experts,))


def keep_first_experts(assignments: Assignments, num_experts: int) -> Assignments:
    """Return a copy of the assignments in which only assignments to the first `num_experts` experts are kept."""
    kept = assignments.kept & (assignments.expert < num_experts)
    expert, weight = torch.where(kept, assignments.expert, 0), torch.where(kept, assignments.weight, 0)
    k, token, t = assignments.k, assignments.token, assignments.num_tokens
    return Assignments(expert, weight, kept, kept, k=k, token=token, num_tokens=t, expert_dims=(num_experts,))


def join_groups(routing: Routing, *, in_slots: bool = False) -> Assignments:
    """Return the assignments for the routing of a single gate.

    Assignments occupy slots if the capacity is limited, except in packed rows, where the capacity applies to each
    document. If `in_slots` is set, they always occupy slots. The implementation determines whether experts process
    slots or rows.
    """
    dropless = routing.capacity is None or routing.segments is not None
    weight, kept, sent, token = routing.weight, routing.kept, routing.sent, routing.token_index
    if routing.padding_weight is not None:
        computed = routing.padding_weight != 0
        weight, kept, sent = weight + routing.padding_weight, kept | computed, sent | computed
    if token is not None:  # convert indices within groups to indices within the call
        token = (token + torch.arange(token.shape[0], device=token.device).unsqueeze(-1) * routing.num_tokens).flatten()
    return Assignments(
        routing.expert.flatten(),
        weight.flatten(),
        kept.flatten(),
        sent.flatten(),
        k=routing.k,
        token=token,
        num_tokens=math.prod(routing.expert.shape[:-1]) * routing.num_tokens,
        expert_dims=(routing.num_experts,),
        dropless=dropless,
        routing=None if dropless and not in_slots else routing,
    )


def gather_choices(values: Tensor, k: int | None, slot_of_outer_choice: Tensor) -> Tensor:
    """Return the values `(t k1 k2,)` of the level-two choices that are made for the slot of each level-one choice. The
    values are 0 for choices without a slot."""
    return append(values.reshape(-1, k or 1), 0)[slot_of_outer_choice].flatten()


def flatten_queue_index(routing: Routing) -> Tensor:
    """Return each assignment's queue, `(router e + expert) b + group`, as an int64 tensor `(a,)`."""
    *outer, b, a = routing.expert.shape
    e, routers, device = routing.num_experts, math.prod(outer), routing.expert.device
    first = torch.arange(b, device=device).view(-1, 1)  # index of expert 0's queue
    if outer:
        first = add_scaled(first, torch.arange(routers, device=device).view(-1, 1, 1), e * b)
    return add_scaled(first, routing.expert.reshape(routers, b, a), b).flatten()


def count_queue_rows(routing: Routing) -> Tensor:
    """Return the number of occupied slots in each queue, as an int64 tensor `(e b,)`. This is the number of rows that
    the queue needs."""
    return routing.count_occupied_slots().transpose(-2, -1).flatten()


def append(values: Tensor, last: int) -> Tensor:
    """Append `last` to `values`. The index of this element means "none"."""
    return torch.cat([values, values.new_full((1, *values.shape[1:]), last)])
