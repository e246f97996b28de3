"""The hidden layer from what was computed with `w_in`, and its gradient, written where they are told.

The backward goes in two steps, so that the gradient of the hidden layer can lie where that of the gate will:
`recompute` reads it for the gradient of what the gate multiplies, `backward` writes over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixture_of_experts.ops.activations import KNOWN, ClampedSwiGLU

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
        clamped_backward(act, pre, grad, grad_pre)
        return
    if len(pre) == 2:
        grad.mul_(pre[1])
    KNOWN[type(act)](act).write_grad(grad, pre[0], grad_pre[0])


def clamped_backward(act: ClampedSwiGLU, pre: Parts, grad: Tensor, grad_pre: Parts) -> None:
    """Of `gate s (up + 1)` with `s = sigmoid(alpha gate)`; where a part is clamped it gets nothing."""
    gate, up = pre[0].clamp(max=act.limit), pre[1].clamp(-act.limit, act.limit)
    s = torch.sigmoid(act.alpha * gate)
    grad_up = torch.where(pre[1].abs() <= act.limit, grad * gate * s, 0)
    slope = s * (1 + act.alpha * gate * (1 - s))
    grad_pre[0].copy_(torch.where(pre[0] <= act.limit, grad * slope * (up + 1), 0))
    grad_pre[1].copy_(grad_up)
