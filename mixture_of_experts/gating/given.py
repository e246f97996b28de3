"""Given choices, which somebody else made: how they are written, and how they join a gate's own.

Axes: b groups, n tokens of a group, k choices of a token; outer experts stand before them: `...`.

    0 and above    this expert computes the token
    -1             no choice
    -2 - i         expert i takes its share of the token's weight, but does not compute the token
    LIVE           the gate chooses

Forced choices, for benchmarks, are given ones that follow from shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from mixture_of_experts.support.checks import check_choice
from mixture_of_experts.support.tracing import can_read

LIVE = -(1 << 15)  # the least of int16


class MergedChoices(NamedTuple):
    """The choices of all tokens, given ones and the gate's own."""

    expert: Tensor  #: (..., b, n, k) int64, from 0 to e - 1
    weighed: Tensor | None  #: (..., b, n, k) bool, choices that share the token's weight; None: all
    computed: Tensor | None  #: (..., b, n, k) bool, choices that are computed; None: all
    live: Tensor | None = None  #: (..., b, n, k) bool, choices that are the gate's own; None: all

    def column(self, i: int) -> MergedChoices:
        """Choice i of every token, `(..., b, n, 1)`."""
        return MergedChoices(*(None if part is None else part[..., i : i + 1] for part in self))  # type: ignore[arg-type]

    def among(self, allowed: Tensor | None) -> Tensor | None:
        """`(..., b, n, k)` bool, choices that are `allowed` and share the token's weight; None if all are."""
        return allowed if self.weighed is None else self.weighed if allowed is None else allowed & self.weighed

    def chosen(self, sent: Tensor | None = None) -> Tensor | None:
        """`(..., b, n, k)` bool, choices that are made; of the gate's own only those `sent`. None if all are made."""
        if self.computed is None or sent is None:
            return self.computed if sent is None else sent
        own = sent & self.computed
        return own if self.live is None else torch.where(self.live, own, self.computed)

    def without(self, closed: Tensor | None) -> MergedChoices:
        """The same choices, without those of experts that are `closed` `(..., b, n, e)` to their token."""
        if closed is None:
            return self
        is_open = ~closed.gather(-1, self.expert)
        weighed, computed = (is_open if part is None else part & is_open for part in (self.weighed, self.computed))
        return self._replace(weighed=weighed, computed=computed)


def merge_given(given: Tensor | None, own: Tensor, chosen: Tensor | None = None) -> MergedChoices:
    """Join choices `(..., b, n, k)`: the given ones, and the gate's `own` where those are `LIVE`. `chosen` says which
    of its own the gate makes."""
    if given is None:
        return MergedChoices(own, chosen, chosen)
    live, not_computed = given == LIVE, torch.where(given < -1, -2 - given, 0)
    expert = torch.where(live, own, torch.where(given < 0, not_computed, given))
    own_chosen = live if chosen is None else live & chosen
    return MergedChoices(expert, own_chosen | ~live & (given != -1), own_chosen | (given >= 0), live)


def check_given(given: Tensor, num_experts: int, active: Tensor | None = None) -> None:
    """Check that given choices `(..., k)` are such numbers, and that no token that is `active` `(...)` has an expert
    twice. It reads values, so it does nothing on a GPU and in a graph."""
    if not can_read(given):
        return
    given = given if active is None else torch.where(active.unsqueeze(-1), given, -1)
    wrong = given[(given >= num_experts) | (given < -1 - num_experts) & (given != LIVE)]
    if wrong.numel():
        raise ValueError(
            f"given_experts has {int(wrong[0])}: give an expert, 0 to {num_experts - 1}; -1 for no choice; or -2 - i "
            "if expert i takes its share of the weight without computing the token"
        )
    if (twice := expert_twice(given)) is not None:
        raise ValueError(
            f"given_experts has expert {twice} twice for a token: a token takes an expert once. Give -1 for a choice "
            "that is not made"
        )


def expert_twice(expert: Tensor) -> int | None:
    """An expert that stands twice in one row `(..., k)` of choices; None if there is none. It reads values."""
    for distance in range(1, expert.shape[-1]):
        one, other = expert[..., distance:], expert[..., :-distance]
        if (same := (one == other) & (one >= 0)).any():
            return int(one[same][0])
    return None


# Forced choices: timings then do not depend on what a router learned

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
