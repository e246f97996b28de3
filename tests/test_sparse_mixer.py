"""SparseMixer by numbers that a person can check, and by how often it draws what.

`test_matrix.py` has it beside a slow reference.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixture_of_experts.gating import SparseMixerGating
from mixture_of_experts.gating.overrides import KEEP_ROUTER_CHOICE

LOGITS = torch.tensor([3.5, 1.0, 4.0, 0.5])  # at a tolerance of 0.1 the third and the first are near each other
SECOND_BEST = 1 / (1 + math.exp(0.5))  # its probability in the softmax over these two


def make_gate(logits: Tensor, **settings) -> SparseMixerGating:
    """A gate that gives every token, 1, these logits."""
    gate = SparseMixerGating(1, len(logits), tolerance=0.1, **settings)
    gate.w_gating.data.copy_(logits.unsqueeze(0))
    return gate


def run_gate(gate: SparseMixerGating, n: int = 1, **side: Tensor) -> tuple[Tensor, Tensor]:
    """Experts and weights `(n, k)`."""
    routing = gate(torch.ones(1, n, 1), **side)
    return routing.expert.view(n, -1), routing.weight.view(n, -1)


@pytest.mark.parametrize(
    ("logits", "experts", "weights"),
    [
        (LOGITS, [2, 0, 1], (1 - SECOND_BEST, 1.0, 1.0)),  # the first is taken when the second choice is made
        (-LOGITS, [3, 1, 0], (1.0, 1.0, 1 - SECOND_BEST)),
        (torch.tensor([1.0, 0.8, 0.79]), [0, 1, 2], (1 / (1 + math.exp(-0.2)), 1 / (1 + math.exp(-0.01)), 1.0)),
    ],
)
def test_in_eval_the_best_weighs_its_share_of_those_that_are_near(logits, experts, weights):
    """Near is what is below the best that is left by a fifth of the best, or of itself, at most."""
    expert, weight = run_gate(make_gate(logits, k=3).eval(), 2)
    assert expert.tolist() == [experts] * 2
    torch.testing.assert_close(weight, torch.tensor([weights] * 2))


def test_in_training_one_of_them_is_drawn():
    """By its probability, which it weighs if it is the best one or, one time in four, all the same; else a third."""
    n, gate = 20_000, make_gate(LOGITS, k=1)
    expert, weight = (found.squeeze(-1) for found in run_gate(gate, n))
    other = expert == 0
    assert set(expert.tolist()) == {0, 2}
    assert other.float().mean().item() == pytest.approx(SECOND_BEST, abs=0.02)
    torch.testing.assert_close(weight[~other], torch.full_like(weight[~other], 1 - SECOND_BEST))
    whole = weight[other] > SECOND_BEST / 2
    torch.testing.assert_close(weight[other], torch.where(whole, SECOND_BEST, SECOND_BEST / 3))
    assert whole.float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_the_gradient_is_that_of_the_whole():
    gate = make_gate(LOGITS, k=1)
    expert, weight = run_gate(gate, 50)
    (found,) = torch.autograd.grad(weight.sum(), gate.w_gating)
    near = torch.where(torch.tensor([True, False, True, False]), gate.w_gating, -torch.inf).softmax(-1).expand(50, 4)
    (wanted,) = torch.autograd.grad(near.gather(-1, expert).sum(), gate.w_gating)
    torch.testing.assert_close(found, wanted)


def test_an_expert_that_is_given_is_one_of_those_that_are_near():
    """It weighs its share of the softmax with them, and is taken for the choice that the gate makes itself."""
    expert, weight = run_gate(make_gate(LOGITS).eval(), given_experts=torch.tensor([[[1, KEEP_ROUTER_CHOICE]]]))
    assert expert.tolist() == [[1, 2]]
    share = math.exp(1.0) / (math.exp(1.0) + math.exp(3.5) + math.exp(4.0))
    torch.testing.assert_close(weight, torch.tensor([[share, 1 - SECOND_BEST]]))
