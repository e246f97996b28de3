"""A `transformers` parallel style for sharded experts of this package. Importing this module registers it."""

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
    """A style name for plans and for the registry of styles.

    It compares equal to the name of the `transformers` style, because `transformers` uses that comparison in three
    places to detect experts that receive tokens from other ranks. Its hash differs, so that a dict lookup finds the
    entry of this package."""

    def __hash__(self) -> int:
        return str.__hash__(self)

    def __eq__(self, other: object) -> bool:
        return other in (STYLE_NAME, "ep_dispatch_experts")


EXPERTS_STYLE = StyleName(STYLE_NAME)


class ShardedExpertsParallel(EpDispatchExpertsParallel):
    """A style that shards experts over the `ep` ranks. Ranks of a `tp` group share a batch; each sends part of it."""

    def install_forward(
        self, module: nn.Module, ep_mesh: DeviceMesh, *, tp_mesh: DeviceMesh, ep_implementation: str = "auto"
    ) -> nn.Module:
        count: Any = getattr(module, "num_experts", None)
        dims = count if isinstance(count, tuple) else (count,)
        check_divisible(dims, ep_mesh)
        # the ranks' losses are summed because transformers divides by the number of batches
        sharding = ExpertSharding(
            ep_mesh, dims, "sum", static_shapes=False,
            sharded_names=find_sharded_names(module, dims, ()), shared_batch=tp_mesh if tp_mesh.size() > 1 else None,
        )  # fmt: skip
        shard_experts(module, sharding, src_data_rank=None)
        return module


ALL_PARALLEL_STYLES.register(EXPERTS_STYLE, ShardedExpertsParallel())  # pyright: ignore[reportArgumentType]
