"""Combines two levels of gating. Computes the arguments of the level-two gate and the joint assignments of both levels.

Axes: b (groups), n (tokens per group), d (model dimension), eo (outer experts), c (slots per outer expert and group),
k1 and k2 (choices per token at levels one and two).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_experts.dispatch.assignments import Assignments, append, gather_choices
from mixture_of_experts.dispatch.capacity import Length
from mixture_of_experts.dispatch.groups import group_shape
from mixture_of_experts.dispatch.permutation import Permutation
from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.dispatch.rows import dispatch
from mixture_of_experts.dispatch.segments import SEGMENT_IDS
from mixture_of_experts.gating.overrides import COUNTED, GIVEN, GIVEN_WEIGHTS
from mixture_of_experts.support.subclassing import is_unchanged
from mixture_of_experts.support.tracing import is_host_readable

GIVEN_INNER = "given_experts_inner"


def split_side_inputs_by_level(outer: Sequence[str], inner: Sequence[str]) -> tuple[set[str], set[str]]:
    """Return the names of the side inputs that are passed to the level-one gate and to the level-two gate.
    `outer` and `inner` are the names that each gate reads.

    Externally specified choices have a different name at each level. Only single-level layers support `counted`,
    `given_weights` and `segment_ids`.
    """
    of_one_level = {COUNTED, GIVEN_WEIGHTS, SEGMENT_IDS}
    own = {name for name in inner if name not in {GIVEN, *of_one_level}}
    return set(outer) - of_one_level, own | ({GIVEN_INNER} if GIVEN in inner else set())


def dispatch_to_inner_gate(
    groups: Tensor, outer: Routing, outer_permutation: Permutation, group_size: int | None, side: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Convert the level-one slots to arguments for the level-two gate. Each pair of an outer expert and a group becomes
    one group.

    If level one has a capacity limit, the level-two load-balancing loss is averaged over all level-one slots, but
    counts only the slots that contain a first choice. At perfect balance, the loss is therefore the square of the
    fraction of these slots instead of 1. If level one is dropless, its capacity is treated as unlimited, and only
    occupied slots count as tokens. Capacity and means are then computed as if the choices were evenly distributed over
    the experts. If there is only one outer expert, the length is n, because each token chooses an expert at most once.
    Level two never receives more slots than this even share, regardless of its capacity factor.

    Args:
        groups: `(b, n, d)`.
        outer: the routing of level one.
        outer_permutation: `permute_to_slots(join_groups(outer, in_slots=True))`.
        group_size: group size at level two, or None to keep the level-one groups.
        side: side inputs `(b, n, ...)` of the gate. Empty slots contain zeros and have importance 0.
            `given_experts_inner` `(b, n, k, k2)` has an entry for each level-one choice of a token.
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
        if outer.limit is not None:  # mask slots beyond the capacity for the group's own length
            mask = (torch.arange(c, device=importance.device) < outer.limit.unsqueeze(-1)).expand(shape)
        if group_size is not None:
            shape = (eo, *group_shape(b * c, group_size))
            mask = None if mask is None else mask.reshape(shape)
    of_slots = {"x": dispatch(groups.flatten(0, 1), outer_permutation), "importance": importance}
    of_slots |= _side_of_slots(side, outer.k, outer_permutation)
    return {name: value.view(*shape, *value.shape[1:]) for name, value in of_slots.items()} | {"mask": mask, **more}


def join_levels(outer: Routing, outer_permutation: Permutation, inner: Routing) -> Assignments:
    """Return the joint assignments of both levels.

    Each token receives the level-two choices that are made for all of its slots, in slot order. The weight of a choice
    is the product of its weights at both levels. With joint assignments, experts read tokens directly from the inputs
    instead of from the level-one slots.

    Args:
        outer: the routing of level one.
        outer_permutation: the permutation of tokens to level-one slots, which are the tokens of level two.
        inner: the routing of level two, which has a separate router for each outer expert.
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
    """Check that a custom level-two gate does not choose experts for empty slots.

    The check reads tensor values, so it is skipped on a GPU and in traced graphs.
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
    """Map the side inputs of tokens `(b, n, ...)` to slots `(r, ...)`, and `given_experts_inner` `(b, n, k, k2)` to
    `given_experts` `(r, k2)`. For empty slots, side inputs are 0, and `given_experts` is -1."""
    found = {}
    for name, value in side.items():
        if name != GIVEN_INNER:
            found[name] = append(value.flatten(0, 1), 0)[outer_permutation.token]
        elif value.ndim == 4 and value.shape[2] == k:
            found[GIVEN] = append(value.flatten(0, 2), -1)[outer_permutation.assignment]
        else:
            got = tuple(value.shape[1:])
            raise ValueError(f"{GIVEN_INNER} must have shape (..., n, {k}, gate_inner.k), got {got}")
    return found
