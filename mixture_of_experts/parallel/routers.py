"""Routers under FSDP2: they become separate units, so that mixed precision does not cast their weights."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mixture_of_experts.gating import Gate


def shard_routers(model: nn.Module, **options: Any) -> None:
    """Apply `fully_shard` to every gate of a model, before it is applied to the modules that contain them.

    If a gate is part of a larger unit, `MixedPrecisionPolicy(param_dtype=torch.bfloat16)` casts its weights too: with a
    router of 64 experts, 8 of which are chosen, 0.9 % of the tokens then choose a different set. A gate that is a
    separate unit keeps its weights in their dtype.

    Args:
        model: a model with layers of this package anywhere in it.
        options: of `fully_shard`, such as `mesh`; not `mp_policy`.

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
