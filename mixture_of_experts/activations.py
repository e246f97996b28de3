"""Activations that write where they are told to, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten


class Activation(NamedTuple):
    """An activation that writes where it is told to, and its gradient likewise."""

    function: Callable[[Tensor], Tensor]
    write: Callable[[Tensor, Tensor], object]  # (h, out)
    write_grad: Callable[[Tensor, Tensor, Tensor], object]  # (grad, h, out)


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda h: F.gelu(h, approximate=approximate),
        lambda h, out: aten.gelu.out(h, approximate=approximate, out=out),
        lambda grad, h, out: aten.gelu_backward.grad_input(grad, h, approximate=approximate, grad_input=out),
    )


_GELU = {approximate: _gelu(approximate) for approximate in ("none", "tanh")}
_SILU = Activation(
    F.silu,
    lambda h, out: aten.silu.out(h, out=out),
    lambda grad, h, out: aten.silu_backward.grad_input(grad, h, grad_input=out),
)
_RELU = Activation(
    torch.relu,
    lambda h, out: torch.clamp_min(h, 0, out=out),
    lambda grad, h, out: aten.threshold_backward.grad_input(grad, h, 0, grad_input=out),
)


def find_activation(act: nn.Module) -> Activation | None:
    """The activation in the form needed here; None if there is none for it."""
    if type(act) is nn.GELU:
        return _GELU.get(act.approximate)
    return {nn.SiLU: _SILU, nn.ReLU: _RELU}.get(type(act))
