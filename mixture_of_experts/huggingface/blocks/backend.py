"""An `experts_implementation` for `transformers` that runs a model's experts with this package.

Importing this module registers the implementation with `transformers`. The implementation is used only by models that
select it.

Axes: t (tokens), k (choices), e (experts), d (model dimension), h (hidden dimension), o (output dimension).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mixture_of_experts.huggingface.private_transformers import apply_gating, has_default_gating
from mixture_of_experts.huggingface.replacement.dense_ffn import TORCH_ACTIVATIONS
from mixture_of_experts.ops import ClampedSwiGLU, moe_ffn

BACKEND_NAME = "mixture_of_experts"
BACKEND_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BACKEND_ACTIVATIONS: dict[str, nn.Module] = {
    name: make() for name, make in TORCH_ACTIVATIONS.items()
}  # these activations have no parameters


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run the experts that a router chose for each token, and return the weighted sums of their outputs.

    Tokens and outputs have shape `(t, d)`. Expert ids and router weights have shape `(t, k)`. Expert ids greater than
    or equal to e are skipped.

    This function supports the `transformers` flags `is_transposed`, `is_concatenated`, `has_bias`, `has_gate` and
    `has_post_expert_norm`, as well as classes that define their own `_apply_gate`.

    Raises:
        TypeError: the weights are quantized or sharded.
    """
    name, down = "gate_up_proj" if self.has_gate else "up_proj", self.down_proj
    first = getattr(self, name)
    for weight in (first, down):
        if type(weight) not in (Tensor, nn.Parameter) or weight.dtype not in BACKEND_DTYPES:
            raise TypeError(
                f"experts_implementation={BACKEND_NAME!r} requires plain weight tensors of dtype "
                f"{', '.join(map(str, BACKEND_DTYPES))}, but got {type(weight).__name__} of dtype {weight.dtype}; load "
                "the model with another experts_implementation"
            )
    if not self.is_transposed:
        first, down = first.mT, down.mT  # views of shape (e, in, out)
    b1 = b2 = None
    if self.has_bias:
        b1, b2 = getattr(self, f"{name}_bias"), self.down_proj_bias
    activation, gate_up = read_gating(self)
    network = dict(w1=first, w2=down, b1=b1, b2=b2, activation=activation, gate_up=gate_up)
    compute: Any = partial(moe_ffn, **network, training=self.training)

    x = hidden_states.to(first.dtype)
    if not self.has_post_expert_norm:
        return compute(x, top_k_index, top_k_weights).to(hidden_states.dtype)
    # the norm is applied before the router weight, so every choice is computed as a separate token
    k = top_k_index.shape[-1]
    alone = top_k_index.reshape(-1, 1)
    results = compute(x.repeat_interleave(k, dim=0), alone, torch.ones_like(alone, dtype=torch.float32))
    weight = torch.where(top_k_index < down.shape[0], top_k_weights, 0).unsqueeze(-1)
    return (self.post_expert_norm(results).unflatten(0, (-1, k)) * weight).sum(dim=1).to(hidden_states.dtype)


def read_gating(experts: Any) -> tuple[Callable[..., Tensor], Any]:
    """Return the experts' activation and their gate/up layout, as arguments for `moe_ffn`. Where possible, the
    activation is replaced with one that `ops` supports."""
    if not experts.has_gate or has_default_gating(experts):
        activation: Any = BACKEND_ACTIVATIONS.get(type(experts.act_fn).__name__, experts.act_fn)
        return activation, "concatenated" if experts.has_gate else None
    if type(experts).__name__ == "GptOssExperts":
        return ClampedSwiGLU(experts.alpha, experts.limit), "interleaved"
    gate_up = "concatenated" if experts.is_concatenated else "interleaved"
    return CustomGating(experts, gate_up), gate_up


class CustomGating(nn.Module):
    """Applies the experts' own gating function to separate gate and up tensors.

    This is a module rather than a nested function, because `torch.compile` cannot read a nested function's signature.
    """

    def __init__(self, experts: Any, gate_up: str) -> None:
        super().__init__()
        self.experts = experts
        self.gate_up = gate_up

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.gate_up == "concatenated":
            return apply_gating(self.experts, torch.cat([gate, up], dim=-1))
        return apply_gating(self.experts, torch.stack([gate, up], dim=-1).flatten(-2))


ALL_EXPERTS_FUNCTIONS.register(BACKEND_NAME, experts_forward)
