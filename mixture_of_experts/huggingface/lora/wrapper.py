"""A PEFT wrapper for stacked weights that passes the low-rank factors to the experts instead of adding their product to
the weight.

Axes: e (experts), p and q (input and output features of a weight), k (rank).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import layer
from torch import Tensor

from mixture_of_experts.dispatch.assignments import Assignments
from mixture_of_experts.huggingface.lora.adapted_network import AdaptedNetwork, LowRankWeight
from mixture_of_experts.huggingface.lora.implementations import LORA_IMPLEMENTATIONS
from mixture_of_experts.huggingface.private_peft import read_stack_factors
from mixture_of_experts.ops import Network, routed_ffn
from mixture_of_experts.quantize import QuantizedExperts

LowRankFactors = tuple[Tensor, Tensor]  # down `(e, p, k)` and up `(e, k, q)`, whose product is added to a weight
NETWORK_TENSOR_NAMES = {"w1": "w_in.0", "w3": "w_in.1", "w2": "w_out"}  # keys in `Network.tensors`


class AdaptedFFN:
    """A replacement for `routed_ffn` that applies low-rank updates along with the network's weights."""

    def __init__(self, factors: Mapping[str, LowRankFactors]) -> None:
        self.factors = factors

    def __call__(self, x: Tensor, assignments: Assignments, network: Network, *, training: bool = False) -> Tensor:
        weights = network.tensors()
        adapted = {name: LowRankWeight(name, weights[name], *part) for name, part in self.factors.items()}
        whole = AdaptedNetwork(**vars(network.with_tensors(weights | adapted)))
        # a trainable weight receives its gradient through the sum of the weight and its update
        if any(stored.requires_grad for stored in weights.values()):
            return routed_ffn(x, assignments, whole.merged(), training=training)
        return routed_ffn(x, assignments, whole, training=training, implementations=LORA_IMPLEMENTATIONS)


class ParamWrapper(layer.ParamWrapper):
    """PEFT's `ParamWrapper` with a faster `forward`. PEFT requires this class name.

    Unsupported cases are handled by PEFT's own `forward`. Quantized experts raise an error in these cases, because they
    have no weight to which PEFT could add an update.
    """

    # the wrapper passes its factors to experts that compute outputs; `quantize_experts` reads this attribute
    passes_factors = True

    def get_param(self) -> Tensor:
        experts = self.get_base_layer()
        return (
            experts.placeholder_weight(self.parameter_name)
            if isinstance(experts, QuantizedExperts)
            else super().get_param()
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or not active:
            return super().forward(x, *args, **kwargs)
        is_supported = self.num_experts > 1 and isinstance(args[0] if args else kwargs.get("assignments"), Assignments)
        if not is_supported:
            self.check_not_quantized("be computed for slots")
        if self.merged or not is_supported or kwargs.get("adapter_names"):
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        outer: AdaptedFFN = kwargs.pop("ffn", None) or AdaptedFFN({})
        parts = {**outer.factors, NETWORK_TENSOR_NAMES[self.parameter_name]: self.combine_factors(active)}
        return self.base_layer(x, *args, ffn=AdaptedFFN(parts), **kwargs)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        self.check_not_quantized("be merged")
        super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        self.check_not_quantized("be unmerged")
        super().unmerge()

    def check_not_quantized(self, what: str) -> None:
        if isinstance(experts := self.get_base_layer(), QuantizedExperts):
            raise ValueError(
                f"adapters cannot {what}, because {self.parameter_name} is quantized to {experts.bits} bits; keep the "
                "adapters separate, or load them into the unquantized model and merge them there"
            )

    def combine_factors(self, adapters: list[str]) -> LowRankFactors:
        """Combine the updates that the active adapters add to the weight, and return the factors of their sum."""
        first, *others = map(self.read_factors, adapters)
        if not others:
            return first
        downs, ups = zip(first, *others, strict=True)
        return torch.cat(downs, -1), torch.cat(ups, -2)

    def read_factors(self, adapter: str) -> LowRankFactors:
        """Return the factors of the update that an adapter adds to the weight."""
        dtype = self.get_param().dtype
        down, up = read_stack_factors(self, adapter)
        return down.to(dtype), up.to(dtype)
