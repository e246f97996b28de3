"""Implements expert activations. This module also converts user arguments to modules, and defines activations that
write to preallocated memory.

Axes: r (rows), h (hidden dimension).

An activation is a function of one tensor, `act(x w1)`. Gated experts multiply the activation's result by `x w3`. For
gated experts, an activation may also be a function of the two products, gate and up, that returns the hidden layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixture_of_experts.support.checks import check_number
from mixture_of_experts.support.private_torch import assume_constant_result, has_hooks

aten: Any = torch.ops.aten
ActivationLike = Callable[..., Any]  # a module class or factory, a module, or a function


class ClampedSwiGLU(nn.Module):
    """The activation of GPT-OSS (arXiv 2508.10925), `gate sigmoid(alpha gate) (up + 1)`, where `gate` and `up` are
    clamped.

    Args:
        alpha: steepness of the sigmoid.
        limit: clamping bound. `gate` is clamped to at most `limit`, and `up` to the range from -limit to limit.

    Shape:
        Maps `gate` and `up` of shape `(..., h)` to a tensor of the same shape.

    Example:
        >>> import torch
        >>> from mixture_of_experts import GatedExperts
        >>> experts = GatedExperts(dim=8, num_experts=4, hidden_dim=16, activation=ClampedSwiGLU, bias=True)
        >>> experts(torch.randn(4, 5, 8)).shape
        torch.Size([4, 5, 8])
    """

    is_tokenwise: ClassVar[bool] = True
    alpha: float
    limit: float

    def __init__(self, alpha: float = 1.702, limit: float = 7.0) -> None:
        super().__init__()
        self.alpha, self.limit = check_number("alpha", alpha), check_number("limit", limit, above=0.0)

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + 1)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, limit={self.limit}"


class ClampedGLU(nn.Module):
    """The activation `act(gate) * up`, where `gate` and `up` are clamped, as in DeepSeek-V4, GLM-5 and Step-3.7.

    Args:
        activation: the activation of the gate, as a class, module or function.
        limit: clamping bound. `gate` is clamped to at most `limit`, and `up` to the range from -limit to limit.
        after: whether to clamp the gate after the activation instead of before it.

    Shape:
        Maps `gate` and `up` of shape `(..., h)` to a tensor of the same shape.

    Example:
        >>> import torch
        >>> ClampedGLU(nn.ReLU, limit=2.0)(torch.tensor([1.0, 9.0]), torch.tensor([-3.0, 1.0]))
        tensor([-2.,  2.])
    """

    is_tokenwise: ClassVar[bool] = True
    act: nn.Module
    limit: float
    after: bool

    def __init__(self, activation: ActivationLike = nn.SiLU, limit: float = 7.0, *, after: bool = False) -> None:
        super().__init__()
        self.act, self.limit, self.after = make_activation(activation), limit, after

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        gate = self.act(gate).clamp(max=self.limit) if self.after else self.act(gate.clamp(max=self.limit))
        return gate * up.clamp(-self.limit, self.limit)

    def extra_repr(self) -> str:
        return f"limit={self.limit}" + (", after=True" if self.after else "")


class SiTU(nn.Module):
    """The sigmoid tanh unit of Kimi K3, `beta tanh(gate / beta) sigmoid(gate) * linear_beta tanh(up / linear_beta)`.

    `SiTU` is a SwiGLU whose two factors are smoothly bounded.

    Args:
        beta, linear_beta: the bounds of the two factors.

    Shape:
        Maps `gate` and `up` of shape `(..., h)` to a tensor of the same shape.

    Example:
        >>> import torch
        >>> SiTU(beta=4.0, linear_beta=25.0)(torch.tensor([100.0]), torch.tensor([1000.0]))
        tensor([100.])
    """

    is_tokenwise: ClassVar[bool] = True
    beta: float
    linear_beta: float

    def __init__(self, beta: float = 4.0, linear_beta: float = 25.0) -> None:
        super().__init__()
        self.beta = check_number("beta", beta, above=0.0)
        self.linear_beta = check_number("linear_beta", linear_beta, above=0.0)

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        bounded = self.beta * torch.tanh(gate / self.beta) * torch.sigmoid(gate)
        return bounded * (self.linear_beta * torch.tanh(up / self.linear_beta))

    def extra_repr(self) -> str:
        return f"beta={self.beta}, linear_beta={self.linear_beta}"


class SquaredReLU(nn.Module):
    """The squared ReLU, `relu(x)^2` (Primer, arXiv 2109.08668).

    Shape:
        Maps a tensor of shape `(..., h)` to a tensor of the same shape.

    Example:
        >>> import torch
        >>> SquaredReLU()(torch.tensor([-1.0, 3.0]))
        tensor([0., 9.])
    """

    is_tokenwise: ClassVar[bool] = True

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).square()


class FunctionActivation(nn.Module):
    """Wraps a function in a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


