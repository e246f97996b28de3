"""Losses of a router: pure functions of counts of tokens and probabilities.

Axes: b groups (with outer experts before it: `...`), n tokens of a group, e experts.

Every loss is one `mean`, a total divided by a count, so that it is exact over several ranks. An empty mean is 0.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mixture_of_experts.dispatch.queues import Length
from mixture_of_experts.dispatch.segments import Segments
from mixture_of_experts.support.collective_errors import collective_error
from mixture_of_experts.support.private_torch import all_reduce_sum, statically_known_true
from mixture_of_experts.support.tracing import symbolic_max, symbolic_min


def global_sum(value: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum of `value` over the ranks of `group`, without gradient; without a group the value itself, detached."""
    value = value.detach()
    if group is None or world_size(group) == 1:
        return value
    try:
        return all_reduce_sum(value, group)
    except RuntimeError as error:
        raise collective_error("a gate could not sum over its process group", error, group) from error


def world_size(group: dist.ProcessGroup | None) -> int:
    """Number of ranks of a process group; 1 without one."""
    return 1 if group is None else dist.get_world_size(group)


def mean(total: Tensor, count: Tensor | int, group: dist.ProcessGroup | None = None, each: float = 1.0) -> Tensor:
    """`total / (count * each)`, 0 where nothing was counted.

    On each of several ranks it is `local total * number of ranks / (global count * each)`. Its average over the ranks,
    and that of its gradients, is exact for the whole batch, even if the ranks' shares of it are unequal.
    """
    alone = world_size(group) == 1
    if not isinstance(count, Tensor):
        if alone:
            return total / (symbolic_max(count, 1) * each)
        count = total.new_full((), count)
    count = global_sum(count.to(total.dtype), group).clamp(min=1)
    count = count if statically_known_true(each == 1) else count * each
    return (total if alone else total * world_size(group)) / count


def count_expert_load(expert: Tensor, counted: Tensor | None, num_experts: int) -> Tensor:
    """`(..., e)` int64, how often each expert is among the choices `(..., n, k)` that are `counted`."""
    ones = torch.ones_like(expert) if counted is None else counted.to(torch.int64).expand_as(expert)
    zeros = torch.zeros(*expert.shape[:-2], num_experts, dtype=torch.int64, device=expert.device)
    return zeros.scatter_add(-1, expert.flatten(-2), ones.flatten(-2))


