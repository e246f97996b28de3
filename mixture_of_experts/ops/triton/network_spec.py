"""Defines `NetworkSpec`, which describes the layout and activation of a network to the kernels. This module does not
import Triton."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from mixture_of_experts.ops.activations import KNOWN_ACTIVATIONS
from mixture_of_experts.ops.network import Network


class NetworkSpec(NamedTuple):
    """The layout and activation of a network.

    Attributes:
        layout: layout of the input weights: "plain" (one weight `(e, d, h)`), "gated" (two such weights),
            "concatenated" or "interleaved" (one weight `(e, d, 2 h)`).
        activation: name of the activation in `kernels/pointwise.py`.
        alpha, limit: arguments of `ClampedSwiGLU`.
    """

    layout: str
    activation: str
    alpha: float = 0.0
    limit: float = 0.0

    def kernel_constants(self) -> dict[str, Any]:
        """Return the compile-time arguments of the kernels."""
        interleaved = self.layout == "interleaved"
        return dict(ACTIVATION=self.activation, ALPHA=self.alpha, LIMIT=self.limit, INTERLEAVED=interleaved)

    def split_parts(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Return input weights, input biases or pre-activations in the form that kernels expect. Concatenated gate and
        up columns are split into two tensors. Interleaved columns remain in one tensor."""
        if self.layout == "concatenated":
            return [half for tensor in tensors for half in tensor.chunk(2, dim=-1)]
        return list(tensors)


def get_network_spec(network: Network) -> NetworkSpec | None:
    """Return the spec of a network, or None if the kernels do not support its activation. Subclasses of known
    activations are not supported."""
    activation: Any = network.activation
    layout = network.gate_up or ("gated" if network.gated else "plain")
    kernel = (
        KNOWN_ACTIVATIONS[type(activation)](activation).kernel_name if type(activation) in KNOWN_ACTIVATIONS else None
    )
    if kernel == "clamped_swiglu":
        return NetworkSpec(layout, kernel, activation.alpha, activation.limit) if network.gated else None
    return None if kernel is None else NetworkSpec(layout, kernel)
