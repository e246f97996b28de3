"""From level one of a hierarchy to level two: what the first gate hands on to the second.

Axes: b groups, n tokens of a group, d model dim, eo outer experts, c slots of an outer expert for each group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mixture_of_experts.dispatch import dispatch
from mixture_of_experts.groups import group_shape
from mixture_of_experts.plan import Plan
from mixture_of_experts.queues import Length
from mixture_of_experts.routing import Routing


def second_level(
    groups: Tensor, outer: Routing, slots: Plan, group_size: int | None, side: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The slots of level one as the arguments of level two's gate: one group for each (outer expert, group).

    If level one is dropless it hands on what a capacity without overflow would: only occupied slots are tokens, and
    the length that capacity and means reckon with is each expert's fair share of the choices (a token takes an expert
    once, so a single expert has n of them). No capacity factor gives level two more slots than that share.

    Args:
        groups: `(b, n, d)`.
        outer: what the gate of level one tells.
        slots: `plan_slots_of(outer)`.
        group_size: of level two, if its groups are others.
        side: `(b, n, ...)` side inputs of the gate; an empty slot has zeros, and importance 0.
    """
    b, n, d = groups.shape
    eo, c = outer.num_experts, outer.slots
    if outer.k is None:
        raise ValueError("gate_outer must be a router of token choice: its Routing has no list of choices")
    x = dispatch(groups.flatten(0, 1), slots).view(eo, b, c, d)
    side = {name: _in_slots(value, slots).view(eo, b, c, *value.shape[2:]) for name, value in side.items()}
    handed_on = outer.importance.flatten()
    importance = torch.cat([handed_on, handed_on.new_zeros(1)])[slots.assignment].view(eo, b, c)
    mask = length = None
    if outer.capacity is None:
        mask = importance > 0
        real = mask.new_full((b,), n, dtype=torch.int64) if outer.real is None else outer.real.sum(dim=-1)
        length = Length((real * min(outer.k, eo)).expand(eo, b), parts_per_token=eo)
    elif outer.limit is not None:
        mask = (torch.arange(c, device=x.device) < outer.limit.unsqueeze(-1)).expand(eo, b, c)
    if group_size is not None and outer.capacity is not None:
        shape = (eo, *group_shape(b * c, group_size))
        x, importance = x.reshape(*shape, d), importance.reshape(shape)
        mask = None if mask is None else mask.reshape(shape)
        side = {name: value.reshape(*shape, *value.shape[3:]) for name, value in side.items()}
    arguments = {"x": x, "importance": importance, "mask": mask, **side}
    return arguments if length is None else {**arguments, "length": length}


def _in_slots(value: Tensor, slots: Plan) -> Tensor:
    """Entries `(b, n, ...)` of tokens as those of slots `(r, ...)`."""
    rows = dispatch(value.reshape(slots.num_tokens, math.prod(value.shape[2:])), slots)
    return rows.view(slots.num_rows, *value.shape[2:])