def load_balancing_loss(
    load: Tensor, proxy: Tensor, length: Length | int, k: float = 1, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Load-balancing loss of GShard (arXiv 2006.16668, algorithm 1) and Switch (arXiv 2101.03961, equation 4).

    Returns 0-dim `e / k * sum_e f_e P_e`, with f and P the means of load and proxy over a group's tokens, averaged over
    the groups that have a token. It is 1.0 at uniform f and P.

    Args:
        load: `(..., b, e)` number of choices that each expert got; carries no gradient.
        proxy: `(..., b, e)` sum of the probabilities over the group's tokens.
        length: number of real tokens of each group `(..., b)`; n if all groups have that many.
        k: choices of a token.
        group: process group that shares the batch.
    """
    return _mean_of_products(load.detach() * proxy, length, k / load.shape[-1], group)


def load_balancing_loss_from_choices(
    expert: Tensor,
    counted: Tensor | None,
    proxy: Tensor,
    length: Length | int,
    k: float = 1,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The loss of `load_balancing_loss`, from the choices instead of loads: `sum_e load_e P_e` sums P over the choices.

    Args:
        expert: `(..., b, n, k)` int64, the choices.
        counted: `(..., b, n, k)` or `(..., b, n, 1)` bool, the choices that count; None if all do.
        proxy, length, k, group: as in `load_balancing_loss`.
    """
    chosen = proxy.gather(-1, expert.flatten(-2))
    if counted is not None:
        chosen = torch.where(counted.expand_as(expert).flatten(-2), chosen, 0.0)
    return _mean_of_products(chosen, length, k / proxy.shape[-1], group)


def _mean_of_products(products: Tensor, length: Length | int, factor: float, group: dist.ProcessGroup | None) -> Tensor:
    """The mean over groups of the sum of `products` `(..., b, any)` divided by the squared length and by `factor`."""
    if isinstance(length, Length):
        return _mean_over_groups(products, length.tokens(products.dtype), factor, group)
    groups = math.prod(products.shape[:-1]) * symbolic_min(length, 1)
    return mean(products.sum(), groups, group, factor * symbolic_max(length, 1) ** 2)


def _mean_over_groups(
    products: Tensor, tokens: Tensor, factor: float, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The same for groups of `tokens` `(..., b)`; those without a token do not count."""
    if tokens.shape != products.shape[:-1]:
        raise ValueError(
            f"lengths of {tuple(tokens.shape)} groups do not fit values of {tuple(products.shape[:-1])}, as in packed "
            "rows (segment_ids): call balance_loss(tokens, probs, expert), which sums over documents"
        )
    there = tokens > 0
    per_group = products.sum(dim=-1) / torch.where(there, tokens, 1.0).square()
    return mean(per_group.sum(), there.sum(), group, factor)


def load_balancing_loss_over_batch(
    load: Tensor, proxy: Tensor, length: Length | int, k: float = 1, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The loss of `load_balancing_loss` with f and P over all tokens of the call (arXiv 2501.11873: global-batch
    balance).

    f is the mean over all ranks of `group` and carries no gradient. With outer experts (`...`), the loss is computed
    for each of them and averaged over those that have a token. Arguments are as in `load_balancing_loss`.
    """
    if isinstance(length, Length):
        tokens = length.sum().tokens(proxy.dtype)
    else:
        tokens = proxy.new_full(proxy.shape[:-2], length * proxy.shape[-2])
    load, tokens = global_sum(load.sum(dim=-2).to(proxy.dtype), group), global_sum(tokens, group)
    return _mean_over_groups(load * proxy.sum(dim=-2), tokens, k / (load.shape[-1] * world_size(group)))


def load_balancing_loss_over_documents(
    load: Tensor, probs: Tensor, segments: Segments, k: float = 1, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The loss of `load_balancing_loss` for packed rows, with the documents as groups.

    `sum_e load_e P_e` is computed as a sum over tokens, each with the load of its document. Summing probabilities by
    document would be nondeterministic on a GPU, because the order of the additions varies between runs.

    Args:
        load: `(b n, e)` number of choices that each expert got in each document; carries no gradient.
        probs: `(b n, e)` probabilities of the tokens, 0 for those that do not count.
        segments: the documents.
        k, group: as in `load_balancing_loss`.
    """
    load = load.detach().to(probs.dtype).index_select(0, segments.document.flatten())
    length = segments.length.to(probs.dtype).clamp(min=1).square()
    per_token = (load * probs).sum(dim=-1) / segments.of_tokens(length).flatten()
    return mean(per_token.sum(), segments.num_documents, group, k / load.shape[-1])


def z_loss(logits: Tensor, counted: Tensor | None = None, group: dist.ProcessGroup | None = None) -> Tensor:
    """Router z-loss (ST-MoE, arXiv 2202.08906, equation 5): mean of `logsumexp(logits)^2` over the counted tokens.

    Args:
        logits: `(..., n, e)`.
        counted: `(..., n)` bool, the tokens that count; None if all do.
        group: process group that shares the batch.
    """
    return token_mean(logits.logsumexp(dim=-1).square(), counted, group)


def logsumexp_from_expert(logit: Tensor, prob: Tensor) -> Tensor:
    """The logsumexp of a token's logits `(..., n)`, as logit - log p of one expert after a softmax.

    This needs no pass over all experts, and its backward needs no logits.

    Args:
        logit, prob: `(..., n, 1)`, those of an expert that is likely, such as the first choice.
    """
    return (logit - prob.log()).squeeze(-1)


def z_loss_from_expert(
    logit: Tensor, prob: Tensor, counted: Tensor | None = None, group: dist.ProcessGroup | None = None
) -> Tensor:
    """`z_loss` using `logsumexp_from_expert`, from one expert of each token; arguments are as in both."""
    if counted is None and not torch.is_grad_enabled():  # fewer launches
        return mean(F.mse_loss(logit, prob.log(), reduction="sum"), math.prod(logit.shape), group)
    return token_mean(logsumexp_from_expert(logit, prob).square(), counted, group)


def token_mean(values: Tensor, counted: Tensor | None = None, group: dist.ProcessGroup | None = None) -> Tensor:
    """Mean of `values` where `counted`, a bool tensor of the same shape, is True; of all values if it is None."""
    if counted is None:
        return mean(values.sum(), math.prod(values.shape), group)
    return mean(torch.where(counted, values, 0.0).sum(), counted.sum(), group)


def cv_squared(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Squared coefficient of variation over experts (arXiv 1701.06538, equations 7 and 11): variance / mean^2.

    It uses the population variance, whose gradient is 0 at perfect balance, where that of the deviation is not finite.

    Args:
        values: `(..., e)` importance or load of each expert, summed over the call.
        group: process group that shares the batch; `values` are summed over its ranks first.

    Returns:
        0-dim, the average over the outer experts (`...`) that got anything.
    """
    total = global_sum(values, group) + (values - values.detach()) * world_size(group)
    centre = total.mean(dim=-1)
    used = centre.detach() != 0
    square = torch.where(used, centre.square(), torch.ones_like(centre))
    variation = torch.where(used, total.var(dim=-1, unbiased=False) / square, 0.0)
    return mean(variation.sum(), used.sum())
