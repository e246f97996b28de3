"""Defines `Routing`, which all gates return, and its dense tensors.

Axes: b (groups, which are sequences unless the layer has a `group_size`, preceded by outer experts, `...`), n (tokens
per group), e (experts), c (capacity), k (choices per token), a (assignments per group, n * k for token choice).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mixture_of_experts.dispatch.queues import Queues, queue_up
from mixture_of_experts.dispatch.segments import SEGMENT_IDS, Segments
from mixture_of_experts.support.private_torch import register_dataclass


# compared and hashed by identity, because == does not return a single bool for tensors
@dataclass(frozen=True, eq=False, kw_only=True)
class Routing:
    """A gate's routing decision, which specifies the expert, slot and weight of each assignment.

    A routing does not move tokens. It is used to compute losses and statistics, and to construct `Assignments`, which
    move tokens. Unpack it to get the balancing loss and the dense tensors described in the papers:
    `dispatch, combine, loss = routing`.

    An assignment is a choice made by a token or, for expert choice, by an expert. Each assignment passes through three
    stages. `decide` determines the first two. Assignments that are sent may be dropped if the capacity is limited::

        chosen    the assignment shares the token's weight
        sent      it is chosen and queues at its expert
        kept      it is sent and computed, because it has a slot and a nonzero weight

    The following table shows which stages each choice reaches::

        =============================  ======  ====  ====  ============================================
        choice of a token              chosen  sent  kept  reason
        =============================  ======  ====  ====  ============================================
        computed                       yes     yes   yes
        dropped                        yes     yes   no    the expert's queue is longer than the capacity
        of weight 0, with a capacity   yes     yes   no    it occupies a slot in which nothing is computed
        of weight 0, dropless          yes     no    no
        weighed without computation    yes     no    no    `Choices.sent`; `given_experts` of -2 - i
        not made                       no      no    no    `Choices.chosen`; `given_experts` of -1
        of a token that is excluded    any     no    no    mask; importance
        of computed padding            any     no    no    `counted=`; its weight is `padding_weight`
        =============================  ======  ====  ====  ============================================

    `chosen` is the result of `decide`, while masks and importance affect only `sent` and `kept`. Experts compute both
    kept assignments and computed padding. Statistics use `sent` and `kept`, and records use `chosen` and `kept`.

    Attributes:
        expert: `(..., b, a)` int64, the expert of each assignment.
        kept: `(..., b, a)` bool mask of the assignments that experts compute, excluding computed padding.
        weight: `(..., b, a)` float32 (float64 in a float64 module), the weight of the expert's output, which is 0 for
            assignments that are not kept.
        probs: `(..., b, n, e)`, the router probabilities (normalized scores).
        num_tokens, num_experts: number of tokens per group, n, and number of experts, e.
        capacity: number of slots per expert and group, c, or None if the gate is dropless.
        k: number of choices per token, or None for expert choice. Assignment i belongs to token i // k.
        sent: `(..., b, a)` bool mask of the assignments in the experts' queues.
        queues: the positions in each group's queues and the queue lengths before the capacity is applied, or None if
            the gate is dropless. For dropless gates, `find_queues` computes the queues on request, and
            `Assignments.locate` sorts rows by expert.
        token_index: `(..., b, a)` int64, the token of each assignment for expert choice, otherwise None.
        limit: `(..., b)` int64, the capacity of each group if it is reduced by a mask, otherwise None. If `segments` is
            set, this is the capacity of each document, `(b n,)`.
        mask: `(..., b, n)` bool mask of the real tokens, or None if there is no padding.
        losses: 0-dim losses, keyed by name and not multiplied by coefficients. "balance" and "z" are always present,
            and are 0 if the gate does not report them. Gates may report additional losses, such as the parts of their
            balancing loss.
        primary: `(..., b, a)` bool mask of the assignments that count as first choices at level two. If None, the first
            assignment of each token counts.
        padding_weight: `(..., b, a)`, detached weights of computed padding, or None if there is none. The weights are 0
            for all other tokens.
        chosen: `(..., b, a)` bool mask of the assignments that share their token's weight, or None if all do.
        state: `(..., b, n, anything)`, the state passed to the next layer's router, or None if the router has no state.
        segments: the documents in packed rows, or None if rows are not packed. Each document is a group. If `segments`
            is set and the capacity is limited, there are no slots, and `kept` marks the assignments within their
            document's capacity.

    Example:
        >>> import torch
        >>> from mixture_of_experts import Top2Gating
        >>> gate = Top2Gating(dim=8, num_gates=4)
        >>> dispatch, combine, loss = gate(torch.randn(2, 6, 8))
        >>> dispatch.shape
        torch.Size([2, 6, 4, 4])
    """

    expert: Tensor
    kept: Tensor
    weight: Tensor
    probs: Tensor
    num_tokens: int
    num_experts: int
    capacity: int | None
    k: int | None
    sent: Tensor
    queues: Queues | None = None
    token_index: Tensor | None = None
    limit: Tensor | None = None
    mask: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    primary: Tensor | None = None
    padding_weight: Tensor | None = None
    chosen: Tensor | None = None
    state: Tensor | None = None
    segments: Segments | None = None

    def __post_init__(self) -> None:
        if missing := [name for name in ("balance", "z") if name not in self.losses]:
            zeros = {name: self.probs.new_zeros(()) for name in missing}
            object.__setattr__(self, "losses", {**zeros, **self.losses})

    @property
    def balance_loss(self) -> Tensor:
        """The 0-dim balancing loss, `losses["balance"]`. A layer multiplies it by `loss_coef`."""
        return self.losses["balance"]

    @property
    def z_loss(self) -> Tensor:
        """The 0-dim router z-loss, `losses["z"]`. A layer multiplies it by `z_loss_coef`."""
        return self.losses["z"]

    def __iter__(self) -> Iterator[Tensor]:
        combine = self.combine_tensor()
        yield occupied(combine)
        yield combine
        yield self.balance_loss

    @property
    def token(self) -> Tensor:
        """The token of each assignment, as an int64 index `(..., b, a)` into the tokens of its group."""
        if self.token_index is not None:
            return self.token_index
        assert self.k is not None
        token = torch.arange(self.num_tokens, device=self.expert.device).repeat_interleave(self.k)
        return token.expand_as(self.expert)

    @property
    def position(self) -> Tensor:
        """The position of each assignment in the queue of its expert and group, as an int64 tensor `(..., b, a)`. This
        position is the assignment's slot. Positions are arbitrary for assignments that are not `kept`."""
        return self.find_queues().position

    @property
    def queue_length(self) -> Tensor:
        """The length of each expert's queue before the capacity is applied, as an int64 tensor `(..., b, e)`. For
        packed rows, the lengths have the shape `(b n, e)`, with one row per document."""
        if self.segments is not None:
            choices = (*self.segments.document.shape, self.k or 1)
            expert, sent = self.expert.view(choices), self.sent.view(choices)
            return self.segments.count_experts(expert, sent, self.num_experts)
        if self.queues is not None:
            return self.queues.length
        none = self.expert.new_zeros(*self.expert.shape[:-1], self.num_experts)
        return none.scatter_add(-1, self.expert, self.sent.to(none.dtype))

    def find_queues(self) -> Queues:
        """Return the queues of each group. For a dropless gate, compute the queues in token order."""
        if self.queues is not None:
            return self.queues
        if self.segments is not None and self.capacity is not None:
            raise ValueError(
                f"packed rows ({SEGMENT_IDS}) with a limited capacity have no slots, so there are no dense tensors. "
                "Use `expert`, `kept` and `weight` instead, or pass each document as a separate row with mask="
            )
        assert self.k is not None
        return queue_up(self.expert, self.sent, self.num_experts, self.k, "token")

    @property
    def importance(self) -> Tensor:
        """The importance of each assignment at level two, `(..., b, a)`. It is 1 if the assignment is primary, 0 if it
        is not kept, and 0.5 otherwise. Raises ValueError for expert choice."""
        if self.k is None:
            raise ValueError(
                "expert-choice routing does not support a second level, because tokens have no first choice"
            )
        primary = self.primary
        if primary is None:
            primary = torch.arange(self.kept.shape[-1], device=self.kept.device) % self.k == 0
        return (self.kept.to(self.weight.dtype) + (self.kept & primary)) * 0.5

    @property
    def slots_per_queue(self) -> int:
        """The number of slots per expert and group, which is the capacity, or n if the gate is dropless."""
        return self.num_tokens if self.capacity is None else self.capacity

    def count_occupied_slots(self) -> Tensor:
        """Return the number of occupied slots in each queue, as an int64 tensor `(..., b, e)`. This is the queue's
        length, limited by the capacity."""
        length = self.find_queues().length
        occupied = length if self.capacity is None else length.clamp(max=self.capacity)
        return occupied if self.limit is None else torch.minimum(occupied, self.limit.unsqueeze(-1))

    def combine_tensor(self) -> Tensor:
        """Return the combine tensor `(..., b, n, e, c)` described in the papers. It contains the weight of expert e's
        slot c for token n."""
        n, e, c = self.num_tokens, self.num_experts, self.slots_per_queue
        cell = torch.where(self.kept, (self.token * e + self.expert) * c + self.position, 0)
        dense = self.weight.new_zeros(*self.weight.shape[:-1], n * e * c)
        # assignments that are not kept add their weight of 0 to cell 0
        return dense.scatter_add(-1, cell, self.weight).unflatten(-1, (n, e, c))

    def dispatch_tensor(self) -> Tensor:
        """Return the dispatch tensor `(..., b, n, e, c)` described in the papers, which is 1 where the combine tensor
        is nonzero."""
        return occupied(self.combine_tensor())


def occupied(combine: Tensor) -> Tensor:
    """Return 1 where a combine tensor is nonzero, and 0 elsewhere."""
    return (combine != 0).to(combine.dtype)


#: field names in programs exported by earlier versions, in which "chosen" denoted what is now `sent`
EXPORTED_NAMES = {"sent": "chosen", "mask": "real", "padding_weight": "uncounted", "chosen": "weighed"}
register_dataclass(Routing, "mixture_of_experts.Routing", EXPORTED_NAMES)


def check_routing(name: str, routing: object) -> Routing:
    """Check that a gate returned a `Routing`, and return it."""
    if not isinstance(routing, Routing):
        raise TypeError(
            f"{name} must return a Routing, got {type(routing).__name__}; subclass TokenChoiceGate, and return experts "
            "and weights from `decide`"
        )
    return routing
