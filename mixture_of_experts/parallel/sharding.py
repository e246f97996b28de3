"""Defines `ExpertSharding`, which describes how a layer's experts are sharded over ranks.

Axes: e (experts on all ranks; `*e` has one or two dimensions, and the first is sharded).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch.distributed.device_mesh import DeviceMesh

from mixture_of_experts.parallel.exchange import Channel

GradientReduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class ExpertSharding:
    """Describes how the experts of a layer are sharded over ranks.

    Attributes:
        mesh: 1-D mesh of the ranks that share the experts.
        expert_dims: `*e`, the total number of experts in each dimension.
        gradient: "mean" or "sum". Expert gradients are computed for the mean or the sum of all ranks' losses.
        static_shapes: whether the number of slots is always the same on all ranks.
        sharded_names: names of the sharded parameters, and of the buffers from which each rank reads only its own part.
        shared_batch: 1-D mesh of ranks that hold the same tokens and each send a part of them, or None if no tokens are
            shared.
    """

    mesh: DeviceMesh
    expert_dims: tuple[int, ...]
    gradient: GradientReduction
    static_shapes: bool
    sharded_names: frozenset[str]
    shared_batch: DeviceMesh | None = None

    @property
    def local_dims(self) -> tuple[int, ...]:
        """`*l`, the number of experts per rank."""
        return (self.expert_dims[0] // self.mesh.size(), *self.expert_dims[1:])

    @property
    def local_expert_ids(self) -> range:
        """The flat indices of this rank's experts, in outer-major order."""
        each, rank = math.prod(self.local_dims), self.mesh.get_local_rank()
        return range(rank * each, (rank + 1) * each)

    @property
    def gradient_factor(self) -> float:
        """The factor by which to scale expert gradients, which are first computed for the sum of all ranks' losses."""
        return 1 / self.mesh.size() if self.gradient == "mean" else 1.0

    @property
    def channel(self) -> Channel:
        return Channel(self.mesh.get_group(), self.shared_batch)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertSharding:
        return self  # a copied layer is sharded over the same ranks
