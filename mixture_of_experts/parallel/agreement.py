"""Setting up is the one time that ranks compare what they have: a problem of one is told to all."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


def check_ranks_agree(describe: Callable[[], dict[str, Any]], mesh: DeviceMesh) -> None:
    """One collective when layers are set up: what is wrong on one rank, or differs, raises on every rank and is named.

    Args:
        describe: tells everything in which the ranks have to agree, or raises.
        mesh: the ranks, 1-D.
    """
    description, problem = {}, None
    try:
        description = describe()
    except Exception as error:  # raised below, when the others have been told
        problem = error
    told = [(description, str(problem or ""))]
    if mesh.size() > 1:
        told = gather_from_ranks((description, str(problem or "")), mesh.get_group())
    if problem is not None:
        raise problem
    for rank, (other, message) in enumerate(told):
        if message:
            raise ValueError(f"expert parallelism: rank {rank} cannot be set up: {message}")
        for key in sorted(description.keys() | other.keys()):
            mine, theirs = (d.get(key, "missing") for d in (told[0][0], other))
            if mine != theirs:
                raise ValueError(
                    f"expert parallelism: the ranks' layers differ in {key}: {mine} on rank 0, {theirs} on rank {rank}"
                )


def gather_from_ranks(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Something of every rank, at its place."""
    told: list[Any] = [None] * group.size()
    try:
        dist.all_gather_object(told, value, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            f"expert parallelism: rank {group.rank()} of {group.size()} could not compare its layers with the others': "
            f"{error}\nAnother rank has raised, is stuck or sets up other layers: look for the first error among them"
        ) from error
    return told


def default_timeout(group: dist.ProcessGroup) -> timedelta:
    """What was given to `init_process_group`; groups that a mesh makes do not have it."""
    backend = dist.group.WORLD._get_backend(group._device_types[0])  # type: ignore[union-attr]
    return backend.options._timeout
