"""What a gate decides: `Routing`, and its dense views.

Axes: b groups (one sequence unless the layer's `group_size` says otherwise; outer experts stand before it: `...`),
n tokens of a group, e experts, c capacity, k choices of a token, a assignments of a group (n * k for token choice).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: tensors have no single answer to ==
class Routing:
    """The decision of a gate: which token goes to which slot of which expert, with which weight.

    Nothing here moves data. Losses, statistics, dispatch and the dense tensors of the papers all read this object.
    Unpacking it gives the published triple: `dispatch, combine, loss = routing`.

    Attributes:
        token: `(..., b, a)` int64, token of each assignment, an index into the group.
        expert: `(..., b, a)` int64, expert of each assignment.
        slot: `(..., b, a)` int64, place in that expert's queue of this group; meaningful where `kept`.
        kept: `(..., b, a)` bool, True where the expert computes this token.
        weight: `(..., b, a)` float32 (float64 in a float64 module), weight of the expert's output; 0 where not kept.
        probs: `(..., b, n, e)` the router's probabilities (normalised scores).
        balance_loss, z_loss: 0-dim, without coefficients.
        num_tokens, num_experts: n and e.
        capacity: c, slots of an expert for each group; None is dropless.
        choices: k when the assignments are token-major (assignment i belongs to token i // k); None for expert choice.
        chosen: `(..., b, a)` bool, the assignments that queued: chosen and not kept is what capacity dropped. A weight
            of 0 holds a slot of limited capacity, though nothing is computed in it; dropless it does not queue.
        queued: `(..., b, e)` int64, length of each expert's queue before capacity.
        limit: `(..., b)` int64, each group's own capacity where a mask makes it smaller; None otherwise.
        real: `(..., b, n)` bool, the real tokens under a mask; None if all are.
        losses: every loss by name, 0-dim, without coefficients: the parts of `balance_loss`, "z", and a gate's own.
        primary: `(..., b, a)` bool, the assignments that a second level takes as their token's first choice; None:
            those that stand first.

    Example:
        >>> import torch
        >>> from mixture_of_experts import Top2Gating
        >>> gate = Top2Gating(dim=8, num_gates=4)
        >>> dispatch, combine, loss = gate(torch.randn(2, 6, 8))
        >>> dispatch.shape
        torch.Size([2, 6, 4, 4])
    """

    token: Tensor
    expert: Tensor
    slot: Tensor
    kept: Tensor
    weight: Tensor
    probs: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    num_tokens: int
    num_experts: int
    capacity: int | None
    choices: int | None
    chosen: Tensor
    queued: Tensor
    limit: Tensor | None = None
    real: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    primary: Tensor | None = None

    def __post_init__(self) -> None:
        parts = self.losses or {"balance": self.balance_loss}
        object.__setattr__(self, "losses", {**parts, "z": parts.get("z", self.z_loss)})

    def __iter__(self) -> Iterator[Tensor]:
        combine = self.combine_tensor()
        yield occupied(combine)
        yield combine
        yield self.balance_loss

    @property
    def importance(self) -> Tensor:
        """`(..., b, a)`: what a second level gets of each assignment: 1 of a token's first choice, 0.5 of the others, 0
        where it was dropped."""
        if self.choices is None:
            raise ValueError("expert choice hands on no importance: its tokens have no first choice")
        primary = self.primary
        if primary is None:
            primary = torch.arange(self.kept.shape[-1], device=self.kept.device) % self.choices == 0
        return torch.where(self.kept, torch.where(primary, 1.0, 0.5).to(self.weight.dtype), 0.0)

    @property
    def slots(self) -> int:
        """Slots of an expert for each group: the capacity, or n when dropless (no token can need more)."""
        return self.num_tokens if self.capacity is None else self.capacity

    def combine_tensor(self) -> Tensor:
        """The papers' combine tensor `(..., b, n, e, c)`: the weight of slot c of expert e for token n."""
        n, e, c = self.num_tokens, self.num_experts, self.slots
        cell = (self.token * e + self.expert) * c + torch.where(self.kept, self.slot, 0)
        dense = self.weight.new_zeros(*self.weight.shape[:-1], n * e * c)
        # an assignment that is not kept adds its weight of 0 to some cell
        return dense.scatter_add(-1, cell, self.weight).unflatten(-1, (n, e, c))

    def dispatch_tensor(self) -> Tensor:
        """The papers' dispatch tensor `(..., b, n, e, c)`: 1 where the combine tensor is not 0."""
        return occupied(self.combine_tensor())


def occupied(combine: Tensor) -> Tensor:
    """1 where a combine tensor is not 0."""
    return (combine != 0).to(combine.dtype)


torch.export.register_dataclass(Routing, serialized_type_name="mixture_of_experts.Routing")


def check_routing(name: str, routing: object) -> Routing:
    """What a gate returned, if it is a decision."""
    if not isinstance(routing, Routing):
        raise TypeError(
            f"{name} must return a Routing, got {type(routing).__name__}: derive it from TokenChoiceGate, whose "
            "`decide` returns experts and weights"
        )
    return routing
