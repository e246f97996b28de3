"""A process group as an attribute of a module that can be copied and pickled; and the ranks that share a batch."""

from __future__ import annotations

import warnings
from typing import Any

import torch.distributed as dist

from mixture_of_experts.support.private_torch import find_process_group


class Ranks:
    """Holds a process group, or None. Copies share the group; a pickle holds only its name and its ranks.

    Unpickled in the same job, it finds its group again. In a process without process groups it holds None. Elsewhere it
    holds None and warns: the gate's losses are then those of one rank.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return Ranks(self.group)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.group is None:
            return Ranks, (None,)
        return find_ranks, (self.group.group_name, dist.get_process_group_ranks(self.group))


def find_ranks(name: str, ranks: list[int]) -> Ranks:
    """A holder of the process group with this name and these ranks, or an empty one."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks(None)
    group = find_process_group(name)
    if group is None or dist.get_process_group_ranks(group) != ranks:
        warnings.warn(
            f"a gate was saved with the process group of ranks {ranks}, which is not here: set gate.process_group, or "
            "its losses are those of this rank alone",
            stacklevel=2,
        )
        return Ranks(None)
    return Ranks(group)


def ranks_of_batch(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The ranks over which counts are summed: `group`, by default all ranks; None if there is one process.

    A gate's own `process_group`, which may be some of the ranks that hold the gate, is not asked: what counts move must
    stay the same on all of them.
    """
    if group is None and dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    return group
