"""Dispatch and combine against matrices of zeros and ones, first and second derivatives too."""

from __future__ import annotations

import pytest
import torch
from support import strategies as make
from torch import Tensor

from mixture_of_experts import ExpertChoiceGating, Top2Gating, TopKGating
from mixture_of_experts.dispatch.assignments import join_groups
from mixture_of_experts.dispatch.permutation import Permutation, permute_to_slots, permute_without_gaps
from mixture_of_experts.dispatch.rows import add_rows, combine, dispatch, read_rows, sum_rows

B, N, D, E = 2, 5, 3, 4
GATES = {
    "top2": lambda: Top2Gating(D, E, second_policy_eval="all", capacity_factor_eval=1.0, min_expert_capacity=1),
    "three choices": lambda: TopKGating(D, E, k=3),
    "one choice": lambda: TopKGating(D, E, k=1, capacity_factor_eval=1.0, min_expert_capacity=1),
    "expert choice": lambda: ExpertChoiceGating(D, E),
}


def build_permutation(name: str, gaps: bool) -> Permutation:
    gate = GATES[name]().double().eval()
    gate.w_gating.data.copy_(make.normal(make.make_generator(1), D, E))
    mask = torch.tensor([[True] * 5, [True, False, True, False, False]])
    assignments = join_groups(gate(make.normal(make.make_generator(2), B, N, D), mask=mask))
    permutation = permute_to_slots(assignments) if gaps else permute_without_gaps(assignments)
    return permutation._replace(weight=permutation.weight.detach().requires_grad_())


def compute_derivatives(out: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """First ones of a weighted sum of the outputs, and second ones of a weighted sum of those."""
    found = torch.autograd.grad(
        (out * make.normal(make.make_generator(3), *out.shape)).sum(), list(leaves.values()), create_graph=True
    )
    first = dict(zip(leaves, found, strict=True))
    total = sum((g.square() * make.normal(make.make_generator(4), *g.shape)).sum() for g in found)
    second = make.compute_gradients(total, list(leaves.values()))
    return {**first, **{f"second of {name}": grad for name, grad in zip(leaves, second, strict=True)}}


@pytest.mark.parametrize("gaps", [False, True], ids=["without gaps", "slots"])
@pytest.mark.parametrize("name", GATES)
def test_equal_matrices(name, gaps):
    """Rows that stand for nothing may hold anything: they reach neither outputs nor gradients."""
    permutation = build_permutation(name, gaps)
    a, t, r = len(permutation.row), permutation.num_tokens, permutation.num_rows
    token = [permutation.token[permutation.row[i]].item() if permutation.row[i] < r else 0 for i in range(a)]
    placed = torch.zeros(a, r, t, dtype=torch.float64)  # assignment a: token t in row r
    for i in range(a):
        if permutation.row[i] < r:
            placed[i, permutation.row[i], token[i]] = 1
    x = make.normal(make.make_generator(5), t, D).requires_grad_()
    found, expected = dispatch(x, permutation), placed.sum(0) @ x
    make.assert_same(found, expected, "rows")
    wanted = compute_derivatives(expected.tanh(), {"x": x})
    for what, value in compute_derivatives(found.tanh(), {"x": x}).items():
        make.assert_same(value, wanted[what], what)

    rows = make.normal(make.make_generator(6), r, 2).requires_grad_()
    empty = (placed.sum((0, 2)) == 0).unsqueeze(-1)
    assert bool(empty.any()) is (gaps or r > int(placed.sum()))
    found = combine(torch.where(empty, torch.nan, rows), permutation)
    expected = torch.einsum("art,a,rd->td", placed, permutation.weight, rows)
    make.assert_same(found, expected, "outputs")
    leaves = {"rows": rows, "weight": permutation.weight}
    wanted = compute_derivatives(expected.tanh(), leaves)
    for what, value in compute_derivatives(found.tanh(), leaves).items():
        make.assert_same(value, wanted[what], what)


@pytest.mark.parametrize("k", [2, None])
def test_sums_are_taken_in_float32_and_cast_once(k):
    rows = torch.tensor([[1.0], [2.0**-9], [-1.0], [3.0]], dtype=torch.bfloat16)
    token, row = torch.tensor([0, 0, 1, 1]), torch.arange(4)
    assert sum_rows(rows, None, token, row, k, 2).tolist() == [[1.0], [2.0]]
    small = torch.tensor([[1.0], [2.0**-8], [2.0**-8]], dtype=torch.bfloat16)  # which one by one are lost
    assert sum_rows(small, None, torch.zeros_like(row[:3]), row[:3], k and 3, 1).tolist() == [[1 + 2.0**-7]]
    weight = torch.tensor([1.0, 1.0 + 2.0**-12, 1.0, 1.0])
    three = torch.tensor([[1.0], [2.0**-8]], dtype=torch.bfloat16)
    found = sum_rows(three, torch.tensor([-1.0, 256.0 + 2.0**-4]), token[:2], row[:2], k, 1)
    assert found.dtype == torch.bfloat16
    assert found.item() == torch.tensor(2.0**-12).bfloat16().item()
    wide = sum_rows(rows.double(), weight, token, row, k, 2)
    assert wide.dtype == torch.float64
    assert wide[0].item() == 1 + 2.0**-9 * (1 + 2.0**-12)
    assert (
        sum_rows(rows.float(), weight.double(), token, row, k, 2)[0].item()
        == torch.tensor(1 + 2.0**-9 * (1 + 2.0**-12)).item()
    )


def test_reading_rows():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert read_rows(x, torch.tensor([1, 2, 0])).tolist() == [[3.0, 4.0], [0.0, 0.0], [1.0, 2.0]]
    assert read_rows(x[:0], torch.tensor([0, 0])).tolist() == [[0.0, 0.0]] * 2
    assert read_rows(x * torch.nan, torch.tensor([2])).tolist() == [[0.0, 0.0]]
    assert add_rows(x.clone(), torch.tensor([0, 0]), x).tolist() == [[5.0, 8.0], [3.0, 4.0]]
