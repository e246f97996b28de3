"""Defines `save_choices`, an activation checkpointing policy that saves routing decisions instead of recomputing
them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

#: operators that turn floating-point numbers into discrete choices
CHOICE_OPERATORS = {
    f"aten.{name}"
    for name in ("argmax", "argmin", "max", "multinomial", "sort", "topk", "lt", "le", "gt", "ge", "eq", "ne")
}


def save_choices(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Selective activation checkpointing policy that saves expert choices and recomputes everything else.

    On some GPUs, matrix multiplications are nondeterministic. A token with nearly equal top scores may then be routed
    to different experts during recomputation than in the forward pass, which makes its gradient wrong. This policy
    saves the results of argmax, top-k, sorting and comparison operators on floating-point tensors. The policy therefore
    supports this package's gates, including their policies and capacity, as well as routers from other libraries.

    Args:
        context, operator, args, kwargs: the arguments that `torch.utils.checkpoint` passes to a policy.

    Returns:
        `MUST_SAVE` for operators whose results are saved, and `PREFER_RECOMPUTE` for all others.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
        >>> from mixture_of_experts import MoE
        >>> from mixture_of_experts.replay import save_choices
        >>> moe, x = MoE(dim=8, num_experts=4), torch.randn(2, 16, 8, requires_grad=True)
        >>> contexts = partial(create_selective_checkpoint_contexts, save_choices)
        >>> out, aux_loss = checkpoint(moe, x, use_reentrant=False, context_fn=contexts)
        >>> (out.sum() + aux_loss).backward()
    """
    first = args[0] if args else None
    name, _, _ = str(operator).rpartition(".")  # operator name without the overload
    chooses = name in CHOICE_OPERATORS and isinstance(first, Tensor) and first.is_floating_point()
    return CheckpointPolicy.MUST_SAVE if chooses else CheckpointPolicy.PREFER_RECOMPUTE
