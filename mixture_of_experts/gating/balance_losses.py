"""Balancing losses by name: one formula, `losses.load_balancing_loss`, over different counts of the same choices.

A gate of token choice computes them only on request: `gate(x, losses=("balance_device",))`. A layer requests those that
its `loss_coefs` weighs. `balance_over="group"` or "batch" makes one of the first two a gate's own::

    balance_group            of each group of tokens (a sequence), averaged
    balance_batch            of all tokens of the batch: f is summed over the ranks
    balance_score            of each group; f counts what the scores would choose without bias: DeepSeek-V3
    balance_device           of each group, over expert groups instead of experts: DeepSeek-V2
    balance_communication    of each group, over the tokens that expert groups receive: DeepSeek-V2

Axes: b groups, n tokens of a group, e experts, g expert groups, k choices of a token; outer experts stand before them:
`...`.
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
        chosen: `(..., b, n, k)` or `(..., b, n, 1)` bool, the choices that are made; None if all are.
        probs: `(..., b, n, e)` normalised scores, 0 for a token that does not count.
        load, proxy: `(..., b, e)`, the number of choices of each expert and the sum of its probabilities; in packed
            rows `(b n, e)`, load by document and probabilities by token.
        length: number of real tokens of each group `(..., b)`; n if all have that many.
        k: choices of a token, by which f is divided.
        num_groups, top_groups: numbers of expert groups, and of those that a token may choose from.
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
        """`e / k * sum_e f_e P_e`, with f and P of these tokens; 0-dim."""
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
    """The balancing loss over groups of tokens or over the batch, 0-dim; arguments are as in `BalanceInputs`."""
    if segments is not None and over == "group":
        return load_balancing_loss_over_documents(load, proxy, segments, k, group)
    return BALANCE_OVER[over](load, proxy, length, k, group)


def count_load(expert: Tensor, chosen: Tensor | None, num_experts: int, segments: Segments | None) -> Tensor:
    """`(..., b, e)` how often each expert is among the choices `(..., b, n, k)`; `(b n, e)` by document."""
    if segments is None:
        return count_expert_load(expert, chosen, num_experts)
    return segments.count_experts(expert, chosen, num_experts)


def sum_counts(counts: Tensor, segments: Segments | None) -> Tensor:
    """`(..., b, e)` the sums of whole numbers `(..., b, n, e)` over the tokens; `(b n, e)` by document."""
    return counts.sum(dim=-2) if segments is None else segments.sum_counts(counts)


def sum_probs(probs: Tensor, segments: Segments | None) -> Tensor:
    """The `proxy` of `BalanceInputs`, from probabilities `(..., b, n, e)`."""
    return probs.sum(dim=-2) if segments is None else probs.flatten(0, 1)


#: the tokens whose f and P a gate's own balancing loss takes, and the loss over them
BALANCE_OVER: Mapping[str, Callable[..., Tensor]] = {
    "group": load_balancing_loss,
    "batch": load_balancing_loss_over_batch,
}


def over_score(inputs: BalanceInputs) -> Tensor:
    """The complementary sequence-wise loss of DeepSeek-V3 (arXiv 2412.19437, equations 17 to 20): f counts the experts
    of the k largest scores, among all experts and without their bias; P is of scores normalised over all experts."""
    e = inputs.probs.shape[-1]
    k = min(inputs.expert.shape[-1], e)  # `Top2Gating` makes two choices of a single expert, the second with weight 0
    chosen = None if inputs.chosen is None else inputs.chosen[..., :k]
    return replace(inputs, load=count_load(top_choices(inputs.probs, k), chosen, e, inputs.segments)).loss()


def over_devices(inputs: BalanceInputs) -> Tensor:
    """The device-level loss of DeepSeek-V2 (arXiv 2405.04434, equations 26 to 28). An expert group takes the place of a
    device: f is the mean over its experts, P the sum."""
    load, proxy = (of_expert_groups(values, inputs.num_groups) for values in (inputs.load, inputs.proxy))
    return replace(inputs, load=load, proxy=proxy).loss()


def over_communication(inputs: BalanceInputs) -> Tensor:
    """The communication loss of DeepSeek-V2 (arXiv 2405.04434, equations 29 to 31): f counts each token that an expert
    group receives once, and is divided by `top_groups`."""
    size = inputs.probs.shape[-1] // inputs.num_groups
    groups = torch.arange(inputs.num_groups, device=inputs.expert.device)
    sent = (inputs.expert // size).unsqueeze(-1) == groups
    if inputs.chosen is not None:
        sent = sent & inputs.chosen.unsqueeze(-1)
    load = sum_counts(sent.any(dim=-2), inputs.segments)  # (..., b, n, k, g) to (..., b, g)
    proxy = of_expert_groups(inputs.proxy, inputs.num_groups)
    return replace(inputs, load=load, proxy=proxy, k=inputs.top_groups).loss()


def of_expert_groups(values: Tensor, num_groups: int) -> Tensor:
    """Sum values of experts `(..., e)` to values of expert groups `(..., g)`."""
    return values.unflatten(-1, (num_groups, -1)).sum(dim=-1)


#: the losses by name
BALANCE_LOSSES: Mapping[str, Callable[[BalanceInputs], Tensor]] = {
    "balance_group": partial(BalanceInputs.loss, over="group"),
    "balance_batch": partial(BalanceInputs.loss, over="batch"),
    "balance_score": over_score,
    "balance_device": over_devices,
    "balance_communication": over_communication,
}
#: the losses that need expert groups
OF_EXPERT_GROUPS = ("balance_device", "balance_communication")
