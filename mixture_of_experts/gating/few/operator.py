"""The kernel as an operator of torch. Imported with triton only."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mixture_of_experts.gating.few import kernel
from mixture_of_experts.launching import launch


@torch.library.custom_op("mixture_of_experts::few_choices", mutates_args=())
def few_choices(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    softmax: bool,
    normalize: bool,
    scale: float,
    eps: float,
    balance_scale: float,
    z_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Experts and weights `(b, n, k)`, probabilities `(b, n, e)`, and terms `(b, 2)` of the losses; see `kernel`.

    Args:
        logits: `(b, n, e)` float32.
        bias: `(e,)` float32, or None.
        k, softmax, normalize, scale, eps: settings of the gate.
        balance_scale, z_scale: what the terms are multiplied by.
    """
    b, n, e = logits.shape
    made = empty_choices(logits, k)
    expert, weight, probs, losses = made
    launch(
        kernel.choose,
        (b,),
        logits=logits.contiguous(),
        bias=bias,
        expert=expert,
        weight=weight,
        probs=probs,
        losses=losses,
        length=n,
        num_experts=e,
        balance_scale=balance_scale,
        z_scale=z_scale,
        SOFTMAX=softmax,
        NORMALIZE=normalize,
        SCALE=scale,
        EPS=eps,
        CHOICES=k,
        WIDTH=triton.next_power_of_2(k),
        BLOCK_E=triton.next_power_of_2(e),
        num_warps=max(1, triton.next_power_of_2(e) // 256),
    )
    return made


@few_choices.register_fake
def _(logits, bias, k, *settings):
    return empty_choices(logits, k)


def empty_choices(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where they are written."""
    b, n, _ = logits.shape
    expert = logits.new_empty(b, n, k, dtype=torch.int64)
    return expert, logits.new_empty(b, n, k), torch.empty_like(logits), logits.new_empty(b, 2)
