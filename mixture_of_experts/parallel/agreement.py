"""Compares the ranks' layers during setup."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mixture_of_experts.support.collective_errors import collective_error

MAX_REPORTED_DIFFERENCES = 3  # differences that an error lists


def check_ranks_agree(describe: Callable[[], dict[str, Any]], mesh: DeviceMesh) -> None:
    """Raise on every rank if `describe` raises on any rank or returns different values on two. One collective.

    Args:
        describe: returns everything on which the ranks must agree, by name.
        mesh: the ranks, 1-D.
    """
    description, problem = {}, None
    try:
        description = describe()
    except Exception as error:  # raised below, after the other ranks know of it
        problem = error
    gathered, group = [(description, str(problem or ""))] * mesh.size(), mesh.get_group()
    try:
        dist.all_gather_object(gathered, gathered[0], group=group)
    except RuntimeError as error:
        what = "expert parallelism: a rank could not compare its layers with the others'"
        raise collective_error(what, error, group) from error
    if problem is not None:
        raise problem
    first = gathered[0][0]
    for rank, (other, message) in enumerate(gathered):
        if message:
            raise ValueError(f"expert parallelism: rank {rank} cannot be set up: {message}")
        differing = [
            f"{key}: {first.get(key, 'missing')} on rank 0, {other.get(key, 'missing')} on rank {rank}"
            for key in {**first, **other}
            if first.get(key) != other.get(key)
        ]
        if differing:
            more = (
                f"; and {len(differing) - MAX_REPORTED_DIFFERENCES} more"
                if len(differing) > MAX_REPORTED_DIFFERENCES
                else ""
            )
            raise ValueError(
                f"expert parallelism: the ranks' layers differ in "
                f"{'; '.join(differing[:MAX_REPORTED_DIFFERENCES])}{more}"
            )
