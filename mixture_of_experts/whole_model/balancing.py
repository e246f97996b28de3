"""Updates the expert bias of every gate in a model once per optimizer step.

A rule (see `gating/bias_rules.py`) defines what is counted and how the counts change the bias. The gates in this
package count their own choices. For routers from other libraries, hooks count the choices that the routers return.

Axes: t (tokens), k (choices per token), e (experts).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from mixture_of_experts.gating.bias_rules import (
    BiasRule,
    ForwardChoices,
    RuleName,
    compute_bias_step,
    resolve_rule,
)
from mixture_of_experts.gating.expert_bias import RANK_LOCAL_BUFFERS, count_in_backward
from mixture_of_experts.support.attachments import Attachments
from mixture_of_experts.support.checks import check_number
from mixture_of_experts.support.private_torch import ignore_in_ddp
from mixture_of_experts.whole_model.external_routers import read_router_output, replace_result
from mixture_of_experts.whole_model.model_tokens import TokenWatch
from mixture_of_experts.whole_model.optimizer_step import OptimizerStepHook, find_updatable_routers, step_factor
from mixture_of_experts.whole_model.router_discovery import GateSelection, RouterHandle


def balance_experts(
    model: nn.Module,
    optimizer: Optimizer,
    rule: RuleName | BiasRule = "sign",
    rate: float | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    gates: GateSelection | None = None,
) -> ExpertBalancing:
    """Update the expert bias of every gate in `model` after each step of `optimizer`.

    This function updates every `TopKGating(expert_bias=True)`, and every router from another library that has such a
    bias (DeepSeek-V3, GLM 4, Kimi, MiniMax-M2, Ernie 4.5, ...). For routers from other libraries, the attention mask
    identifies padding. Each update uses the choices of all real tokens before expert capacity is applied. The update
    covers the training forward passes whose backward pass has run since the last step. Every micro-batch therefore
    counts exactly once, even under activation checkpointing. If a gradient scaler skips a step, the bias does not
    change, and the choices are counted in the next step instead. The bias is part of the state dict, and no other state
    needs to be saved after a step. A warning is issued if adapter files would not include the bias, or if the optimizer
    was constructed before the layers.

    Args:
        model: the model, before it is wrapped in DDP or `torch.compile`, so that DDP does not synchronize the counts
            across ranks.
        optimizer: the optimizer whose steps trigger the updates. It may be wrapped by accelerate.
        rule: how to update the bias. "sign" adds `rate * sign(mean load - load)` (Wang 2024, arXiv 2408.15664).
            "centred_sign" does the same and then subtracts the mean of the bias. "quantile" moves the bias toward the
            value that would have balanced the counted tokens (Kimi K3, section 2.3.3), and requires scores between 0
            and 1. You can also pass a rule instance, such as `mixture_of_experts.gating.QuantileRule(bins=4000)` or a
            custom rule.
        rate: step size of the updates. Default: 1e-3 for the sign rules, and 1 (a full step) for "quantile". You may
            change `balancing.rate` later. A rate of 0 freezes the bias, as DeepSeek-V3 does at the end of training.
        group: the ranks that hold these gates. Counts are summed over these ranks. Default: all ranks if
            `torch.distributed` is initialized, regardless of the gates' `process_group`. All ranks in the group must
            take the same optimizer steps.

        gates: the gates to balance, specified as gate names, gate modules, or layers that contain gates. Default: all
            gates with an expert bias. `balancing.gates` lists the names of the selected gates.

    Returns:
        An object whose `close()` method stops the updates. It can also be used as a context manager.

    Raises:
        TypeError: a gate in `gates` has no expert bias, or a router from another library has an expert bias but does
            not return its choices and their weights.
        ValueError: no gate has an expert bias, an argument is invalid, or "quantile" does not support a gate. The
            "quantile" rule does not support routers from other libraries, gates that choose experts by group, by
            function or by token id, or gates that make fewer than k choices for some tokens.

    Example:
        >>> import torch
        >>> from mixture_of_experts import MoE, TopKGating, balance_experts
        >>> moe = MoE(dim=8, gate=TopKGating(8, num_experts=4, expert_bias=True))
        >>> optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
        >>> balancing = balance_experts(moe, optimizer)
        >>> moe(torch.randn(2, 16, 8))[0].sum().backward()
        >>> optimizer.step()
        >>> bool((moe.gate.expert_bias.abs() <= 1e-3).all())
        True
    """
    balancing = ExpertBalancing(optimizer, group)
    balancing.rule = rule = resolve_rule("rule", rule)
    balancing.rate = rule.rate if rate is None else rate
    empty_message = (
        f"no gate of {type(model).__name__} has an expert bias; build its gates with TopKGating(..., expert_bias=True)"
    )
    routers = find_updatable_routers(
        model,
        "balance_experts",
        gates,
        lambda router: "it has no expert bias" if router.expert_bias is None else None,
        empty_message,
    )
    with Attachments() as hooks:  # removes the hooks if anything below raises an error
        token_watches = {
            router.enclosing_model: TokenWatch(router.enclosing_model) for router in routers if router.is_external
        }
        balancing.bias_updaters = [
            ExternalBiasUpdater(router, rule, token_watches[router.enclosing_model], hooks)
            if router.is_external
            else GateBiasUpdater(router.gate, rule, hooks)
            for router in routers
        ]
        for reader in token_watches.values():
            reader.attach_to(reader.model, hooks)
        balancing.enter_context(hooks.pop_all())
    ignore_counts_in_ddp(model)
    balancing.start(model, {router.name: router.expert_bias for router in routers})
    return balancing


class ExpertBalancing(OptimizerStepHook):
    """Updates the expert bias of a model's gates after each optimizer step. Returned by `balance_experts`.

    Attributes:
        gates: the names of the balanced gates.
    """

    rule: BiasRule
    bias_updaters: list[GateBiasUpdater | ExternalBiasUpdater]

    @property
    def rate(self) -> float:
        return self._rate

    @rate.setter
    def rate(self, value: float) -> None:
        self._rate = check_number("rate", value, at_least=0.0)

    def after_step(self, step_taken: Tensor | int) -> None:
        counted = [(bias, counts) for bias in self.bias_updaters if (counts := bias.counts) is not None]
        totals = self.sum_over_ranks([counts for _, counts in counted])
        for (bias, counts), total in zip(counted, totals, strict=True):
            factor = step_factor(step_taken, counts)
            bias.update_bias(total * factor, self.rate)
            counts.mul_(1 - factor)


class GateBiasUpdater:
    """Updates the bias of a gate from this package. Until `hooks` are closed, the gate counts what `rule` defines.

    If a gate has several updaters, only the newest one changes the bias. When this updater is closed, the newest
    remaining one takes over.
    """

    def __init__(self, gate: Any, rule: BiasRule, hooks: Attachments) -> None:
        self.gate = gate
        self.rule = rule
        hooks.set_attribute(gate, "bias_rule", rule)
        hooks.set_attribute(gate, "balanced_by", self)

    @property
    def counts(self) -> Tensor | None:
        """The gate's counts, or None if another updater is active or the gate's rule has been changed."""
        moves = self.gate.balanced_by is self and self.gate.bias_rule is self.rule
        return self.gate.bias_counts if moves else None

    def update_bias(self, counts: Tensor, rate: float) -> None:
        gate = self.gate
        gate.move_bias(compute_bias_step(self.rule, counts, gate.expert_bias, gate.k, rate, gate.always_chosen))


def ignore_counts_in_ddp(model: nn.Module) -> None:
    """Stop `DistributedDataParallel` from copying the first rank's counts to the other ranks before each forward
    pass."""
    ignore_in_ddp(model, find_rank_local_buffers(model))


def find_rank_local_buffers(model: nn.Module) -> set[str]:
    """Return the names of the gates' rank-local buffers (see `RANK_LOCAL_BUFFERS`)."""
    return {name for name, _ in model.named_buffers() if name.rpartition(".")[2] in RANK_LOCAL_BUFFERS}


