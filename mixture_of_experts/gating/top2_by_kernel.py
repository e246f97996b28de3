"""Implements `Top2Gating` on NVIDIA GPUs with one kernel for the forward pass and another for the gradient.

Axes: b (groups, preceded by outer experts, `...`), n (tokens per group), d (model dimension), e (experts).

The first call of each kind runs a self-check. If the kernels raise an error, or if their results differ from those of
torch's operators, the kernels are disabled for the rest of the process, and a warning is emitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixture_of_experts import losses
from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.gating.base import Tokens
from mixture_of_experts.gating.choices import Choices, both
from mixture_of_experts.gating.kernel_checks import NO_KERNEL, describe_difference, has_kernel
from mixture_of_experts.gating.logits import router_logits
from mixture_of_experts.gating.overrides import GIVEN
from mixture_of_experts.gating.recomputing import recomputed_on_gpu
from mixture_of_experts.kernels.launching import SelfCheck
from mixture_of_experts.support.private_torch import is_fake_tensor, is_functorch_wrapped
from mixture_of_experts.support.subclassing import find_implementing_class, find_overridden

Top2Gating = Any  # avoids a circular import
MAX_EXPERTS = 1024

#: methods that the operators use and the kernels replace
REPLACED_METHODS = (
    *("decide_and_route", "decide", "_compute_scores", "_without_first", "_weights", "_sent", "_losses", "allowed"),
    *("balance_loss", "_balance_of_tokens", "balance", "select_counted", "token_mean"),
)

SELF_CHECK = SelfCheck("the Triton kernels of Top2Gating")


def unsupported_reason(gate: Top2Gating, tokens: Tokens) -> str | None:
    """Return the reason why the kernels do not support the call, or None if they support it."""
    if not has_kernel(tokens.x, gate.w_gating):
        return NO_KERNEL
    base = find_implementing_class(type(gate))
    if (method := find_overridden(gate, base, REPLACED_METHODS)) is not None:
        return f"{type(gate).__name__} overrides {method}"
    if gate.num_experts > MAX_EXPERTS:
        return f"the kernels support at most {MAX_EXPERTS} experts"
    if tokens.segments is not None:
        return "the kernels do not support packed rows"
    if gate.second_place_loss or GIVEN in tokens.side or tokens.loss_mask is not tokens.makes_all_choices:
        return "the kernels do not support second_place_loss, expert choices passed by the caller, or computed padding"
    if math.prod(tokens.x.shape[:-1]) == 0:
        return "the input has no tokens"
    return None if is_fake_tensor(tokens.x) else _self_check_failure(gate, tokens)


def run(gate: Top2Gating, tokens: Tokens) -> Routing:
    """Compute the `Routing` of a call with the kernels."""
    return gate.route(tokens, choose_by_kernel(gate, tokens))


def choose_by_kernel(gate: Top2Gating, tokens: Tokens) -> Choices:
    """Compute the gate's choices with the kernels."""
    (policy, threshold), shape = gate.second, tokens.x.shape[:-1]
    uniform = torch.rand(shape, device=tokens.x.device, dtype=torch.float32) if policy == "random" else None
    settings = tokens.makes_all_choices, tokens.makes_any_choice, uniform, policy, threshold, gate.eps

    def decided(x: Tensor, weight: Tensor) -> Decided:
        return Decided(*_TwoBest.apply(router_logits(x, weight), *settings))

    found = recomputed_on_gpu(decided, tokens.x, gate.w_gating)
    balance = losses.load_balancing_loss(found.load, found.proxy, tokens.length, process_group=gate.process_group)
    z_loss = losses.mean(
        found.squares, math.prod(shape) if tokens.makes_all_choices is None else found.number, gate.process_group
    )
    all_made = policy == "all" and tokens.makes_all_choices is None and gate.num_experts > 1
    return Choices(
        found.expert,
        found.weight,
        found.probs,
        {"balance": balance, "z": z_loss},
        sent=None if all_made else found.sent,
        primary=found.primary,
        is_masked=True,
    )


class Decided(NamedTuple):
    """The results of the forward kernel, including the sums from which losses are computed."""

    expert: Tensor  # (..., b, n, 2) int64
    weight: Tensor  # (..., b, n, 2)
    sent: Tensor  # (..., b, n, 2) bool, whether the policy makes each choice
    primary: Tensor  # (..., b, n, 2) bool
    probs: Tensor  # (..., b, n, e)
    log_total: Tensor  # (..., b, n), logsumexp of the logits
    load: Tensor  # (..., b, e), number of each expert's first choices among counted tokens
    proxy: Tensor  # (..., b, e), sums of probabilities over counted tokens
    squares: Tensor  # (), sum of the squared `log_total` over counted tokens
    number: Tensor  # (), number of counted tokens