def make_activation(activation: ActivationLike) -> nn.Module:
    """Convert an activation to a module. Classes and other factories without arguments are called to create the
    module."""
    if isinstance(activation, nn.Module):
        return activation
    if not callable(activation):
        raise TypeError(f"activation must be a class such as nn.GELU, a module or a function, got {activation!r}")
    if (known := module_for_function(activation)) is not activation:
        return type(known)()  # a new instance, so that its hooks do not run in other layers
    made = (
        activation()
        if isinstance(activation, type) or _accepts_num_arguments(activation, 0)
        else FunctionActivation(activation)
    )
    if not isinstance(made, nn.Module):
        raise TypeError(f"activation {activation!r} must return an nn.Module when called, got {type(made).__name__}")
    return made


def takes_gate_and_up(activation: ActivationLike) -> bool:
    """Return whether an activation is a function of `(gate, up)` that cannot be called with a single tensor."""
    if isinstance(activation, ClampedSwiGLU):
        return True
    if type(activation) in KNOWN_ACTIVATIONS:
        return False
    if isinstance(activation, FunctionActivation):
        return takes_gate_and_up(activation.function)
    if isinstance(activation, nn.Module):
        # before torch 2.12, graphs cannot pass modules as arguments
        return _needs_two_arguments(type(activation).forward, 1)
    return _needs_two_arguments(activation, 0)


def compute_hidden(activation: ActivationLike, parts: Sequence[Tensor]) -> Tensor:
    """Compute a network's hidden layer `(..., h)` from either a single pre-activation or gate and up."""
    if len(parts) == 1 or takes_gate_and_up(activation):
        return activation(*parts)
    return activation(parts[0]) * parts[1]


@assume_constant_result  # a traced graph cannot read signatures
def _needs_two_arguments(function: Callable, leading_arguments: int) -> bool:
    """Return whether a function accepts two arguments, but not one, after its first `leading_arguments` arguments."""
    return not _accepts_num_arguments(function, 1 + leading_arguments) and _accepts_num_arguments(
        function, 2 + leading_arguments
    )


def _accepts_num_arguments(function: Callable, num_arguments: int) -> bool:
    """Return whether a function accepts `num_arguments` arguments. The result is False for built-in functions without a
    signature."""
    try:
        inspect.signature(function).bind(*range(num_arguments))
    except (TypeError, ValueError):
        return False
    return True


class KnownActivation(NamedTuple):
    """A single-tensor activation that can write its result and its gradient to preallocated memory or in place.

    `forward`, `recompute` and `backward` compute the hidden layer and its gradients from the pre-activations `pre`,
    which are either one tensor or gate and up. `recompute` runs first and reads `grad`, the gradient of the hidden
    layer. `backward` may then overwrite `grad`, so that its memory can be reused for the gradient of the gate.

    Attributes:
        write: a function `write(h, out)` that writes the activation of h to `out`.
        write_grad: a function `write_grad(grad, h, out)` that writes the gradient of h to `out`.
        kernel_name: the activation's name in `kernels/pointwise.py`, or None if it has no kernel there.
    """

    write: Callable[[Tensor, Tensor], object]
    write_grad: Callable[[Tensor, Tensor, Tensor], object]
    kernel_name: str | None = None

    def forward(self, pre: Sequence[Tensor], out: Tensor) -> None:
        self.write(pre[0], out)
        if len(pre) == 2:
            out.mul_(pre[1])

    def recompute(self, pre: Sequence[Tensor], grad: Tensor, grad_pre: Sequence[Tensor], out: Tensor) -> None:
        """Recompute the hidden layer and write it to `out`. Also write the gradient of up."""
        self.write(pre[0], out)
        if len(pre) == 2:
            torch.mul(out, grad, out=grad_pre[1])
            out.mul_(pre[1])

    def backward(self, pre: Sequence[Tensor], grad: Tensor, grad_pre: Sequence[Tensor]) -> None:
        """Overwrite `grad`, and write the gradient of the gate or of the single pre-activation."""
        if len(pre) == 2:
            grad.mul_(pre[1])
        self.write_grad(grad, pre[0], grad_pre[0])


