"""Shards experts with FSDP2, in addition to expert parallelism."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from mixture_of_experts.parallel.gradients import expert_parameters
from mixture_of_experts.parallel.sharded_experts import ShardedExperts
from mixture_of_experts.parallel.style import find_experts_to_shard
from mixture_of_experts.support.private_torch import unwrap_module


def fully_shard_experts(layer: nn.Module, *, mesh: DeviceMesh, **options: Any) -> nn.Module:
    """Apply `fully_shard` to a layer's experts, and return these experts.

    Call this function after `parallelize_module` with `ExpertParallel`, and before applying `fully_shard` to the rest
    of the model over all ranks. For latent experts, only the inner experts are sharded, because the projections are
    replicated on all ranks.

    Args:
        layer: an `MoE` or `HeirarchicalMoE`.
        mesh: a 1-D mesh of the ranks that hold the same experts, such as the data-parallel ranks.
        options: other arguments of `fully_shard`.

    Raises:
        ValueError: the experts are not sharded by `ExpertParallel`, or have parameters that are replicated over the
            expert-parallel ranks. FSDP2 would average the gradients of such parameters only over the ranks of `mesh`.

    Example:
        >>> from torch.distributed.fsdp import fully_shard
        >>> from mixture_of_experts.parallel import fully_shard_experts
        >>> def shard(model, mesh):
        ...     for layer in model.layers:
        ...         fully_shard_experts(layer.ffn, mesh=mesh["dp"])
        ...     return fully_shard(model, mesh=mesh["dp", "ep"]._flatten("batch"))
    """
    _, experts = find_experts_to_shard(layer)
    if not isinstance(unwrap_module(experts), ShardedExperts):
        raise ValueError(
            f"the experts, {type(experts).__name__}, are not sharded; first call parallelize_module with an "
            "ExpertParallel style for this layer"
        )
    sharded = set(expert_parameters(experts).values())
    if replicated := [name for name, parameter in experts.named_parameters() if parameter not in sharded]:
        raise ValueError(
            f"the experts' parameters {', '.join(replicated)} are replicated over the expert-parallel ranks, but FSDP2 "
            "would average their gradients only over the given mesh. Do not shard these experts with FSDP2: pass "
            "set(expert_parameters(model).values()) as ignored_params of fully_shard"
        )
    return fully_shard(experts, mesh=mesh, **options)  # type: ignore[return-value]
