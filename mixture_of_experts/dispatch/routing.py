"""`Routing`, which every gate returns, and its dense views.

Axes: b groups (a sequence each, unless the layer has a `group_size`; outer experts stand before it: `...`),
n tokens of a group, e experts, c capacity, k choices of a token, a assignments of a group (n * k for token choice).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mixture_of_experts.dispatch.queues import Queues, queue_up
from mixture_of_experts.dispatch.segments import SEGMENT_IDS, Segments
from mixture_of_experts.support.private_torch import register_dataclass


# compared and hashed by identity: tensors have no single answer to ==
@dataclass(frozen=True, eq=False, kw_only=True)
class Routing:
    """What a gate decided: which token goes to which slot of which expert, with which weight.

    It moves no data. Losses and statistics read it, and `Assignments` are made from it to move tokens. Unpack it for
    the dense tensors of the papers and the balancing loss: `dispatch, combine, loss = routing`.

    An assignment is one choice of one token (in expert choice: one token of one expert).

    An assignment passes through three stages. `decide` returns the first two; a capacity may drop some of the sent:

        chosen    shares the token's weight
        sent      of the chosen, queues at its expert
        kept      of the sent, is computed: it has a slot, and a weight other than 0

    =============================  ======  ====  ====  ============================================
    choice of a token              chosen  sent  kept  where it comes from
    =============================  ======  ====  ====  ============================================
    computed                       yes     yes   yes
    dropped                        yes     yes   no    its expert's queue is longer than the capacity
    of weight 0, with a capacity   yes     yes   no    it holds a slot in which nothing is computed
    of weight 0, dropless          yes     no    no
    weighed without computation    yes     no    no    `Choices.sent`; `given_experts` of -2 - i
    not made                       no      no    no    `Choices.chosen`; `given_experts` of -1
    of a token that is left out    any     no    no    mask; importance
    of computed padding            any     no    no    `counted=`; its weight is `padding_weight`
    =============================  ======  ====  ====  ============================================

    `chosen` is what `decide` returned: masks and importance change only the two others. Experts compute what is kept,
    and computed padding. Statistics read `sent` and `kept`, records `chosen` and `kept`.

    Attributes:
        expert: `(..., b, a)` int64, expert of each assignment.
        kept: `(..., b, a)` bool, the assignments that the expert computes, without computed padding.
        weight: `(..., b, a)` float32 (float64 in a float64 module), weight of the expert's output; 0 where not kept.
        probs: `(..., b, n, e)` the router's probabilities (normalised scores).
        num_tokens, num_experts: n and e.
        capacity: c, slots of an expert for each group; None if dropless.
        k: choices of a token: assignment i belongs to token i // k; None for expert choice.
        sent: `(..., b, a)` bool, the assignments that queue at their expert.
        queues: positions and lengths of the queues of each group before capacity; None if dropless (`find_queues` then
            computes them).
        token_index: `(..., b, a)` int64, token of each assignment in expert choice; None otherwise.
        limit: `(..., b)` int64, each group's own capacity where a mask makes it smaller; None otherwise. With
            `segments` it is that of each document, `(b n,)`.
        mask: `(..., b, n)` bool, the tokens that are not padding; None if all are.
        losses: every loss by name, 0-dim, without coefficients: "balance" and "z", which are 0 where a gate reports
            none, and a gate's own, such as the parts of its balancing loss.
        primary: `(..., b, a)` bool, the assignments that count as first choices in a second level; None: the first
            assignment of each token.
        padding_weight: `(..., b, a)`, without gradient: the weights of padding that is computed, 0 at other tokens;
            None if there is none.
        chosen: `(..., b, a)` bool, the assignments that share their token's weight; None if all do.
        state: `(..., b, n, anything)`, passed to the router of the next layer; None for most routers.
        segments: the documents of packed rows, each of which is a group; None if each row is a group. With a limited
            capacity there are then no slots: `kept` says what each document's capacity leaves.

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
        """0-dim, the balancing loss, which a layer's `loss_coef` weighs: `losses["balance"]`."""
        return self.losses["balance"]

    @property
    def z_loss(self) -> Tensor:
        """0-dim, the router z-loss, which a layer's `z_loss_coef` weighs: `losses["z"]`."""
        return self.losses["z"]

    def __iter__(self) -> Iterator[Tensor]:
        combine = self.combine_tensor()
        yield occupied(combine)
        yield combine
        yield self.balance_loss

    @property
    def token(self) -> Tensor:
        """`(..., b, a)` int64, token of each assignment, an index into the group."""
        if self.token_index is not None:
            return self.token_index
        assert self.k is not None
        token = torch.arange(self.num_tokens, device=self.expert.device).repeat_interleave(self.k)
        return token.expand_as(self.expert)

    @property
    def position(self) -> Tensor:
        """`(..., b, a)` int64, position of each assignment in its expert's queue of this group, and so its slot; any
        number where not `kept`."""
        return self.find_queues().position

    @property
    def queue_length(self) -> Tensor:
        """`(..., b, e)` int64, length of each expert's queue before capacity; `(b n, e)` for packed rows, by
        document."""
        if self.segments is not None:
            choices = (*self.segments.document.shape, self.k or 1)
            expert, sent = self.expert.view(choices), self.sent.view(choices)
            return self.segments.count_experts(expert, sent, self.num_experts)
        if self.queues is not None:
            return self.queues.length
        none = self.expert.new_zeros(*self.expert.shape[:-1], self.num_experts)
        return none.scatter_add(-1, self.expert, self.sent.to(none.dtype))

    def find_queues(self) -> Queues:
        """Return the queues of each group; for a dropless gate they are computed here, in the order of tokens."""
        if self.queues is not None:
            return self.queues
        if self.segments is not None and self.capacity is not None:
            raise ValueError(
                f"a Routing of packed rows ({SEGMENT_IDS}) with a limited capacity has no slots, and so no dense "
                "tensors: read its expert, kept and weight, or pass each document as a row of its own, with mask="
            )
        assert self.k is not None
        return queue_up(self.expert, self.sent, self.num_experts, self.k, "token")

    @property
    def importance(self) -> Tensor:
        """`(..., b, a)`, importance of each assignment in a second level: 1 for a primary one, 0.5 for others,
        0 if not kept. Expert choice raises ValueError."""
        if self.k is None:
            raise ValueError("expert choice has no importance for a second level: its tokens have no first choice")
        primary = self.primary
        if primary is None:
            primary = torch.arange(self.kept.shape[-1], device=self.kept.device) % self.k == 0
        return (self.kept.to(self.weight.dtype) + (self.kept & primary)) * 0.5

    @property
    def slots_per_queue(self) -> int:
        """Slots of an expert for each group: the capacity, or n if dropless."""
        return self.num_tokens if self.capacity is None else self.capacity

    def count_occupied_slots(self) -> Tensor:
        """`(..., b, e)` int64, the occupied slots of each queue: its length, limited by the capacity."""
        length = self.find_queues().length
        occupied = length if self.capacity is None else length.clamp(max=self.capacity)
        return occupied if self.limit is None else torch.minimum(occupied, self.limit.unsqueeze(-1))

    def combine_tensor(self) -> Tensor:
        """Return the papers' combine tensor `(..., b, n, e, c)`: the weight of slot c of expert e for token n."""
        n, e, c = self.num_tokens, self.num_experts, self.slots_per_queue
        cell = torch.where(self.kept, (self.token * e + self.expert) * c + self.position, 0)
        dense = self.weight.new_zeros(*self.weight.shape[:-1], n * e * c)
        # an assignment that is not kept adds its weight, 0, to cell 0
        return dense.scatter_add(-1, cell, self.weight).unflatten(-1, (n, e, c))

    def dispatch_tensor(self) -> Tensor:
        """Return the papers' dispatch tensor `(..., b, n, e, c)`: 1 where the combine tensor is not 0."""
        return occupied(self.combine_tensor())


def occupied(combine: Tensor) -> Tensor:
    """1 where a combine tensor is not 0."""
    return (combine != 0).to(combine.dtype)


#: fields under their names in exported programs, as earlier versions wrote them, in which "chosen" was what is now sent
EXPORTED_NAMES = {"sent": "chosen", "mask": "real", "padding_weight": "uncounted", "chosen": "weighed"}
register_dataclass(Routing, "mixture_of_experts.Routing", EXPORTED_NAMES)


def check_routing(name: str, routing: object) -> Routing:
    """Return `routing`, what a gate returned; TypeError if it is no `Routing`."""
    if not isinstance(routing, Routing):
        raise TypeError(
            f"{name} must return a Routing, got {type(routing).__name__}: derive it from TokenChoiceGate, whose "
            "`decide` returns experts and weights"
        )
    return routing