class KnownClampedSwiGLU(NamedTuple):
    """The clamped SwiGLU, a function of gate and up that implements the methods of `KnownActivation`."""

    act: ClampedSwiGLU
    kernel_name = "clamped_swiglu"

    def forward(self, pre: Sequence[Tensor], out: Tensor) -> None:
        out.copy_(self.act(*pre))

    def recompute(self, pre: Sequence[Tensor], grad: Tensor, grad_pre: Sequence[Tensor], out: Tensor) -> None:
        self.forward(pre, out)

    def backward(self, pre: Sequence[Tensor], grad: Tensor, grad_pre: Sequence[Tensor]) -> None:
        """Write the gradients of `gate s (up + 1)` with `s = sigmoid(alpha gate)`. The gradient of a clamped value is
        0."""
        alpha, limit = self.act.alpha, self.act.limit
        gate, up = pre[0].clamp(max=limit), pre[1].clamp(-limit, limit)
        s = torch.sigmoid(alpha * gate)
        grad_up = torch.where(pre[1].abs() <= limit, grad * gate * s, 0)
        slope = s * (1 + alpha * gate * (1 - s))
        grad_pre[0].copy_(torch.where(pre[0] <= limit, grad * slope * (up + 1), 0))
        grad_pre[1].copy_(grad_up)


def _make_known_gelu(act: nn.GELU) -> KnownActivation:
    approximate = act.approximate
    return KnownActivation(
        lambda h, out: aten.gelu.out(h, approximate=approximate, out=out),
        lambda grad, h, out: aten.gelu_backward.grad_input(grad, h, approximate=approximate, grad_input=out),
        "gelu" if approximate == "none" else "gelu_tanh",
    )


_SILU = KnownActivation(
    lambda h, out: aten.silu.out(h, out=out),
    lambda grad, h, out: aten.silu_backward.grad_input(grad, h, grad_input=out),
    "silu",
)
_RELU = KnownActivation(
    lambda h, out: torch.clamp_min(h, 0, out=out),
    lambda grad, h, out: aten.threshold_backward.grad_input(grad, h, 0, grad_input=out),
    "relu",
)
_SQUARED_RELU = KnownActivation(
    lambda h, out: torch.clamp_min(h, 0, out=out).square_(),
    lambda grad, h, out: torch.mul(grad, torch.relu(h).mul_(2), out=out),
    "relu_squared",
)
_IDENTITY = KnownActivation(lambda h, out: out.copy_(h), lambda grad, h, out: out.copy_(grad), "identity")
KNOWN_ACTIVATIONS: dict[type[Any], Callable[[Any], KnownActivation | KnownClampedSwiGLU]] = {
    nn.GELU: _make_known_gelu,
    nn.SiLU: lambda _: _SILU,
    nn.ReLU: lambda _: _RELU,
    SquaredReLU: lambda _: _SQUARED_RELU,
    nn.Identity: lambda _: _IDENTITY,
    ClampedSwiGLU: KnownClampedSwiGLU,
}
FUNCTION_MODULES: dict[Callable[..., Any], nn.Module] = {
    F.gelu: nn.GELU(),
    F.silu: nn.SiLU(),
    F.relu: nn.ReLU(),
    torch.relu: nn.ReLU(),
}


def module_for_function(activation: ActivationLike) -> Any:
    """Return the module for a well-known function, such as `nn.SiLU()` for `F.silu`. Other activations are returned
    unchanged."""
    return next((module for function, module in FUNCTION_MODULES.items() if function is activation), activation)


def unknown_activation_reason(activation: ActivationLike) -> str | None:
    """Return the reason why implementations cannot compute an activation without calling it, or None if they can."""
    if type(activation) not in KNOWN_ACTIVATIONS:
        name = type(activation).__name__ if isinstance(activation, nn.Module) else repr(activation)
        return f"the activation {name} is none of {', '.join(kind.__name__ for kind in KNOWN_ACTIVATIONS)}"
    if has_hooks(activation):
        return "the activation has hooks, which run only if it is called"
    if "forward" in activation.__dict__:
        return "the activation has its own forward, which runs only if it is called"
    return None
