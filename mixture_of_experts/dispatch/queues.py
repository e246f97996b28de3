"""Computes the order in which tokens queue for slots. Without a capacity limit, a queue contains all rows of an expert,
so queues are also used to sort rows by expert.

Axes: b (groups, preceded by outer experts, `...`), n (tokens per group), e (experts), k (choices per token), a (choices
per group, n * k).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
from mixture_of_experts.support.tracing import is_exporting_to_onnx

Priority = Literal["choice", "token", "score"]
PRIORITIES: tuple[Priority, ...] = ("choice", "token", "score")
QUEUES_SELF_CHECK = SelfCheck("the Triton kernels of queues")
MAX_KERNEL_EXPERTS = 1024  # the kernels store one table row per expert
MAX_TABLE_ENTRIES = 4096  # for smaller tables, the implementation with the fewest operators is fastest


@dataclass(frozen=True, eq=False)
class Queues:
    """The positions of assignments in their experts' queues.

    Attributes:
        position: `(..., a)` int64, the position of each assignment in its queue, starting from 0. Positions are
            arbitrary for assignments that are not in a queue.
        length: `(..., q)` int64, the number of assignments in each queue.
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
    """Add each assignment to the queue of its expert.

    Args:
        expert: `(..., a)` int64, the expert of each assignment. Assignments are ordered by token, and the best choice
            of each token comes first.
        sent: `(..., a)` bool mask of the assignments to add, or None to add all.
        num_experts: number of experts, e.
        k: number of choices per token. The number of assignments a is n k.
        priority: "choice" queues all first choices before all second choices (GShard). "token" queues all choices of a
            token before the choices of later tokens (causal). "score" is like "choice", but queues tokens in order of
            descending score (batch-priority routing, arXiv 2106.05974).
        score: `(..., n)`, the tokens' scores, which are required for priority "score".

    Returns:
        The queues, with positions `(..., a)` and lengths `(..., e)`.
    """
    order = order_of_priority(priority, score)
    # with a single token, every order is the same
    in_order = priority == "token" or statically_known_true(expert.shape[-1] == k)
    if can_launch_kernels(expert.device) and _kernels_support(expert, num_experts):
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
    """Return the position of each assignment in its queue, as an int64 tensor `(b, a)`. Each pair of a document and an
    expert has its own queue.

    The number of queues may be as large as the number of tokens times the number of experts, so positions are computed
    with a sort instead of a table.

    Args:
        document: `(b, n)` int64, the index of each token's document, which is at most b n.
        expert, sent, num_experts, k, priority, score: see `queue_up`.
    """
    queue = expert if sent is None else torch.where(sent, expert, num_experts)
    queue = document.repeat_interleave(k, dim=-1) * (num_experts + 1) + queue
    (position,) = _find_positions_in_order(
        lambda queue: (find_positions_in_runs(queue),),
        queue,
        order_of_priority(priority, score),
        k,
        priority == "token",
    )
    return position


def order_of_priority(priority: Priority, score: Tensor | None) -> Tensor | None:
    """Return the order of tokens for priority "score" as an int64 tensor `(..., n)`, or None for other priorities."""
    if priority != "score":
        return None
    assert score is not None
    return stable_argsort(score, descending=True)


def find_positions_in_runs(queue: Tensor) -> Tensor:
    """Return the position `(..., a)` of each assignment among the assignments with the same value in `queue`."""
    ordered, order = stable_sort(queue)
    index = torch.arange(queue.shape[-1], device=queue.device).expand_as(order)
    starts = ordered != ordered.roll(1, dims=-1)  # the first run starts at index 0, so it needs no mark
    first = torch.where(starts, index, 0)
    if is_exporting_to_onnx():  # ONNX has no cummax, so look up each run's first index by the run's number
        run = starts.cumsum(dim=-1)
        first = run.new_zeros(*run.shape[:-1], run.shape[-1] + 1).scatter(-1, run * starts, first).gather(-1, run)
    else:
        first = first.cummax(dim=-1).values
    return torch.empty_like(order).scatter(-1, order, index - first)


def _by_operators(
    expert: Tensor, sent: Tensor | None, order: Tensor | None, num_experts: int, k: int, in_order: bool
) -> Queues:
    """Queue assignments in their original order if `in_order` is set. Otherwise, queue all first choices before all
    second choices.

    Assignments that are not sent are placed in an additional last queue.
    """
    queue = expert if sent is None else torch.where(sent, expert, num_experts)
    return Queues(
        *_find_positions_in_order(partial(_find_positions, num_experts=num_experts), queue, order, k, in_order)
    )


