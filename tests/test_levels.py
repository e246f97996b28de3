"""What level one hands on to level two, slot by slot."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.strategies import generator, normal

from mixture_of_experts import ExpertChoiceGating, HeirarchicalMoE, Top2Gating, TopKGating
from mixture_of_experts.dispatch.decision import plan_slots_of
from mixture_of_experts.gating.levels import second_level, side_inputs_of_levels

B, N, D, EXPERTS = 2, 6, 3, 4


@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropless", [False, True])
def test_slots_of_level_one(dropless, masked, group_size):
    """Every slot has its token, with its side inputs, and its importance; empty ones have zeros."""
    gen, factor = generator(5), None if dropless else 2.0
    gate = Top2Gating(D, EXPERTS, second_policy_eval="all", capacity_factor_eval=factor, min_expert_capacity=1)
    gate = gate.double().eval()
    gate.w_gating.data.copy_(normal(gen, D, EXPERTS))
    x = normal(gen, B, N, D)
    mask = torch.tensor([[True] * 6, [True, True, False, True, False, False]]) if masked else None
    outer = gate(x, mask=mask)
    side = {"vector": normal(gen, B, N, 2, 5), "number": torch.arange(1, B * N + 1).view(B, N)}
    side["given_experts_inner"] = torch.arange(B * N * 2 * 3).view(B, N, 2, 3)
    found = second_level(x, outer, plan_slots_of(outer), group_size, side)
    c = outer.slots
    expected = SimpleNamespace(
        x=torch.zeros(EXPERTS, B, c, D).double(),
        importance=torch.zeros(EXPERTS, B, c).double(),
        vector=torch.zeros(EXPERTS, B, c, 2, 5).double(),
        number=torch.zeros(EXPERTS, B, c, dtype=torch.int64),
        given_experts=torch.full((EXPERTS, B, c, 3), -1),
    )
    for b in range(B):
        for a in range(2 * N):
            if outer.kept[b, a]:
                at = (int(outer.expert[b, a]), b, int(outer.slot[b, a]))
                expected.x[at], expected.importance[at] = x[b, a // 2], outer.importance[b, a]
                expected.vector[at], expected.number[at] = side["vector"][b, a // 2], side["number"][b, a // 2]
                expected.given_experts[at] = side["given_experts_inner"][b, a // 2, a % 2]
    assert set(expected.importance.unique().tolist()) == {0.0, 0.5, 1.0}
    shape = (EXPERTS, B, c)
    if group_size is not None and not dropless:
        shape = (EXPERTS, *found["importance"].shape[1:])
        assert shape[1] * shape[2] == B * c
        assert shape != (EXPERTS, B, c)
    for name, tail in (("x", (D,)), ("importance", ()), ("vector", (2, 5)), ("number", ()), ("given_experts", (3,))):
        assert torch.equal(found[name], getattr(expected, name).view(*shape, *tail)), name
    assert "given_experts_inner" not in found
    if dropless:
        assert torch.equal(found["mask"], expected.importance > 0)
        tokens = [N, 3] if masked else [N, N]
        assert found["length"].parts.tolist() == [[n * 2 for n in tokens]] * EXPERTS
        assert found["length"].parts_per_token == EXPERTS
    elif masked:
        real = torch.arange(c) < outer.limit.unsqueeze(-1)
        assert torch.equal(found["mask"], real.expand(EXPERTS, B, c).reshape(shape))
    if not dropless:
        assert "length" not in found
        assert (found["mask"] is None) is not masked


def test_a_single_expert_gets_each_token_once():
    gate = TopKGating(D, 1, k=1).double()
    outer = gate(normal(generator(0), B, N, D))
    found = second_level(normal(generator(0), B, N, D), outer, plan_slots_of(outer), None, {})
    assert found["length"].parts.tolist() == [[N, N]]


def test_expert_choice_hands_on_nothing():
    outer = ExpertChoiceGating(D, EXPERTS)(torch.randn(B, N, D))
    with pytest.raises(ValueError, match="router of token choice"):
        second_level(torch.randn(B, N, D), outer, plan_slots_of(outer), None, {})


def test_each_level_is_given_choices_under_a_name_of_its_own():
    given = ("router_input", "given_experts")
    assert side_inputs_of_levels(given, given) == ({*given}, {"router_input", "given_experts_inner"})
    assert side_inputs_of_levels(given, ("router_input", "ids")) == ({*given}, {"router_input", "ids"})
    outer = TopKGating(D, EXPERTS)(torch.randn(B, N, D))
    for shape in ((B, N, 3, 2), (B, N, 2)):
        with pytest.raises(ValueError, match=r"given_experts_inner must have shape \(\.\.\., n, 2, k of level two\)"):
            second_level(
                torch.randn(B, N, D), outer, plan_slots_of(outer), None, {"given_experts_inner": torch.zeros(shape)}
            )


def test_a_gate_of_ones_own_that_fills_empty_slots_is_refused():
    """It ignores importance and mask; the same gate that reads them is taken."""

    class Heedless(Top2Gating):
        heedless = True

        def forward(self, x, importance=None, mask=None, length=None, losses=(), **side):
            return super().forward(x) if self.heedless else super().forward(x, importance, mask, length, losses, **side)

    gate = Heedless(D, 2, outer_expert_dims=(EXPERTS,))
    moe, x = HeirarchicalMoE(D, (EXPERTS, 2), capacity_factor_train=8.0, gate_inner=gate), torch.randn(B, N, D)
    with pytest.raises(ValueError, match=r"a Heedless, chose experts for \d+ slots"):
        moe(x)
    gate.heedless = False
    assert moe(x)[0].isfinite().all()
