"""Makes the arguments of level two's gate from the routing of level one.

Axes: b groups, n tokens of a group, d model dim, eo outer experts, c slots of an outer expert for each group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_experts.dispatch import dispatch
from mixture_of_experts.gating.base import COUNTED
from mixture_of_experts.groups import group_shape
from mixture_of_experts.plan import Plan
from mixture_of_experts.private_torch import is_fake
from mixture_of_experts.queues import Length
from mixture_of_experts.routing import Routing
from mixture_of_experts.tracing import is_wrapped

GIVEN, GIVEN_INNER, OPEN = "given_experts", "given_experts_inner", "open_experts"


def side_inputs_of_levels(outer: Sequence[str], inner: Sequence[str]) -> tuple[set[str], set[str]]:
    """The names of side inputs for the gates of level one and two, by what each gate reads. Given choices have another
    name at each level; `open_experts` is for level one, `counted` for layers of one level."""
    own = {name for name in inner if name not in (GIVEN, OPEN, COUNTED)}
    return set(outer) - {COUNTED}, own | ({GIVEN_INNER} if GIVEN in inner else set())


def second_level(
    groups: Tensor, outer: Routing, slots: Plan, group_size: int | None, side: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The slots of level one as the arguments of level two's gate: one group for each (outer expert, group).

    A dropless level one hands on what a capacity without overflow would: only occupied slots are tokens. Capacity and
    means then use each expert's fair share of the choices as the length (n for a single expert, as a token takes an
    expert once). No capacity factor gives level two more slots than that share.

    Args:
        groups: `(b, n, d)`.
        outer: the routing of level one.
        slots: `plan_slots_of(outer)`.
        group_size: group size of level two, if it has groups of its own.
        side: `(b, n, ...)` side inputs of the gate; an empty slot has zeros, and importance 0. `given_experts_inner`
            `(b, n, k, k2)` is for each choice of a token.
    """
    b, n, d = groups.shape
    eo, c = outer.num_experts, outer.slots
    if outer.k is None:
        raise ValueError("gate_outer must be a router of token choice: its Routing has no list of choices")
    x, given = dispatch(groups.flatten(0, 1), slots).view(eo, b, c, d), side.get(GIVEN_INNER)
    side = {name: value for name, value in side.items() if name != GIVEN_INNER}
    side = {name: _in_slots(value, slots).view(eo, b, c, *value.shape[2:]) for name, value in side.items()}
    if given is not None:
        side[GIVEN] = _of_choices(given, outer.k, slots).view(eo, b, c, given.shape[-1])
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


def check_slots_have_tokens(gate: nn.Module, inner: Routing, slots: Plan) -> None:
    """Check that a gate of level two, if it is not this package's, chooses no expert for an empty slot.

    It reads values, so it does nothing on a GPU and in a graph.
    """
    ours = type(gate).__module__.partition(".")[0] == __package__
    if ours or inner.k is None or torch.compiler.is_compiling() or inner.chosen.device.type != "cpu":
        return
    empty = slots.assignment == slots.row.shape[0]
    if is_fake(empty) or is_wrapped(empty) or is_wrapped(inner.chosen):
        return
    if (chosen := inner.chosen.reshape(slots.num_rows, inner.k).any(dim=-1) & empty).any():
        raise ValueError(
            f"gate_inner, a {type(gate).__name__}, chose experts for {int(chosen.sum())} slots of level one that no "
            "token has: choose none where importance is 0 (TokenChoiceGate.route leaves them out)"
        )


def _in_slots(value: Tensor, slots: Plan) -> Tensor:
    """Return the entries of slots `(r, ...)`, from those of tokens `(b, n, ...)`."""
    rows = dispatch(value.reshape(slots.num_tokens, math.prod(value.shape[2:])), slots)
    return rows.view(slots.num_rows, *value.shape[2:])


def _of_choices(given: Tensor, k: int, slots: Plan) -> Tensor:
    """Return the entries of slots `(r, k2)`, from those of choices `(b, n, k, k2)`; an empty slot has -1."""
    if given.ndim != 4 or given.shape[2] != k:
        raise ValueError(f"{GIVEN_INNER} must have shape (..., n, {k}, k of level two), got {tuple(given.shape[1:])}")
    none = given.new_full((1, given.shape[-1]), -1)
    return torch.cat([given.flatten(0, 2), none])[slots.assignment]
