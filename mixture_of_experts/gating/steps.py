"""The named steps of a top-k router.

Axes: b (groups), n (tokens per group), e (experts), g (expert groups), k (choices per token). `...` stands for the
outer expert dimensions.

Each of the following steps can be replaced with a custom function or module::

    score      maps logits `(..., b, n, e)` to nonnegative scores of the same shape
    select     determines whether experts are chosen by scores or logits
    group      maps scores `(..., b, n, g, e / g)` to a score of each expert group `(..., b, n, g)`
    weigh      computes the weights `(..., b, n, k)` of the choices, before they are normalized and scaled
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixture_of_experts.support.batch_invariance import apply_elementwise
from mixture_of_experts.support.checks import check_number, check_size

Score = Literal["softmax", "sigmoid", "sqrt_softplus"] | Callable[[Tensor], Tensor]
Select = Literal["score", "logits"] | Callable[[Tensor, Tensor, Tensor | None], Tensor]
GroupScore = Literal["best", "two_best"] | Callable[[Tensor], Tensor]
Weigh = Literal["score", "softmax"] | Callable[[Tensor, Tensor, Tensor], Tensor]
Normalize = bool | Callable[[Tensor], Tensor] | None


def sqrt_softplus(logits: Tensor) -> Tensor:
    """Compute `sqrt(log(1 + exp(logits)))`. If the result is 0, as for logits below about -104 in float32, the gradient
    is 0 instead of NaN."""
    total = F.softplus(logits)
    is_zero = total == 0
    return total.masked_fill(is_zero, 1.0).sqrt().masked_fill(is_zero, 0.0)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(dim=-1),
    "sigmoid": partial(apply_elementwise, torch.sigmoid),
    "sqrt_softplus": partial(apply_elementwise, sqrt_softplus),
}
SELECTS = ("score", "logits")
GROUP_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "best": lambda grouped: grouped.amax(dim=-1),
    "two_best": lambda grouped: grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1),
}
WEIGHS = ("score", "softmax")
NO_EPSILON = 1e-20  # changes a float32 sum of weights only if all weights are 0
STEPS: dict[str, Collection[str]] = {"score": SCORES, "select": SELECTS, "group_score": GROUP_SCORES, "weigh": WEIGHS}


def check_step(name: str, value: Any) -> Any:
    """Check that a step is one of the allowed names, a function or a module."""
    allowed = STEPS[name]
    if callable(value) and not isinstance(value, type):
        return value
    if not isinstance(value, str) or value not in allowed:
        got = f"the class {value.__name__}; instantiate it first" if isinstance(value, type) else repr(value)
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, or a function, got {got}")
    return value


class AlwaysChosen:
    """A `select` step in which every token chooses the last `num` experts. All other choices are based on biased
    scores.

    Use this step for shared experts that are weighted by the router.

    Example:
        >>> import torch
        >>> from mixture_of_experts import TopKGating
        >>> gate = TopKGating(8, 5, k=3, select=AlwaysChosen(2))
        >>> gate(torch.randn(1, 1, 8)).expert[0, :2].tolist()
        [3, 4]
    """

    num: int

    def __init__(self, num: int) -> None:
        self.num = check_size("num", num)

    def __call__(self, logits: Tensor, score: Tensor, bias: Tensor | None) -> Tensor:
        biased = score if bias is None else score + bias
        return torch.cat([biased[..., : -self.num], torch.full_like(biased[..., -self.num :], torch.inf)], dim=-1)

    def __repr__(self) -> str:
        return f"AlwaysChosen({self.num})"


class OpenGroups:
    """A `select` step that sets the biased scores of experts in closed groups to 0, instead of ranking them below all
    others. Experts in closed groups therefore rank above experts in open groups whose biased scores are negative."""

    num_groups: int
    top_groups: int

    def __init__(self, num_groups: int, top_groups: int) -> None:
        self.num_groups, self.top_groups = check_size("num_groups", num_groups), check_size("top_groups", top_groups)

    def __call__(self, logits: Tensor, score: Tensor, bias: Tensor | None) -> Tensor:
        grouped = (score if bias is None else score + bias).unflatten(-1, (self.num_groups, -1))
        best = GROUP_SCORES["two_best"](grouped).topk(self.top_groups, dim=-1).indices
        is_open = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=score.device).scatter(-1, best, True)
        return torch.where(is_open.unsqueeze(-1), grouped, 0.0).flatten(-2)

    def __repr__(self) -> str:
        return f"OpenGroups({self.num_groups}, {self.top_groups})"


class NormalizeBy:
    """A `normalize` step that divides the weights by their `p`-norm, or by `eps` if the norm is smaller."""

    p: float
    eps: float

    def __init__(self, p: float = 1.0, eps: float = 0.0) -> None:
        self.p, self.eps = check_number("p", p, above=0.0), check_number("eps", eps, at_least=0.0)

    def __call__(self, weight: Tensor) -> Tensor:
        total = weight.sum(dim=-1, keepdim=True) if self.p == 1 else weight.norm(p=self.p, dim=-1, keepdim=True)
        return weight / total.clamp(min=self.eps)

    def __repr__(self) -> str:
        return f"NormalizeBy(p={self.p}, eps={self.eps})"


class LearnedScale(nn.Module):
    """A `weigh` step that multiplies normalized scores by a learned scale, which is shared or specific to each expert.

    Args:
        num_scales: number of scales, either e for one per expert or 1 for a shared scale.

    Example:
        >>> import torch
        >>> from mixture_of_experts import TopKGating
        >>> gate = TopKGating(8, 4, weigh=LearnedScale(4))
        >>> gate.weigh.scale.data.fill_(3.0).shape
        torch.Size([4])
        >>> bool((gate(torch.randn(1, 1, 8)).weight.sum() - 3).abs() < 1e-5)
        True
    """

    scale: nn.Parameter

    def __init__(self, num_scales: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(check_size("num_scales", num_scales), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the scales to 1."""
        nn.init.ones_(self.scale)

    def forward(self, logits: Tensor, score: Tensor, expert: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Return the weights `(..., b, n, k)`. Scores are normalized over the `chosen` choices, or over all choices if
        `chosen` is None."""
        weight = score.gather(-1, expert)
        if chosen is not None:
            weight = torch.where(chosen, weight, 0.0)
        scale = self.scale.to(weight.dtype)
        weight = weight / (weight.sum(dim=-1, keepdim=True) + NO_EPSILON)
        return weight * (scale if len(self.scale) == 1 else scale[expert])


#: classes of steps that are known to process each token independently
KNOWN_STEPS: set[type] = {AlwaysChosen, OpenGroups, NormalizeBy, LearnedScale}
