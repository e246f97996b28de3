"""The capacity of an expert, and the order in which tokens queue for its slots.

Axes: b groups (outer experts stand before it: `...`), n tokens of a group, e experts, k choices of a token, a choices
of a group (n * k).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from mixture_of_experts.private_torch import statically_known_true
from mixture_of_experts.tracing import exporting_to_onnx, is_wrapped, largest, smallest

Priority = Literal["choice", "token", "score"]
PRIORITIES: tuple[Priority, ...] = ("choice", "token", "score")
FEW = 4096  # entries of a table for which the way of fewest operators is fastest, whatever they read


def expert_capacity(num_tokens: int, factor: float, num_experts: int, minimum: int, k: int = 1) -> int:
    """Slots of an expert for a group of n tokens: `max(min(n, int(k n factor / e)), minimum)`; 0 without a token."""
    if statically_known_true(num_tokens == 0):  # a second level would count the slots as tokens
        return 0
    wanted: Any = torch.sym_int(k * num_tokens * factor / num_experts)
    return largest(smallest(num_tokens, wanted), minimum)


def group_capacity(length: Tensor, factor: float, num_experts: int, minimum: int, k: int = 1) -> Tensor:
    """`(..., b)` int64, slots of an expert for groups of `length` `(..., b)` real tokens; 0 for a group without any.

    The product is taken in float64, so that it truncates as Python's does.
    """
    length = length.to(torch.float64)
    wanted = torch.minimum(length, (k * length * factor / num_experts).floor())
    return torch.where(length > 0, wanted.floor().clamp(min=minimum), 0.0).to(torch.int64)


@dataclass(frozen=True, eq=False)
class Queues:
    """Where assignments stand in the queues of their experts.

    Attributes:
        position: `(..., a)` int64, position of each assignment in its queue, from 0; any value where it does not queue.
        length: `(..., q)` int64, number of assignments in each queue.
    """

    position: Tensor
    length: Tensor


torch.export.register_dataclass(Queues, serialized_type_name="mixture_of_experts.Queues")


def queue_up(
    expert: Tensor,
    chosen: Tensor | None,
    num_experts: int,
    k: int,
    priority: Priority = "choice",
    score: Tensor | None = None,
) -> Queues:
    """Queue every assignment at its expert, one queue for each expert.

    Args:
        expert: `(..., a)` int64, expert of each assignment: token by token, and of a token the best choice first.
        chosen: `(..., a)` bool, the assignments that queue at all; None if all do.
        num_experts: e.
        k: choices of a token; a is n k.
        priority: "choice" queues all first choices before all second ones (GShard), "token" all choices of a token
            before those of later tokens (causal), "score" as "choice" with the tokens in order of descending score
            (batch-priority routing, arXiv 2106.05974).
        score: `(..., n)` for priority "score".

    Returns:
        Queues with positions `(..., a)` and lengths `(..., e)`.
    """
    order = None
    if priority == "score":
        assert score is not None
        order = stable_order(score, descending=True).unsqueeze(-1).expand(*score.shape, k)
    # of one token all orders are the same
    in_order = priority == "token" or statically_known_true(expert.shape[-1] == k)

    def in_queue_order(values: Tensor) -> Tensor:
        """Values that lie token by token, in the order in which the assignments queue."""
        if in_order:
            return values
        values = rearrange(values, "... (n k) -> ... n k", k=k)
        return rearrange(values if order is None else values.gather(-2, order), "... n k -> ... (k n)")

    def in_token_order(values: Tensor) -> Tensor:
        """Values in the order in which the assignments queue, token by token again."""
        if in_order:
            return values
        values = rearrange(values, "... (k n) -> ... n k", k=k)
        return (values if order is None else torch.empty_like(values).scatter(-2, order, values)).flatten(-2)

    if statically_known_true(expert.numel() * num_experts <= FEW) or exporting_to_onnx():
        position, length = _count(
            in_queue_order(expert), None if chosen is None else in_queue_order(chosen), num_experts
        )
        return Queues(in_token_order(position), length)
    # a stable sort of int16 is several times faster than one of int64
    narrow = torch.int16 if num_experts < torch.iinfo(torch.int16).max else torch.int64
    ids = torch.arange(num_experts + 1, device=expert.device, dtype=narrow)
    key = expert.to(narrow)
    if chosen is not None:
        key = torch.where(chosen, key, ids[-1])  # behind every queue
    place, start = _sort(in_queue_order(key), ids)
    return Queues(in_token_order(place) - start.gather(-1, expert), start.diff(dim=-1))


def _sort(key: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """For keys `(..., a)` their places in stable order, and the first place of each of `ids` (all there can be)."""
    ordered, order = key.sort(dim=-1, stable=True)
    of_each = (*key.shape[:-1], ids.shape[0])
    # contiguous, as searchsorted wants it, under a transform too
    ids = key.new_empty(of_each).copy_(ids) if is_wrapped(key) else ids.expand(of_each).contiguous()
    index = torch.arange(key.shape[-1], device=key.device).expand_as(order)
    return torch.empty_like(order).scatter(-1, order, index), torch.searchsorted(ordered, ids)


def _count(expert: Tensor, chosen: Tensor | None, num_experts: int) -> tuple[Tensor, Tensor]:
    """How often the same expert was chosen before `(..., a)`, and how often each is chosen `(..., e)`.

    They are counted in a table `(..., a, e)`: fewer operators than sorting, and ONNX has all of them.
    """
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
