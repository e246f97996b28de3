"""Update rules for the expert bias. A rule defines what is counted in each training forward pass and how the counts
change the bias.

Axes: t (tokens), k (choices per token), e (experts). `...` stands for the outer expert dimensions.
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
    """The router's choices in one training forward pass, as passed to `BiasRule.count`."""

    expert: Tensor  #: (..., t, k) int64
    chosen: Tensor | None  #: (..., t, k) bool, True for choices that are made; None if all are made
    score: Tensor | None  #: (..., t, e), scores that select experts, without the bias; None if the rule reads no scores
    full: Tensor | None  #: (..., t) bool, True for tokens that make all their choices; None if all tokens do
    bias: Tensor  #: (..., e), the bias in this forward pass


class BiasRule:
    """Base class for update rules of the expert bias. Custom rules implement `count` and `step`."""

    #: number of bins in each expert's histogram in `expert_histogram`, or 0 for a single count in `expert_counts`
    bins: int = 0
    #: default `rate` of `balance_experts`
    rate: ClassVar[float]
    #: whether `count` reads `ForwardChoices.score`
    reads_scores: ClassVar[bool] = False

    def count(self, choices: ForwardChoices) -> Tensor:
        """Return the counts of one forward pass: integers `(..., e)`, or `(..., e, bins)` if the rule has `bins`."""
        raise NotImplementedError(f"{type(self).__name__} must implement count(choices)")

    def step(self, counts: Tensor, bias: Tensor, k: int, rate: float) -> Tensor:
        """Return the step `(..., e)` to add to the bias. The step must be 0 if nothing was counted.

        Here, e and k exclude the experts that `AlwaysChosen` assigns to every token.

        Args:
            counts: results of `count`, summed over all micro-batches and ranks.
            bias: `(..., e)`.
            k: number of choices per token.
            rate: the update rate passed to `balance_experts`.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement step(counts, bias, k, rate)")


class SignRule(BiasRule):
    """An update rule that adds `rate * sign(mean load - load)` to the expert bias (Wang et al. 2024, arXiv 2408.15664).

    Args:
        centred: whether to subtract the mean from the bias after each step, so that the mean cannot drift. Up to
            rounding, this does not change which experts are chosen.
        shares: e positive integers that specify each expert's target share of the choices, or None for equal shares.
            Use shares to balance zero-computation experts and regular experts separately; see `ZeroComputationExperts`.

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
        """Return the number of times each expert was chosen, as an int64 tensor `(..., e)`."""
        return count_expert_load(choices.expert, choices.chosen, choices.bias.shape[-1])

    def step(self, counts: Tensor, bias: Tensor, k: int, rate: float) -> Tensor:
        parts, whole = 1, counts.shape[-1]
        if self.shares is not None:
            if len(self.shares) != whole:
                raise ValueError(
                    f"`shares` must have one entry for each of the {whole} experts, got {len(self.shares)} entries"
                )
            parts, whole = torch.tensor(self.shares, device=counts.device), sum(self.shares)
        # the sign is 1 for loads below the share, -1 above and 0 if equal; integers make the comparison exact
        step = rate * torch.sign(counts.sum(dim=-1, keepdim=True) * parts - counts * whole)
        if not (self.centred and rate):
            return step
        centred = step - (bias + step).mean(dim=-1, keepdim=True)
        return torch.where(counts.any(dim=-1, keepdim=True), centred, 0.0)

    def __repr__(self) -> str:
        return f"SignRule(centred={self.centred}" + ("" if self.shares is None else f", shares={self.shares}") + ")"


def check_shares(shares: Any) -> tuple[int, ...]:
    """Check that the shares are positive integers whose products with counts fit into int64."""
    try:
        found = check_sizes("shares", tuple(shares))
    except (TypeError, ValueError):
        raise ValueError(
            f"`shares` must be positive integers that form a ratio, such as [1, 9] for 10% and 90%, got {shares!r}"
        ) from None
    if sum(found) >= 1 << 20:
        raise ValueError(f"the sum of `shares` must be below 2^20, got {sum(found)}; use smaller integers")
    return found