def _find_positions_in_order(
    find_positions: Callable[[Tensor], tuple[Tensor, ...]], queue: Tensor, order: Tensor | None, k: int, in_order: bool
) -> tuple[Tensor, ...]:
    """Call `find_positions` on the assignments in order of priority. Return its results with the positions `(..., a)`
    in the original order of the assignments."""
    if in_order:
        return find_positions(queue)
    queue = rearrange(queue, "... (n k) -> ... k n", k=k)
    if order is None:
        position, *rest = find_positions(queue.flatten(-2))
        return rearrange(position, "... (k n) -> ... (n k)", k=k), *rest
    order = order.unsqueeze(-2).expand_as(queue)
    position, *rest = find_positions(queue.gather(-1, order).flatten(-2))
    position = torch.empty_like(order).scatter(-1, order, position.view_as(order))
    return rearrange(position, "... k n -> ... (n k)"), *rest


def _find_positions(queue: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return the position `(..., a)` of each assignment in its queue, and the lengths `(..., e)` of all queues except
    the last. `queue` contains indices from 0 to e."""
    if statically_known_true(queue.numel() * num_experts <= MAX_TABLE_ENTRIES) or is_exporting_to_onnx():
        # a table (..., a, e + 1) needs fewer operators than a sort, and ONNX supports all of them
        index = queue.unsqueeze(-1)
        is_in_queue = index == torch.arange(num_experts + 1, device=queue.device)
        place = is_in_queue.cumsum(dim=-2, dtype=torch.int64).gather(-1, index).squeeze(-1) - 1
        return place, is_in_queue[..., :num_experts].sum(dim=-2)
    # a stable sort is several times faster for int16 than for int64
    narrow = torch.int16 if num_experts < torch.iinfo(torch.int16).max else torch.int64
    ids = torch.arange(num_experts + 1, device=queue.device, dtype=narrow)
    ordered, order = queue.to(narrow).sort(dim=-1, stable=True)
    of_each = (*queue.shape[:-1], num_experts + 1)
    # searchsorted requires contiguous ids, even under a transform
    ids = ordered.new_empty(of_each).copy_(ids) if is_functorch_wrapped(ordered) else ids.expand(of_each).contiguous()
    index = torch.arange(queue.shape[-1], device=queue.device).expand_as(order)
    place, start = torch.empty_like(order).scatter(-1, order, index), torch.searchsorted(ordered, ids)
    return place - start.gather(-1, queue), start.diff(dim=-1)


def _kernels_support(expert: Tensor, num_experts: int) -> bool:
    """Return whether the kernels support these assignments and pass the self-check on their device."""
    if expert.numel() == 0 or num_experts > MAX_KERNEL_EXPERTS or is_wrapper_subclass(expert):
        return False
    return (
        is_fake_tensor(expert)
        or QUEUES_SELF_CHECK.failure_reason(expert.device, None, partial(_find_queue_fault, expert.device)) is None
    )


def _by_kernels(
    expert: Tensor, sent: Tensor | None, order: Tensor | None, num_experts: int, k: int, by_choice: bool
) -> Queues:
    """Compute the result of `_by_operators` with three kernel launches."""
    from mixture_of_experts.kernels.queueing import queue_assignments  # importing triton takes about a second

    sent, order = (None if values is None else values.reshape(-1, values.shape[-1]) for values in (sent, order))
    position, length = queue_assignments(expert.reshape(-1, expert.shape[-1]), sent, order, num_experts, k, by_choice)
    return Queues(position.view(expert.shape), length.view(*expert.shape[:-1], num_experts))


def _find_queue_fault(device: torch.device) -> str | None:
    """Compare both implementations on generated assignments. Return a description of the difference, or None if the
    results agree."""
    generator = torch.Generator(device).manual_seed(0)
    e, k, n = 37, 3, 90
    expert = torch.randint(e, (2, n * k), generator=generator, device=device)
    some = torch.rand(expert.shape, generator=generator, device=device) < 0.7
    shuffled = stable_argsort(torch.rand(2, n, generator=generator, device=device))
    for sent, order, by_choice in ((None, None, False), (some, None, True), (some, shuffled, True)):
        found = _by_kernels(expert, sent, order, e, k, by_choice)
        wanted = _by_operators(expert, sent, order, e, k, not by_choice)
        differs = found.position != wanted.position
        if bool((differs if sent is None else differs & sent).any()) or not found.length.equal(wanted.length):
            return "their queues differ from those of torch's operators"
    return None


def stable_argsort(values: Tensor, descending: bool = False) -> Tensor:
    """Return indices `(..., n)` that sort the last dimension. The sort is stable, so the order of equal values is
    preserved."""
    return stable_sort(values, descending)[1]


def stable_sort(values: Tensor, descending: bool = False) -> tuple[Tensor, Tensor]:
    """Sort the last dimension of `values` `(..., n)`, and return the sorted values and their indices. The sort is
    stable, so the order of equal values is preserved."""
    if is_exporting_to_onnx():  # ONNX has no stable sort, but its TopK keeps equal values in order
        ordered, order = values.topk(values.shape[-1], dim=-1, largest=descending)
    else:
        ordered, order = values.sort(dim=-1, descending=descending, stable=True)
    return ordered, order
