"""What a gate decides: `Routing`, the capacity of an expert, and the order in which tokens queue for its slots.

Axes: b groups (one sequence unless the layer's `group_size` says otherwise; outer experts stand before it: `...`),
n tokens of a group, e experts, c capacity, k choices of a token, a assignments of a group (n * k for token choice).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

Priority = Literal["choice", "token", "score"]
PRIORITIES: tuple[Priority, ...] = ("choice", "token", "score")
FEW = 4096  # entries of a table for which the way of fewest operators is fastest, whatever they read


@dataclass(frozen=True)
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
        chosen: `(..., b, a)` bool, the assignments that queued: chosen and not kept is what capacity dropped.
        queued: `(..., b, e)` int64, length of each expert's queue before capacity.
        limit: `(..., b)` int64, each group's own capacity where a mask makes it smaller; None otherwise.
        real: `(..., b, n)` bool, the real tokens under a mask; None if all are.
        losses: the parts of `balance_loss` by name.

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

    def __iter__(self) -> Iterator[Tensor]:
        yield self.dispatch_tensor()
        yield self.combine_tensor()
        yield self.balance_loss

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
        combine = self.combine_tensor()
        return (combine != 0).to(combine.dtype)


torch.export.register_dataclass(Routing, serialized_type_name="mixture_of_experts.Routing")


def expert_capacity(num_tokens: int, factor: float, num_experts: int, minimum: int, choices: int = 1) -> int:
    """Slots of an expert for a group of `num_tokens`: `max(min(n, int(k n factor / e)), minimum)`."""
    wanted: Any = torch.sym_int(choices * num_tokens * factor / num_experts)
    return largest(smallest(num_tokens, wanted), minimum)


def smallest(first: int, second: int) -> int:
    """`min` that stays a formula when a length is dynamic under export or compile."""
    return torch.sym_min(first, second)  # pyright: ignore[reportReturnType]


def largest(first: int, second: int) -> int:
    """`max` likewise."""
    return torch.sym_max(first, second)  # pyright: ignore[reportReturnType]


def group_capacity(length: Tensor, factor: float, num_experts: int, minimum: int, choices: int = 1) -> Tensor:
    """The same for groups whose real length, at most n, is read from a mask; 0 for a group without a token.

    The product is taken in float64, so that it truncates as Python's does.
    """
    length = length.to(torch.float64)
    wanted = torch.minimum(length, (choices * length * factor / num_experts).floor())
    return torch.where(length > 0, wanted.floor().clamp(min=minimum), 0.0).to(torch.int64)


def queue_positions(
    expert: Tensor,
    chosen: Tensor | None,
    num_experts: int,
    choices: int,
    priority: Priority = "choice",
    score: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Place of every choice in the queue of its expert, and the length of each queue.

    Args:
        expert: `(..., a)` int64, expert of each choice: token by token, and of a token the best first.
        chosen: `(..., a)` bool, the choices that queue at all; None if all do.
        num_experts: e.
        choices: k; a is n k.
        priority: "choice" queues all first choices before all second ones (GShard), "token" all choices of a token
            before those of later tokens (causal), "score" as "choice" with the tokens in order of descending score
            (batch-priority routing, arXiv 2106.05974).
        score: `(..., n)` for priority "score".

    Returns:
        `(..., a)` int64 positions, and `(..., e)` int64 lengths.
    """
    key = expert if chosen is None else torch.where(chosen, expert, num_experts)
    if priority == "token" or statically_known_true(key.shape[-1] == choices):  # of one token all orders are the same
        return _positions(key, num_experts)
    key, order = rearrange(key, "... (n k) -> ... n k", k=choices), None
    if priority == "score":
        assert score is not None
        order = stable_order(score, descending=True).unsqueeze(-1).expand_as(key)
        key = key.gather(-2, order)
    slot, queued = _positions(rearrange(key, "... n k -> ... (k n)"), num_experts)
    slot = rearrange(slot, "... (k n) -> ... n k", k=choices)
    if order is not None:
        slot = torch.empty_like(slot).scatter(-2, order, slot)
    return slot.flatten(-2), queued


def _positions(key: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """For keys `(..., a)` in queue order: how often the same key stands before; and how often each expert occurs.

    A key of `num_experts` is in no queue.
    """
    if statically_known_true(key.numel() * num_experts <= FEW) or exporting_to_onnx():
        return _positions_by_counting(key, num_experts)
    if num_experts < torch.iinfo(torch.int16).max:
        key = key.to(torch.int16)  # a stable sort of int16 is several times faster than one of int64
    key, order = key.sort(dim=-1, stable=True)
    # added to zeros, not expanded, so that it is contiguous also under vmap, as searchsorted wants it
    experts = key.new_zeros(*key.shape[:-1], 1) + torch.arange(num_experts + 1, device=key.device, dtype=key.dtype)
    start = torch.searchsorted(key, experts)
    position = torch.arange(key.shape[-1], device=key.device) - start.gather(-1, key.to(torch.int64))
    return torch.empty_like(position).scatter(-1, order, position), start.diff(dim=-1)


def _positions_by_counting(key: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The same with a table `(..., a, e)`: by fewer operators, all of which ONNX has."""
    queues = key.unsqueeze(-1) == torch.arange(num_experts, device=key.device)
    place = queues.cumsum(dim=-2, dtype=torch.int64) * queues
    return place.sum(dim=-1) - 1, queues.sum(dim=-2)


def stable_order(values: Tensor, descending: bool = False) -> Tensor:
    """Indices `(..., n)` that sort the last dimension; equal values keep their order."""
    if exporting_to_onnx():  # no stable sort there, but its TopK gives equal values lowest index first
        return values.topk(values.shape[-1], dim=-1, largest=descending).indices
    return values.sort(dim=-1, descending=descending, stable=True).indices


def exporting_to_onnx() -> bool:
    """Whether `torch.onnx.export` traces: ONNX has neither a stable sort nor searchsorted."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def is_wrapped(tensor: Tensor) -> bool:
    """Whether it stands for many tensors or one that is differentiated, under vmap and the other transforms of
    `torch.func`: numbers of such a tensor cannot be read. (Nothing is done with what is unwrapped.)"""
    return torch.func.debug_unwrap(tensor, recurse=False) is not tensor
