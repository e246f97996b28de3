"""Compares the ranks' layers when they are set up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mixture_of_experts.support.failures import waited_in_vain

MOST = 3  # differences that an error names


def check_ranks_agree(describe: Callable[[], dict[str, Any]], mesh: DeviceMesh) -> None:
    """Raise on every rank if `describe` raises on one rank, or returns different things on two. One collective.

    Args:
        describe: returns everything in which the ranks must agree, by name.
        mesh: the ranks, 1-D.
    """
    description, problem = {}, None
    try:
        description = describe()
    except Exception as error:  # raised below, after the other ranks know of it
        problem = error
    descriptions = [(description, str(problem or ""))]
    if mesh.size() > 1:
        descriptions = gather_from_ranks((description, str(problem or "")), mesh.get_group())
    if problem is not None:
        raise problem
    for rank, (other, message) in enumerate(descriptions):
        if message:
            raise ValueError(f"expert parallelism: rank {rank} cannot be set up: {message}")
        if differing := differences(descriptions[0][0], other):
            shown = [f"{key}: {first} on rank 0, {its} on rank {rank}" for key, first, its in differing[:MOST]]
            more = f"; and {len(differing) - MOST} more" if len(differing) > MOST else ""
            raise ValueError(f"expert parallelism: the ranks' layers differ in {'; '.join(shown)}{more}")


def differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The keys of two descriptions whose values differ, each with both values."""
    pairs = ((key, first.get(key, "missing"), other.get(key, "missing")) for key in {**first, **other})
    return [(key, mine, its) for key, mine, its in pairs if mine != its]


def gather_from_ranks(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """The values of all ranks, in the order of the ranks."""
    values: list[Any] = [None] * group.size()
    try:
        dist.all_gather_object(values, value, group=group)
    except RuntimeError as error:
        raise waited_in_vain(
            "expert parallelism: a rank could not compare its layers with the others'", error, group
        ) from error
    return values
