"""Computes calls with a small number of tokens during inference, such as decoding on a GPU. No permutation is needed,
and only torch operators are used.

Axes: t (tokens), k (choices), e (experts), d (model dimension), o (output dimension).

For small row counts, the run time is dominated by kernel launches and by loading the weights from memory. Each choice
uses a copy of its expert's weights. If these copies would move more bytes than reading all weights, every expert
computes all tokens instead, and results from experts that a token did not choose are ignored. This path is used only in
eval mode without gradients, because a recomputation must use the same implementation as the forward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixture_of_experts.ops import plain
from mixture_of_experts.ops.network import Call
from mixture_of_experts.support.private_torch import statically_known_true
from mixture_of_experts.support.tracing import disable_autocast

MAX_INFERENCE_TOKENS = 64
MAX_DENSE_ROWS = 8192  # maximum number of rows when every expert computes all tokens
COPY_COST = 3  # a copied weight is read, written and read again


def should_copy_weights(call: Call) -> bool:
    """Return whether copying the weights for each choice moves fewer bytes than reading all weights."""
    return COPY_COST * call.assignments.weight.shape[0] < call.network.w_out.shape[0]


def supports_call(call: Call) -> bool:
    """Return whether a call routes a small number of tokens with token choice, in eval mode and without gradients."""
    tokens, experts = call.x.shape[0], call.network.w_out.shape[0]
    if not (call.is_inference() and statically_known_true(tokens <= MAX_INFERENCE_TOKENS)):
        return False
    return should_copy_weights(call) or tokens * experts <= MAX_DENSE_ROWS


def run(call: Call) -> Tensor:
    """Compute the outputs `(t, o)` of a call. The weighted sum over each token's choices is computed in float32 or
    higher precision."""
    x, network, assignments = call.x, call.network, call.assignments
    assert assignments.k is not None
    (t, d), experts, k = x.shape, network.w_out.shape[0], assignments.k
    weight = assignments.weight.view(t, k).to(torch.promote_types(assignments.weight.dtype, torch.float32))
    with disable_autocast(x.device):
        if should_copy_weights(call):
            chosen = network.map(lambda weights: weights.index_select(0, assignments.expert))
            rows = x.unsqueeze(1).expand(t, k, d).reshape(t * k, 1, d)
            y = plain.feed_forward(rows, chosen).view(t, k, network.w_out.shape[-1])
            unused = assignments.kept.logical_not().view(t, k)
        else:
            y = plain.feed_forward(x.expand(experts, t, d), network).transpose(0, 1)
            weight = weight.new_zeros(t, experts).scatter_add(1, assignments.expert.view(t, k), weight)
            unused = weight == 0
        return (y * weight.unsqueeze(-1)).masked_fill(unused.unsqueeze(-1), 0).sum(dim=1).to(x.dtype)
