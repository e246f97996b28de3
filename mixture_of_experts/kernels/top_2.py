# type: ignore  (Triton's language, which type checkers take for Python)
"""Kernels for `Top2Gating`, and the torch operators that launch them.

The kernels choose two experts for each token, and compute the experts' weights, the sums for the losses, and the
gradient.

Axes: g (groups, after any dimensions for outer experts), n (tokens per group), e (experts), p (programs per group).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixture_of_experts.kernels.launching import launch_kernel, make_contiguous

MAX_NUMEL_AT_ONCE = 1024  # maximum number of elements (tokens x experts) that a program processes at a time
GRAD_NAMES = ("grad_weight", "grad_probs", "grad_log_total", "grad_proxy", "grad_squares")
# minimum number of tokens per program, and maximum number processed at a time
MIN_TOKENS_PER_PROGRAM, MAX_TOKENS_AT_ONCE = 32, 128


@triton.jit(do_not_specialize=["length", "programs"])
def top_2_kernel(
    logits,  # (g, n, e) float32
    full,  # (g, n) bool: whether each token makes a first choice and is counted; None if all do
    active,  # (g, n) bool: whether each token makes a second choice; None if `full` is None
    uniform,  # (g, n) float32 between 0 and 1 for the policy "random"; otherwise None
    expert,  # (g, n, 2) int64; an output, as are all tensors below; ties go to the lowest index
    weight,  # (g, n, 2) float32
    chosen,  # (g, n, 2) bool: whether each choice is made
    primary,  # (g, n, 2) bool: whether each choice has more than half of the weight
    probs,  # (g, n, e) float32
    log_total,  # (g, n) float32: logsumexp of the logits
    # (2, g, p, e) float32: each expert's number of first choices and sum of probabilities, over counted tokens
    sums,
    totals,  # (g, p, 2) float32: sum of squared `log_total` over counted tokens, and number of counted tokens
    length,  # n
    programs,  # p
    num_experts,
    eps,
    threshold,
    POLICY: tl.constexpr,
    TOKENS: tl.constexpr,  # tokens per program
    ROWS: tl.constexpr,  # tokens processed at a time
    BLOCK_E: tl.constexpr,
):
    """Choose two experts for each token. NaN ranks above all probabilities, as in torch's sort."""
    program, column, choice = tl.program_id(0), tl.arange(0, BLOCK_E)[None, :], tl.arange(0, 2)[None, :]
    group, begin = (program // programs).to(tl.int64), program % programs * TOKENS
    exists, is_first = column < num_experts, choice == 0
    load = tl.zeros((BLOCK_E,), tl.float32)
    proxy = tl.zeros((BLOCK_E,), tl.float32)
    squares = 0.0
    number = 0.0
    for start in range(0, TOKENS, ROWS):
        place = begin + start + tl.arange(0, ROWS)
        is_token, token = place < length, group * length + place
        row, inside = token[:, None] * num_experts + column, is_token[:, None] & exists
        logit = tl.where(exists, tl.load(logits + row, mask=inside, other=0.0), -float("inf"))
        top = tl.max(logit, 1)
        power = tl.exp(logit - top[:, None])
        total = tl.sum(power, 1)
        prob = power / total[:, None]
        log = top + tl.log(total)
        is_full = is_token if full is None else tl.load(full + token, mask=is_token, other=False)

        rank = tl.where(exists, tl.where(prob != prob, float("inf"), prob), -1.0)
        first = tl.min(tl.where(rank == tl.max(rank, 1)[:, None], column, BLOCK_E), 1)
        is_best = column == first[:, None]
        rest = tl.where(is_best & is_full[:, None], 0.0, rank)
        second = tl.min(tl.where(rest == tl.max(rest, 1)[:, None], column, BLOCK_E), 1)
        same = (first == second) & is_full
        p_1 = tl.sum(tl.where(is_best, prob, 0.0), 1)
        p_2 = tl.sum(tl.where(column == second[:, None], prob, 0.0), 1)
        p_1, p_2 = tl.where(is_full, p_1, 0.0), tl.where(same, 0.0, p_2)
        # IEEE rounding makes both weights of a tie exactly 0.5, which `/` does not guarantee
        weights = tl.div_rn(tl.join(p_1, p_2), (p_1 + p_2 + eps)[:, None])
        weights = tl.where(same[:, None] & ~is_first, 0.0, weights)  # the weight is 0 even if the sum is NaN

        if POLICY == "none":
            sent = is_first
        elif POLICY == "threshold":
            sent = is_first | (weights > threshold)
        elif POLICY == "random":
            drawn = tl.load(uniform + token, mask=is_token, other=1.0)
            sent = is_first | (drawn[:, None] < weights / tl.maximum(threshold, eps))
        else:
            tl.static_assert(POLICY == "all")
            sent = choice < 2
        if BLOCK_E == 1:  # with a single expert, there is no second choice
            sent = sent & (weights != 0)
        if full is not None:
            is_active = tl.load(active + token, mask=is_token, other=False)
            sent = sent & tl.where(is_first, is_full[:, None], is_active[:, None])

        two, stored = token[:, None] * 2 + choice, is_token[:, None] & (choice < 2)
        tl.store(expert + two, tl.where(is_first, first[:, None], second[:, None]).to(tl.int64), mask=stored)
        tl.store(weight + two, weights, mask=stored)
        tl.store(chosen + two, sent, mask=stored)
        tl.store(primary + two, weights > 0.5, mask=stored)
        tl.store(probs + row, prob, mask=inside)
        tl.store(log_total + token, log, mask=is_token)
        counts = is_full[:, None] & exists
        load += tl.sum(tl.where(counts & is_best, 1.0, 0.0), 0)
        proxy += tl.sum(tl.where(counts, prob, 0.0), 0)
        squares += tl.sum(tl.where(is_full, log * log, 0.0), 0)
        number += tl.sum(tl.where(is_full, 1.0, 0.0), 0)
    place, there = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_E) < num_experts
    program, behind = program.to(tl.int64), tl.num_programs(0).to(tl.int64)
    tl.store(sums + program * num_experts + place, load, mask=there)
    tl.store(sums + (program + behind) * num_experts + place, proxy, mask=there)
    tl.store(totals + 2 * program, squares)
    tl.store(totals + 2 * program + 1, number)


