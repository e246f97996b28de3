"""Implements `TopKGating` with a single kernel on NVIDIA GPUs, for inference on short groups.

Axes: b (groups), n (tokens per group), d (model dimension), e (experts), k (choices).

Each kernel program processes one group, so groups must be short, as they are during decoding. The first call of each
kind runs a self-check. If the kernel raises an error, or if its results differ from those of torch's operators, the
kernel is disabled for the rest of the process, and a warning is emitted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.gating.base import Tokens
from mixture_of_experts.gating.choices import Choices
from mixture_of_experts.gating.kernel_checks import NO_KERNEL, describe_difference, has_kernel
from mixture_of_experts.gating.logits import RouterLogits
from mixture_of_experts.gating.steps import NO_EPSILON
from mixture_of_experts.kernels.launching import SelfCheck
from mixture_of_experts.support.private_torch import is_fake_tensor
from mixture_of_experts.support.subclassing import find_implementing_class, find_overridden

TopKGating = Any  # avoids a circular import
MAX_TOKENS = 8  # maximum number of tokens per group
MAX_EXPERTS, MAX_CHOICES = 1024, 32

#: methods that the operators use, and that the kernel and the "numbers" implementation replace
REPLACED_METHODS = (
    "decide_and_route",
    "decide",
    "_compute_scores",
    "_rank_experts",
    "own_choices",
    "balance_of_scores",
    "first_is_likeliest",
    "_compute_weights",
    "_normalize_weights",
    "allowed",
    "balance_loss",
    "_balance_of_tokens",
    "balance",
    "select_counted",
    "token_mean",
)

SELF_CHECK = SelfCheck("the Triton kernels of gates")


def unsupported_reason(gate: TopKGating, tokens: Tokens) -> str | None:
    """Return the reason why the kernel does not support the call, or None if it supports it."""
    if gate.training or torch.is_grad_enabled():
        return "it supports only eval mode without gradients"
    if not has_kernel(tokens.x, *gate.parameters()):
        return NO_KERNEL
    if tokens.loss_mask is not None or tokens.length != tokens.num_tokens or tokens.side:
        return "it does not support masks, importance or side inputs"
    if not 0 < tokens.num_tokens <= MAX_TOKENS or tokens.x.shape[0] == 0:
        return f"it supports only groups of 1 to {MAX_TOKENS} tokens"
    return unsupported_settings_reason(gate) or (
        None if is_fake_tensor(tokens.x) else _self_check_failure(gate, tokens.x)
    )


def run(gate: TopKGating, tokens: Tokens) -> Routing:
    """Compute the `Routing` of a call with the kernel."""
    return gate.route(tokens, choose_by_kernel(gate, tokens))


def unsupported_settings_reason(gate: TopKGating, replaced: Collection[str] = REPLACED_METHODS) -> str | None:
    """Return the reason why the kernel and the "numbers" implementation do not support the gate's settings or
    overridden methods, or None if both are supported. Only overrides of the `replaced` methods are checked."""
    if (method := find_overridden(gate, find_implementing_class(type(gate)), replaced)) is not None:
        return f"{type(gate).__name__} overrides {method}"
    if type(gate.logits) not in (type(None), RouterLogits):
        return f"{type(gate.logits).__name__} computes the logits"
    weighs = gate.weigh == "score" or (gate.weigh == gate.score == "softmax" and gate.eps <= NO_EPSILON)
    if gate.score not in ("softmax", "sigmoid") or gate.select != "score" or not weighs:
        return "it does not support the gate's scores or weights"
    if gate.num_groups is not None or gate.outer_expert_dims or not isinstance(gate.normalize, bool):
        return "it does not support expert groups, two levels or normalization by a function"
    if gate.process_group is not None or gate.priority == "score":
        return "it does not support a process group or priority='score'"
    if gate.num_experts > MAX_EXPERTS or gate.k > MAX_CHOICES:
        return f"it supports at most {MAX_EXPERTS} experts and {MAX_CHOICES} choices"
    return None


def choose_by_kernel(gate: TopKGating, tokens: Tokens) -> Choices:
    """Compute the gate's choices with the kernel."""
    from mixture_of_experts.kernels.top_k import choose_top_k  # importing triton takes about a second

    logits = gate.compute_logits(tokens.x, gate.w_gating, gate.b_gating)
    b, n, e = logits.shape
    scales = e / (gate.choices_at_balance * b * n * n), 1 / (b * n)
    expert, weight, probs, sums = choose_top_k(logits, gate.expert_bias, *_settings(gate), *scales)
    balance, z_loss = sums.sum(dim=0).unbind()
    if gate.balance_over != "group":
        balance = gate.balance_loss(tokens, probs, expert, k=gate.choices_at_balance)
    return Choices(expert, weight, probs, {"balance": balance, "z": z_loss})


def _settings(gate: TopKGating) -> tuple[int, bool, bool, bool, float, float]:
    """Return the kernel's settings: k, whether scores are a softmax, whether weights are a softmax over the chosen
    experts, whether weights are normalized, their scale, and epsilon."""
    return gate.k, gate.score == "softmax", gate.weigh == "softmax", gate.normalize is True, gate.scale, gate.eps


def _self_check_failure(gate: TopKGating, x: Tensor) -> str | None:
    """Compare the kernel with torch's operators on this device, using generated tokens and the gate's settings. Return
    a description of the difference, or None if the results agree."""
    names = ("num_experts", "k", "score", "weigh", "normalize", "scale", "eps")
    kind = {name: getattr(gate, name) for name in names} | {"expert_bias": gate.expert_bias is not None}
    base = find_implementing_class(type(gate))  # subclasses may have other arguments
    return SELF_CHECK.failure_reason(x.device, tuple(kind.items()), partial(_find_fault, base, x.device, kind))


@torch.no_grad()
def _find_fault(base: Any, device: torch.device, settings: Mapping[str, Any]) -> str | None:
    """Return a description of how the results differ, or None if they agree."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    gate = base(16, **settings, device=device, dtype=torch.float32).eval()
    gate.w_gating.copy_(draw(16, gate.num_experts))
    if gate.expert_bias is not None:
        gate.expert_bias.copy_(draw(gate.num_experts))
    tokens = Tokens(draw(16, 2, 16), None, None, None, 2)
    wanted = gate.decide(tokens)

    def results(choices: Choices) -> dict[str, Tensor]:
        chosen = wanted.probs.gather(-1, choices.expert.clamp(0, gate.num_experts - 1))
        return {"weights": choices.weight, "experts": chosen, "probabilities": choices.probs, **choices.losses}

    return describe_difference(results(choose_by_kernel(gate, tokens)), results(wanted), atol=1e-6)
