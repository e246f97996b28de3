"""Checks during setup that all ranks have the same layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mixture_of_experts.support.collective_errors import collective_error

MAX_REPORTED_DIFFERENCES = 3  # maximum number of differences listed in an error message


def check_ranks_agree(describe: Callable[[], dict[str, Any]], mesh: DeviceMesh) -> None:
    """Raise an error on all ranks if `describe` fails on any rank or if the results differ between ranks.

    The check requires one collective.

    Args:
        describe: a function that returns the values that must be equal on all ranks, keyed by name.
        mesh: a 1-D mesh of the ranks to compare.
    """
    description, problem = {}, None
    try:
        description = describe()
    except Exception as error:  # the error is raised below, after it has been sent to the other ranks
        problem = error
    gathered: list[Any] = [None] * mesh.size()
    group = mesh.get_group()
    try:
        dist.all_gather_object(gathered, (description, str(problem or "")), group=group)
    except RuntimeError as error:
        what = "expert parallelism: a rank could not compare its layers with those of other ranks"
        raise collective_error(what, error, group) from error
    if problem is not None:
        raise problem
    first = gathered[0][0]
    for rank, (other, message) in enumerate(gathered):
        if message:
            raise ValueError(f"expert parallelism: setup failed on rank {rank}: {message}")
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
                f"expert parallelism: all ranks must have the same layers, but they differ in "
                f"{'; '.join(differing[:MAX_REPORTED_DIFFERENCES])}{more}"
            )
