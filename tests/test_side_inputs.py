"""Side inputs: tensors for each token that a gate says it reads, grouped, masked and handed on like tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mixture_of_experts import (
    Choices,
    ExpertChoiceGating,
    HashGating,
    MoE,
    NoisyTopKGating,
    TokenChoiceGate,
    Top2Gating,
    TopKGating,
)
from mixture_of_experts.gating import SparseMixerGating
from mixture_of_experts.gating.overrides import KEEP_ROUTER_CHOICE, is_computed, merge_overrides

DIM = 6


class IdGate(TokenChoiceGate):
    """Every token goes to the expert `token_ids % e`, with a learned weight; notes what it read."""

    side_inputs = (*TokenChoiceGate.side_inputs, "token_ids", "features")

    def __init__(self, num_experts, **settings):
        super().__init__(DIM, num_experts, k=1, **settings)
        self.w_gating = nn.Parameter(torch.randn(*self.outer_expert_dims, DIM, num_experts))
        self.seen: list = []

    def decide(self, tokens):
        self.seen.append(tokens.side)
        score = self.product(tokens.x, self.w_gating).sigmoid()
        expert = (tokens.side["token_ids"] % self.num_experts).unsqueeze(-1)
        probs = score / score.sum(dim=-1, keepdim=True)
        return Choices(expert, score.gather(-1, expert), probs, {})


def test_toy_example():
    """Three tokens of ids 4, 1, 2 and three experts: by hand."""
    moe = MoE(DIM, gate=IdGate(3))
    routing = moe.gate(torch.randn(1, 3, DIM), token_ids=torch.tensor([[4, 1, 2]]))
    assert routing.expert.tolist() == [[1, 1, 2]]
    out, _ = moe(x := torch.randn(1, 3, DIM), token_ids=torch.tensor([[4, 1, 2]]))
    weight = (x[0] @ moe.gate.w_gating).sigmoid()
    for token, expert in enumerate([1, 1, 2]):
        network = nn.Sequential(nn.Linear(DIM, 4 * DIM, bias=False), nn.GELU(), nn.Linear(4 * DIM, DIM, bias=False))
        network[0].weight.data, network[2].weight.data = moe.experts.w1[expert].T, moe.experts.w2[expert].T
        torch.testing.assert_close(out[0, token], weight[token, expert] * network(x[0, token]))


def test_side_inputs_are_grouped_and_masked():
    moe = MoE(DIM, gate=IdGate(3), group_size=4)
    x, ids = torch.randn(2, 6, DIM), torch.arange(12).view(2, 6) + 1
    features, mask = torch.randn(2, 6, 2, 3), torch.rand(2, 6) < 0.6
    moe(x, mask=mask, token_ids=ids, features=features)
    seen = moe.gate.seen[0]
    assert seen["token_ids"].equal(torch.where(mask, ids, 0).view(3, 4))
    assert seen["token_ids"].dtype == torch.int64
    assert seen["features"].equal(torch.where(mask[..., None, None], features, 0.0).view(3, 4, 2, 3))


def test_checks_names_and_shapes():
    moe, x = MoE(DIM, gate=IdGate(3)), torch.randn(2, 6, DIM)
    with pytest.raises(TypeError, match=r"not support the side input 'ids'; it reads counted, features, .*token_ids"):
        moe(x, ids=torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"token_ids must have shape \(2, 6, ...\), .*got \(2, 5\)"):
        moe(x, token_ids=torch.zeros(2, 5))
    with pytest.raises(TypeError, match="does not support the side input 'token_ids'"):
        MoE(DIM, 4)(x, token_ids=torch.zeros(2, 6))
    with pytest.raises(TypeError, match="TopKGating does not support the side input 'maks'; it reads router_input"):
        TopKGating(DIM, 4)(x, maks=torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"given_experts must be an int64 .*\(2, 6, 2\), got .* \(2, 6, 3\)"):
        MoE(DIM, gate=TopKGating(DIM, 4))(x, given_experts=torch.zeros(2, 6, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"ExpertChoiceGating does not support .* 'losses'; it reads router_input"):
        ExpertChoiceGating(DIM, 4)(x, losses=("balance_group",))


# ---- given experts ----


def test_missing_choice_is_not_expert_0():
    """Of the noisy router it has no part in the importance; of SparseMixer it takes no expert from the gate's own."""
    noisy, x = NoisyTopKGating(DIM, 3, k=2), torch.randn(1, 2, DIM)
    routing = noisy(x, given_experts=torch.tensor([[[0, -1], [-1, -1]]]))
    assert routing.probs.tolist() == [[[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]
    mixer, best = SparseMixerGating(DIM, 3).eval(), torch.eye(1, DIM).view(1, 1, DIM)
    mixer.w_gating.data.copy_(torch.eye(DIM, 3))
    assert mixer(best, given_experts=torch.tensor([[[-1, KEEP_ROUTER_CHOICE]]])).expert[0, 1] == 0


def test_missing_choice_has_no_softmax_share():
    gate, x = TopKGating(DIM, 3, k=2, weigh="softmax", normalize=False), torch.randn(1, 2, DIM)
    with torch.autograd.set_detect_anomaly(True):  # which raises where a gradient is no number on its way
        routing = gate(x, given_experts=torch.tensor([[[2, -1], [-1, -1]]]))
        assert routing.weight.tolist() == [[1.0, 0.0, 0.0, 0.0]]
        assert torch.autograd.grad(routing.weight.sum(), gate.w_gating)[0].isfinite().all()


def test_one_of_two_choices_may_be_missing():
    """It has no weight, leaves the other the whole one, and as a first choice counts in no loss."""
    gate, x = Top2Gating(DIM, 4, second_policy_train="all"), torch.randn(1, 2, DIM)
    routing = gate(x, given_experts=torch.tensor([[[2, -1], [-1, 1]]]))
    assert routing.weight.tolist() == [[pytest.approx(1.0), 0.0, 0.0, pytest.approx(1.0)]]
    torch.testing.assert_close(routing.balance_loss, 4 / 2**2 * routing.probs[0, :, 2].sum())


def test_given_choices_join_own_ones():
    own, made = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[True, False, True, True]])
    assert merge_overrides(None, own, made) == (own, made)
    expert, chosen = merge_overrides(torch.tensor([[KEEP_ROUTER_CHOICE, KEEP_ROUTER_CHOICE, -1, -2 - 3]]), own, made)
    assert expert.tolist() == [[0, 1, 0, 3]]
    assert chosen.tolist() == [[True, False, False, True]]
    assert is_computed(torch.tensor([KEEP_ROUTER_CHOICE, -1, 0, 5, -2, -7])).tolist() == [
        True,
        True,
        True,
        True,
        False,
        False,
    ]


