"""Activations of experts: made from what a user gives, and, for those that are known here, written where they are told.

Axes: r rows, h hidden dim.

An activation is a function of one tensor, `act(x w1)`, which gated experts multiply by `x w3`; or, for gated experts
only, a function of both, `(gate, up)`, that returns the hidden layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten
ActivationLike = Callable[..., Any]  # a class or factory of modules, a module, or a function


class ClampedSwiGLU(nn.Module):
    """The activation of GPT-OSS (arXiv 2508.10925): `gate sigmoid(alpha gate) (up + 1)`, both clamped before.

    Args:
        alpha: steepness of the sigmoid.
        limit: `gate` is clamped to at most, `up` to plus and minus this.

    Shape:
        gate and up `(..., h)`; returns `(..., h)`.

    Example:
        >>> import torch
        >>> from mixture_of_experts import GatedExperts
        >>> experts = GatedExperts(dim=8, num_experts=4, hidden_dim=16, activation=ClampedSwiGLU, bias=True)
        >>> experts(torch.randn(4, 5, 8)).shape
        torch.Size([4, 5, 8])
    """

    def __init__(self, alpha: float = 1.702, limit: float = 7.0) -> None:
        super().__init__()
        self.alpha, self.limit = alpha, limit

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + 1)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, limit={self.limit}"


class SquaredReLU(nn.Module):
    """`relu(x)^2` (Primer, arXiv 2109.08668).

    Shape:
        `(..., h)` to the same.

    Example:
        >>> import torch
        >>> SquaredReLU()(torch.tensor([-1.0, 3.0]))
        tensor([0., 9.])
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).square()


class FunctionActivation(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


def make_activation(activation: ActivationLike) -> nn.Module:
    """A module from a class (or other factory of no arguments), a module, or a function."""
    if isinstance(activation, nn.Module):
        return activation
    if not callable(activation):
        raise TypeError(f"activation must be a class such as nn.GELU, a module or a function, got {activation!r}")
    if (known := known_module(activation)) is not activation:
        return type(known)()  # one of its own: hooks on it are not other layers'
    made = activation() if isinstance(activation, type) or _binds(activation, 0) else FunctionActivation(activation)
    if not isinstance(made, nn.Module):
        raise TypeError(f"activation {activation!r} must make an nn.Module, it made {type(made).__name__}")
    return made


def takes_two(activation: ActivationLike) -> bool:
    """Whether it is a function of `(gate, up)`: one that cannot be called with a single tensor."""
    if type(activation) in KNOWN or isinstance(activation, ClampedSwiGLU):
        return isinstance(activation, ClampedSwiGLU)
    if isinstance(activation, FunctionActivation):
        return takes_two(activation.function)
    if isinstance(activation, nn.Module):
        return _needs_two(type(activation).forward, 1)  # before torch 2.12 no module may be an argument there
    return _needs_two(activation, 0)


@torch.compiler.assume_constant_result  # a graph could not read signatures
def _needs_two(function: Callable, more: int) -> bool:
    """Whether it can be called with two arguments and not with one, those that are given anyway apart."""
    return not _binds(function, 1 + more) and _binds(function, 2 + more)


def _binds(function: Callable, arguments: int) -> bool:
    """Whether it can be called with so many arguments; no if it has no signature to tell (one that is built in)."""
    try:
        inspect.signature(function).bind(*range(arguments))
    except (TypeError, ValueError):
        return False
    return True


class Known(NamedTuple):
    """An activation of one tensor that writes where it is told to, and its gradient likewise (in place if asked)."""

    write: Callable[[Tensor, Tensor], object]  # (h, out)
    write_grad: Callable[[Tensor, Tensor, Tensor], object]  # (grad, h, out)


def _gelu(act: nn.GELU) -> Known:
    approximate = act.approximate
    return Known(
        lambda h, out: aten.gelu.out(h, approximate=approximate, out=out),
        lambda grad, h, out: aten.gelu_backward.grad_input(grad, h, approximate=approximate, grad_input=out),
    )


_SILU = Known(
    lambda h, out: aten.silu.out(h, out=out),
    lambda grad, h, out: aten.silu_backward.grad_input(grad, h, grad_input=out),
)
_RELU = Known(
    lambda h, out: torch.clamp_min(h, 0, out=out),
    lambda grad, h, out: aten.threshold_backward.grad_input(grad, h, 0, grad_input=out),
)
_SQUARED_RELU = Known(
    lambda h, out: torch.clamp_min(h, 0, out=out).square_(),
    lambda grad, h, out: torch.mul(grad, torch.relu(h).mul_(2), out=out),
)
_IDENTITY = Known(lambda h, out: out.copy_(h), lambda grad, h, out: out.copy_(grad))
KNOWN: dict[type, Callable[[Any], Known]] = {
    nn.GELU: _gelu,
    nn.SiLU: lambda _: _SILU,
    nn.ReLU: lambda _: _RELU,
    SquaredReLU: lambda _: _SQUARED_RELU,
    nn.Identity: lambda _: _IDENTITY,
}
FUNCTIONS: dict[Callable, nn.Module] = {F.gelu: nn.GELU(), F.silu: nn.SiLU(), F.relu: nn.ReLU(), torch.relu: nn.ReLU()}


def known_module(activation: ActivationLike) -> Any:
    """The module that a well-known function is, such as `nn.SiLU()` for `F.silu`; anything else as it is."""
    return next((module for function, module in FUNCTIONS.items() if function is activation), activation)


def why_unknown(activation: ActivationLike) -> str | None:
    """Why kernels cannot compute it themselves; None if they can. A hook on it is one reason: it must be called."""
    if type(activation) not in (*KNOWN, ClampedSwiGLU):
        name = type(activation).__name__ if isinstance(activation, nn.Module) else repr(activation)
        return f"the activation {name} is none of {', '.join(kind.__name__ for kind in (*KNOWN, ClampedSwiGLU))}"
    return why_hooked(activation)


def why_hooked(activation: ActivationLike) -> str | None:
    """Why an activation has to be called, whether it is known or not."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(activation, name, None) for name in hooks):
        return "there are hooks on the activation, which has to be called for them"
    return None
