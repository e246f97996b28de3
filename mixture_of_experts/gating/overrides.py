"""Combines externally specified choices with a gate's own choices.

Axes: b (groups), n (tokens per group), k (choices per token). `...` stands for the outer expert dimensions.

Externally specified choices are encoded as follows::

    0 and above           this expert computes the token
    -1                    no choice
    -2 - i                expert i takes its share of the token's weight, but does not compute the token
    KEEP_ROUTER_CHOICE    the gate chooses

Forced choices, which benchmarks use, are externally specified choices that depend only on shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from mixture_of_experts.gating.choices import find_repeated_expert
from mixture_of_experts.support.checks import check_choice
from mixture_of_experts.support.tracing import is_host_readable

# Side inputs that override decisions of a gate or describe its tokens
GIVEN, GIVEN_WEIGHTS = "given_experts", "given_weights"  # experts chosen for tokens, and their weights
COUNTED = "counted"  # mask of real tokens if padding is also computed
STATE = "router_state"  # state of the router in the previous layer
KEEP_ROUTER_CHOICE = -(1 << 15)  # the minimum int16 value


def merge_overrides(overrides: Tensor | None, own: Tensor, made: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Replace the gate's `own` choices with the `overrides` `(..., b, n, k)`, except where an override is
    `KEEP_ROUTER_CHOICE`.

    Args:
        overrides: externally specified choices, encoded as described in this module, or None.
        own, made: the gate's own choices, and a mask of the choices that it makes, or None if it makes all of them.

    Returns:
        The expert ids, from 0 to e - 1, and a mask of the choices that are made, or None if all are made.
    """
    if overrides is None:
        return own, made
    live = overrides == KEEP_ROUTER_CHOICE
    expert = torch.where(
        live, own, torch.where(overrides < 0, torch.where(overrides < -1, -2 - overrides, 0), overrides)
    )
    return expert, torch.where(live, True if made is None else made, overrides != -1)


def is_computed(given: Tensor) -> Tensor:
    """Return a mask that is False for externally specified choices whose expert receives its share of the weight but
    does not compute the token."""
    return (given >= -1) | (given == KEEP_ROUTER_CHOICE)


def override_weights(given: Tensor, weight: Tensor, padding: Tensor | None) -> Tensor:
    """Replace weights `(..., b, n, k)` with externally specified weights. A weight is kept if the new weight is NaN, or
    if the mask `padding` `(..., b, n, 1)` marks the token as padding."""
    if given.shape != weight.shape or not given.is_floating_point():
        raise ValueError(
            f"{GIVEN_WEIGHTS} must be a floating-point tensor of shape {tuple(weight.shape)}, got {given.dtype} "
            f"{tuple(given.shape)}"
        )
    own = given.isnan() if padding is None else given.isnan() | padding
    return torch.where(own, weight, given.to(weight.dtype) + (weight - weight.detach()))


def check_overrides(given: Tensor, num_experts: int, active: Tensor | None = None) -> None:
    """Check that externally specified choices `(..., k)` are valid, and that no token in the mask `active` `(...)` has
    the same expert twice. The check reads tensor values, so it is skipped on a GPU and in traced graphs."""
    if not is_host_readable(given):
        return
    given = given if active is None else torch.where(active.unsqueeze(-1), given, -1)
    wrong = given[(given >= num_experts) | (given < -1 - num_experts) & (given != KEEP_ROUTER_CHOICE)]
    if wrong.numel():
        raise ValueError(
            f"given_experts contains {int(wrong[0])}, which is invalid. Use an expert id from 0 to {num_experts - 1}, "
            "-1 for no choice, or -2 - i to count expert i in the weights without running it on the token"
        )
    if (twice := find_repeated_expert(given)) is not None:
        raise ValueError(
            f"given_experts contains expert {twice} twice for a token, but a token's experts must be distinct. Use -1 "
            "to omit a choice"
        )


# Forced choices make timings independent of what a router has learned

Forced = Literal["balanced", "random"]


def balanced(shape: Sequence[Any], num_experts: int, chosen: Tensor | None, device: Any, rank: int) -> Tensor:
    """Assign experts to all `chosen` choices in round-robin order. Each rank starts where the previous rank ends."""
    *_, b, n, k = shape
    if chosen is None:
        chosen = torch.ones(*shape, dtype=torch.bool, device=device)
    order = (chosen.flatten(-3).cumsum(dim=-1) - 1).view(*shape)
    return (order + rank * b * n * k) % num_experts


def random(shape: Sequence[Any], num_experts: int, chosen: Tensor | None, device: Any, rank: int) -> Tensor:
    """Sample k different experts uniformly for each token."""
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
    """Return forced experts as an int64 tensor `(..., b, n, k)`, with -1 for choices beyond the number of experts.

    Args:
        how: "balanced" or "random".
        shape: `(..., b, n, k)`.
        chosen: `(..., b, n, k)` bool mask of the choices that are made, or None if all are made.
        group: process group across which the batch is split.
    """
    *outer, k = shape
    num_choices = min(k, num_experts)  # with two choices and one expert, the second choice is not made
    chosen = None if chosen is None else chosen[..., :num_choices]
    expert = FORCED[how](
        (*outer, num_choices), num_experts, chosen, device, 0 if group is None else dist.get_rank(group)
    )
    return expert if num_choices == k else functional.pad(expert, (0, k - num_choices), value=-1)
