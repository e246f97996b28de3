"""Activation checkpointing of another implementation than torch's: reentrant, as that of DeepSpeed is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def checkpoint(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a function without gradients; a backward runs it again."""
    return CheckpointFunction.apply(lambda *args: run(*args, **kwargs), *args)


class CheckpointFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, *args):
        ctx.run, ctx.args = run, args
        with torch.no_grad():
            return run(*args)

    @staticmethod
    def backward(ctx, *grads):
        inputs = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in ctx.args]
        with torch.enable_grad():
            outputs = ctx.run(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if isinstance(out, Tensor)]
        pairs = [(out, grad) for out, grad in pairs if out.requires_grad and grad is not None]
        torch.autograd.backward(*zip(*pairs, strict=True))
        return (None, *(getattr(value, "grad", None) for value in inputs))
