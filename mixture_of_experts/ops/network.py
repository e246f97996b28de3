"""Defines the inputs of all implementations: `Network`, which contains the weights of all experts, and `Call`. This
module also casts operands to a common dtype.

Axes: t (tokens), e (experts), d (model dimension), h (hidden dimension), o (output dimension).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixture_of_experts.dispatch.assignments import Assignments
from mixture_of_experts.ops.activations import ActivationLike, compute_hidden, unknown_activation_reason
from mixture_of_experts.support import private_torch

GateUpLayout = Literal["concatenated", "interleaved"]
# names of a network's input weights and their biases
W_IN_NAMES, B_IN_NAMES = ("w_in.0", "w_in.1"), ("b_in.0", "b_in.1")


@dataclass(frozen=True)
class Network:
    """The stored weights of all experts, which compute `act(x w_in) w_out`. The experts may be gated, and may have
    biases.

    Attributes:
        w_in: one weight `(e, d, h)`, two weights for the gate and up projections, or one weight `(e, d, 2 h)` for both
            projections.
        w_out: `(e, h, o)`.
        activation: a function of one tensor, or of `(gate, up)`.
        b_in: a bias `(e, q)` or None for each weight `(e, d, q)` in `w_in`. Default: no biases.
        b_out: bias `(e, o)`, or None.
        gate_up: layout of the gate and up projections in a single weight, "concatenated" or "interleaved". None if the
            projections are separate or there is no gate projection.
        dropout: probability of zeroing an element of the hidden layer. The remaining elements are scaled up.
    """

    w_in: tuple[Tensor, ...]
    w_out: Tensor
    activation: ActivationLike
    b_in: tuple[Tensor | None, ...] = ()
    b_out: Tensor | None = None
    gate_up: GateUpLayout | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.b_in:
            object.__setattr__(self, "b_in", (None,) * len(self.w_in))

    @property
    def gated(self) -> bool:
        return len(self.w_in) == 2 or self.gate_up is not None

    def tensors(self) -> dict[str, Tensor]:
        """Return all weights and biases that are not None, keyed by the names "w_in.0", "w_in.1", "w_out", "b_in.0",
        "b_in.1" and "b_out"."""
        names = (*W_IN_NAMES[: len(self.w_in)], "w_out", *B_IN_NAMES[: len(self.b_in)], "b_out")
        named = zip(names, (*self.w_in, self.w_out, *self.b_in, self.b_out), strict=True)
        return {name: tensor for name, tensor in named if tensor is not None}

    def with_tensors(self, tensors: Mapping[str, Any]) -> Network:
        """Return a copy of the network with the given weights and biases, keyed by name. Tensors whose names are
        missing are set to None."""
        get: Any = tensors.get
        w_in, b_in = (tuple([get(name) for name in names[: len(self.w_in)]]) for names in (W_IN_NAMES, B_IN_NAMES))
        return Network(w_in, get("w_out"), self.activation, b_in, get("b_out"), self.gate_up, self.dropout)

    def map(self, function: Callable[[Tensor], Tensor]) -> Network:
        """Return a copy of the network with `function` applied to all weights and biases."""
        return self.with_tensors({name: function(tensor) for name, tensor in self.tensors().items()})

    def merged(self) -> Network:
        """Return an equivalent network whose weights are plain tensors. Subclasses with other kinds of weights override
        this method."""
        return self

    def projections(self, pre: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the gate and up projections, or the single pre-activation, as views of `pre`. `pre` contains the
        products with the weights in `w_in`."""
        if self.gate_up is None:
            return pre
        return pre[0].chunk(2, dim=-1) if self.gate_up == "concatenated" else (pre[0][..., ::2], pre[0][..., 1::2])

    def hidden(self, pre: Sequence[Tensor]) -> Tensor:
        """Return the hidden layer `(..., h)`. `pre` contains the products with the weights in `w_in`."""
        hidden = compute_hidden(self.activation, self.projections(pre))
        return F.dropout(hidden, self.dropout) if self.dropout else hidden

    def unsupported_activation_reason(self) -> str | None:
        """Return the reason why an implementation cannot compute the hidden layer and its gradient, or None if it
        can."""
        if self.dropout:
            return "dropout of the hidden layer draws random numbers, which only torch's operators support"
        return unknown_activation_reason(self.activation)


def get_operand_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which weights of the given dtype are multiplied.

    The result is the autocast dtype if autocast is enabled, because autocast itself does not cast the operands of
    grouped products. Otherwise, the result is `dtype`. The result is also `dtype` on CPUs that do not natively support
    products in the autocast dtype, because autocast would only be slower there.
    """
    if device == "meta" or dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return dtype
    narrow = torch.get_autocast_dtype(device)
    return narrow if device != "cpu" or private_torch.has_native_matmul(narrow) else dtype


def cast_operands(x: Tensor, network: Network) -> tuple[Tensor, Network]:
    """Cast tokens and weights to a common dtype."""
    dtype = network.w_out.dtype if x.dtype == torch.float64 else get_operand_dtype(x.device.type, network.w_out.dtype)
    if all(tensor.dtype == dtype for tensor in network.tensors().values()):
        return x.to(dtype), network
    return x.to(dtype), network.map(lambda tensor: tensor.to(dtype))


class Call(NamedTuple):
    """A call to the experts, with all operands in a common dtype.

    Attributes:
        x: `(t, d)`, tokens.
        assignments: the expert assignments of the tokens.
        network: the weights of all experts.
        training: whether the experts are in training mode. The training mode rather than the grad mode determines the
            implementation, because a recomputation must use the same implementation as the forward pass.
    """

    x: Tensor
    assignments: Assignments
    network: Network
    training: bool

    def is_inference(self) -> bool:
        """Return whether the call uses token choice in eval mode without gradients."""
        return not (self.training or torch.is_grad_enabled() or self.assignments.k is None)
