"""Assignments and their permutations, assignment by assignment: which expert computes which token, in which row."""

from __future__ import annotations

import math

import pytest
import torch
from support.strategies import make_generator, normal
from torch import Tensor

from mixture_of_experts import ExpertChoiceGating, Routing, Top2Gating, TopKGating
from mixture_of_experts.dispatch.assignments import Assignments, append, assign_experts, join_groups
from mixture_of_experts.dispatch.permutation import (
    Permutation,
    permute_to_slots,
    permute_with_padding,
    permute_without_gaps,
)
from mixture_of_experts.gating.levels import dispatch_to_inner_gate, join_levels

pytest.importorskip("triton")

from mixture_of_experts.ops.triton.row_permutation import queued_choices

B, N, D, E = 2, 6, 3, 4
GATES = {
    "top2": lambda: Top2Gating(D, E, second_policy_eval="all", capacity_factor_eval=1.0, min_expert_capacity=1),
    "dropless": lambda: TopKGating(D, E),
    "one choice": lambda: TopKGating(D, E, k=1, capacity_factor_eval=1.0, min_expert_capacity=1),
    "expert choice": lambda: ExpertChoiceGating(D, E),
}


def routing_of(name: str, masked: bool = False) -> Routing:
    gate = GATES[name]().double().eval()
    gate.w_gating.data.copy_(normal(make_generator(1), D, E))
    mask = torch.tensor([[True] * 6, [True, False, True, False, False, True]]) if masked else None
    return gate(normal(make_generator(2), B, N, D), mask=mask)