@triton.jit(do_not_specialize=["num_tokens", "length"])
def top_2_grads_kernel(
    probs,  # (t, e) float32, where t = g n is the total number of tokens
    expert,  # (t, 2) int64
    log_total,  # (t,) float32
    full,  # (t,) bool: whether each token is counted; None if all are
    grad_weight,  # (t, 2) float32; None means a zero gradient, as for all gradients below
    grad_probs,  # (t, e) float32
    grad_log_total,  # (t,) float32
    grad_proxy,  # (g, e) float32
    grad_squares,  # () float32
    grad_logits,  # (t, e) float32, output
    num_tokens,
    length,  # n
    num_experts,
    eps,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Write the gradient of the logits. `grads_by_operators` computes the same gradient with torch's operators."""
    column = tl.arange(0, BLOCK_E)[None, :]
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_token = token < num_tokens
    row, inside = token[:, None] * num_experts + column, is_token[:, None] & (column < num_experts)
    prob = tl.load(probs + row, mask=inside, other=0.0)
    is_full = is_token if full is None else tl.load(full + token, mask=is_token, other=False)
    grad = tl.zeros((ROWS, BLOCK_E), tl.float32)
    if grad_probs is not None:
        grad += tl.load(grad_probs + row, mask=inside, other=0.0)
    if grad_proxy is not None:
        of_group = (token // length)[:, None] * num_experts + column
        grad += tl.load(grad_proxy + of_group, mask=inside & is_full[:, None], other=0.0)
    if grad_weight is not None:
        first = tl.load(expert + 2 * token, mask=is_token, other=0)
        second = tl.load(expert + 2 * token + 1, mask=is_token, other=0)
        is_second = is_token & ((first != second) | ~is_full)
        at_first = (column == first[:, None]) & is_full[:, None]
        p_1 = tl.sum(tl.where(at_first, prob, 0.0), 1)
        at_second = (column == second[:, None]) & is_second[:, None]
        p_2 = tl.sum(tl.where(at_second, prob, 0.0), 1)
        grad_1 = tl.load(grad_weight + 2 * token, mask=is_token, other=0.0)
        grad_2 = tl.load(grad_weight + 2 * token + 1, mask=is_token, other=0.0)
        total = p_1 + p_2 + eps
        mean = (grad_1 * p_1 + grad_2 * p_2) / total
        grad += tl.where(at_first, ((grad_1 - mean) / total)[:, None], 0.0)
        grad += tl.where(at_second, ((grad_2 - mean) / total)[:, None], 0.0)
    of_row = -tl.sum(prob * grad, 1)
    if grad_squares is not None:
        log = tl.load(log_total + token, mask=is_token, other=0.0)
        of_row += tl.where(is_full, 2 * tl.load(grad_squares) * log, 0.0)
    if grad_log_total is not None:
        of_row += tl.load(grad_log_total + token, mask=is_token, other=0.0)
    tl.store(grad_logits + row, prob * (grad + of_row[:, None]), mask=inside)


@torch.library.custom_op("mixture_of_experts::two_best", mutates_args=())
def choose_top_2(
    logits: Tensor,
    full: Tensor | None,
    active: Tensor | None,
    uniform: Tensor | None,
    policy: str,
    threshold: float,
    eps: float,
) -> list[Tensor]:
    """Return the outputs `expert`, `weight`, `chosen`, `primary`, `probs`, `log_total`, `sums` and `totals` of
    `top_2_kernel`.

    Args:
        logits: `(..., g, n, e)` float32, with at least one token.
        full, active: `(..., g, n)` bool; either both or neither may be None.
        uniform: `(..., g, n)` float32, required for the policy "random".
        policy, threshold, eps: the gate's settings.
    """
    found, (*groups, length, e) = allocate_top_2(logits), logits.shape
    programs, (rows, tokens, block) = found["sums"].shape[-2], get_launch_sizes(e)
    launch_kernel(
        top_2_kernel,
        (math.prod(groups) * programs,),
        **make_contiguous(logits=logits, full=full, active=active, uniform=uniform),
        **found,
        length=length,
        programs=programs,
        num_experts=e,
        eps=eps,
        threshold=threshold,
        POLICY=policy,
        TOKENS=tokens,
        ROWS=rows,
        BLOCK_E=block,
    )
    return list(found.values())


@choose_top_2.register_fake
def _(logits, *settings):
    return list(allocate_top_2(logits).values())


def get_launch_sizes(num_experts: int) -> tuple[int, int, int]:
    """Return how many tokens a program processes at a time, how many it processes in total, and the number of experts
    rounded up to a power of 2."""
    block = triton.next_power_of_2(num_experts)
    rows = min(MAX_NUMEL_AT_ONCE // block, MAX_TOKENS_AT_ONCE)
    return rows, max(rows, MIN_TOKENS_PER_PROGRAM), block


def allocate_top_2(logits: Tensor) -> dict[str, Tensor]:
    """Allocate the outputs of `top_2_kernel`, and return them keyed by name."""
    *lead, n, e = logits.shape
    programs = -(-n // get_launch_sizes(e)[1])
    pair = (*lead, n, 2)
    return dict(
        expert=logits.new_empty(pair, dtype=torch.int64),
        weight=logits.new_empty(pair),
        chosen=logits.new_empty(pair, dtype=torch.bool),
        primary=logits.new_empty(pair, dtype=torch.bool),
        probs=logits.new_empty(logits.shape),
        log_total=logits.new_empty(*lead, n),
        sums=logits.new_empty(2, *lead, programs, e),
        totals=logits.new_empty(*lead, programs, 2),
    )


@torch.library.custom_op("mixture_of_experts::choose_top_2_grads", mutates_args=())
def choose_top_2_grads(
    probs: Tensor,
    expert: Tensor,
    log_total: Tensor,
    full: Tensor | None,
    eps: float,
    grads: list[Tensor | None],
) -> Tensor:
    """Return the gradient of the logits `(..., g, n, e)`, given the results of `choose_top_2` and their gradients.

    `grads` contains the gradients of `weight`, `probs` and `log_total`, followed by the gradients of two sums over
    programs: the proxy `(..., g, e)` and the squares `()`. None means 0.
    """
    n, e = probs.shape[-2:]
    rows, _, block = get_launch_sizes(e)
    grad_logits = torch.empty_like(probs)
    launch_kernel(
        top_2_grads_kernel,
        (triton.cdiv(log_total.numel(), rows),),
        probs=probs,
        expert=expert,
        log_total=log_total,
        **make_contiguous(full=full, **dict(zip(GRAD_NAMES, grads, strict=True))),
        grad_logits=grad_logits,
        num_tokens=log_total.numel(),
        length=n,
        num_experts=e,
        eps=eps,
        ROWS=rows,
        BLOCK_E=block,
    )
    return grad_logits


@choose_top_2_grads.register_fake
def _(probs, *rest):
    return torch.empty_like(probs)
