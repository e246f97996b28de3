"""Combines two levels of gating: arguments of the second gate from the routing of the first, and joint assignments.

Axes: b groups, n tokens per group, d model dim, eo outer experts, c slots per outer expert and group, k1 and k2 choices
per token at levels one and two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_experts.dispatch.assignments import Assignments, append, gather_choices
from mixture_of_experts.dispatch.groups import group_shape
from mixture_of_experts.dispatch.permutation import Permutation
from mixture_of_experts.dispatch.queues import Length
from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.dispatch.rows import dispatch
from mixture_of_experts.dispatch.segments import SEGMENT_IDS
from mixture_of_experts.gating.overrides import COUNTED, GIVEN, GIVEN_WEIGHTS
from mixture_of_experts.support.subclassing import is_unchanged
from mixture_of_experts.support.tracing import is_host_readable

GIVEN_INNER = "given_experts_inner"


def side_inputs_of_levels(outer: Sequence[str], inner: Sequence[str]) -> tuple[set[str], set[str]]:
    """Return which side inputs the gates of levels one and two receive, given the names that each gate reads.

    Given choices have a different name at each level. `counted`, `given_weights` and `segment_ids` are supported only
    in layers with one level.
    """
    of_one_level = {COUNTED, GIVEN_WEIGHTS, SEGMENT_IDS}
    own = {name for name in inner if name not in {GIVEN, *of_one_level}}
    return set(outer) - of_one_level, own | ({GIVEN_INNER} if GIVEN in inner else set())


def dispatch_to_inner_gate(
    groups: Tensor, outer: Routing, outer_permutation: Permutation, group_size: int | None, side: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return the slots of level one as arguments for the gate of level two, with a group per (outer expert, group).

    With a capacity, the load-balancing loss of level two averages over all slots of level one, but counts only those
    that hold a first choice: at balance it is the square of their share, not 1. If level one is dropless, the result is
    as with a capacity that never overflows, where only occupied slots are tokens. Capacity and means then use each
    expert's even share of the choices as length (n for a single expert, because a token chooses each expert at most
    once). No capacity factor provides level two with more slots than that share.

    Args:
        groups: `(b, n, d)`.
        outer: the routing of level one.
        outer_permutation: `permute_to_slots(join_groups(outer, in_slots=True))`.
        group_size: group size of level two, or None to keep the groups.
        side: `(b, n, ...)` side inputs of the gate. Empty slots get zeros and importance 0. `given_experts_inner`
            `(b, n, k, k2)` has an entry for each choice of a token.
    """
    if outer.k is None:
        raise ValueError(
            "gate_outer must be a token-choice router, but it returned a Routing without k choices per token"
        )
    b, n, _ = groups.shape
    eo, c = outer.num_experts, outer.slots_per_queue
    importance = append(outer.importance.flatten(), 0)[outer_permutation.assignment]
    shape, mask, more = (eo, b, c), None, {}
    if outer.capacity is None:
        mask = (importance > 0).view(shape)
        real = outer.expert.new_full((b,), n) if outer.mask is None else outer.mask.sum(dim=-1)
        more["length"] = Length((real * min(outer.k, eo)).expand(eo, b), parts_per_token=eo)
    else:
        if outer.limit is not None:  # use only the slots within the capacity for a group's own length
            mask = (torch.arange(c, device=importance.device) < outer.limit.unsqueeze(-1)).expand(shape)
        if group_size is not None:
            shape = (eo, *group_shape(b * c, group_size))
            mask = None if mask is None else mask.reshape(shape)
    of_slots = {"x": dispatch(groups.flatten(0, 1), outer_permutation), "importance": importance}
    of_slots |= _side_of_slots(side, outer.k, outer_permutation)
    return {name: value.view(*shape, *value.shape[1:]) for name, value in of_slots.items()} | {"mask": mask, **more}


def join_levels(outer: Routing, outer_permutation: Permutation, inner: Routing) -> Assignments:
    """Return the joint assignments of two levels.

    Each token has the choices of all its slots, in order, and their weights are the products of the weights of both
    levels. Experts therefore read tokens from the inputs, not from the slots of level one.

    Args:
        outer: the routing of level one.
        outer_permutation: its permutation to slots, which are the tokens of level two.
        inner: the routing of level two, with one router for each expert of level one.
    """
    if outer_permutation.k is None or inner.k is None:
        raise ValueError(
            "both levels must be token-choice routers, because expert-choice routers do not make k choices per token"
        )
    slot = outer_permutation.row
    weight = outer_permutation.weight.unsqueeze(-1) * gather_choices(inner.weight, inner.k, slot).view(-1, inner.k)
    kept = gather_choices(inner.kept, inner.k, slot)
    return Assignments(
        expert=None,  # the slots determine the expert
        weight=weight.flatten(),
        kept=kept,
        sent=kept,
        k=outer_permutation.k * inner.k,
        num_tokens=outer_permutation.num_tokens,
        expert_dims=(outer.num_experts, inner.num_experts),
        dropless=inner.capacity is None,
        routing=inner,
        slot_of_outer_choice=slot,
    )


def check_slots_have_tokens(gate: nn.Module, inner: Routing, outer_permutation: Permutation) -> None:
    """Check that a custom gate of level two chooses no expert for an empty slot.

    The check reads values, so it is skipped on a GPU and in a graph.
    """
    if (
        inner.k is None
        or not (is_host_readable(inner.sent) and is_host_readable(outer_permutation.assignment))
        or is_unchanged(gate)
    ):
        return
    empty = outer_permutation.assignment == outer_permutation.row.shape[0]
    if (sent := inner.sent.reshape(outer_permutation.num_rows, inner.k).any(dim=-1) & empty).any():
        raise ValueError(
            f"gate_inner ({type(gate).__name__}) chose experts for {int(sent.sum())} empty first-level slots. Do not "
            "choose experts where `importance` is 0; TokenChoiceGate.route removes such choices"
        )


def _side_of_slots(side: Mapping[str, Tensor], k: int, outer_permutation: Permutation) -> dict[str, Tensor]:
    """Return the side inputs of slots `(r, ...)` from those of tokens `(b, n, ...)`, and `given_experts` `(r, k2)` from
    those of choices `(b, n, k, k2)`. Empty slots get zeros, and -1 as given experts."""
    found = {}
    for name, value in side.items():
        if name != GIVEN_INNER:
            found[name] = append(value.flatten(0, 1), 0)[outer_permutation.token]
        elif value.ndim == 4 and value.shape[2] == k:
            found[GIVEN] = append(value.flatten(0, 2), -1)[outer_permutation.assignment]
        else:
            got = tuple(value.shape[1:])
            raise ValueError(f"{GIVEN_INNER} must have shape (..., n, {k}, k of gate_inner), got {got}")
    return found