def test_a_hash_layer():
    """An id has its experts wherever it stands; experts have equally many ids, give or take one."""
    moe = MoE(DIM, gate=HashGating(DIM, 5, k=2, num_ids=33))
    table = moe.gate.experts_of_id
    assert sorted(table.flatten().bincount(minlength=5).tolist()) == [13, 13, 13, 13, 14]
    assert all(len(set(row)) == 2 for row in table.tolist())
    ids = torch.randint(0, 33, (2, 6))
    routing = moe.gate(torch.randn(2, 6, DIM), token_ids=ids)
    assert routing.expert.view(2, 6, 2).equal(table[ids])
    assert "experts_of_id" in dict(moe.gate.named_buffers())
    for dtype in (torch.uint8, torch.int16):
        assert moe.gate(torch.randn(2, 6, DIM), token_ids=ids.to(dtype)).expert.view(2, 6, 2).equal(table[ids])
    with pytest.raises(ValueError, match=r"call the layer as moe\(x, token_ids=ids\)"):
        moe(torch.randn(2, 6, DIM))
    with pytest.raises(TypeError, match=r"token_ids must be integers, got torch\.float32"):
        moe(torch.randn(2, 6, DIM), token_ids=ids.float())
    for wrong in (-1, 33):
        with pytest.raises(ValueError, match=f"token_ids must be from 0 to 32, got {wrong}"):
            moe(torch.randn(2, 6, DIM), token_ids=torch.full((2, 6), wrong))


def test_the_table_of_a_hash_layer_that_was_empty_is_drawn():
    gate = HashGating(DIM, 5, k=2, num_ids=33, device="meta").to_empty(device="cpu")
    gate.experts_of_id.fill_(-7)
    gate.reset_parameters()
    assert gate.experts_of_id.flatten().bincount(minlength=5).sort().values.tolist() == [13, 13, 13, 13, 14]
