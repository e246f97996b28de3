"""Rules by which an expert bias moves: what a training forward counts, and how the sum over a step moves the bias.

Axes: t tokens, k choices of a token, e experts; outer experts stand before them: `...`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mixture_of_experts.losses import count_expert_load
from mixture_of_experts.support.checks import check_choice, check_flag, check_size, check_sizes


class ForwardChoices(NamedTuple):
    """The decision of a router in a training forward, which a rule counts."""

    expert: Tensor  #: (..., t, k) int64
    chosen: Tensor | None  #: (..., t, k) bool, the choices that are made; None if all are
    score: Tensor | None  #: (..., t, e), by which experts are chosen, without the bias; None if the rule reads none
    full: Tensor | None  #: (..., t) bool, the tokens that make all their choices; None if all do
    bias: Tensor  #: (..., e), the bias in this forward


class BiasRule:
    """Base of the rules. A rule of your own writes `count` and `step`."""

    #: bins of each expert's histogram, in the buffer `expert_histogram`; 0: one count for each, in `expert_counts`
    bins: int = 0
    #: the default `rate` of `balance_experts`
    rate: ClassVar[float]
    #: whether `count` reads `ForwardChoices.score`
    reads_scores: ClassVar[bool] = False

    def count(self, choices: ForwardChoices) -> Tensor:
        """The counts of one forward: integers `(..., e)`, or `(..., e, bins)` for a rule with `bins`."""
        raise NotImplementedError(f"{type(self).__name__} must write count(choices)")

    def step(self, counts: Tensor, bias: Tensor, k: int, rate: float) -> Tensor:
        """The step `(..., e)` that is added to the bias; 0 if nothing was counted. Experts that every token takes, by
        `AlwaysChosen`, are not among these e, nor are choices of them among these k.

        Args:
            counts: sums of what `count` returned, over all micro-batches and ranks.
            bias: `(..., e)`.
            k: choices of a token.
            rate: the rate of `balance_experts`.
        """
        raise NotImplementedError(f"{type(self).__name__} must write step(counts, bias, k, rate)")


class SignRule(BiasRule):
    """Adds `rate * sign(mean load - load)` to the bias (Wang et al. 2024, arXiv 2408.15664).

    Args:
        centred: whether the mean of the bias is subtracted after each step, so that the bias cannot drift as a whole.
            The same experts are chosen, up to rounding.
        shares: e integers above 0, the proportion in which experts are to be chosen; None: equally. So experts that
            compute and experts that cost nothing (`ZeroComputationExperts`) can be balanced separately.

    Example:
        >>> import torch
        >>> SignRule(centred=True).step(torch.tensor([9, 1, 1, 1]), torch.zeros(4), k=2, rate=0.5)
        tensor([-0.7500,  0.2500,  0.2500,  0.2500])
    """

    centred: bool
    shares: tuple[int, ...] | None

    rate: ClassVar[float] = 1e-3

    def __init__(self, centred: bool = False, shares: Sequence[int] | None = None) -> None:
        self.centred = check_flag("centred", centred)
        self.shares = None if shares is None else check_shares(shares)

    def count(self, choices: ForwardChoices) -> Tensor:
        """The number of choices of each expert, `(..., e)` int64."""
        return count_expert_load(choices.expert, choices.chosen, choices.bias.shape[-1])

    def step(self, counts: Tensor, bias: Tensor, k: int, rate: float) -> Tensor:
        parts, whole = 1, counts.shape[-1]
        if self.shares is not None:
            if len(self.shares) != whole:
                raise ValueError(f"shares must be a number for each of the {whole} experts, got {len(self.shares)}")
            parts, whole = torch.tensor(self.shares, device=counts.device), sum(self.shares)
        # below its share 1, above it -1, at it 0: in integers, so balance is exact
        step = rate * torch.sign(counts.sum(dim=-1, keepdim=True) * parts - counts * whole)
        if not (self.centred and rate):
            return step
        centred = step - (bias + step).mean(dim=-1, keepdim=True)
        return torch.where(counts.any(dim=-1, keepdim=True), centred, 0.0)

    def __repr__(self) -> str:
        return f"SignRule(centred={self.centred}" + ("" if self.shares is None else f", shares={self.shares}") + ")"


def check_shares(shares: Any) -> tuple[int, ...]:
    """Integers above 0, in proportion."""
    try:
        found = check_sizes("shares", tuple(shares))
    except (TypeError, ValueError):
        raise ValueError(
            f"shares must be integers of at least 1, in proportion, such as [1, 9] for 10% and 90%, got {shares!r}"
        ) from None
    if sum(found) >= 1 << 20:  # their products with counts must be int64
        raise ValueError(f"shares must have a sum below 2^20, got {sum(found)}: give smaller integers")
    return found


class QuantileRule(BiasRule):
    """Quantile balancing (Kimi K3, section 2.3.3): moves each bias at once to where its expert gets its share.

    A token goes to an expert whose biased score is above alpha, the (k + 1)-th largest: to one whose bias is above
    `r = alpha - score`. If an expert's bias were the k / e quantile of its r, and the other biases stayed, the expert
    would take k / e of the tokens. The new bias is this quantile, minus the mean over the experts.

    Quantiles are interpolated linearly in histograms over `[min b - 1, max b + 1]`. Scores between 0 and 1 have all
    their r in this range. An r outside of it counts at the end of the range; the bias then moves by at most about 1 in
    a step, and the range moves with it.

    Masked tokens do not count, nor do tokens that make fewer than k choices (at a second level) or have a score that is
    NaN. With a `rate` below 1 the bias moves that part of the way.

    Args:
        bins: bins of each expert's histogram. The error of a quantile is at most the width of a bin.

    Example:
        Two experts, one choice, and 4 bins over [-1, 1]. Half of the 4 tokens have an r below 0 for the first expert,
        and below -0.5 for the second.

        >>> import torch
        >>> rule = QuantileRule(bins=4)
        >>> rule.step(torch.tensor([[0, 2, 2, 0], [2, 2, 0, 0]]), torch.zeros(2), k=1, rate=1.0)
        tensor([ 0.2500, -0.2500])
    """

    rate: ClassVar[float] = 1.0
    reads_scores: ClassVar[bool] = True

    def __init__(self, bins: int = 1000) -> None:
        self.bins: int = check_size("bins", bins)

    def count(self, choices: ForwardChoices) -> Tensor:
        """Histograms of r, `(..., e, bins)` int32."""
        score, bias, full = choices.score, choices.bias, choices.full
        assert score is not None
        score, bias = score.detach(), bias.to(score.dtype).unsqueeze(-2)
        cutoff = (score + bias).topk(choices.expert.shape[-1] + 1, dim=-1).values[..., -1:]
        low, width = histogram_range(bias, self.bins)
        place = (cutoff - score - low) / width
        known = ~place.isnan().any(dim=-1, keepdim=True)
        place = torch.where(known, place, 0.0).floor().clamp(0, self.bins - 1).to(torch.int64).mT
        counted = (known if full is None else known & full.unsqueeze(-1)).mT
        ones = torch.ones_like(place, dtype=torch.int32) * counted
        zeros = torch.zeros(*choices.bias.shape, self.bins, dtype=torch.int32, device=score.device)
        return zeros.scatter_add(-1, place, ones)

    def step(self, counts: Tensor, bias: Tensor, k: int, rate: float) -> Tensor:
        e = counts.shape[-2]
        up_to = counts.cumsum(dim=-1)  # int64
        tokens = up_to[..., -1:]
        at = (up_to * e < tokens * k).sum(dim=-1, keepdim=True)  # the bin with the k / e quantile
        within = counts.gather(-1, at)
        before = up_to.gather(-1, at) - within
        place = at + (tokens * k - before * e).to(bias.dtype) / (e * within.clamp(min=1))
        place, (_, width) = place.squeeze(-1), histogram_range(bias, self.bins)
        new = (place - place.mean(dim=-1, keepdim=True)) * width
        return torch.where(tokens.squeeze(-1) > 0, rate * (new - bias), 0.0)

    def __repr__(self) -> str:
        return f"QuantileRule(bins={self.bins})"


def histogram_range(bias: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """The lower end of the histograms of biases `(..., e)`, and the width of a bin; both `(..., 1)`."""
    low, high = bias.amin(dim=-1, keepdim=True) - 1, bias.amax(dim=-1, keepdim=True) + 1
    return low, (high - low) / bins


RuleName = Literal["sign", "centred_sign", "quantile"]
#: functions that make the rules: each gate has its own, because settings of a rule can be changed
RULES: Mapping[str, Callable[[], BiasRule]] = {
    "sign": SignRule,
    "centred_sign": partial(SignRule, centred=True),
    "quantile": QuantileRule,
}


def check_rule(name: str, rule: Any) -> BiasRule:
    """A new rule of this name, or the rule itself if an instance is given."""
    return rule if isinstance(rule, BiasRule) else RULES[check_choice(name, rule, tuple(RULES))]()


def step_of(rule: BiasRule, counts: Tensor, bias: Tensor, k: int, rate: float, always: int = 0) -> Tensor:
    """The step `(..., e)` of a rule from its counts `(..., e)` or `(..., e, bins)`; 0 for the last `always` experts,
    which every token takes."""
    competing = bias.shape[-1] - always
    step = rule.step(counts.narrow(bias.ndim - 1, 0, competing), bias[..., :competing], k - always, rate)
    return functional.pad(step, (0, always)) if always else step


def check_scores(
    rule: BiasRule,
    owner: str,
    k: int,
    num_experts: int,
    select: Any,
    num_groups: int | None,
    why: str | None = None,
) -> None:
    """Raise ValueError if `rule` reads scores, but the router's scores do not tell how many tokens an expert gets.
    `why` is a reason that the router knows."""
    if not rule.reads_scores:
        return
    if why is not None:
        pass
    elif k >= num_experts:
        why = f"every token takes all {num_experts} experts there"
    elif num_groups is not None:
        why = f"experts are chosen in {num_groups} groups there"
    elif not isinstance(select, str):
        why = "experts are chosen by a function of their scores there"
    if why is not None:
        raise ValueError(
            f"{rule!r} does not fit {owner}: {why}, so its scores do not tell an expert's load. Balance it "
            "by rule='sign'"
        )
