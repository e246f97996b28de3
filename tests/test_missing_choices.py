"""Tokens that find fewer experts than they have choices: scores of -inf, and experts given twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mixture_of_experts import HeirarchicalMoE, MoE, NoisyTopKGating, TopKGating, TopPGating
from mixture_of_experts.gating import SparseMixerGating
from mixture_of_experts.replay import RoutingRecords, record_routing, replay_routing

DIM = 6


# Fewer experts than choices


def close_experts(number: int) -> Callable[..., Tensor]:
    """A `select` that leaves the experts from `number` on out, for tokens of a positive first logit."""

    def select(logits: Tensor, scores: Tensor, bias: Tensor | None) -> Tensor:
        closed = (torch.arange(logits.shape[-1], device=logits.device) >= number) & (logits[..., :1] > 0)
        return (scores if bias is None else scores + bias).masked_fill(closed, -torch.inf)

    return select


MISSING_CHOICES = {
    "select": dict(select=close_experts(1)),
    "none": dict(select=close_experts(0)),
    "normalised softmax": dict(select=close_experts(2), weigh="softmax"),
    "sigmoid, bias": dict(select=close_experts(1), score="sigmoid", expert_bias=True),
    "capacity": dict(select=close_experts(1), capacity_factor_train=0.5, min_expert_capacity=1),
    "score priority": dict(select=close_experts(1), capacity_factor_train=0.5, priority="score"),
    "groups": dict(
        num_groups=5, top_groups=3, group_score=lambda g: g.amax(-1).masked_fill(g.amax(-1) < 0.2, -torch.inf)
    ),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", MISSING_CHOICES)
def test_a_token_makes_no_choice_of_minus_infinity(name, mode):
    """It makes fewer: the others are not chosen, have no weight and no slot, and are counted nowhere."""
    gate = TopKGating(DIM, 5, k=3, **MISSING_CHOICES[name])
    x, k = torch.randn(2, 20, DIM, requires_grad=True), 3
    gate.train(mode == "train")
    routing = gate(x, losses=["balance_batch"])
    logits = x @ gate.w_gating
    score = logits.sigmoid() if "sigmoid" in name else logits.softmax(-1)
    ranked = gate._rank_experts(logits, score)  # who is closed is the function's to say
    left = (ranked != -torch.inf).sum(-1).clamp(max=k)
    assert left.min() < k
    chosen, kept = routing.sent.view(2, 20, k), routing.kept.view(2, 20, k)
    assert torch.equal(chosen, torch.arange(k) < left.unsqueeze(-1))
    expert, weight = routing.expert.view(2, 20, k), routing.weight.view(2, 20, k)
    assert (ranked.gather(-1, expert)[chosen] != -torch.inf).all()
    for row, there in zip(expert.flatten(0, 1).tolist(), chosen.flatten(0, 1).tolist(), strict=True):
        made = [e for e, is_made in zip(row, there, strict=True) if is_made]
        assert len(set(made)) == len(made)
    assert not weight[~kept].any()
    assert torch.equal(routing.queue_length.sum(), chosen.sum())
    if gate.capacity_factor is None:
        torch.testing.assert_close(weight.sum(-1), (left > 0).float())
    load = torch.stack([expert[b][chosen[b]].bincount(minlength=5) for b in range(2)])
    wanted = (load * routing.probs.sum(1)).sum(-1) * 5 / (3 * 20 * 20)
    torch.testing.assert_close(routing.losses["balance"], wanted.mean())
    batch = (load.sum(0) * routing.probs.sum((0, 1))).sum() * 5 / (3 * 40 * 40)
    torch.testing.assert_close(routing.losses["balance_batch"], batch)
    (routing.weight.square().sum() + routing.balance_loss).backward()
    assert x.grad.isfinite().all()
    if gate.expert_bias is not None and gate.training:
        assert torch.equal(gate.expert_counts, load.sum(0))


@pytest.mark.slow
def test_compiled_a_token_makes_no_choice_of_minus_infinity():
    moe, x = MoE(DIM, gate=TopKGating(DIM, 5, k=3, **MISSING_CHOICES["sigmoid, bias"])), torch.randn(2, 20, DIM)
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), moe(x))


@pytest.mark.parametrize("name", MISSING_CHOICES)
def test_choices_that_are_not_made_are_replayed(name):
    moe, x = (
        MoE(DIM, gate=TopKGating(DIM, 5, k=3, **MISSING_CHOICES[name]), loss_coefs={"balance_batch": 0.1}),
        torch.randn(2, 20, DIM),
    )
    with record_routing(moe) as records:
        wanted = moe(x)
    with replay_routing(moe, records):
        again = moe(x)
    torch.testing.assert_close(again, wanted)
    assert any((record == -1).any() for record in records["gate"])


def test_a_level_of_two_makes_fewer_choices():
    """Each level; masked too. A layer whose experts all return their input tells how much weight is left."""
    outer = TopKGating(DIM, 3, k=2, select=close_experts(1))
    inner = TopKGating(DIM, 4, k=3, select=close_experts(1), outer_expert_dims=(3,))
    moe = HeirarchicalMoE(
        DIM, gate_outer=outer, gate_inner=inner, experts=nn.ModuleList(nn.Identity() for _ in range(12))
    )
    x, mask, seen = torch.randn(2, 9, DIM), torch.rand(2, 9) < 0.7, []
    for gate in (outer, inner):
        gate.register_forward_hook(lambda gate, args, routing: seen.append(routing))
    out, _ = moe(x, mask)
    torch.testing.assert_close(out[mask], x[mask])
    assert not out[~mask].any()
    for routing in seen:
        number = routing.sent.unflatten(-1, (-1, routing.k)).sum(-1)
        assert ((number > 0) & (number < routing.k)).any()


def test_an_expert_of_nan_is_chosen_and_seen():
    """So that a gradient scaler skips the step."""
    gate = TopKGating(DIM, 5, k=2, select=close_experts(1))
    assert gate(torch.full((1, 2, DIM), torch.nan)).weight.isnan().all()


# An expert twice


@pytest.mark.parametrize(
    "gate",
    [
        lambda: TopKGating(DIM, 4, k=3),
        lambda: TopPGating(DIM, 4, k=3),
        lambda: NoisyTopKGating(DIM, 4, k=3),
        lambda: SparseMixerGating(DIM, 4, k=3),
    ],
)
def test_rejects_duplicate_given_expert(gate):
    moe, x = MoE(DIM, gate=gate()), torch.randn(1, 2, DIM)
    given = torch.tensor([[[0, 1, 2], [3, 0, 3]]])
    with pytest.raises(ValueError, match=r"given_experts contains expert 3 twice .*Use -1"):
        moe(x, given_experts=given)
    moe(x, mask=torch.tensor([[True, False]]), given_experts=given)  # padding has what it has
    given[0, 1, 0] = -1
    moe(x, given_experts=given)
    records = RoutingRecords({"gate": [torch.tensor([[0, 1, 2], [2, 1, 1]])]})
    wanted = "invalid records for 'gate': given_experts contains expert 1 twice for a token"
    with pytest.raises(ValueError, match=wanted), replay_routing(moe, records):
        pass
