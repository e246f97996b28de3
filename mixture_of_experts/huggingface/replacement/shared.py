"""The shared expert of a replaced network, which computes every token.

Axes: d model dim, h hidden dim.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_experts.experts import draw_weights
from mixture_of_experts.ops.activations import ActivationLike, hidden_layer, make_activation


class SharedNetwork(nn.Module):
    """A network with the weights and names of a single expert of `Experts` or `GatedExperts`.

    Args:
        dim: d.
        hidden_dim: h.
        gated: whether there is a `w3`.
        activation, bias: as in `Experts`.
        device, dtype: of the weights.

    Shape:
        `(..., d)` to the same shape.
    """

    act: nn.Module

    def __init__(
        self, dim: int, hidden_dim: int, activation: ActivationLike, *, gated: bool, bias: bool, **factory: Any
    ) -> None:
        super().__init__()
        self.dim = dim
        self.hidden_dim = hidden_dim
        self.act = copy.deepcopy(make_activation(activation))  # with a dropout of its own
        sizes = {"w1": (dim, hidden_dim), "w2": (hidden_dim, dim), "b1": (hidden_dim,), "b2": (dim,)}
        sizes |= {"w3": (dim, hidden_dim), "b3": (hidden_dim,)}
        for name, size in sizes.items():
            there = (gated or not name.endswith("3")) and (bias or name.startswith("w"))
            self.register_parameter(name, nn.Parameter(torch.zeros(*size, **factory)) if there else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as those of an expert; set biases to 0."""
        draw_weights(self)

    @torch.no_grad()
    def fill(self, network: Any) -> None:
        """Copy a dense network, without its last bias, which the experts have."""
        for name, parameter in self.named_parameters(recurse=False):
            parameter.copy_(torch.zeros_like(parameter) if name == "b2" else getattr(network, name))

    def forward(self, x: Tensor) -> Tensor:
        numbers = ("1",) if self.w3 is None else ("1", "3")
        return self._linear(hidden_layer(self.act, [self._linear(x, number) for number in numbers]), "2")

    def _linear(self, x: Tensor, number: str) -> Tensor:
        return nn.functional.linear(x, getattr(self, f"w{number}").T, getattr(self, f"b{number}"))

    def extra_repr(self) -> str:
        return f"{self.dim}, hidden_dim={self.hidden_dim}"