class QuantileRule(BiasRule):
    """Quantile balancing (Kimi K3, section 2.3.3), which moves each bias directly to the value that balances its
    expert.

    A token is routed to an expert if the expert's biased score exceeds alpha, the token's (k + 1)-th largest biased
    score. Equivalently, the expert's bias must exceed `r = alpha - score`. If the bias were equal to the k / e quantile
    of r and all other biases were fixed, the expert would receive k / e of the tokens. The new bias is this quantile
    minus the mean over all experts.

    Quantiles are interpolated linearly in histograms over the range `[min b - 1, max b + 1]`, where b is the bias. If
    all scores are between 0 and 1, every r is within this range. Otherwise, values outside the range are counted in the
    first or last bin. In this case, the bias moves by at most about 1 per step, and the range moves with it.

    Tokens are not counted if they are masked, make fewer than k choices (at level two), or have a NaN score. If `rate`
    is below 1, only that fraction of the step is applied.

    Args:
        bins: number of bins in each expert's histogram. The error of a quantile is at most one bin width.

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
        """Return the histograms of r as an int32 tensor `(..., e, bins)`."""
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
        at = (up_to * e < tokens * k).sum(dim=-1, keepdim=True)  # index of the bin that contains the k / e quantile
        within = counts.gather(-1, at)
        before = up_to.gather(-1, at) - within
        place = at + (tokens * k - before * e).to(bias.dtype) / (e * within.clamp(min=1))
        place, (_, width) = place.squeeze(-1), histogram_range(bias, self.bins)
        new = (place - place.mean(dim=-1, keepdim=True)) * width
        return torch.where(tokens.squeeze(-1) > 0, rate * (new - bias), 0.0)

    def __repr__(self) -> str:
        return f"QuantileRule(bins={self.bins})"


def histogram_range(bias: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Return the histograms' lower bound and bin width, both `(..., 1)`, for biases `(..., e)`."""
    low, high = bias.amin(dim=-1, keepdim=True) - 1, bias.amax(dim=-1, keepdim=True) + 1
    return low, (high - low) / bins


RuleName = Literal["sign", "centred_sign", "quantile"]
#: rule factories; each gate has its own instance, because the settings of a rule can be changed
RULES: Mapping[str, Callable[[], BiasRule]] = {
    "sign": SignRule,
    "centred_sign": partial(SignRule, centred=True),
    "quantile": QuantileRule,
}


def resolve_rule(name: str, rule: Any) -> BiasRule:
    """Return `rule` if it is a `BiasRule`; otherwise, create the rule with this name."""
    return rule if isinstance(rule, BiasRule) else RULES[check_choice(name, rule, tuple(RULES))]()


def compute_bias_step(rule: BiasRule, counts: Tensor, bias: Tensor, k: int, rate: float, always: int = 0) -> Tensor:
    """Compute the step `(..., e)` of a rule from its counts `(..., e)` or `(..., e, bins)`. The step is 0 for the last
    `always` experts, which every token chooses."""
    competing = bias.shape[-1] - always
    step = rule.step(counts.narrow(bias.ndim - 1, 0, competing), bias[..., :competing], k - always, rate)
    return functional.pad(step, (0, always)) if always else step


def scores_insufficient_reason(k: int, num_experts: int, select: Any, num_groups: int | None) -> str | None:
    """Return why a router's scores do not determine the expert load, or None if they do."""
    if k >= num_experts:
        return f"every token chooses all {num_experts} experts"
    if num_groups is not None:
        return f"experts are chosen in {num_groups} groups"
    return None if isinstance(select, str) else "experts are chosen by a function of their scores"


def check_rule_supports_router(rule: BiasRule, owner: str, insufficient_reason: str | None) -> None:
    """Raise ValueError if `rule` reads scores but there is a reason why the router's scores are insufficient."""
    if rule.reads_scores and insufficient_reason is not None:
        raise ValueError(
            f"{rule!r} does not support {owner}: {insufficient_reason}, so the scores do not determine an expert's "
            "load. Use rule='sign'"
        )
