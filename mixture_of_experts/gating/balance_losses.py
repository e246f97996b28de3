"""Load-balancing losses by name, which apply `losses.load_balancing_loss` to different counts of the same choices.

Token-choice gates compute them only on request: `gate(x, losses=("balance_device",))`. A layer requests those that have
a coefficient in its `loss_coefs`. `balance_over="group"` or "batch" selects one of the first two as a gate's own loss::

    balance_group            over each group of tokens (a sequence), averaged over groups
    balance_batch            over all tokens of the batch; f is summed over the ranks
    balance_score            over each group; f counts what the scores would choose without bias (DeepSeek-V3)
    balance_device           over each group, for expert groups instead of experts (DeepSeek-V2)
    balance_communication    over each group, for the tokens that expert groups receive (DeepSeek-V2)

Axes: b groups, n tokens per group, e experts, g expert groups, k choices per token; `...` are outer experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mixture_of_experts.dispatch.queues import Length
from mixture_of_experts.dispatch.segments import Segments
from mixture_of_experts.gating.choices import top_choices
from mixture_of_experts.losses import (
    count_expert_load,
    load_balancing_loss,
    load_balancing_loss_over_batch,
    load_balancing_loss_over_documents,
)

BalanceOver = Literal["group", "batch"]


@dataclass(frozen=True)
class BalanceInputs:
    """Choices and probabilities of the tokens that count in a loss.

    Attributes:
        expert: `(..., b, n, k)` int64, the choices.
        chosen: `(..., b, n, k)` or `(..., b, n, 1)` bool, which choices are made; None if all are.
        probs: `(..., b, n, e)` normalized scores, 0 for tokens that do not count.
        load, proxy: `(..., b, e)`, the number of choices of each expert and the sum of its probabilities; in packed
            rows `(b n, e)`, load by document and probabilities by token.
        length: number of real tokens of each group `(..., b)`, or n if all groups have n tokens.
        k: number of choices per token, by which f is divided.
        num_groups, top_groups: number of expert groups, and number of groups that a token may choose from.
        process_group: the ranks that share the batch.
    """

    expert: Tensor
    chosen: Tensor | None
    probs: Tensor
    load: Tensor
    proxy: Tensor
    length: Length | int
    k: float
    num_groups: int = 1
    top_groups: int = 1
    process_group: dist.ProcessGroup | None = None
    segments: Segments | None = None

    def loss(self, over: BalanceOver = "group") -> Tensor:
        """Return the 0-dim `e / k * sum_e f_e P_e`, with f and P of these tokens."""
        return balance_loss_over(over, self.load, self.proxy, self.length, self.segments, self.k, self.process_group)


def balance_loss_over(
    over: BalanceOver,
    load: Tensor,
    proxy: Tensor,
    length: Length | int,
    segments: Segments | None,
    k: float,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Return the 0-dim balancing loss over groups of tokens or over the batch. Arguments are as in `BalanceInputs`."""
    if segments is not None and over == "group":
        return load_balancing_loss_over_documents(load, proxy, segments, k, group)
    return BALANCE_OVER[over](load, proxy, length, k, group)


def count_load(expert: Tensor, chosen: Tensor | None, num_experts: int, segments: Segments | None) -> Tensor:
    """Return `(..., b, e)`, or `(b n, e)` by document: how often each expert is among the choices `(..., b, n, k)`."""
    if segments is None:
        return count_expert_load(expert, chosen, num_experts)
    return segments.count_experts(expert, chosen, num_experts)


def sum_counts(counts: Tensor, segments: Segments | None) -> Tensor:
    """Return `(..., b, e)`, or `(b n, e)` by document: the sums of integers `(..., b, n, e)` over the tokens."""
    return counts.sum(dim=-2) if segments is None else segments.sum_counts(counts)


def sum_probs(probs: Tensor, segments: Segments | None) -> Tensor:
    """Return the `proxy` of `BalanceInputs`, from probabilities `(..., b, n, e)`."""
    return probs.sum(dim=-2) if segments is None else probs.flatten(0, 1)


#: balancing losses, keyed by the tokens over which f and P are computed
BALANCE_OVER: Mapping[str, Callable[..., Tensor]] = {
    "group": load_balancing_loss,
    "batch": load_balancing_loss_over_batch,
}


def over_score(inputs: BalanceInputs) -> Tensor:
    """Return the complementary sequence-wise loss of DeepSeek-V3 (arXiv 2412.19437, equations 17 to 20).

    f counts the experts with the k largest scores among all experts, without their bias. P uses scores that are
    normalized over all experts.
    """
    e = inputs.probs.shape[-1]
    k = min(inputs.expert.shape[-1], e)  # `Top2Gating` makes two choices even for a single expert, one of weight 0
    chosen = None if inputs.chosen is None else inputs.chosen[..., :k]
    return replace(inputs, load=count_load(top_choices(inputs.probs, k), chosen, e, inputs.segments)).loss()


def over_devices(inputs: BalanceInputs) -> Tensor:
    """Return the device-level loss of DeepSeek-V2 (arXiv 2405.04434, equations 26 to 28).

    Expert groups play the role of devices: f is the mean over the experts of a group, and P is their sum.
    """
    load, proxy = (of_expert_groups(values, inputs.num_groups) for values in (inputs.load, inputs.proxy))
    return replace(inputs, load=load, proxy=proxy).loss()


def over_communication(inputs: BalanceInputs) -> Tensor:
    """Return the communication loss of DeepSeek-V2 (arXiv 2405.04434, equations 29 to 31).

    f counts each token that an expert group receives once, and is divided by `top_groups`.
    """
    size = inputs.probs.shape[-1] // inputs.num_groups
    groups = torch.arange(inputs.num_groups, device=inputs.expert.device)
    sent = (inputs.expert // size).unsqueeze(-1) == groups
    if inputs.chosen is not None:
        sent = sent & inputs.chosen.unsqueeze(-1)
    load = sum_counts(sent.any(dim=-2), inputs.segments)  # (..., b, n, k, g) to (..., b, g)
    proxy = of_expert_groups(inputs.proxy, inputs.num_groups)
    return replace(inputs, load=load, proxy=proxy, k=inputs.top_groups).loss()


def of_expert_groups(values: Tensor, num_groups: int) -> Tensor:
    """Sum the values of experts `(..., e)` within each expert group, and return `(..., g)`."""
    return values.unflatten(-1, (num_groups, -1)).sum(dim=-1)


#: functions that compute balancing losses, keyed by name
BALANCE_LOSSES: Mapping[str, Callable[[BalanceInputs], Tensor]] = {
    "balance_group": partial(BalanceInputs.loss, over="group"),
    "balance_batch": partial(BalanceInputs.loss, over="batch"),
    "balance_score": over_score,
    "balance_device": over_devices,
    "balance_communication": over_communication,
}
#: losses that require expert groups
OF_EXPERT_GROUPS = ("balance_device", "balance_communication")
