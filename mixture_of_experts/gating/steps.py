"""The steps of a router of top-k choices that have names; each may be a function or module of one's own instead.

Axes: b groups, n tokens of a group, e experts, g expert groups, k choices of a token; outer experts stand before them:
`...`.

    score      logits `(..., b, n, e)` to scores of the same shape, none below 0
    select     what the experts are chosen by: the scores, or the logits
    group      scores `(..., b, n, g, e / g)` to what each expert group scores `(..., b, n, g)`
    weigh      what the chosen weigh `(..., b, n, k)`, before they are normalised and scaled
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Score = Literal["softmax", "sigmoid", "sqrt_softplus"] | Callable[[Tensor], Tensor]
Select = Literal["score", "logits"] | Callable[[Tensor, Tensor, Tensor | None], Tensor]
GroupScore = Literal["best", "two_best"] | Callable[[Tensor], Tensor]
Weigh = Literal["score", "softmax"] | Callable[[Tensor, Tensor, Tensor], Tensor]
Normalize = bool | Callable[[Tensor], Tensor] | None

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": lambda logits: F.softplus(logits).sqrt(),
}
SELECTS = ("score", "logits")
GROUP_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "best": lambda grouped: grouped.amax(dim=-1),
    "two_best": lambda grouped: grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1),
}
WEIGHS = ("score", "softmax")
STEPS = {"score": SCORES, "select": SELECTS, "group_score": GROUP_SCORES, "weigh": WEIGHS}


def check_step(name: str, value: Any) -> Any:
    """One of a step's names, or a function of one's own."""
    allowed = STEPS[name]
    if callable(value) and not isinstance(value, type):
        return value
    if not isinstance(value, str) or value not in allowed:
        got = f"the class {value.__name__}: make an instance" if isinstance(value, type) else repr(value)
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, or a function, got {got}")
    return value


def named(step: Any) -> str:
    """How a step is written in a module's repr."""
    return repr(step) if isinstance(step, str) else getattr(step, "__qualname__", None) or type(step).__name__
