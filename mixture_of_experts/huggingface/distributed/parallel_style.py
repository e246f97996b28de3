"""A `transformers` parallel style that shards this package's experts. Importing this module registers the style."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.expert_parallel import EpDispatchExpertsParallel
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

from mixture_of_experts.parallel.sharding import ExpertSharding
from mixture_of_experts.parallel.style import check_divisible, find_sharded_names, shard_experts

STYLE_NAME = "mixture_of_experts"


class StyleName(str):
    """The name of a parallel style, used in parallel plans and in the style registry.

    The name compares equal to "ep_dispatch_experts", which `transformers` checks for in three places to detect experts
    that receive tokens from other ranks. Its hash is different, so that a dictionary lookup finds this package's style.
    """

    def __hash__(self) -> int:
        return str.__hash__(self)

    def __eq__(self, other: object) -> bool:
        return other in (STYLE_NAME, "ep_dispatch_experts")


EXPERTS_STYLE = StyleName(STYLE_NAME)


class ShardedExpertsParallel(EpDispatchExpertsParallel):
    """A parallel style that shards experts across the `ep` ranks. The ranks in a `tp` group hold the same batch, and
    each rank sends part of it."""

    def install_forward(
        self, module: nn.Module, ep_mesh: DeviceMesh, *, tp_mesh: DeviceMesh, ep_implementation: str = "auto"
    ) -> nn.Module:
        count: Any = getattr(module, "num_experts", None)
        dims = count if isinstance(count, tuple) else (count,)
        check_divisible(dims, ep_mesh)
        # sum the ranks' losses, because transformers divides by the number of batches
        sharding = ExpertSharding(
            ep_mesh, dims, "sum", static_shapes=False,
            sharded_names=find_sharded_names(module, dims, ()), shared_batch=tp_mesh if tp_mesh.size() > 1 else None,
        )  # fmt: skip
        shard_experts(module, sharding, src_data_rank=None)
        return module


ALL_PARALLEL_STYLES.register(EXPERTS_STYLE, ShardedExpertsParallel())  # pyright: ignore[reportArgumentType]
