"""Forced choices for benchmarks, so that timings do not depend on what a router learned.

Axes: b groups, n tokens of a group, e experts, k choices of a token; outer experts stand before them: `...`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from mixture_of_experts.checks import check_choice

Forced = Literal["balanced", "random"]


def balanced(shape: Sequence[Any], num_experts: int, chosen: Tensor | None, device: Any, rank: int) -> Tensor:
    """Experts in turn, one for each choice that is `chosen`. A rank starts where the one before it ends."""
    *outer, b, n, k = shape
    if chosen is None:
        order = torch.arange(b * n * k, device=device).view(b, n, k).expand(*outer, b, n, k)
    else:
        order = (chosen.flatten(-3).cumsum(dim=-1) - 1).view(*outer, b, n, k)
    return (order + rank * b * n * k) % num_experts


def random(shape: Sequence[Any], num_experts: int, chosen: Tensor | None, device: Any, rank: int) -> Tensor:
    """k different experts for each token, all equally likely."""
    return torch.rand(*shape[:-1], num_experts, device=device).topk(shape[-1], dim=-1).indices


FORCED: dict[str, Callable[..., Tensor]] = {"balanced": balanced, "random": random}


def check_forced(name: str, how: Any) -> Forced | None:
    return None if how is None else check_choice(name, how, tuple(FORCED))


def forced_experts(
    how: Forced,
    shape: Sequence[Any],
    num_experts: int,
    device: Any,
    chosen: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Forced experts `(..., b, n, k)` int64; -1 for choices beyond the number of experts.

    Args:
        how: "balanced" or "random".
        shape: `(..., b, n, k)`.
        chosen: `(..., b, n, k)` bool, the choices that are made; None if all are.
        group: the ranks that share the batch.
    """
    *outer, k = shape
    there = min(k, num_experts)  # of two choices and one expert, the second is none
    chosen = None if chosen is None else chosen[..., :there]
    expert = FORCED[how]((*outer, there), num_experts, chosen, device, 0 if group is None else dist.get_rank(group))
    return expert if there == k else functional.pad(expert, (0, k - there), value=-1)