class _TwoBest(torch.autograd.Function):
    """Saves the probabilities, the choices and `log_total`, from which second derivatives are computed."""

    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        full: Tensor | None,
        active: Tensor | None,
        uniform: Tensor | None,
        policy: str,
        threshold: float,
        eps: float,
    ) -> tuple[Tensor, ...]:
        from mixture_of_experts.kernels.top_2 import choose_top_2  # importing triton takes about a second

        *found, sums, totals = choose_top_2(logits, full, active, uniform, policy, threshold, eps)
        expert, _, sent, primary, probs, log_total = found
        load, proxy = (sums.squeeze(-2) if sums.shape[-2] == 1 else sums.sum(dim=-2)).unbind()
        squares, number = totals.flatten(end_dim=-2).sum(dim=0).unbind()
        ctx.save_for_backward(probs, expert, log_total, full)
        ctx.eps = eps
        ctx.mark_non_differentiable(expert, sent, primary, load, number)
        ctx.set_materialize_grads(False)
        return *found, load, proxy, squares, number

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        grad_of = Decided(*grads)  # type: ignore[arg-type]
        given = [grad_of.weight, grad_of.probs, grad_of.log_total, grad_of.proxy, grad_of.squares]
        if torch.is_grad_enabled() or any(is_functorch_wrapped(grad) for grad in given if grad is not None):
            function: Callable[..., Tensor] = grads_by_operators
        else:
            from mixture_of_experts.kernels.top_2 import choose_top_2_grads as function
        return function(*ctx.saved_tensors, ctx.eps, given), *6 * [None]


def grads_by_operators(
    probs: Tensor,
    expert: Tensor,
    log_total: Tensor,
    full: Tensor | None,
    eps: float,
    grads: Sequence[Tensor | None],
) -> Tensor:
    """Compute the gradient of the logits `(..., b, n, e)` with operators that support autograd and vmap. The arguments
    are described in `Decided`."""
    grad_weight, grad_probs, grad_log_total, grad_proxy, grad_squares = grads
    counts = torch.ones_like(log_total, dtype=torch.bool) if full is None else full
    grad = torch.zeros_like(probs) if grad_probs is None else grad_probs
    if grad_proxy is not None:
        grad = grad + torch.where(counts.unsqueeze(-1), grad_proxy.unsqueeze(-2), 0.0)
    if grad_weight is not None:
        weighs = torch.stack([counts, ~((expert[..., 0] == expert[..., 1]) & counts)], dim=-1)
        shares = torch.where(weighs, probs.gather(-1, expert), 0.0)
        total = shares.sum(dim=-1, keepdim=True) + eps
        of_shares = (grad_weight - (grad_weight * shares).sum(dim=-1, keepdim=True) / total) / total
        grad = grad + torch.zeros_like(probs).scatter_add(-1, expert, torch.where(weighs, of_shares, 0.0))
    of_token = -(probs * grad).sum(dim=-1)
    if grad_squares is not None:
        of_token = of_token + torch.where(counts, 2 * grad_squares * log_total, 0.0)
    if grad_log_total is not None:
        of_token = of_token + grad_log_total
    return probs * (grad + of_token.unsqueeze(-1))


def _self_check_failure(gate: Top2Gating, tokens: Tokens) -> str | None:
    """Compare the kernels with torch's operators on this device, using generated tokens and the gate's settings. Return
    a description of the difference, or None if the results agree."""
    kind = gate.num_experts, gate.second[0], tokens.makes_all_choices is not None, gate.eps
    base = find_implementing_class(type(gate))  # subclasses may have other arguments
    check = partial(_find_fault, base, tokens.x.device, gate.second[1], *kind)
    return SELF_CHECK.failure_reason(tokens.x.device, kind, check)


def _find_fault(
    base: Any, device: torch.device, threshold: float, num_experts: int, policy: str, masked: bool, eps: float
) -> str | None:
    """Return a description of how the results differ, or None if they agree."""
    generator = torch.Generator(device).manual_seed(0)
    forked = partial(torch.random.fork_rng, [device] if device.type == "cuda" else [])
    groups, length, dim = 2, 150, 8

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

    def results(choose: Callable[[Any, Tokens], Choices]) -> dict[str, Tensor]:
        with forked():  # both implementations draw the same random numbers
            found = choose(gate, tokens)
        of_values = sum((value * value.detach().cos()).sum() for value in (found.weight, found.probs))
        total = of_values + groups * length * torch.stack([*found.losses.values()]).sum()
        (grad,) = torch.autograd.grad(total, [tokens.x])
        sent = found.sent if found.is_masked else both(both(found.chosen, found.sent), gate.allowed(tokens))
        flags = {"choices": sent, "first choices": found.primary}
        parts = {name: flag.float() for name, flag in flags.items() if flag is not None}
        parts |= {"experts": found.probs.gather(-1, found.expert), "weights": found.weight}
        return {**parts, "probabilities": found.probs, "gradients": grad, **found.losses}

    with forked():
        gate = base(dim, num_experts, eps, (), policy, policy, threshold, threshold, device=device)
    gate.w_gating = torch.nn.Parameter(draw(dim, num_experts))
    full, active = (draw(groups, length) < bound if masked else None for bound in (0.5, 1.0))
    active = active if full is None or active is None else full | active
    tokens = Tokens(draw(groups, length, dim).requires_grad_(), None, full, active, length)
    return describe_difference(results(choose_by_kernel), results(base.decide), atol=1e-5)
