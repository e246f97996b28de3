"""Implements `TopKGating` for single-token inference on a CPU. Python numbers are used because they are faster than
operators.

Axes: d (model dimension), e (experts), k (choices).

Logits and scores are computed as in any other call. In the remaining steps, operator overhead would dominate.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.gating import topk_by_kernel
from mixture_of_experts.gating.base import Tokens
from mixture_of_experts.gating.steps import NO_EPSILON, SCORES
from mixture_of_experts.kernels.launching import can_launch_kernels
from mixture_of_experts.support.batch_invariance import BATCH_INVARIANT
from mixture_of_experts.support.implementations import requested_implementation
from mixture_of_experts.support.tracing import is_host_readable

TopKGating = Any  # avoids a circular import
MAX_EXPERTS = 64  # with more experts, operators are faster
#: methods used by the operators and replaced by this implementation
REPLACED_METHODS = (*topk_by_kernel.REPLACED_METHODS, "route", "_restrict_choices", "capacity", "named_losses")
MIN_NONZERO = 1e-37  # smaller weights may round to 0 in float32
MIN_TOTAL = 1e-9  # minimum sum of the weights for normalization


def unsupported_reason(gate: TopKGating, tokens: Tokens) -> str | None:
    """Return the reason why Python numbers cannot be used for this gate and these tokens, or None if they can be
    used."""
    x = tokens.x
    if gate.training or torch.is_grad_enabled():
        return "it supports only eval mode without gradients"
    if not is_host_readable(x) or torch.jit.is_tracing():
        return "it reads values, which requires plain CPU tensors outside of graphs and transforms"
    if x.shape != (1, 1, gate.dim) or tokens.loss_mask is not None or tokens.side or tokens.losses or tokens.segments:
        return f"it supports only one token (1, 1, {gate.dim}), without mask, side inputs, packing or further losses"
    if requested_implementation() in ("plain", BATCH_INVARIANT) or can_launch_kernels(x.device):
        return "operators or kernels are requested"
    if gate.capacity_factor_eval is not None or gate.num_experts > MAX_EXPERTS:
        return f"it supports only dropless gates with at most {MAX_EXPERTS} experts"
    if (reason := topk_by_kernel.unsupported_settings_reason(gate, REPLACED_METHODS)) is not None:
        return reason
    weights = gate.logits.parameters() if gate.w_gating is None else (gate.w_gating,)
    if any(type(weight) not in (Tensor, nn.Parameter) for weight in weights):
        return "its weights are not plain tensors"
    return None


def run(gate: TopKGating, tokens: Tokens) -> Routing:
    """Compute the `Routing` of a single token `(1, 1, d)`.

    Operators are used instead if a score is not finite, or if weights that must be normalized are close to 0. Experts
    that are chosen only because of their bias may have scores that round to 0, whereas the softmax over their logits
    does not round to 0.
    """
    logits, k, e = gate.compute_logits(tokens.x, gate.w_gating, gate.b_gating), gate.k, gate.num_experts
    score = SCORES[gate.score](logits)
    numbers = score.view(-1).tolist()
    ranks = numbers if gate.expert_bias is None else (score + gate.expert_bias).view(-1).tolist()
    if not all(map(math.isfinite, ranks)):  # fsum raises an error for a sum of inf and -inf
        return gate.decide_and_route(tokens)
    expert = sorted(range(e), key=ranks.__getitem__, reverse=True)[:k]  # ties go to the lowest index
    weight = [numbers[i] for i in expert]
    probs, share = score, sum(weight)
    if gate.score == "softmax":
        likeliest = max(range(e), key=numbers.__getitem__)
        log_total = logits.view(-1).tolist()[likeliest] - math.log(numbers[likeliest])
    else:
        probs = score / (score.sum(dim=-1, keepdim=True) + NO_EPSILON)
        share, log_total = share / (math.fsum(numbers) + NO_EPSILON), logits.logsumexp(dim=-1).item()
    if gate.normalize or gate.weigh == "softmax":
        if sum(weight) < MIN_TOTAL:
            return gate.decide_and_route(tokens)
        divisor = sum(weight) + gate.eps
        weight = [number / divisor for number in weight]
    if gate.scale != 1:
        weight = [number * gate.scale for number in weight]
    like: Any = dict(dtype=logits.dtype, device=logits.device)
    weights = torch.tensor([weight], **like)
    nonzero = min(map(abs, weight)) > MIN_NONZERO
    kept = torch.tensor([[True] * len(weight)], device=logits.device) if nonzero else weights != 0
    return Routing(
        expert=torch.tensor([expert], device=logits.device),
        kept=kept,
        weight=weights,
        probs=probs,
        num_tokens=1,
        num_experts=e,
        capacity=None,
        k=k,
        sent=kept,
        losses={
            "balance": torch.tensor(e / gate.choices_at_balance * share, **like),
            "z": torch.tensor(log_total**2, **like),
        },
    )
