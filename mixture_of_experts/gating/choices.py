"""Defines `Choices`, the return type of `decide`, and functions that check choices and select the largest scores.

Axes: b (groups, preceded by outer experts, `...`), n (tokens per group), e (experts), k (choices per token).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mixture_of_experts.dispatch.queues import stable_argsort
from mixture_of_experts.support.checks import describe_shape
from mixture_of_experts.support.private_torch import is_functorch_wrapped
from mixture_of_experts.support.tracing import is_host_readable


class Choices(NamedTuple):
    """The choices of all tokens, before priorities and capacity are applied.

    Gates may read the mask and the importance, but need not apply them, because `TokenChoiceGate.route` does.
    """

    expert: Tensor  #: (..., b, n, k) int64, best choice first; the choices that are made must be distinct experts
    weight: Tensor  #: (..., b, n, k), weights of the experts' outputs; choices with weight 0 are not computed
    probs: Tensor  #: (..., b, n, e), the router's probabilities (normalized scores)
    #: 0-dim losses, keyed by name; the layer multiplies "balance" by its loss_coef and "z" by its z_loss_coef
    losses: dict[str, Tensor]
    chosen: Tensor | None = None  #: (..., b, n, k) bool, True for choices that share the token's weight; None if all do
    priority_score: Tensor | None = None  #: (..., b, n), the sort key for priority "score"; default: top probability
    primary: Tensor | None = None  #: (..., b, n, k) bool, True for first choices at level two; default: choice 0
    sent: Tensor | None = None  #: (..., b, n, k) bool, True if the chosen expert receives the token; None if all do
    is_masked: bool = False  #: whether `sent` already excludes the choices that the mask and importance do not allow
    state: Tensor | None = None  #: `(..., b, n, *)`, the state passed to the next layer's router


def check_choices(gate: str, choices: Choices, shape: Sequence[int], k: int, num_experts: int) -> None:
    """Check the shapes and dtypes of a gate's choices for tokens of shape `(..., b, n)`."""
    of_choices, of_experts = (*shape, k), (*shape, num_experts)
    for name, wanted, kind in (
        ("expert", of_choices, "int64"),
        ("weight", of_choices, "floating point"),
        ("probs", of_experts, "floating point"),
        ("chosen", of_choices, "bool"),
        ("sent", of_choices, "bool"),
        ("priority_score", tuple(shape), "floating point"),
        ("primary", of_choices, "bool"),
    ):
        value = getattr(choices, name)
        if value is None:
            continue
        if value.shape != wanted:
            raise ValueError(
                f"{gate} returned {name} of shape {tuple(value.shape)}, expected {wanted} (groups, "
                f"tokens{dict(priority_score='', probs=', experts').get(name, f', k={k} choices')})"
            )
        got = "floating point" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
        if got != kind:
            raise TypeError(f"{gate} returned {name} of dtype {value.dtype}, expected {kind}")
    for name, loss in choices.losses.items():
        if not isinstance(loss, Tensor) or loss.ndim:
            raise ValueError(
                f"{gate} must return the loss {name!r} as a 0-dim tensor, got {describe_shape(loss)}; return the mean"
            )


def check_experts_of_tokens(gate: str, expert: Tensor, computed: Tensor, num_experts: int) -> None:
    """Check that the expert ids `expert` `(..., k)` are between 0 and e - 1, and that a token's `computed` choices are
    distinct. The check reads tensor values, so it is skipped on a GPU and in traced graphs."""
    if not is_host_readable(expert) or is_functorch_wrapped(computed):
        return
    if expert.numel() and not (int(expert.min()) >= 0 and int(expert.max()) < num_experts):
        raise ValueError(
            f"{gate} returned expert ids from {int(expert.min())} to {int(expert.max())}, but valid ids are 0 to "
            f"{num_experts - 1}. To omit a choice, return any valid id with chosen=False"
        )
    if (twice := find_repeated_expert(torch.where(computed, expert, -1))) is not None:
        raise ValueError(
            f"{gate} chose expert {twice} twice for a token, but a token's experts must be distinct. Assign the sum of "
            "both weights to the first choice, and 0 to the second"
        )


def find_repeated_expert(expert: Tensor) -> int | None:
    """Return an expert that occurs twice among a token's k choices, or None if there is no such expert. This function
    reads tensor values."""
    for distance in range(1, expert.shape[-1]):
        one, other = expert[..., distance:], expert[..., :-distance]
        if (same := (one == other) & (one >= 0)).any():
            return int(one[same][0])
    return None


def check_k_of_experts(k: int, num_experts: int) -> int:
    """Check that there are at least k experts, and return `k`."""
    if k > num_experts:
        raise ValueError(
            f"k must be at most num_experts={num_experts}, but got {k}; a token chooses each expert only once"
        )
    return k


def both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Return the logical AND of two conditions, where None means that a condition is always true."""
    return first if second is None else second if first is None else first & second


def top_choices(score: Tensor, k: int) -> Tensor:
    """Return the indices `(..., k)` of the k largest scores, best first. Ties go to the lowest index.

    `argmax` guarantees this order for equal scores, but `torch.topk` does not. A stable sort selects all choices at
    once, which is faster for 3 or more choices on a GPU and for about 32 or more choices on a CPU.
    """
    if k > score.shape[-1]:
        raise ValueError(
            f"k must be at most the number of experts ({score.shape[-1]}), got {k}; each is chosen only once"
        )
    score = score.detach()
    if k >= (32 if score.device.type == "cpu" else 3):
        return stable_argsort(score, descending=True)[..., :k].contiguous()
    picked = [score.argmax(dim=-1, keepdim=True)]
    while len(picked) < k:
        score = score.scatter(-1, picked[-1], -torch.inf)
        picked.append(score.argmax(dim=-1, keepdim=True))
    return torch.cat(picked, dim=-1)
