"""`Choices`, which `decide` returns, their checks, and the choice of the largest scores.

Axes: b groups (outer experts stand before it: `...`), n tokens of a group, e experts, k choices of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mixture_of_experts.dispatch.queues import stable_order
from mixture_of_experts.support.checks import describe_shape
from mixture_of_experts.support.private_torch import is_functorch_wrapped
from mixture_of_experts.support.tracing import is_host_readable


class Choices(NamedTuple):
    """The choices of all tokens, before priorities and capacity. `TokenChoiceGate.route` applies mask and importance,
    but a gate may also read them."""

    expert: Tensor  #: (..., b, n, k) int64, a token's best choice first, no expert twice among those made
    weight: Tensor  #: (..., b, n, k), multiplies the experts' outputs; a choice of weight 0 is not computed
    probs: Tensor  #: (..., b, n, e) the router's probabilities (normalised scores)
    #: every loss by name, 0-dim: "balance" is what the layer's loss_coef weighs, "z" what its z_loss_coef weighs
    losses: dict[str, Tensor]
    chosen: Tensor | None = None  #: (..., b, n, k) bool, the choices that share the token's weight; None if all do
    priority_score: Tensor | None = None  #: (..., b, n) the order of priority "score"; by default the top probability
    primary: Tensor | None = None  #: (..., b, n, k) bool, first choices for a second level; by default choice 0
    sent: Tensor | None = None  #: (..., b, n, k) bool, those of the chosen that go to their expert; None if all do
    is_masked: bool = False  #: whether `sent` excludes what masks and importance do not allow
    state: Tensor | None = None  #: (..., b, n, anything), what the router hands to that of the next layer


def check_choices(gate: str, choices: Choices, shape: Sequence[int], k: int, num_experts: int) -> None:
    """Check the shapes and dtypes of a gate's choices for tokens of `shape` `(..., b, n)`."""
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
                f"{gate} gave {name} of shape {tuple(value.shape)}, wanted {wanted}: groups, tokens"
                f"{dict(priority_score='', probs=', experts').get(name, f', k={k} choices')}"
            )
        got = "floating point" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
        if got != kind:
            raise TypeError(f"{gate} gave {name} of dtype {value.dtype}, wanted {kind}")
    for name, loss in choices.losses.items():
        if not isinstance(loss, Tensor) or loss.ndim:
            raise ValueError(
                f"{gate} gave the loss {name!r} as {describe_shape(loss)}, wanted a tensor of no dimensions: take "
                f"its mean"
            )


def check_experts_of_tokens(gate: str, expert: Tensor, computed: Tensor, num_experts: int) -> None:
    """Check that the ids `expert` `(..., k)` are from 0 to e - 1, and that no token has one twice among those
    `computed`. It reads values, so it does nothing on a GPU and in a graph."""
    if not is_host_readable(expert) or is_functorch_wrapped(computed):
        return
    if expert.numel() and not (int(expert.min()) >= 0 and int(expert.max()) < num_experts):
        raise ValueError(
            f"{gate} chose experts {int(expert.min())} to {int(expert.max())}, there are 0 to {num_experts - 1}: give "
            "a choice that is not made any of these, with chosen=False"
        )
    if (twice := expert_twice(torch.where(computed, expert, -1))) is not None:
        raise ValueError(
            f"{gate} chose expert {twice} twice for a token: a token takes an expert once. Add up the weights of the "
            "two, and give the second choice the weight 0"
        )


def expert_twice(expert: Tensor) -> int | None:
    """An expert that stands twice in one row `(..., k)` of choices; None if there is none. It reads values."""
    for distance in range(1, expert.shape[-1]):
        one, other = expert[..., distance:], expert[..., :-distance]
        if (same := (one == other) & (one >= 0)).any():
            return int(one[same][0])
    return None


def check_k_of_experts(k: int, num_experts: int) -> int:
    """Return `k` if there are as many experts to choose from."""
    if k > num_experts:
        raise ValueError(f"k must be at most num_experts={num_experts}, got {k}: a token takes an expert once")
    return k


def both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Where two conditions hold; None is a condition that holds everywhere."""
    return first if second is None else second if first is None else first & second


def top_choices(score: Tensor, k: int) -> Tensor:
    """Indices `(..., k)` of the k largest scores, best first; on a tie the lowest index first.

    `torch.topk` promises no order of equal scores, but `argmax` does. A stable sort makes all choices at once, which is
    faster on a GPU from three choices on, and on a CPU from about thirty-two.
    """
    if k > score.shape[-1]:
        raise ValueError(f"k must be at most the number of experts, {score.shape[-1]}, got {k}: it takes each once")
    score = score.detach()
    if k >= (32 if score.device.type == "cpu" else 3):
        return stable_order(score, descending=True)[..., :k].contiguous()
    picked = [score.argmax(dim=-1, keepdim=True)]
    while len(picked) < k:
        score = score.scatter(-1, picked[-1], -torch.inf)
        picked.append(score.argmax(dim=-1, keepdim=True))
    return torch.cat(picked, dim=-1)
