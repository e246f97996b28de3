"""The capacity of an expert, and the order in which tokens queue for its slots. Without a capacity, a queue holds all
rows of an expert, so it also sorts rows by expert.

Axes: b groups (preceded by outer experts, `...`), n tokens per group, e experts, k choices per token, a choices per
group (n * k).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from mixture_of_experts.kernels.launching import SelfCheck, can_launch_kernels
from mixture_of_experts.support.private_torch import (
    is_fake_tensor,
    is_functorch_wrapped,
    is_wrapper_subclass,
    statically_known_true,
)
from mixture_of_experts.support.tracing import is_exporting_to_onnx, symbolic_max

Priority = Literal["choice", "token", "score"]
PRIORITIES: tuple[Priority, ...] = ("choice", "token", "score")
MAX_DENOMINATOR = 1 << 20  # maximum denominator of a capacity factor
QUEUES_SELF_CHECK = SelfCheck("the Triton kernels of queues")
MAX_KERNEL_EXPERTS = 1024  # the tables of the kernels have a row for each expert
MAX_TABLE_ENTRIES = 4096  # for smaller tables, the implementation with the fewest operators is fastest


def bounded_ratio(factor: float) -> tuple[int, int]:
    """Return a capacity factor as a ratio of two integers with a denominator of at most 2^20, which is exact for usual
    factors."""
    ratio = Fraction(factor).limit_denominator(MAX_DENOMINATOR) or Fraction(1, MAX_DENOMINATOR)
    return ratio.numerator, ratio.denominator


def expert_capacity(
    num_tokens: int, length: Length | int, factor: tuple[int, int], num_experts: int, minimum: int, k: int = 1
) -> tuple[int, Tensor | None]:
    """Compute the slots per expert for a group of n tokens, `max(min(n, int(k n factor / e)), minimum)`, or 0 for n =
    0.

    Args:
        num_tokens: n.
        length: number of real tokens of each group `(..., b)`, or n if all groups have n tokens.
        factor: the capacity factor as a result of `bounded_ratio`.
        num_experts, minimum: e, and the minimum number of slots.
        k: number of choices per token.

    Returns:
        The slots for n tokens, and the slots for the real tokens of each group `(..., b)` int64, or None if all groups
        have n tokens.
    """
    slots, tokens = k * factor[0], num_experts * factor[1]
    if slots >= tokens:  # at most 1 slot per token, so that products cannot overflow int64
        slots = tokens = 1
    # without tokens there must be no slots, because a second level would count them as tokens
    empty = statically_known_true(num_tokens == 0)
    capacity = 0 if empty else symbolic_max(num_tokens * slots // tokens, minimum)
    if not isinstance(length, Length):
        return capacity, None
    wanted = length.parts * slots // (tokens * length.parts_per_token)
    return capacity, torch.where(length.parts > 0, wanted.clamp(min=minimum), 0)


@dataclass(frozen=True, eq=False)
class Length:
    """Numbers of real tokens as ratios of integers, because the share of tokens in a second level may be fractional.

    Attributes:
        parts: `(..., b)` int64, the number of tokens of each group in units of 1 / parts_per_token.
        parts_per_token: the number of parts per token.
    """

    parts: Tensor
    parts_per_token: int = 1

    def tokens(self, dtype: torch.dtype) -> Tensor:
        """Return `(..., b)`, the number of tokens in a floating dtype."""
        parts = self.parts.to(dtype)
        return parts if self.parts_per_token == 1 else parts / self.parts_per_token

    def sum(self) -> Length:
        """Return the total number of tokens `(...)` of all groups."""
        return Length(self.parts.sum(dim=-1), self.parts_per_token)


@dataclass(frozen=True, eq=False)
class Queues:
    """The positions of assignments in the queues of their experts.

    Attributes:
        position: `(..., a)` int64, position of each assignment in its queue, from 0; arbitrary if it does not queue.
        length: `(..., q)` int64, number of assignments in each queue.
    """

    position: Tensor
    length: Tensor


torch.export.register_dataclass(Queues, serialized_type_name="mixture_of_experts.Queues")


def queue_up(
    expert: Tensor,
    sent: Tensor | None,
    num_experts: int,
    k: int,
    priority: Priority = "choice",
    score: Tensor | None = None,
) -> Queues:
    """Queue each assignment at its expert, with one queue per expert.

    Args:
        expert: `(..., a)` int64, expert of each assignment, ordered by token, with the best choice of a token first.
        sent: `(..., a)` bool, which assignments queue; None if all do.
        num_experts: e.
        k: number of choices per token; a is n k.
        priority: "choice" queues all first choices before all second choices (GShard). "token" queues all choices of a
            token before those of later tokens (causal). "score" is like "choice", with tokens in order of descending
            score (batch-priority routing, arXiv 2106.05974).
        score: `(..., n)` for priority "score".

    Returns:
        Queues with positions `(..., a)` and lengths `(..., e)`.
    """
    order = order_of_priority(priority, score)
    # for one token, all orders are the same
    in_order = priority == "token" or statically_known_true(expert.shape[-1] == k)
    if can_launch_kernels(expert.device) and _kernels_serve(expert, num_experts):
        return _by_kernels(expert, sent, order, num_experts, k, not in_order)
    return _by_operators(expert, sent, order, num_experts, k, in_order)


def find_positions_in_documents(
    expert: Tensor,
    sent: Tensor | None,
    document: Tensor,
    num_experts: int,
    k: int,
    priority: Priority = "choice",
    score: Tensor | None = None,
) -> Tensor:
    """Return `(b, a)` int64, the position of each assignment in its queue, with one queue per document and expert.

    There may be as many queues as tokens times experts, so positions are computed by sorting, without a table.

    Args:
        document: `(b, n)` int64, index of each token's document, at most b n.
        expert, sent, num_experts, k, priority, score: as in `queue_up`.
    """
    queue = expert if sent is None else torch.where(sent, expert, num_experts)
    queue = document.repeat_interleave(k, dim=-1) * (num_experts + 1) + queue
    (position,) = _place_in_order(
        lambda queue: (find_places_in_runs(queue),), queue, order_of_priority(priority, score), k, priority == "token"
    )
    return position


def order_of_priority(priority: Priority, score: Tensor | None) -> Tensor | None:
    """Return `(..., n)` int64, the order of tokens with priority "score", or None for other priorities."""
    if priority != "score":
        return None
    assert score is not None
    return stable_order(score, descending=True)


def find_places_in_runs(queue: Tensor) -> Tensor:
    """Return the position `(..., a)` of each assignment among those with the same value in `queue`."""
    ordered, order = stable_sort(queue)
    index = torch.arange(queue.shape[-1], device=queue.device).expand_as(order)
    starts = ordered != ordered.roll(1, dims=-1)  # the first run needs no mark, because its index is 0
    first = torch.where(starts, index, 0)
    if is_exporting_to_onnx():  # ONNX has no cummax, so look up the first index by the number of the run
        run = starts.cumsum(dim=-1)
        first = run.new_zeros(*run.shape[:-1], run.shape[-1] + 1).scatter(-1, run * starts, first).gather(-1, run)
    else:
        first = first.cummax(dim=-1).values
    return torch.empty_like(order).scatter(-1, order, index - first)


def _by_operators(
    expert: Tensor, sent: Tensor | None, order: Tensor | None, num_experts: int, k: int, in_order: bool
) -> Queues:
    """Queue assignments in the order in which they are stored, or with all first choices before all second choices.

    Assignments that do not queue are put into an additional last queue.
    """
    queue = expert if sent is None else torch.where(sent, expert, num_experts)
    return Queues(*_place_in_order(partial(_places, num_experts=num_experts), queue, order, k, in_order))


def _place_in_order(
    places: Callable[[Tensor], tuple[Tensor, ...]], queue: Tensor, order: Tensor | None, k: int, in_order: bool
) -> tuple[Tensor, ...]:
    """Call `places` on assignments in order of priority, and return its results with positions `(..., a)` in the order
    in which assignments are stored."""
    if in_order:
        return places(queue)
    queue = rearrange(queue, "... (n k) -> ... k n", k=k)
    if order is None:
        position, *rest = places(queue.flatten(-2))
        return rearrange(position, "... (k n) -> ... (n k)", k=k), *rest
    order = order.unsqueeze(-2).expand_as(queue)
    position, *rest = places(queue.gather(-1, order).flatten(-2))
    position = torch.empty_like(order).scatter(-1, order, position.view_as(order))
    return rearrange(position, "... k n -> ... (n k)"), *rest


def _places(queue: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return the position `(..., a)` of each assignment in its queue, 0 to e, and the lengths `(..., e)` of all queues
    except the last."""
    if statically_known_true(queue.numel() * num_experts <= MAX_TABLE_ENTRIES) or is_exporting_to_onnx():
        # a table (..., a, e + 1) needs fewer operators than sorting, and ONNX supports all of them
        index = queue.unsqueeze(-1)
        stands = index == torch.arange(num_experts + 1, device=queue.device)
        place = stands.cumsum(dim=-2, dtype=torch.int64).gather(-1, index).squeeze(-1) - 1
        return place, stands[..., :num_experts].sum(dim=-2)
    # a stable sort of int16 is several times faster than one of int64
    narrow = torch.int16 if num_experts < torch.iinfo(torch.int16).max else torch.int64
    ids = torch.arange(num_experts + 1, device=queue.device, dtype=narrow)
    ordered, order = queue.to(narrow).sort(dim=-1, stable=True)
    of_each = (*queue.shape[:-1], num_experts + 1)
    # searchsorted requires contiguous ids, even under a transform
    ids = ordered.new_empty(of_each).copy_(ids) if is_functorch_wrapped(ordered) else ids.expand(of_each).contiguous()
    index = torch.arange(queue.shape[-1], device=queue.device).expand_as(order)
    place, start = torch.empty_like(order).scatter(-1, order, index), torch.searchsorted(ordered, ids)
    return place - start.gather(-1, queue), start.diff(dim=-1)


