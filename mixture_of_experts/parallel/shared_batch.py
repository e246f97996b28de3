"""Ranks that bring the same tokens, as under tensor parallelism, each send a part of the rows: none is computed twice.

Axes: r rows sorted by expert, e experts, s slots of an expert.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard


def part_of(x: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
    """This rank's part of x, which is the same on all ranks; in the backward every rank gets the gradient of all."""
    whole = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return whole.redistribute(mesh, [Shard(dim)]).to_local()


def whole_of(part: Tensor, dim: int, size: int, mesh: DeviceMesh) -> Tensor:
    """The parts of all ranks, `size` long at `dim`; in the backward every rank takes its part of the gradient."""
    shape = torch.Size([*part.shape[:dim], size, *part.shape[dim + 1 :]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part.contiguous(), mesh, [Shard(dim)], run_check=False, shape=shape, stride=stride
    ).full_tensor()


def counts_of_part(counts: Tensor, num_rows: int, mesh: DeviceMesh) -> Tensor:
    """How many rows of each expert `(e,)` are in this rank's part of `num_rows` rows."""
    longest = -(-num_rows // mesh.size())
    begin = min(mesh.get_local_rank() * longest, num_rows)
    ends = counts.cumsum(0).clamp(begin, min(begin + longest, num_rows))
    return ends.diff(prepend=ends.new_full((1,), begin))


def sign_choices(counts: Tensor, mesh: DeviceMesh) -> Tensor:
    """Two integers that a rank tells of its batch: which ranks share it, and a sum that follows from the counts."""
    first = dist.get_process_group_ranks(mesh.get_group())[0]
    factors = torch.arange(1, len(counts) + 1, device=counts.device) ** 3 % 1000003
    return torch.stack([counts.new_tensor(first + 1), (counts * factors).sum()])


def check_choices(signed: list[list[int]]) -> None:
    """Compare what the ranks told: those that share a batch must have chosen the same. A 0 stands for no batch."""
    chosen: dict[int, int] = {}
    for batch, choices in signed:
        if batch and chosen.setdefault(batch, choices) != choices:
            raise ValueError(
                "expert parallelism: ranks that share a batch chose different experts for it: give them one seed, or "
                "one batch"
            )