# Routers from other libraries


class ExternalBiasUpdater:
    """Updates the bias of a router from another library. A hook on the router counts its choices until `hooks` are
    closed. If a router has several updaters, all of them count, but only the newest one changes the bias."""

    def __init__(self, router: RouterHandle, rule: BiasRule, token_watch: TokenWatch, hooks: Attachments) -> None:
        self.router = router
        self.external: Any = router.external
        if missing := {"weights", "experts"}.difference(self.external.returns):
            raise TypeError(
                f"balance_experts cannot count the choices of {router.name!r} ({router.class_name}), which does not "
                f"return {' and '.join(sorted(missing))}; {self.external.remedy}"
            )
        self.external.check_rule(rule, router.name)
        self.hook_target: nn.Module = router.hook_target
        self.rule = rule
        self.token_watch = token_watch
        bias = self.bias
        shape, kind = ((rule.bins,), torch.int32) if rule.bins else ((), torch.int64)
        self.accumulated_counts: Tensor = torch.zeros(bias.numel(), *shape, dtype=kind, device=bias.device)
        if bias.dtype.itemsize < 4:
            warnings.warn(
                f"the expert bias of {router.name!r} is {bias.dtype}, which is too coarse for small steps; keep it in "
                "float32",
                stacklevel=4,
            )
        hooks.add_forward_hook(router.hook_target, self.count_router_output)

    @property
    def bias(self) -> Any:
        """The bias. Moving the model to another device replaces this tensor."""
        return self.external.expert_bias

    @property
    def flat_bias(self) -> Tensor:
        """The bias as a float32 tensor of shape `(e,)`, regardless of its original shape."""
        return self.bias.detach().flatten().float()

    @property
    def counts(self) -> Tensor:
        if self.accumulated_counts.device != self.bias.device:  # the model was moved to another device
            self.accumulated_counts = self.accumulated_counts.to(self.bias.device)
        return self.accumulated_counts

    @property
    def is_active(self) -> bool:
        """Whether this updater is the newest one for its router."""
        hooks = self.hook_target._forward_hooks.values()
        counting = [
            owner for hook in hooks if isinstance(owner := getattr(hook, "__self__", None), ExternalBiasUpdater)
        ]
        return counting[-1] is self

    def update_bias(self, counts: Tensor, rate: float) -> None:
        if self.is_active:
            step = compute_bias_step(self.rule, counts, self.flat_bias, self.external.k, rate)
            self.bias.add_(step.view_as(self.bias).to(self.bias.dtype))

    def count_router_output(self, router: nn.Module, args: object, output: Any) -> Any:
        """Forward hook that counts a router's choices `(t, k)` for real tokens. The choices are counted when the
        gradient of the router weights is computed."""
        if not router.training or not torch.is_grad_enabled():
            return None
        _, weight, expert = read_router_output(self.router, output)
        # with NaN weights, a gradient scaler will skip this step
        real, mask = ~weight.isnan().any(dim=-1), self.token_watch.current_tokens().mask
        if mask is not None and mask.numel() == len(real):
            real = real & mask.flatten().to(real.device)
        chosen = real.unsqueeze(-1) & (expert >= 0) & (expert < self.bias.numel())
        expert = torch.where(chosen, expert, 0).to(torch.int64)
        counts = self.rule.count(ForwardChoices(expert, chosen, None, real, self.flat_bias))
        weight = output[self.external.returns.index("weights")]
        return replace_result(self.router, output, "weights", count_in_backward(weight, counts, self.counts))
