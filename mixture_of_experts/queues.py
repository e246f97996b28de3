"""The capacity of an expert, and the order in which tokens queue for its slots.

Axes: b groups (outer experts stand before it: `...`), n tokens of a group, e experts, k choices of a token, a choices
of a group (n * k).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mixture_of_experts.tracing import exporting_to_onnx, largest, smallest

Priority = Literal["choice", "token", "score"]
PRIORITIES: tuple[Priority, ...] = ("choice", "token", "score")
FEW = 4096  # entries of a table for which the way of fewest operators is fastest, whatever they read


def expert_capacity(num_tokens: int, factor: float, num_experts: int, minimum: int, choices: int = 1) -> int:
    """Slots of an expert for a group of `num_tokens`: `max(min(n, int(k n factor / e)), minimum)`."""
    wanted: Any = torch.sym_int(choices * num_tokens * factor / num_experts)
    return largest(smallest(num_tokens, wanted), minimum)


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
