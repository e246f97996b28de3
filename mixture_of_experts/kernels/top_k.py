# type: ignore  (Triton's language, which type checkers take for Python)
"""A kernel that chooses experts for short groups, and the torch operator that launches it.

The kernel computes scores, the top k experts, their weights, and losses.

Axes: t (tokens), b (groups), n (tokens per group), e (experts), k (choices).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixture_of_experts.kernels.launching import launch_kernel, make_contiguous


@triton.jit(do_not_specialize=["length"])
def top_k_kernel(
    logits,  # (t, e) float32
    bias,  # (e,) float32, added to the scores for the choice of experts only; or None
    expert,  # (t, k) int64, output: best choice first; ties go to the lowest index
    weight,  # (t, k) float32, output
    probs,  # (t, e) float32, output
    losses,  # (b, 2) float32, output: each group's contributions to the load-balancing loss and z-loss
    length,  # n
    num_experts,
    balance_scale,
    z_scale,
    SOFTMAX: tl.constexpr,  # whether to compute scores with softmax rather than sigmoid
    # whether the weights are a softmax over the logits of the chosen experts, rather than their scores
    OF_CHOSEN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SCALE: tl.constexpr,
    EPS: tl.constexpr,
    CHOICES: tl.constexpr,
    WIDTH: tl.constexpr,  # CHOICES rounded up to a power of 2
    BLOCK_E: tl.constexpr,
):
    """Choose experts for the tokens of one group. NaN ranks above all scores, as in torch's sort."""
    group, column, choice = tl.program_id(0), tl.arange(0, BLOCK_E), tl.arange(0, WIDTH)
    exists = column < num_experts
    load = tl.zeros((BLOCK_E,), tl.float32)
    proxy = tl.zeros((BLOCK_E,), tl.float32)
    squares = 0.0
    for i in range(length):
        token = (group * length + i).to(tl.int64)
        logit = tl.load(logits + token * num_experts + column, mask=exists, other=-float("inf"))
        top = tl.max(logit, 0)
        power = tl.exp(logit - top)
        total = tl.sum(power, 0)
        if SOFTMAX:
            score = power / total
            prob = score
        else:
            score = tl.where(exists, tl.sigmoid(logit), 0.0)
            prob = score / (tl.sum(score, 0) + 1e-20)
        rank = score if bias is None else score + tl.load(bias + column, mask=exists, other=0.0)
        rank = tl.where(exists, tl.where(rank != rank, float("inf"), rank), -float("inf"))
        chosen = tl.zeros((BLOCK_E,), tl.int1)
        best = tl.zeros((WIDTH,), tl.int32)
        weights = tl.full((WIDTH,), -float("inf") if OF_CHOSEN else 0.0, tl.float32)
        value = logit if OF_CHOSEN else score
        for c in tl.static_range(CHOICES):
            rest = tl.where(chosen | (column >= num_experts), -float("inf"), rank)
            is_best = (rest == tl.max(rest, 0)) & exists & (chosen == 0)
            index = tl.min(tl.where(is_best, column, BLOCK_E), 0)
            chosen = chosen | (column == index)
            best = tl.where(choice == c, index, best)
            weights = tl.where(choice == c, tl.sum(tl.where(column == index, value, 0.0), 0), weights)
        if OF_CHOSEN:  # the score of an expert that was chosen because of its bias may round to 0
            weights = tl.exp(weights - tl.max(weights, 0))
            weights = weights / tl.sum(weights, 0)
        elif NORMALIZE:
            weights = weights / (tl.sum(weights, 0) + EPS)
        place, stored = token * CHOICES + choice, choice < CHOICES
        tl.store(expert + place, best.to(tl.int64), mask=stored)
        tl.store(weight + place, weights * SCALE, mask=stored)
        tl.store(probs + token * num_experts + column, prob, mask=exists)
        load += chosen.to(tl.float32)
        proxy += tl.where(exists, prob, 0.0)
        log_total = top + tl.log(total)
        squares += log_total * log_total
    tl.store(losses + 2 * group, tl.sum(load * proxy, 0) * balance_scale)
    tl.store(losses + 2 * group + 1, squares * z_scale)


@torch.library.custom_op("mixture_of_experts::few_choices", mutates_args=())
def choose_top_k(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    softmax: bool,
    of_chosen: bool,
    normalize: bool,
    scale: float,
    eps: float,
    balance_scale: float,
    z_scale: float,
) -> list[Tensor]:
    """Return experts and weights `(b, n, k)`, probabilities `(b, n, e)` and loss terms `(b, 2)`. See `top_k_kernel`.

    Args:
        logits: `(b, n, e)` float32.
        bias: `(e,)` float32 or None.
        k, softmax, of_chosen, normalize, scale, eps: the gate's settings.
        balance_scale, z_scale: factors for the two loss terms.
    """
    b, n, e = logits.shape
    found = allocate_top_k(logits, k)
    launch_kernel(
        top_k_kernel,
        (b,),
        **make_contiguous(logits=logits, bias=bias),
        **found,
        length=n,
        num_experts=e,
        balance_scale=balance_scale,
        z_scale=z_scale,
        SOFTMAX=softmax,
        OF_CHOSEN=of_chosen,
        NORMALIZE=normalize,
        SCALE=scale,
        EPS=eps,
        CHOICES=k,
        WIDTH=triton.next_power_of_2(k),
        BLOCK_E=triton.next_power_of_2(e),
        num_warps=max(1, triton.next_power_of_2(e) // 256),
    )
    return list(found.values())


@choose_top_k.register_fake
def _(logits, bias, k, *settings):
    return list(allocate_top_k(logits, k).values())


def allocate_top_k(logits: Tensor, k: int) -> dict[str, Tensor]:
    """Allocate the outputs of `top_k_kernel`, and return them keyed by name."""
    b, n, e = logits.shape
    return dict(
        expert=logits.new_empty(b, n, k, dtype=torch.int64),
        weight=logits.new_empty(b, n, k),
        probs=logits.new_empty(b, n, e),
        losses=logits.new_empty(b, 2),
    )
