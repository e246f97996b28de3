"""From the decision of a gate to the experts' results: which rows, in which form.

Axes: b groups, n tokens of a group, t = b n tokens of the call, d model dim, e experts, s slots of an expert, r rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from mixture_of_experts.dispatch import Decision, Plan, combine, dispatch
from mixture_of_experts.routing import Routing


def compute(experts: nn.Module, groups: Tensor, levels: Sequence[Routing]) -> Tensor:
    """Dispatch the tokens `(b, n, d)` to the experts' rows, run the experts, and combine: `(t, d)`."""
    x = groups.flatten(0, 1)
    decision = Decision(levels)
    if takes_tokens(experts, x):
        return experts(x, decision=decision)
    where = decision.plan(ragged=prefers_rows(experts, x, levels))
    return combine(run(experts, dispatch(x, where), where), where)


def takes_tokens(experts: nn.Module, x: Tensor) -> bool:
    """Whether the experts do dispatch and combine themselves."""
    method = getattr(experts, "takes_tokens", None)
    return method is not None and method(x)


def prefers_rows(experts: nn.Module, x: Tensor, levels: Sequence[Routing]) -> bool:
    """Whether the experts would rather have rows without gaps than slots."""
    method = getattr(experts, "prefers_rows", None)
    if method is None:
        return False
    last = levels[-1]
    num_slots = math.prod(last.expert.shape[:-1]) * last.num_experts * last.slots
    num_rows = num_slots if last.choices is None else x.shape[0]
    for routing in levels:
        num_rows = num_rows * (routing.choices or 1)
    return method(num_rows, num_slots, last.capacity is None)


def run(experts: nn.Module, rows: Tensor, where: Plan) -> Tensor:
    """Experts on rows `(r, d)`: as slots `(*e, s, d)`, or as rows with counts."""
    if where.counts is not None:
        return experts(rows, where.counts)
    each = where.num_rows // math.prod(where.num_experts)
    slots = rows.view(*where.num_experts, each, rows.shape[-1])
    result = experts(slots)
    if not isinstance(result, Tensor) or result.shape != slots.shape:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"experts must return the shape they are given, {tuple(slots.shape)}, got {got}")
    return result.flatten().view(rows.shape)  # `flatten(0, -2)` asks of a dynamic length whether it is 1