def check_permutation(assignments: Assignments, permutation: Permutation, expert: list[int], token: list[int]) -> None:
    """Each kept assignment has a row of its own, among those of its expert; the other rows are empty."""
    rows, total, kept = permutation.row.tolist(), permutation.num_rows, assignments.kept.tolist()
    ends = None if permutation.rows_per_expert is None else permutation.rows_per_expert.cumsum(0).tolist()
    num_experts = math.prod(permutation.expert_dims)
    row_weight, seen = permutation.row_weight().tolist(), {}
    for a, row in enumerate(rows):
        if not kept[a]:
            assert row == total
            continue
        assert row not in seen
        seen[row] = a
        first = 0 if expert[a] == 0 else (ends[expert[a] - 1] if ends else expert[a] * (total // num_experts))
        end = ends[expert[a]] if ends else (expert[a] + 1) * (total // num_experts)
        assert first <= row < end
        assert permutation.token[row] == token[a]
        assert row_weight[row] == assignments.weight[a].item()
    for row in range(total):
        assert permutation.assignment[row] == seen.get(row, len(rows))
        if row not in seen:
            assert permutation.token[row] == permutation.num_tokens
            assert row_weight[row] == 0
    saved = permutation.tensors_to_save()
    assert ("token" in saved) is (permutation.k is None)
    assert saved["assignment"].dtype == torch.int32
    assert all(value is None for value in (permutation.without_tensors().row, permutation.without_tensors().token))
    again = permutation.without_tensors().from_saved(saved)
    for name, value in permutation.tensors().items():
        assert torch.equal(getattr(again, name).long() if value.dtype == torch.int64 else getattr(again, name), value)


def check(assignments: Assignments, expert: list[int], token: list[int]) -> None:
    assert assignments.num_tokens == B * N
    check_permutation(assignments, permute_to_slots(assignments), expert, token)
    assert permute_to_slots(assignments).num_rows == assignments.num_slots
    without_gaps = permute_without_gaps(assignments)
    check_permutation(assignments, without_gaps, expert, token)
    wanted = [0] * math.prod(assignments.expert_dims)
    for one, kept in zip(expert, assignments.kept.tolist(), strict=True):
        wanted[one] += kept
    seen = []

    def pad(needed: Tensor) -> tuple[Tensor, int]:
        seen.append(needed)
        padded = needed + torch.arange(len(needed)) % 3
        return padded, int(padded.sum()) + 2

    with_padding = permute_with_padding(assignments, pad)
    assert torch.equal(without_gaps.rows_per_expert, seen[0])
    assert all(rows >= least for rows, least in zip(seen[0].tolist(), wanted, strict=True))
    check_permutation(assignments, with_padding, expert, token)
    assert [e for e, kept in zip(assignments.expert.tolist(), assignments.kept, strict=True) if kept] == [
        e for e, kept in zip(expert, assignments.kept, strict=True) if kept
    ]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", GATES)
def test_one_gate(name, masked):
    routing = routing_of(name, masked)
    assignments = join_groups(routing)
    group = torch.arange(B).unsqueeze(-1) * N
    token = (routing.token + group).flatten().tolist()
    check(assignments, routing.expert.flatten().tolist(), token)
    slots = permute_to_slots(join_groups(routing, in_slots=True))
    check_permutation(assignments, slots, routing.expert.flatten().tolist(), token)
    assert slots.num_rows == E * B * routing.slots_per_queue
    limited = routing.capacity is not None
    assert assignments.dropless is not limited
    assert assignments.num_slots == (E * B * routing.capacity if limited else E * B * N)
    fewer = assignments.weight.shape[0] < assignments.num_slots
    assert assignments.prefers_rows() is (not limited or (name != "expert choice" and fewer))


def test_loss_of_given_choices():
    """Ids that are no expert's are nobody's, whatever they weigh."""
    assert append(torch.ones(2, 2, dtype=torch.int64), 7).tolist() == [[1, 1], [1, 1], [7, 7]]
    expert, weight = torch.tensor([[0, 3], [-1, 2], [4, 1], [5, -7]]), torch.arange(1.0, 9.0).view(4, 2)
    assignments = assign_experts(expert, weight, 4)
    assert assignments.kept.tolist() == [True, True, False, True, False, True, False, False]
    assert assignments.weight.tolist() == [1.0, 2.0, 0.0, 4.0, 0.0, 6.0, 0.0, 0.0]
    assert assignments.expert.tolist() == [0, 3, 0, 2, 0, 1, 0, 0]
    assert (assignments.k, assignments.num_tokens, assignments.expert_dims) == (2, 4, (4,))
    assert assignments.dropless
    assert assignments.prefers_rows()
    assert assignments.sent is assignments.kept
    check_permutation(
        assignments, permute_without_gaps(assignments), [0, 3, 0, 2, 0, 1, 0, 0], [0, 0, 1, 1, 2, 2, 3, 3]
    )
    assert permute_without_gaps(assignments).rows_per_expert.tolist() == [1, 1, 1, 1]
    assert permute_to_slots(assignments).num_rows == 16


@pytest.mark.parametrize("inner_factor", [None, 1.0])
@pytest.mark.parametrize("name", ["top2", "dropless", "one choice"])
def test_two_levels_of_choices(name, inner_factor):
    """A choice of a choice is computed if both are kept, by one of the inner experts, with the product of weights."""
    outer, gen = routing_of(name), make_generator(3)
    slots = permute_to_slots(join_groups(outer, in_slots=True))
    settings = dict(capacity_factor_eval=inner_factor, min_expert_capacity=1, outer_expert_dims=E)
    gate = TopKGating(D, 3, k=2, **settings).double().eval()
    gate.w_gating.data.copy_(normal(gen, E, D, 3))
    inner = gate(**dispatch_to_inner_gate(normal(make_generator(2), B, N, D), outer, slots, None, {}))
    assignments = join_levels(outer, slots, inner)
    expert, token, weight, kept = [], [], [], []
    for b in range(B):
        for a in range(outer.k * N):
            for choice in range(2):
                o, c = int(outer.expert[b, a]), int(outer.position[b, a])
                at = (o, b, 2 * c + choice)
                there = bool(outer.kept[b, a]) and bool(inner.kept[at])
                expert.append(o * 3 + int(inner.expert[at]) if there else 0)
                weight.append((outer.weight[b, a] * inner.weight[at]).item() if there else 0.0)
                token.append(b * N + a // outer.k)
                kept.append(there)
    assert assignments.kept.tolist() == kept
    assert assignments.weight.tolist() == weight
    assert (assignments.k, assignments.expert_dims) == (2 * outer.k, (E, 3))
    assert assignments.dropless is (inner_factor is None)
    assert assignments.max_rows == min(inner.expert.numel(), len(kept))
    check(assignments, expert, token)
    with pytest.raises(ValueError, match="both levels must be token-choice routers"):
        join_levels(outer, permute_to_slots(join_groups(routing_of("expert choice"), in_slots=True)), inner)


def rows_of(assignments: Assignments, num_experts: int) -> list[int | None]:
    """The row of each assignment, by a loop over the choices that queue: behind the rows of the queues before."""
    expert_of, position_of, _, kept, lengths, slot, num_tokens, k, e = queued_choices(assignments)
    start, length = [0], lengths.tolist()
    for rows in length:
        start.append(start[-1] + rows)
    groups, number = len(length) // num_experts, len(expert_of) // k
    found: list[int | None] = []
    for token in range(number) if slot is None else slot.tolist():
        for choice in range(token * k, (token + 1) * k):
            if token == number or not kept[choice]:
                found.append(None)
                continue
            router, group = divmod(token // num_tokens, groups)
            expert, position = router * e + int(expert_of[choice]), int(position_of[choice])
            assert position < length[expert * groups + group]
            found.append(start[expert * groups + group] + position)
    return found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["top2", "dropless", "one choice"])
def test_kernel_choices_match_plan_rows(name: str, masked: bool):
    assignments = join_groups(routing_of(name, masked))
    permutation, (_, _, chosen, *_, num_tokens, _, _) = permute_without_gaps(assignments), queued_choices(assignments)
    assert rows_of(assignments, E) == [None if row == permutation.num_rows else row for row in permutation.row.tolist()]
    assert torch.equal(chosen, assignments.kept if name == "dropless" else assignments.sent)
    assert num_tokens == (B * N if name == "dropless" else N)


@pytest.mark.parametrize("factor", [None, 1.0])
def test_kernel_choices_match_plan_rows_on_level_two(factor: float | None):
    outer = routing_of("top2")
    inner = Top2Gating(D, 2, outer_expert_dims=(E,), second_policy_eval="all", capacity_factor_eval=factor)
    inner = inner.double().eval()
    inner.w_gating.data.copy_(normal(make_generator(3), E, D, 2))
    slots = permute_to_slots(join_groups(outer, in_slots=True))
    described = inner(**dispatch_to_inner_gate(normal(make_generator(2), B, N, D), outer, slots, None, {}))
    assignments = join_levels(outer, slots, described)
    permutation = permute_without_gaps(assignments)
    assert rows_of(assignments, E * 2) == [
        None if row == permutation.num_rows else row for row in permutation.row.tolist()
    ]
    assert (permutation.row == permutation.num_rows).any()