def _kernels_serve(expert: Tensor, num_experts: int) -> bool:
    """Return whether the kernels support these assignments, and pass the self-check on their device."""
    if expert.numel() == 0 or num_experts > MAX_KERNEL_EXPERTS or is_wrapper_subclass(expert):
        return False
    return (
        is_fake_tensor(expert)
        or QUEUES_SELF_CHECK.failure_reason(expert.device, None, partial(_find_queue_fault, expert.device)) is None
    )


def _by_kernels(
    expert: Tensor, sent: Tensor | None, order: Tensor | None, num_experts: int, k: int, by_choice: bool
) -> Queues:
    """Return the same as `_by_operators`, using three kernel launches."""
    from mixture_of_experts.kernels.queueing import queue_assignments  # importing triton takes a second

    sent, order = (None if values is None else values.reshape(-1, values.shape[-1]) for values in (sent, order))
    position, length = queue_assignments(expert.reshape(-1, expert.shape[-1]), sent, order, num_experts, k, by_choice)
    return Queues(position.view(expert.shape), length.view(*expert.shape[:-1], num_experts))


def _find_queue_fault(device: torch.device) -> str | None:
    """Return what differs between the two implementations on generated assignments, or None if nothing does."""
    generator = torch.Generator(device).manual_seed(0)
    e, k, n = 37, 3, 90
    expert = torch.randint(e, (2, n * k), generator=generator, device=device)
    some = torch.rand(expert.shape, generator=generator, device=device) < 0.7
    shuffled = stable_order(torch.rand(2, n, generator=generator, device=device))
    for sent, order, by_choice in ((None, None, False), (some, None, True), (some, shuffled, True)):
        found = _by_kernels(expert, sent, order, e, k, by_choice)
        wanted = _by_operators(expert, sent, order, e, k, not by_choice)
        differs = found.position != wanted.position
        if bool((differs if sent is None else differs & sent).any()) or not found.length.equal(wanted.length):
            return "their queues differ from those of torch's operators"
    return None


def stable_order(values: Tensor, descending: bool = False) -> Tensor:
    """Return indices `(..., n)` that sort the last dimension; equal values keep their order."""
    return stable_sort(values, descending)[1]


def stable_sort(values: Tensor, descending: bool = False) -> tuple[Tensor, Tensor]:
    """Sort the last dimension of values `(..., n)`, and return values and indices; equal values keep their order."""
    if is_exporting_to_onnx():  # ONNX has no stable sort, but its TopK returns equal values lowest index first
        ordered, order = values.topk(values.shape[-1], dim=-1, largest=descending)
    else:
        ordered, order = values.sort(dim=-1, descending=descending, stable=True)
    return ordered, order
