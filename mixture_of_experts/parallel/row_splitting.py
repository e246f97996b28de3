"""Splits rows among ranks that hold the same tokens, as in tensor parallelism, so that no row is computed twice.

Axes: r (rows sorted by expert), e (experts), s (slots per expert).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import functional


def take_local_part(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return this rank's part of `x` `(..., r, d)`, the rows or slots that all ranks hold.

    All parts have the same length, so the last ones may be padded with zeros. In the backward pass, all ranks receive
    the whole gradient.
    """
    if missing := -x.shape[-2] % mesh.size():
        x = functional.pad(x, (0, 0, 0, missing))
    whole = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return whole.redistribute(mesh, [Shard(x.ndim - 2)]).to_local()


def gather_parts(part: Tensor, size: int, mesh: DeviceMesh) -> Tensor:
    """Concatenate all ranks' parts, and return the first `size` rows or slots. In the backward pass, each rank receives
    its part of the gradient."""
    return DTensor.from_local(part, mesh, [Shard(part.ndim - 2)], run_check=False).full_tensor()[..., :size, :]


def count_local_part(counts: Tensor, length: int, mesh: DeviceMesh) -> Tensor:
    """Return the number of rows `(e,)` that belong to each expert in this rank's part, which has `length` rows."""
    begin = mesh.get_local_rank() * length
    ends = counts.cumsum(0).clamp(begin, begin + length)
    return ends.diff(prepend=ends.new_full((1,), begin))


def fingerprint_choices(counts: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return a two-integer fingerprint of this rank's batch. The first identifies the ranks that share the batch, and
    the second is a checksum of the counts."""
    first = dist.get_process_group_ranks(mesh.get_group())[0]
    factors = torch.arange(1, len(counts) + 1, device=counts.device) ** 3 % 1000003
    return torch.stack([counts.new_tensor(first + 1), (counts * factors).sum()])


def check_fingerprints(fingerprints: Iterable[tuple[int, int]]) -> None:
    """Raise a ValueError if ranks that share a batch chose different experts for it. A batch ID of 0 means that the
    batch is not shared."""
    chosen: dict[int, int] = {}
    for batch, choices in fingerprints:
        if batch and chosen.setdefault(batch, choices) != choices:
            raise ValueError(
                "expert parallelism: ranks that share a batch chose different experts for it; use the same seed and "
                "the same batch on all of them"
            )
