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

from mixture_of_experts.tracing import exporting_to_onnx, is_wrapped, largest, smallest

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
        `(..., a)` int64 positions, of any value where not `chosen`, and `(..., e)` int64 lengths.
    """
    order = None
    if priority == "score":
        assert score is not None
        order = stable_order(score, descending=True).unsqueeze(-1).expand(*score.shape, choices)
    # of one token all orders are the same
    in_order = priority == "token" or statically_known_true(expert.shape[-1] == choices)

    def queued_up(values: Tensor) -> Tensor:
        """What lies token by token, as it queues."""
        if in_order:
            return values
        values = rearrange(values, "... (n k) -> ... n k", k=choices)
        return rearrange(values if order is None else values.gather(-2, order), "... n k -> ... (k n)")

    def put_back(values: Tensor) -> Tensor:
        """The other way."""
        if in_order:
            return values
        values = rearrange(values, "... (k n) -> ... n k", k=choices)
        return (values if order is None else torch.empty_like(values).scatter(-2, order, values)).flatten(-2)

    if statically_known_true(expert.numel() * num_experts <= FEW) or exporting_to_onnx():
        place, queued = _count(queued_up(expert), None if chosen is None else queued_up(chosen), num_experts)
        return put_back(place), queued
    # a stable sort of int16 is several times faster than one of int64
    narrow = torch.int16 if num_experts < torch.iinfo(torch.int16).max else torch.int64
    ids = torch.arange(num_experts + 1, device=expert.device, dtype=narrow)
    key = expert.to(narrow)
    if chosen is not None:
        key = torch.where(chosen, key, ids[-1])  # behind every queue
    place, start = _sort(queued_up(key), ids)
    return put_back(place) - start.gather(-1, expert), start.diff(dim=-1)


def _sort(key: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """For keys `(..., a)` their places in stable order, and the first place of each of `ids` (all there can be)."""
    ordered, order = key.sort(dim=-1, stable=True)
    of_each = (*key.shape[:-1], ids.shape[0])
    # contiguous, as searchsorted wants it, under a transform too
    ids = key.new_empty(of_each).copy_(ids) if is_wrapped(key) else ids.expand(of_each).contiguous()
    index = torch.arange(key.shape[-1], device=key.device).expand_as(order)
    return torch.empty_like(order).scatter(-1, order, index), torch.searchsorted(ordered, ids)


def _count(expert: Tensor, chosen: Tensor | None, num_experts: int) -> tuple[Tensor, Tensor]:
    """How often the same expert was chosen before, and how often each is: by a table `(..., a, e)`, which takes fewer
    operators than sorting, all of which ONNX has."""
    index = expert.unsqueeze(-1)
    queues = index == torch.arange(num_experts, device=expert.device)
    if chosen is not None:
        queues = queues & chosen.unsqueeze(-1)
    place = queues.cumsum(dim=-2, dtype=torch.int64).gather(-1, index).squeeze(-1)
    return place - 1, queues.sum(dim=-2)


def stable_order(values: Tensor, descending: bool = False) -> Tensor:
    """Indices `(..., n)` that sort the last dimension; equal values keep their order."""
    if exporting_to_onnx():  # no stable sort there, but its TopK gives equal values lowest index first
        return values.topk(values.shape[-1], dim=-1, largest=descending).indices
    return values.sort(dim=-1, descending=descending, stable=True).indices
