"""Stores process groups in modules that can be copied and pickled, and finds the ranks that share a batch."""

from __future__ import annotations

import warnings
from typing import Any

import torch.distributed as dist

from mixture_of_experts.support.private_torch import find_process_group


class Ranks:
    """Holds a process group or None. Copies share the group, while a pickle stores only the group's name and ranks.

    Unpickling in the same job restores the group. In any other process, the holder is empty. If `torch.distributed` is
    initialized in that process, a warning reports that the gate's losses cover only one rank.
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
    """Return a holder for the process group with this name and these ranks, or an empty holder if there is no such
    group."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks(None)
    group = find_process_group(name)
    if group is None or dist.get_process_group_ranks(group) != ranks:
        warnings.warn(
            f"a gate was saved with the process group of ranks {ranks}, which does not exist in this process. Set "
            "gate.process_group; otherwise, the gate's losses cover only this rank",
            stacklevel=2,
        )
        return Ranks(None)
    return Ranks(group)


def ranks_of_batch(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return the group over which counts are summed: `group` if it is set, otherwise all ranks, or None in a single
    process.

    The gate's own `process_group` is not used, because it may exclude some of the ranks that hold the gate. All ranks
    that hold the gate must compute the same update from the counts.
    """
    if group is None and dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    return group
