"""Queues and capacities against loops over tokens and choices, in both ways of counting."""

from __future__ import annotations

import pytest
import torch
from support.strategies import PRIORITIES, make_generator
from torch import Tensor

from mixture_of_experts.dispatch import queues
from mixture_of_experts.dispatch.capacity import Length
from mixture_of_experts.dispatch.queues import MAX_TABLE_ENTRIES, find_positions_in_runs, queue_up, stable_argsort


def queue_by_loop(expert: list[list[int]], chosen: list[list[bool]], e: int, order: list[tuple[int, int]]):
    """Positions of the chosen assignments `(n, k)` of one group, None where not chosen, and lengths of the queues."""
    length, position = [0] * e, [[None] * len(row) for row in expert]
    for token, choice in order:
        if chosen[token][choice]:
            position[token][choice] = length[expert[token][choice]]
            length[expert[token][choice]] += 1
    return position, length


def make_order(priority: str, n: int, k: int, score: list[float]) -> list[tuple[int, int]]:
    if priority == "token":
        return [(token, choice) for token in range(n) for choice in range(k)]
    tokens = sorted(range(n), key=lambda t: -score[t]) if priority == "score" else range(n)
    return [(token, choice) for choice in range(k) for token in tokens]


@pytest.mark.parametrize("some", [False, True], ids=["all chosen", "some chosen"])
@pytest.mark.parametrize(("n", "e"), [(7, 3), (120, 40), (1, 5), (0, 3)])
@pytest.mark.parametrize("priority", PRIORITIES)
def test_queues_equal_a_loop(priority, n, e, some, monkeypatch):
    """Of few assignments a table is counted, many are sorted; ONNX always counts, transforms wrap the tensors."""
    k, gen = 2, make_generator(n + e)
    expert = torch.rand(2, 3, n, e, generator=gen).argsort(dim=-1)[..., :k].flatten(-2)
    chosen = torch.rand(expert.shape, generator=gen) < 0.6 if some else None
    score = torch.randint(0, 9, (2, 3, n), generator=gen) / 8
    wanted = [
        queue_by_loop(
            expert[i, j].view(n, k).tolist(),
            (torch.ones_like(expert) if chosen is None else chosen)[i, j].view(n, k).tolist(),
            e,
            make_order(priority, n, k, score[i, j].tolist()),
        )
        for i in range(2)
        for j in range(3)
    ]
    assert (expert.numel() * e > MAX_TABLE_ENTRIES) == (n == 120)

    def check(position: Tensor, length: Tensor) -> None:
        assert length.view(6, e).tolist() == [lengths for _, lengths in wanted]
        for found, (expected, _) in zip(position.view(6, n * k).tolist(), wanted, strict=True):
            flat = [place for row in expected for place in row]
            assert all(one == other for one, other in zip(found, flat, strict=True) if other is not None)
        assert position.dtype == length.dtype == torch.int64

    given = {} if priority != "score" else {"score": score}
    found = queue_up(expert, chosen, e, k, priority, **given)
    check(found.position, found.length)
    if n:

        def one(expert: Tensor, chosen: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
            found = queue_up(expert, chosen if some else None, e, k, priority, **({"score": score} if given else {}))
            return found.position, found.length

        check(*torch.func.vmap(one)(expert, expert > 0 if chosen is None else chosen, score))
    monkeypatch.setattr(queues, "is_exporting_to_onnx", lambda: True)
    if priority != "score":  # equal scores stand in order there alone
        found = queue_up(expert, chosen, e, k, priority)
        check(found.position, found.length)


def test_more_experts_than_int16_counts():
    e = 1 << 15
    expert = torch.tensor([[e - 1, 0, e - 1, 5], [3, e - 1, 0, 3]])
    found = queue_up(expert, torch.tensor([[True] * 4, [False] + [True] * 3]), e, 2, "token")
    assert found.position[0].tolist() == [0, 0, 1, 0]
    assert found.position[1, 1:].tolist() == [0, 0, 0]
    assert found.length.sum(-1).tolist() == [4, 3]
    assert found.length[0, e - 1] == 2


@pytest.mark.parametrize("onnx", [False, True])
def test_places_in_runs(onnx, monkeypatch):
    monkeypatch.setattr(queues, "is_exporting_to_onnx", lambda: onnx)
    for numbers in (1, 2, 5, 40):
        queue = torch.randint(numbers, (3, 13), generator=torch.Generator().manual_seed(numbers))
        equal = queue.unsqueeze(-1) == queue.unsqueeze(-2)
        expected = equal.tril(diagonal=-1).sum(dim=-1)  # those before it
        # on a CPU TopK of torch puts equal values in no order, unlike that of ONNX
        assert find_positions_in_runs(queue).sort(dim=-1).values.equal(expected.sort(dim=-1).values)
        assert onnx or find_positions_in_runs(queue).equal(expected)
    assert find_positions_in_runs(queue[:, :0]).shape == (3, 0)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("onnx", [False, True])
def test_stable_order(descending, onnx, monkeypatch):
    monkeypatch.setattr(queues, "is_exporting_to_onnx", lambda: onnx)
    values = torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    expected = [[0, 2, 1], [2, 1, 0]] if descending else [[1, 2, 0], [0, 1, 2]]
    assert stable_argsort(values, descending).tolist() == expected
    if not descending:
        assert stable_argsort(values).tolist() == expected
    if not onnx:
        equal = (torch.arange(1000) // 100).flip(0) % 2
        assert stable_argsort(equal, descending)[:3].tolist() == ([0, 1, 2] if descending else [100, 101, 102])


def test_length_in_parts():
    length = Length(torch.tensor([[3, 5], [0, 1]]), 4)
    assert length.tokens(torch.float64).tolist() == [[0.75, 1.25], [0.0, 0.25]]
    assert length.tokens(torch.float32).dtype == torch.float32
    total = length.sum()
    assert (total.parts.tolist(), total.parts_per_token) == ([8, 1], 4)
    assert Length(torch.tensor([3])).tokens(torch.float64).tolist() == [3.0]
