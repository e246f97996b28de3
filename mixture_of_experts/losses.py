"""Implements router losses as pure functions of token counts and probabilities.

Axes: b (groups, preceded by outer experts, `...`), n (tokens per group), e (experts).

Each loss is computed with a single call to `mean`, which divides a total by a count, so the result is exact across
ranks. The mean of zero elements is 0.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mixture_of_experts.dispatch.capacity import Length
from mixture_of_experts.dispatch.segments import Segments
from mixture_of_experts.support.collective_errors import collective_error
from mixture_of_experts.support.private_torch import all_reduce_sum, statically_known_true
from mixture_of_experts.support.tracing import symbolic_max, symbolic_min


def global_sum(value: Tensor, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum `value` over the ranks of `process_group` without tracking gradients. If `process_group` is None, return the
    detached value."""
    value = value.detach()
    if process_group is None or world_size(process_group) == 1:
        return value
    try:
        return all_reduce_sum(value, process_group)
    except RuntimeError as error:
        raise collective_error("a gate could not sum values over its process group", error, process_group) from error


def world_size(process_group: dist.ProcessGroup | None) -> int:
    """Return the number of ranks in a process group, or 1 if `process_group` is None."""
    return 1 if process_group is None else dist.get_world_size(process_group)


def mean(
    total: Tensor, count: Tensor | int, process_group: dist.ProcessGroup | None = None, divisor: float = 1.0
) -> Tensor:
    """Return `total / (count * divisor)`, or 0 if the count is 0.

    With several ranks, each rank returns `local total * number of ranks / (global count * divisor)`. Averaging this
    value or its gradients over the ranks yields the exact result for the whole batch, even if the ranks hold different
    shares of the batch.

    Args:
        total: 0-dimensional sum over this rank's elements.
        count: number of these elements.
        process_group: process group across which the batch is split.
        divisor: an additional divisor.
    """
    alone = world_size(process_group) == 1
    if not isinstance(count, Tensor):
        if alone:
            return total / (symbolic_max(count, 1) * divisor)
        count = total.new_full((), count)
    count = global_sum(count.to(total.dtype), process_group).clamp(min=1)
    count = count if statically_known_true(divisor == 1) else count * divisor
    return (total if alone else total * world_size(process_group)) / count


def count_expert_load(
    expert: Tensor, counted: Tensor | None, num_experts: int, segments: Segments | None = None
) -> Tensor:
    """Count how often each expert is selected by the `counted` choices `(..., b, n, k)`, and return an int64 tensor of
    shape `(..., b, e)`, or `(b n, e)` with one row per document if rows are packed."""
    if segments is not None:
        return segments.count_experts(expert, counted, num_experts)
    ones = torch.ones_like(expert) if counted is None else counted.to(torch.int64).expand_as(expert)
    zeros = torch.zeros(*expert.shape[:-2], num_experts, dtype=torch.int64, device=expert.device)
    return zeros.scatter_add(-1, expert.flatten(-2), ones.flatten(-2))


def load_balancing_loss(
    load: Tensor, proxy: Tensor, length: Length | int, k: float = 1, process_group: dist.ProcessGroup | None = None
) -> Tensor:
    """Compute the load-balancing loss of GShard (arXiv 2006.16668, algorithm 1) and Switch (arXiv 2101.03961, eq. 4).

    The loss is `e / k * sum_e f_e P_e`, averaged over all groups that have tokens. f and P are the means of `load` and
    `proxy` over a group's tokens. The result is 0-dimensional and equals 1.0 if f and P are uniform.

    Args:
        load: `(..., b, e)`, the number of times each expert was chosen. The load carries no gradient.
        proxy: `(..., b, e)`, the router probabilities summed over each group's tokens.
        length: number of real tokens in each group, `(..., b)`, or n if every group has n tokens.
        k: number of choices per token.
        process_group: process group across which the batch is split.
    """
    return _mean_of_products(load.detach() * proxy, length, k / load.shape[-1], process_group)


