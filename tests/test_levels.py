"""What level one hands on to level two, and what it refuses; test_matrix.py has layers of both."""

from __future__ import annotations

import pytest
import torch

from mixture_of_experts import ExpertChoiceGating, HeirarchicalMoE, Top2Gating, TopKGating
from mixture_of_experts.dispatch.decision import plan_slots_of
from mixture_of_experts.gating.levels import second_level, side_inputs_of_levels

B, N, D, EXPERTS = 2, 6, 3, 4


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
