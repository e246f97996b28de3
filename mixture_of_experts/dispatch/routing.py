"""`Routing`, the result of all gates, and its dense tensors.

Axes: b groups (sequences, unless the layer has a `group_size`; preceded by outer experts, `...`), n tokens per group,
e experts, c capacity, k choices per token, a assignments per group (n * k for token choice).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mixture_of_experts.dispatch.queues import Queues, queue_up
from mixture_of_experts.dispatch.segments import SEGMENT_IDS, Segments
from mixture_of_experts.support.private_torch import register_dataclass


# compared and hashed by identity, because == of tensors is not a single bool
@dataclass(frozen=True, eq=False, kw_only=True)
class Routing:
    """The routing decision of a gate: the expert, slot and weight of each assignment of a token.

    A routing does not move tokens. Losses and statistics read it, and `Assignments`, which move tokens, are constructed
    from it. Unpack it to get the dense tensors of the papers and the balancing loss: `dispatch, combine, loss =
    routing`.

    An assignment is one choice of one token, or in expert choice one token of one expert. Each assignment passes
    through three stages. `decide` returns the first two, and a limited capacity may drop assignments that are sent:

        chosen    the assignment shares the token's weight
        sent      it is chosen and queues at its expert
        kept      it is sent and computed, because it has a slot and a nonzero weight

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

    `chosen` is the result of `decide`, while masks and importance change only `sent` and `kept`. Experts compute
    assignments that are kept, and computed padding. Statistics read `sent` and `kept`; records read `chosen` and
    `kept`.

    Attributes:
        expert: `(..., b, a)` int64, expert of each assignment.
        kept: `(..., b, a)` bool, which assignments the expert computes, without computed padding.
        weight: `(..., b, a)` float32 (float64 in a float64 module), weight of the expert's output; 0 where not kept.
        probs: `(..., b, n, e)` probabilities of the router (normalized scores).
        num_tokens, num_experts: n and e.
        capacity: c, slots per expert and group; None if dropless.
        k: number of choices per token, where assignment i belongs to token i // k; None for expert choice.
        sent: `(..., b, a)` bool, which assignments queue at their expert.
        queues: positions and lengths of the queues of each group before capacity is applied; None if dropless, where
            `find_queues` computes them for readers, and `Assignments.locate` sorts the rows of experts.
        token_index: `(..., b, a)` int64, token of each assignment in expert choice; None otherwise.
        limit: `(..., b)` int64, capacity of each group if a mask makes it smaller; None otherwise. With `segments`, the
            capacity of each document `(b n,)`.
        mask: `(..., b, n)` bool, which tokens are not padding; None if there is no padding.
        losses: 0-dim losses by name, without coefficients: "balance" and "z", which are 0 if the gate does not report
            them, and further losses of the gate, such as the parts of its balancing loss.
        primary: `(..., b, a)` bool, which assignments count as first choices in a second level; None for the first
            assignment of each token.
        padding_weight: `(..., b, a)` weights of computed padding without gradient, 0 for other tokens; None if there is
            no computed padding.
        chosen: `(..., b, a)` bool, which assignments share their token's weight; None if all do.
        state: `(..., b, n, anything)`, passed to the router of the next layer; None for most routers.
        segments: the documents of packed rows, each of which is a group; None if each row is a group. With segments and
            a limited capacity there are no slots, and `kept` marks the assignments within the capacity of their
            document.

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
        """The 0-dim balancing loss, `losses["balance"]`, whose coefficient is a layer's `loss_coef`."""
        return self.losses["balance"]

    @property
    def z_loss(self) -> Tensor:
        """The 0-dim router z-loss, `losses["z"]`, whose coefficient is a layer's `z_loss_coef`."""
        return self.losses["z"]

    def __iter__(self) -> Iterator[Tensor]:
        combine = self.combine_tensor()
        yield occupied(combine)
        yield combine
        yield self.balance_loss

    @property
    def token(self) -> Tensor:
        """`(..., b, a)` int64, token of each assignment as an index into the group."""
        if self.token_index is not None:
            return self.token_index
        assert self.k is not None
        token = torch.arange(self.num_tokens, device=self.expert.device).repeat_interleave(self.k)
        return token.expand_as(self.expert)

    @property
    def position(self) -> Tensor:
        """`(..., b, a)` int64, position of each assignment in its expert's queue of this group, which is its slot;
        arbitrary where not `kept`."""
        return self.find_queues().position

    @property
    def queue_length(self) -> Tensor:
        """`(..., b, e)` int64, length of each expert's queue before capacity is applied; `(b n, e)` by document for
        packed rows."""
        if self.segments is not None:
            choices = (*self.segments.document.shape, self.k or 1)
            expert, sent = self.expert.view(choices), self.sent.view(choices)
            return self.segments.count_experts(expert, sent, self.num_experts)
        if self.queues is not None:
            return self.queues.length
        none = self.expert.new_zeros(*self.expert.shape[:-1], self.num_experts)
        return none.scatter_add(-1, self.expert, self.sent.to(none.dtype))

    def find_queues(self) -> Queues:
        """Return the queues of each group. For a dropless gate, compute them in the order of tokens."""
        if self.queues is not None:
            return self.queues
        if self.segments is not None and self.capacity is not None:
            raise ValueError(
                f"packed rows ({SEGMENT_IDS}) with a limited capacity have no slots, so their Routing has no dense "
                "tensors. Use its `expert`, `kept` and `weight`, or pass each document as a separate row with mask="
            )
        assert self.k is not None
        return queue_up(self.expert, self.sent, self.num_experts, self.k, "token")

    @property
    def importance(self) -> Tensor:
        """`(..., b, a)`, importance of each assignment in a second level: 1 if it is primary, 0 if it is not kept, and
        0.5 otherwise. Expert choice raises ValueError."""
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
        """Slots per expert and group: the capacity, or n if dropless."""
        return self.num_tokens if self.capacity is None else self.capacity

    def count_occupied_slots(self) -> Tensor:
        """Return `(..., b, e)` int64, the number of occupied slots of each queue, which is its length limited by the
        capacity."""
        length = self.find_queues().length
        occupied = length if self.capacity is None else length.clamp(max=self.capacity)
        return occupied if self.limit is None else torch.minimum(occupied, self.limit.unsqueeze(-1))

    def combine_tensor(self) -> Tensor:
        """Return the combine tensor of the papers `(..., b, n, e, c)`, the weight of slot c of expert e for token n."""
        n, e, c = self.num_tokens, self.num_experts, self.slots_per_queue
        cell = torch.where(self.kept, (self.token * e + self.expert) * c + self.position, 0)
        dense = self.weight.new_zeros(*self.weight.shape[:-1], n * e * c)
        # assignments that are not kept add their weight of 0 to cell 0
        return dense.scatter_add(-1, cell, self.weight).unflatten(-1, (n, e, c))

    def dispatch_tensor(self) -> Tensor:
        """Return the dispatch tensor of the papers `(..., b, n, e, c)`, which is 1 where the combine tensor is not
        0."""
        return occupied(self.combine_tensor())


def occupied(combine: Tensor) -> Tensor:
    """Return 1 where a combine tensor is not 0, and 0 elsewhere."""
    return (combine != 0).to(combine.dtype)


#: field names in programs exported by earlier versions, in which "chosen" denoted what is now `sent`
EXPORTED_NAMES = {"sent": "chosen", "mask": "real", "padding_weight": "uncounted", "chosen": "weighed"}
register_dataclass(Routing, "mixture_of_experts.Routing", EXPORTED_NAMES)


def check_routing(name: str, routing: object) -> Routing:
    """Check that the result of a gate is a `Routing`, and return it."""
    if not isinstance(routing, Routing):
        raise TypeError(
            f"{name} must return a Routing, got {type(routing).__name__}; derive the gate from TokenChoiceGate, and "
            "return experts and weights from `decide`"
        )
    return routing
