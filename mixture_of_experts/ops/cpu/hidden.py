"""The hidden layer from what was computed with `w_in`, and its gradient, written where they are told.

The backward goes in two steps, so that the gradient of the hidden layer can lie where that of the gate will:
`recompute` reads it for the gradient of what the gate multiplies, `backward` writes over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixture_of_experts.ops.activations import KNOWN

Parts = Sequence[Tensor]  # of what was computed with `w_in`: one tensor, or gate and up


def forward(act: Any, pre: Parts, out: Tensor) -> None:
    if type(act) not in KNOWN:  # a function of both
        out.copy_(act(*pre))
        return
    KNOWN[type(act)](act).write(pre[0], out)
    if len(pre) == 2:
        out.mul_(pre[1])


def recompute(act: Any, pre: Parts, grad: Tensor, grad_pre: Parts, out: Tensor) -> None:
    """`forward` again, and the gradient of up, given that of the hidden layer."""
    if len(pre) == 1 or type(act) not in KNOWN:
        forward(act, pre, out)
    else:
        KNOWN[type(act)](act).write(pre[0], out)
        torch.mul(out, grad, out=grad_pre[1])
        out.mul_(pre[1])


def backward(act: Any, pre: Parts, grad: Tensor, grad_pre: Parts) -> None:
    """The rest of the gradients; `grad`, that of the hidden layer, may lie where `grad_pre[0]` is to be."""
    if type(act) not in KNOWN:
        with torch.enable_grad():
            leaves = [part.detach().requires_grad_() for part in pre]
            gradients = torch.autograd.grad(act(*leaves), leaves, grad)
        for part, gradient in zip(grad_pre, gradients, strict=True):
            part.copy_(gradient)
        return
    if len(pre) == 2:
        grad.mul_(pre[1])
    KNOWN[type(act)](act).write_grad(grad, pre[0], grad_pre[0])
