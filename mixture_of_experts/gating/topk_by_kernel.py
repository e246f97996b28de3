"""Decides for `TopKGating` on a few tokens in inference, by one kernel on NVIDIA's GPUs.

Axes: b groups, n tokens of a group, d model dim, e experts, k choices.

A program computes one group, so groups must be short, as in decoding. The kernel checks itself before it serves a first
call of its kind. If it differs from torch's operators, or raises, it warns and is off for the process.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mixture_of_experts.gating.base import Tokens
from mixture_of_experts.gating.choices import Choices
from mixture_of_experts.gating.logits import RouterLogits
from mixture_of_experts.kernels.launching import SelfCheck, has_kernels
from mixture_of_experts.support.private_torch import is_fake, is_wrapper_subclass

TopKGating = Any  # which imports this
LONGEST = 8  # tokens of a group
MOST_EXPERTS, MOST_CHOICES = 1024, 32
TOLERANCE = 1e-3

CHECK = SelfCheck("the Triton kernels of gates")


def choices(gate: TopKGating, tokens: Tokens) -> Choices | None:
    """Return the gate's choices; None if the kernel does not serve the call."""
    if not (_is_decoding(gate, tokens) and has_kernel(tokens.x, *gate.parameters()) and knows(gate)):
        return None
    return _choose(gate, tokens) if is_fake(tokens.x) or _is_right(gate, tokens.x) else None


def _is_decoding(gate: TopKGating, tokens: Tokens) -> bool:
    """Whether groups are short, in eval and without gradients, and all tokens count."""
    if gate.training or torch.is_grad_enabled():
        return False
    simple = tokens.full is None and tokens.length == tokens.num_tokens and not tokens.side
    return simple and not gate.outer_expert_dims and 0 < tokens.num_tokens <= LONGEST and tokens.x.shape[0] > 0


def has_kernel(x: Tensor, *weights: Tensor) -> bool:
    """Whether kernels of gates take these tensors of one device: plain ones, none of them in float64."""
    tensors = (x, *weights)
    return has_kernels(x.device) and not any(t.dtype == torch.float64 or is_wrapper_subclass(t) for t in tensors)


def knows(gate: TopKGating) -> bool:
    """Whether the kernel is written for the gate's settings."""
    own = type(gate).__module__ == "mixture_of_experts.gating.topk" and type(gate.logits) in (type(None), RouterLogits)
    weighs = gate.weigh == "score" or (gate.weigh == gate.score == "softmax" and gate.eps <= 1e-20)
    steps = gate.score in ("softmax", "sigmoid") and gate.select == "score" and weighs
    simple = gate.num_groups is None and gate.process_group is None and gate.priority != "score"
    sizes = gate.num_experts <= MOST_EXPERTS and gate.k <= MOST_CHOICES
    return own and steps and simple and sizes and isinstance(gate.normalize, bool)


def _choose(gate: TopKGating, tokens: Tokens) -> Choices:
    from mixture_of_experts.kernels.top_k import few_choices  # it imports triton, which takes a second

    logits = gate.logits_of(tokens.x)
    b, n, e = logits.shape
    scales = e / (gate.choices_at_balance * b * n * n), 1 / (b * n)
    expert, weight, probs, sums = few_choices(logits, gate.expert_bias, *_settings(gate), *scales)
    balance, z_loss = sums.sum(dim=0).unbind()
    if gate.balance_over != "group":
        balance = gate.balance_loss(tokens, probs, expert, k=gate.choices_at_balance)
    return Choices(expert, weight, probs, {"balance": balance, "z": z_loss})


def _settings(gate: TopKGating) -> tuple[int, bool, bool, bool, float, float]:
    """k, whether scores are a softmax, whether weights are one of the chosen, are normalised, their scale, epsilon."""
    return gate.k, gate.score == "softmax", gate.weigh == "softmax", gate.normalize is True, gate.scale, gate.eps


def _is_right(gate: TopKGating, x: Tensor) -> bool:
    """Whether the kernel does on this device what torch's operators do, on made-up tokens of such a gate."""
    kind = x.device, gate.num_experts, gate.expert_bias is None, *_settings(gate)
    return CHECK.why_wrong(x.device, kind, partial(_fault, gate, x)) is None


@torch.no_grad()
def _fault(gate: TopKGating, x: Tensor) -> str | None:
    """What differs; None if nothing. One token may choose other experts: its scores may be equal up to rounding."""
    generator = torch.Generator(x.device).manual_seed(0)
    made_up = torch.randn(16, 2, x.shape[-1], generator=generator, device=x.device).to(x.dtype)
    tokens = Tokens(made_up, None, None, None, 2)
    found, wanted = _choose(gate, tokens), gate.decide_by_operators(tokens)
    chosen = (wanted.probs.gather(-1, way.expert.clamp(0, gate.num_experts - 1)) for way in (found, wanted))
    for name, got, want, allowed in (
        ("weights", found.weight, wanted.weight, gate.k),
        ("experts", *chosen, gate.k),
        ("probabilities", found.probs, wanted.probs, 0),
        *((name, found.losses[name], loss, 0) for name, loss in wanted.losses.items()),
    ):
        if torch.isclose(got, want, rtol=TOLERANCE, atol=1e-6, equal_nan=True).logical_not().sum() > allowed:
            return f"its {name} differ from those of torch's operators"
    return None
