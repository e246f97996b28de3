"""From the decision of a gate to the experts' results: which rows, in which form, through which level.

Axes: b groups, n tokens of a group, t = b n tokens of the call, d model dim, e experts (outer eo, inner ei), c slots of
an expert for each group, s slots of an expert, r rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mixture_of_experts.dispatch import Decision, Plan, combine, dispatch, plan
from mixture_of_experts.groups import group_shape
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


def second_level(groups: Tensor, outer: Routing, handed_on: Tensor, group_size: int | None) -> dict[str, Tensor | None]:
    """The slots of level one as the arguments of level two's gate: one group for each (outer expert, group).

    `handed_on` is the importance `(b, a)` that level one gives each of its choices.

    If level one is dropless it hands on what a capacity without overflow would: only occupied slots are tokens, and
    the length that capacity and means reckon with is each expert's fair share of the choices (a token takes an expert
    once, so a single expert has n of them).
    """
    b, n, d = groups.shape
    eo, c = outer.num_experts, outer.slots
    if outer.choices is None:
        raise ValueError("gate_outer must be a router of token choice: its Routing has no list of choices")
    slots = plan(outer)
    x = dispatch(groups.flatten(0, 1), slots).view(eo, b, c, d)
    importance = torch.cat([handed_on.flatten(), handed_on.new_zeros(1)])[slots.assignment].view(eo, b, c)
    mask = length = None
    if outer.capacity is None:
        mask = importance > 0
        real = groups.new_full((b,), n, dtype=torch.float64) if outer.real is None else outer.real.sum(dim=-1)
        length = (real.to(torch.float64) * min(outer.choices, eo) / eo).expand(eo, b)
    elif outer.limit is not None:
        mask = (torch.arange(c, device=x.device) < outer.limit.unsqueeze(-1)).expand(eo, b, c)
    if group_size is not None and outer.capacity is not None:
        shape = (eo, *group_shape(b * c, group_size))
        x, importance = x.reshape(*shape, d), importance.reshape(shape)
        mask = None if mask is None else mask.reshape(shape)
    arguments = {"x": x, "importance": importance, "mask": mask}
    return arguments if length is None else {**arguments, "length": length}
