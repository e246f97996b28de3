"""The load-balancing losses that can be requested by name. They all use `losses.load_balancing_loss`, but count the
choices differently.

Token-choice gates compute these losses only on request, as in `gate(x, losses=("balance_device",))`. A layer requests
the losses that have a coefficient in its `loss_coefs`. A gate's `balance_over` setting determines whether its own loss
is "balance_group" or "balance_batch"::

    balance_group            over each group of tokens (a sequence), averaged over groups
    balance_batch            over all tokens of the batch; f is summed over the ranks
    balance_score            over each group; f counts what the scores would choose without bias (DeepSeek-V3)
    balance_device           over each group, for expert groups instead of experts (DeepSeek-V2)
    balance_communication    over each group, for the tokens that expert groups receive (DeepSeek-V2)

Axes: b (groups), n (tokens per group), e (experts), g (expert groups), k (choices per token). `...` stands for the
outer expert dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mixture_of_experts.dispatch.capacity import Length
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
    """The choices and probabilities from which a balancing loss is computed.

    Attributes:
        expert: `(..., b, n, k)` int64, the chosen experts.
        chosen: `(..., b, n, k)` or `(..., b, n, 1)` bool mask of the choices that are made, or None if all are made.
        probs: `(..., b, n, e)` normalized scores, which are 0 for uncounted tokens.
        load, proxy: `(..., b, e)`, the number of times each expert was chosen, and the sum of its probabilities. For
            packed rows, both have the shape `(b n, e)`: `load` has one row per document, and `proxy` has one row per
            token.
        length: number of real tokens in each group, `(..., b)`, or n if every group has n tokens.
        k: number of choices per token, used to normalize f.
        num_groups, top_groups: the number of expert groups, and the number of groups from which each token may choose.
        process_group: process group across which the batch is split.
        segments: the documents of packed rows, or None if rows are not packed.
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
        """Return `e / k * sum_e f_e P_e` as a 0-dim tensor, where f and P are computed from `load` and `proxy`."""
        return balance_loss_over(over, self.load, self.proxy, self.length, self.segments, self.k, self.process_group)


def balance_loss_over(
    over: BalanceOver,
    load: Tensor,
    proxy: Tensor,
    length: Length | int,
    segments: Segments | None,
    k: float,
    process_group: dist.ProcessGroup | None,
) -> Tensor:
    """Return the load-balancing loss over token groups or over the batch. See `BalanceInputs` for the arguments."""
    if segments is not None and over == "group":
        return load_balancing_loss_over_documents(load, proxy, segments, k, process_group)
    return BALANCE_OVER[over](load, proxy, length, k, process_group)


def sum_counts(counts: Tensor, segments: Segments | None) -> Tensor:
    """Sum integer counts `(..., b, n, e)` over the tokens. The result has the shape `(..., b, e)`, or `(b n, e)` with
    one row per document if rows are packed."""
    return counts.sum(dim=-2) if segments is None else segments.sum_counts(counts)


def sum_probs(probs: Tensor, segments: Segments | None) -> Tensor:
    """Compute `BalanceInputs.proxy` from probabilities `(..., b, n, e)`."""
    return probs.sum(dim=-2) if segments is None else probs.flatten(0, 1)


#: balancing losses, keyed by the tokens over which f and P are computed
BALANCE_OVER: Mapping[str, Callable[..., Tensor]] = {
    "group": load_balancing_loss,
    "batch": load_balancing_loss_over_batch,
}


def over_score(inputs: BalanceInputs) -> Tensor:
    """Return the complementary sequence-wise loss of DeepSeek-V3 (arXiv 2412.19437, equations 17 to 20).

    f counts how often each expert's score, without the expert bias, is among the k largest scores of all experts. P is
    computed from scores that are normalized over all experts.
    """
    e = inputs.probs.shape[-1]
    k = min(inputs.expert.shape[-1], e)  # with a single expert, the second choice of `Top2Gating` has weight 0
    chosen = None if inputs.chosen is None else inputs.chosen[..., :k]
    return replace(inputs, load=count_expert_load(top_choices(inputs.probs, k), chosen, e, inputs.segments)).loss()


def over_devices(inputs: BalanceInputs) -> Tensor:
    """Return the device-level loss of DeepSeek-V2 (arXiv 2405.04434, equations 26 to 28).

    Each expert group represents a device. f is averaged over the experts in a group, and P is summed over them.
    """
    load, proxy = (sum_over_expert_groups(values, inputs.num_groups) for values in (inputs.load, inputs.proxy))
    return replace(inputs, load=load, proxy=proxy).loss()


def over_communication(inputs: BalanceInputs) -> Tensor:
    """Return the communication loss of DeepSeek-V2 (arXiv 2405.04434, equations 29 to 31).

    f is the number of tokens that an expert group receives, divided by `top_groups`. Each token is counted once per
    group.
    """
    size = inputs.probs.shape[-1] // inputs.num_groups
    groups = torch.arange(inputs.num_groups, device=inputs.expert.device)
    sent = (inputs.expert // size).unsqueeze(-1) == groups
    if inputs.chosen is not None:
        sent = sent & inputs.chosen.unsqueeze(-1)
    load = sum_counts(sent.any(dim=-2), inputs.segments)  # (..., b, n, k, g) to (..., b, g)
    proxy = sum_over_expert_groups(inputs.proxy, inputs.num_groups)
    return replace(inputs, load=load, proxy=proxy, k=inputs.top_groups).loss()


def sum_over_expert_groups(values: Tensor, num_groups: int) -> Tensor:
    """Sum per-expert values `(..., e)` within each expert group, and return a tensor of shape `(..., g)`."""
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
