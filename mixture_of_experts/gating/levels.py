"""Makes the arguments of level two's gate from the routing of level one.

Axes: b groups, n tokens of a group, d model dim, eo outer experts, c slots of an outer expert for each group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_experts.dispatch.groups import group_shape
from mixture_of_experts.dispatch.moving import dispatch
from mixture_of_experts.dispatch.plan import Plan, append
from mixture_of_experts.dispatch.queues import Length
from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.gating.given import COUNTED, GIVEN, GIVEN_WEIGHTS, OPEN
from mixture_of_experts.support.private_torch import is_fake, is_wrapped

GIVEN_INNER = "given_experts_inner"


def side_inputs_of_levels(outer: Sequence[str], inner: Sequence[str]) -> tuple[set[str], set[str]]:
    """The names of side inputs for the gates of level one and two, by what each gate reads. Given choices have another
    name at each level; `open_experts` is for level one, `counted` and `given_weights` for layers of one level."""
    own = {name for name in inner if name not in (GIVEN, OPEN, COUNTED, GIVEN_WEIGHTS)}
    return set(outer) - {COUNTED, GIVEN_WEIGHTS}, own | ({GIVEN_INNER} if GIVEN in inner else set())


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
    if outer.k is None:
        raise ValueError("gate_outer must be a router of token choice: its Routing has no list of choices")
    b, n, _ = groups.shape
    eo, c = outer.num_experts, outer.slots
    of_slots = {  # (eo b c, ...)
        "x": dispatch(groups.flatten(0, 1), slots),
        "importance": append(outer.importance.flatten(), 0)[slots.assignment],
        **_side_of_slots(side, outer.k, slots),
    }
    shape, more = (eo, b, c), {}
    if outer.capacity is None:
        mask = (of_slots["importance"] > 0).view(shape)
        more["length"] = _fair_shares(outer, n)
    else:
        mask = _real_slots(outer, c)
        if group_size is not None:
            shape = (eo, *group_shape(b * c, group_size))
            mask = None if mask is None else mask.reshape(shape)
    return {name: value.view(*shape, *value.shape[1:]) for name, value in of_slots.items()} | {"mask": mask, **more}


def _fair_shares(outer: Routing, n: int) -> Length:
    """`(eo, b)`, each outer expert's share of a group's choices, had all of them the same."""
    b, eo, k = outer.expert.shape[-2], outer.num_experts, outer.k
    assert k is not None
    real = outer.expert.new_full((b,), n) if outer.real is None else outer.real.sum(dim=-1)
    return Length((real * min(k, eo)).expand(eo, b), parts_per_token=eo)


def _real_slots(outer: Routing, c: int) -> Tensor | None:
    """`(eo, b, c)` bool, the slots below the capacity that a group's real length gives; None if nothing is masked."""
    if outer.limit is None:
        return None
    real = torch.arange(c, device=outer.limit.device) < outer.limit.unsqueeze(-1)
    return real.expand(outer.num_experts, *real.shape)


def check_slots_have_tokens(gate: nn.Module, inner: Routing, slots: Plan) -> None:
    """Check that a gate of level two, if it is not this package's, chooses no expert for an empty slot.

    It reads values, so it does nothing on a GPU and in a graph.
    """
    ours = type(gate).__module__.partition(".")[0] == "mixture_of_experts"
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


def _side_of_slots(side: Mapping[str, Tensor], k: int, slots: Plan) -> dict[str, Tensor]:
    """The side inputs of level two `(r, ...)`, from those of tokens; `given_experts` from those of choices."""
    found = {name: _in_slots(value, slots) for name, value in side.items() if name != GIVEN_INNER}
    if (given := side.get(GIVEN_INNER)) is not None:
        found[GIVEN] = _of_choices(given, k, slots)
    return found


def _in_slots(value: Tensor, slots: Plan) -> Tensor:
    """Return the entries of slots `(r, ...)`, from those of tokens `(b, n, ...)`."""
    rows = dispatch(value.reshape(slots.num_tokens, math.prod(value.shape[2:])), slots)
    return rows.view(slots.num_rows, *value.shape[2:])


def _of_choices(given: Tensor, k: int, slots: Plan) -> Tensor:
    """Return the entries of slots `(r, k2)`, from those of choices `(b, n, k, k2)`; an empty slot has -1."""
    if given.ndim != 4 or given.shape[2] != k:
        raise ValueError(f"{GIVEN_INNER} must have shape (..., n, {k}, k of level two), got {tuple(given.shape[1:])}")
    return append(given.flatten(0, 2), -1)[slots.assignment]
