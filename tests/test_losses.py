"""Losses: over ranks those of the whole batch, gradients too; test_matrix.py holds them to the slow reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import strategies as make
from torch import Tensor

from mixture_of_experts import ExpertChoiceGating, NoisyTopKGating, Top2Gating, TopKGating, losses
from mixture_of_experts.gating import RouterLogits, SparseMixerGating, get_optional_losses

DIM, EXPERTS, OUTER = 4, 3, 2
GROUP = dist.ProcessGroup(0, 2)
GATES: dict[str, Callable[..., Any]] = {
    "top2": lambda **more: Top2Gating(DIM, EXPERTS, second_place_loss=True, second_policy_eval="all", **more),
    "softmax": lambda **more: TopKGating(DIM, EXPERTS, **more),
    "sigmoid by batch": lambda **more: TopKGating(DIM, EXPERTS, score="sigmoid", balance_over="batch", **more),
    "logits": lambda **more: TopKGating(
        DIM, EXPERTS, logits=RouterLogits(DIM, EXPERTS, outer_expert_dims=more.get("outer_expert_dims", ())), **more
    ),
    "noisy": lambda **more: NoisyTopKGating(DIM, EXPERTS, **more),
    "sparse mixer": lambda **more: SparseMixerGating(DIM, EXPERTS, **more),
    "expert choice": lambda **more: ExpertChoiceGating(DIM, EXPERTS, **more),
}


class TwoRanks:
    """Two ranks one after the other: a first pass learns what each gives to sums, a second one gets the sums."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: list[list[Tensor]] = []
        self.sums: list[Tensor] = []
        monkeypatch.setattr(dist, "get_world_size", self.size)
        monkeypatch.setattr(losses, "all_reduce_sum", self.sum)

    def size(self, group: Any = None) -> int:
        assert group is GROUP
        return 2

    def sum(self, value: Tensor, group: Any) -> Tensor:
        assert group is GROUP
        assert not value.requires_grad
        if self.sums:
            return self.sums.pop(0)
        self.given[-1].append(value.clone())
        return value

    def run(self, *ranks: Callable[[], Any]) -> list[Any]:
        for rank in ranks:
            self.given.append([])
            rank()
        totals, results = [one + other for one, other in zip(*self.given, strict=True)], []
        for rank in ranks:
            self.sums = list(totals)
            results.append(rank())
            assert not self.sums
        return results


def losses_and_gradients(gate: Any, x: Tensor, mask: Tensor | None) -> list[Tensor]:
    asked = {"losses": ["balance_group", "balance_batch"]} if get_optional_losses(gate) else {}
    routing = gate(x, mask=mask, **asked)
    found = [routing.balance_loss, *routing.losses.values()]
    for loss in found[:]:
        found += make.compute_gradients(loss, list(gate.parameters()))
    with torch.no_grad():
        quiet = gate(x, mask=mask)
    make.assert_same(quiet.balance_loss, routing.balance_loss, "without gradients")
    return [value.detach() for value in (*found, quiet.balance_loss, *quiet.losses.values())]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("outer", [(), (OUTER,)], ids=["one level", "outer experts"])
@pytest.mark.parametrize("name", GATES)
def test_ranks_average_to_the_whole_batch(name, outer, masked, monkeypatch):
    """However unequal their shares are: three groups at one rank, one group at the other."""
    if name == "expert choice" and outer:
        pytest.skip("it is no second level")
    gen = make.make_generator(3)
    more = {"outer_expert_dims": outer} if outer else {}
    whole = GATES[name](**more).double().eval()
    ranks = GATES[name](**more, process_group=GROUP).double().eval()
    for one, other in zip(whole.parameters(), ranks.parameters(), strict=True):
        one.data.copy_(make.normal(gen, *one.shape))
        other.data.copy_(one.data)
    x = make.normal(gen, *outer, 4, 5, DIM)
    mask = torch.rand(*outer, 4, 5, generator=gen) < 0.6 if masked else None
    parts = [(x[..., :3, :, :], None if mask is None else mask[..., :3, :])]
    parts.append((x[..., 3:, :, :], None if mask is None else mask[..., 3:, :]))
    expected = losses_and_gradients(whole, x, mask)
    found = TwoRanks(monkeypatch).run(*(lambda part=part: losses_and_gradients(ranks, *part) for part in parts))
    for i, (one, other, wanted) in enumerate(zip(*found, expected, strict=True)):
        make.assert_same((one + other) / 2, wanted, f"number {i}")
    assert any(value.count_nonzero() for value in expected)
