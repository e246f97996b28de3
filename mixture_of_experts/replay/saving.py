"""Choices that activation checkpointing saves, instead of making them again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

Policy = Callable[..., CheckpointPolicy | bool]

#: operators by which numbers become choices
CHOOSE: set[Any] = {
    torch.ops.aten.argmax.default,
    torch.ops.aten.argmin.default,
    torch.ops.aten.max.dim,
    torch.ops.aten.multinomial.default,
    torch.ops.aten.sort.default,
    torch.ops.aten.sort.stable,
    torch.ops.aten.topk.default,
    *(
        getattr(getattr(torch.ops.aten, name), kind)
        for name in ("lt", "le", "gt", "ge", "eq", "ne")
        for kind in ("Tensor", "Scalar")
    ),
}


def save_choices(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """A policy for selective activation checkpointing: choices are saved, everything else is computed again.

    Where products differ from run to run, as on some GPUs, a token whose best scores are nearly equal may otherwise
    choose other experts in the recomputation than in the forward: its gradient is of a network that it did not pass.
    Saved is what operators make of floating-point numbers that is discrete: argmax, top-k, sorting, comparisons. That
    holds for gates of this package, policies and capacity among it, and for routers of `transformers`.

    Args:
        context, operator, args, kwargs: what `torch.utils.checkpoint` gives a policy.

    Returns:
        `MUST_SAVE` for such operators, else `PREFER_RECOMPUTE`.

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

        In a model of `transformers`: `model.activation_checkpointing_enable(dict(use_reentrant=False,
        context_fn=contexts))`.
    """
    first = args[0] if args else None
    chooses = operator in CHOOSE and isinstance(first, Tensor) and first.is_floating_point()
    return CheckpointPolicy.MUST_SAVE if chooses else CheckpointPolicy.PREFER_RECOMPUTE