def load_balancing_loss_from_choices(
    expert: Tensor,
    counted: Tensor | None,
    proxy: Tensor,
    length: Length | int,
    k: float = 1,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Compute `load_balancing_loss` from choices instead of loads. `sum_e load_e P_e` equals the sum of P over all
    choices.

    Args:
        expert: `(..., b, n, k)` int64, the chosen experts.
        counted: `(..., b, n, k)` or `(..., b, n, 1)` bool mask of the choices to count, or None to count all.
        proxy, length, k, process_group: see `load_balancing_loss`.
    """
    chosen = proxy.gather(-1, expert.flatten(-2))
    if counted is not None:
        chosen = torch.where(counted.expand_as(expert).flatten(-2), chosen, 0.0)
    return _mean_of_products(chosen, length, k / proxy.shape[-1], process_group)


def _mean_of_products(
    products: Tensor, length: Length | int, factor: float, process_group: dist.ProcessGroup | None
) -> Tensor:
    """Sum `products` `(..., b, any)` within each group, divide by `length^2 * factor`, and return the mean over
    groups."""
    if isinstance(length, Length):
        return _mean_over_groups(products, length.tokens(products.dtype), factor, process_group)
    groups = math.prod(products.shape[:-1]) * symbolic_min(length, 1)
    return mean(products.sum(), groups, process_group, factor * symbolic_max(length, 1) ** 2)


def _mean_over_groups(
    products: Tensor, tokens: Tensor, factor: float, process_group: dist.ProcessGroup | None = None
) -> Tensor:
    """Compute `_mean_of_products` over all nonempty groups. `tokens` `(..., b)` is the number of tokens in each
    group."""
    if tokens.shape != products.shape[:-1]:
        raise ValueError(
            f"lengths of shape {tuple(tokens.shape)} do not match values of shape {tuple(products.shape[:-1])}. If the "
            "rows are packed (segment_ids), call balance_loss(tokens, probs, expert), which sums over documents"
        )
    nonempty = tokens > 0
    per_group = products.sum(dim=-1) / torch.where(nonempty, tokens, 1.0).square()
    return mean(per_group.sum(), nonempty.sum(), process_group, factor)


def load_balancing_loss_over_batch(
    load: Tensor, proxy: Tensor, length: Length | int, k: float = 1, process_group: dist.ProcessGroup | None = None
) -> Tensor:
    """Compute `load_balancing_loss` with f and P averaged over all tokens of the call (global-batch balance, arXiv
    2501.11873).

    f is also averaged over all ranks of `process_group` and carries no gradient. The loss is computed separately for
    each outer expert (`...`) and averaged over the outer experts that have tokens. See `load_balancing_loss` for the
    arguments.
    """
    if isinstance(length, Length):
        tokens = length.sum().tokens(proxy.dtype)
    else:
        tokens = proxy.new_full(proxy.shape[:-2], length * proxy.shape[-2])
    load, tokens = global_sum(load.sum(dim=-2).to(proxy.dtype), process_group), global_sum(tokens, process_group)
    return _mean_over_groups(load * proxy.sum(dim=-2), tokens, k / (load.shape[-1] * world_size(process_group)))


def load_balancing_loss_over_documents(
    load: Tensor, probs: Tensor, segments: Segments, k: float = 1, process_group: dist.ProcessGroup | None = None
) -> Tensor:
    """Compute `load_balancing_loss` for packed rows, treating each document as a group.

    `sum_e load_e P_e` is computed as a sum over tokens, using the load of each token's document. Summing probabilities
    per document would be nondeterministic on a GPU, because the order of additions varies between runs.

    Args:
        load: `(b n, e)`, the number of times each expert was chosen in each document. The load carries no gradient.
        probs: `(b n, e)` router probabilities, which are 0 for uncounted tokens.
        segments: the documents in the packed rows.
        k, process_group: see `load_balancing_loss`.
    """
    load = load.detach().to(probs.dtype).index_select(0, segments.document.flatten())
    length = segments.length.to(probs.dtype).clamp(min=1).square()
    per_token = (load * probs).sum(dim=-1) / segments.map_to_tokens(length).flatten()
    return mean(per_token.sum(), segments.num_documents, process_group, k / load.shape[-1])


def z_loss(logits: Tensor, counted: Tensor | None = None, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """Compute the router z-loss, the mean of `logsumexp(logits)^2` (ST-MoE, arXiv 2202.08906, equation 5).

    Args:
        logits: `(..., n, e)`.
        counted: `(..., n)` bool mask of the tokens to count, or None to count all.
        process_group: process group across which the batch is split.
    """
    return token_mean(logits.logsumexp(dim=-1).square(), counted, process_group)


def logsumexp_from_expert(logit: Tensor, prob: Tensor) -> Tensor:
    """Compute the logsumexp `(..., n)` of each token's logits from the logit and softmax probability of a single
    expert.

    Computing `logit - log(prob)` avoids a pass over all experts, and the backward pass does not need the logits.

    Args:
        logit, prob: `(..., n, 1)`, the logit and probability of a likely expert, such as the first choice.
    """
    return (logit - prob.log()).squeeze(-1)


def z_loss_from_expert(
    logit: Tensor, prob: Tensor, counted: Tensor | None = None, process_group: dist.ProcessGroup | None = None
) -> Tensor:
    """Compute `z_loss` from one expert per token. See `z_loss` and `logsumexp_from_expert` for the arguments."""
    if counted is None and not torch.is_grad_enabled():  # a single kernel squares and sums
        return mean(F.mse_loss(logit, prob.log(), reduction="sum"), math.prod(logit.shape), process_group)
    return token_mean(logsumexp_from_expert(logit, prob).square(), counted, process_group)


def token_mean(values: Tensor, counted: Tensor | None = None, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the mean of the `values` selected by the bool mask `counted`, or of all values if it is None."""
    if counted is None:
        return mean(values.sum(), math.prod(values.shape), process_group)
    return mean(torch.where(counted, values, 0.0).sum(), counted.sum(), process_group)


def cv_squared(values: Tensor, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """Compute the squared coefficient of variation over experts, variance / mean^2 (arXiv 1701.06538, eq. 7 and 11).

    The variance is the population variance. At perfect balance, the variance has a gradient of 0, whereas the standard
    deviation has no finite gradient.

    Args:
        values: `(..., e)` importance or load of each expert, summed over all tokens of the call.
        process_group: process group across which the batch is split. `values` are first summed over its ranks.

    Returns:
        A 0-dimensional tensor, averaged over the outer experts (`...`) that have nonzero values.
    """
    total = global_sum(values, process_group) + (values - values.detach()) * world_size(process_group)
    center = total.mean(dim=-1)
    used = center.detach() != 0
    square = torch.where(used, center.square(), torch.ones_like(center))
    variation = torch.where(used, total.var(dim=-1, unbiased=False) / square, 0.0)
    return mean(variation.sum(), used.sum())
