"""The inputs of every implementation, `Network` (the weights of all experts) and `Call`; casts operands to one dtype.

Axes: t tokens, e experts, d model dim, h hidden dim, o dim of the outputs.
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
W_IN_NAMES, B_IN_NAMES = (
    ("w_in.0", "w_in.1"),
    ("b_in.0", "b_in.1"),
)  # names of a network's input weights and their biases


@dataclass(frozen=True)
class Network:
    """The weights of all experts as they are stored: `act(x w_in) w_out`, gated or not, with or without biases.

    Attributes:
        w_in: one weight `(e, d, h)`; or two, gate and up projection; or one weight `(e, d, 2 h)` that holds both.
        w_out: `(e, h, o)`.
        activation: a function of one tensor, or of `(gate, up)`.
        b_in: for each weight `(e, d, q)` of `w_in` a bias `(e, q)` or None; no biases by default.
        b_out: `(e, o)` or None.
        gate_up: how one weight holds gate and up projection, "concatenated" or "interleaved"; None if it does not.
        dropout: probability with which elements of the hidden layer are set to 0; the others are scaled up.
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
        """Return all weights and biases except None, by name: "w_in.0", "w_in.1", "w_out", "b_in.0", "b_in.1",
        "b_out"."""
        names = (*W_IN_NAMES[: len(self.w_in)], "w_out", *B_IN_NAMES[: len(self.b_in)], "b_out")
        there = zip(names, (*self.w_in, self.w_out, *self.b_in, self.b_out), strict=True)
        return {name: tensor for name, tensor in there if tensor is not None}

    def with_tensors(self, tensors: Mapping[str, Any]) -> Network:
        """Return the network with these weights and biases, by name; None for names that are missing."""
        get: Any = tensors.get
        w_in, b_in = (tuple([get(name) for name in names[: len(self.w_in)]]) for names in (W_IN_NAMES, B_IN_NAMES))
        return Network(w_in, get("w_out"), self.activation, b_in, get("b_out"), self.gate_up, self.dropout)

    def map(self, function: Callable[[Tensor], Tensor]) -> Network:
        """Return the network with `function` applied to every weight and bias."""
        return self.with_tensors({name: function(tensor) for name, tensor in self.tensors().items()})

    def merged(self) -> Network:
        """Return a network with the same outputs whose weights are plain tensors: itself, unless a subclass stores
        others."""
        return self

    def projections(self, pre: Sequence[Tensor]) -> Sequence[Tensor]:
        """Gate and up (or the one tensor) as views of `pre`, the products with each weight of `w_in`."""
        if self.gate_up is None:
            return pre
        return pre[0].chunk(2, dim=-1) if self.gate_up == "concatenated" else (pre[0][..., ::2], pre[0][..., 1::2])

    def hidden(self, pre: Sequence[Tensor]) -> Tensor:
        """Return the hidden layer `(..., h)` from `pre`, the products with each weight of `w_in`."""
        hidden = compute_hidden(self.activation, self.projections(pre))
        return F.dropout(hidden, self.dropout) if self.dropout else hidden

    def unsupported_activation_reason(self) -> str | None:
        """Return why an implementation cannot write the hidden layer and its gradient itself; None if it can."""
        if self.dropout:
            return "dropout draws random numbers for the hidden layer, which only torch's operators do"
        return unknown_activation_reason(self.activation)


def get_operand_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which weights of a dtype are multiplied: autocast's if it is on (it does not cast for grouped
    products), else their own. On a CPU without native products in autocast's dtype it is their own too, because the
    other would only be slower."""
    if device == "meta" or dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return dtype
    narrow = torch.get_autocast_dtype(device)
    return narrow if device != "cpu" or private_torch.has_native_matmul(narrow) else dtype


def cast_operands(x: Tensor, network: Network) -> tuple[Tensor, Network]:
    """Cast tokens and weights to one dtype."""
    dtype = network.w_out.dtype if x.dtype == torch.float64 else get_operand_dtype(x.device.type, network.w_out.dtype)
    if all(tensor.dtype == dtype for tensor in network.tensors().values()):
        return x.to(dtype), network
    return x.to(dtype), network.map(lambda tensor: tensor.to(dtype))


class Call(NamedTuple):
    """One call, with all operands in one dtype.

    Attributes:
        x: `(t, d)`, tokens.
        assignments: the assignments of these tokens.
        network: the experts' weights.
        training: the experts' mode. The selection of an implementation depends on this, not on the grad mode, because a
            recomputation must use the same implementation as its forward.
    """

    x: Tensor
    assignments: Assignments
    network: Network
    training: bool

    def is_inference(self) -> bool:
        """Return whether it is a call with token choice, in eval mode and without gradients."""
        return not (self.training or torch.is_grad_enabled() or self.assignments.k is None)
