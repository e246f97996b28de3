"""What of a network is not a tensor, in the words of the kernels. Imported without triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mixture_of_experts.ops.activations import KNOWN
from mixture_of_experts.ops.network import Network


class Form(NamedTuple):
    """Of a network.

    Attributes:
        layout: how the input weights lie: "plain", one `(e, d, h)`; "gated", two of them; or in one `(e, d, 2 h)`
            "concatenated" or "interleaved".
        activation: a name that `activations.py` knows.
        alpha, limit: of clamped SwiGLU.
    """

    layout: str
    activation: str
    alpha: float = 0.0
    limit: float = 0.0

    @property
    def gated(self) -> bool:
        return self.layout != "plain"

    def parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Of input weights or biases, or of what is computed with them, what kernels know by a name: columns of gate
        and of up apart, but where they lie in turn."""
        if self.layout == "concatenated":
            return [half for tensor in tensors for half in tensor.chunk(2, dim=-1)]
        return list(tensors)


def form_of(network: Network) -> Form | None:
    """None if no kernel knows the activation; of a subclass nobody knows what it computes."""
    activation: Any = network.activation
    layout = network.halves or ("gated" if network.gated else "plain")
    kernel = KNOWN[type(activation)](activation).kernel if type(activation) in KNOWN else None
    if kernel == "clamped_swiglu":
        return Form(layout, kernel, activation.alpha, activation.limit) if network.gated else None
    return None if kernel is None else Form(layout, kernel)
