"""Switches of a router: forced experts, and what needs no switch: frozen, in float64, at a temperature."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support.layer_variants import DIM, NUM_EXPERTS, ROUTERS, make_layer_with_router
from torch import nn
from torch.utils.checkpoint import checkpoint

from mixture_of_experts import (
    Choices,
    ExpertChoiceGating,
    HeirarchicalMoE,
    MoE,
    TokenChoiceGate,
    TopKGating,
    balance_experts,
    force_routing,
)
from mixture_of_experts.gating import RouterLogits, get_side_inputs
from mixture_of_experts.gating.overrides import forced_experts

FORCED = ("balanced", "random")
#: but for ReLU, of whose forced experts those of no positive logit weigh 0 and are not computed
GIVEN = [name for name, make in ROUTERS.items() if "given_experts" in get_side_inputs(make()) and name != "ReLU"]


def count_made_choices(routing) -> list[list[list[int]]]:
    """The experts of each token of each group, of choices that are made."""
    rows = zip(routing.token, routing.expert, routing.sent, strict=True)
    tokens = range(routing.num_tokens)
    return [[expert[(token == i) & chosen].tolist() for i in tokens] for token, expert, chosen in rows]


def test_toy_example():
    """Three experts in turn, two for each token; the third token is padding, and its turn goes to the fourth."""
    gate = TopKGating(DIM, 3, k=2)
    mask = torch.tensor([[True, True, False, True]])
    x = torch.randn(1, 4, DIM)
    with force_routing(gate):
        assert "forced='balanced'" in repr(gate)
        routing = gate(x, mask=mask)
        assert count_made_choices(routing) == [[[0, 1], [2, 0], [], [1, 2]]]
        assert torch.equal(routing.mask, mask)
        assert count_made_choices(gate(x)) == [[[0, 1], [2, 0], [1, 2], [0, 1]]]
    probs = (x[0, 3] @ gate.w_gating).softmax(-1)[[1, 2]]
    torch.testing.assert_close(routing.weight[0, 6:], probs / probs.sum())
    routing.weight.square().sum().backward()
    assert gate.w_gating.grad.any()
    assert "forced" not in repr(gate)


def test_uncounted_padding_takes_no_turn():
    gate, real = TopKGating(DIM, 2, k=1), torch.tensor([[True, False] * 4])
    with force_routing(gate):
        assert gate(torch.randn(1, 8, DIM), counted=real).queue_length.tolist() == [[2, 2]]


@pytest.mark.parametrize("how", FORCED)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", GIVEN)
def test_every_router(name, masked, how):
    """Real tokens make k choices of different experts; balanced, experts have equally many, give or take one."""
    gate = make_layer_with_router(name).gate
    k, x = gate.k, torch.randn(3, 8, DIM)
    mask = torch.rand(3, 8) < 0.6 if masked else None
    for gate.training in (True, False):
        with force_routing(gate, how):
            routing = gate(x, mask=mask)
        real = mask.flatten().tolist() if masked else [True] * 24
        experts = [token for group in count_made_choices(routing) for token in group]
        assert [len(set(token)) for token in experts] == [k if each else 0 for each in real]
        load = torch.tensor([expert for token in experts for expert in token]).bincount(minlength=NUM_EXPERTS)
        assert how == "random" or load.max() - load.min() <= 1


@pytest.mark.parametrize("how", FORCED)
def test_forcing_is_uniform(how):
    gate, x = TopKGating(DIM, 4, k=2), torch.randn(1, 2000, DIM)
    with force_routing(gate, how):
        first, second = gate(x), gate(x)
    assert torch.equal(first.expert, second.expert) == (how == "balanced")
    assert first.queue_length.sum(0).sub(1000).abs().max() < 120  # five deviations of what is drawn


@pytest.mark.parametrize("factor", [None, 1.0])
def test_two_levels(factor):
    """Empty slots take no turn, and a token of importance below 1 takes one."""
    moe = HeirarchicalMoE(
        DIM,
        gate_outer=TopKGating(DIM, 2, k=2, capacity_factor_train=factor),
        gate_inner=TopKGating(DIM, 3, outer_expert_dims=(2,), capacity_factor_train=factor),
    )
    routings = []
    moe.gate_inner.register_forward_hook(lambda *arguments: routings.append(arguments[-1]))
    with force_routing(moe):
        out, _ = moe(torch.randn(2, 6, DIM), mask=torch.arange(6) < torch.tensor([[6], [4]]))
    load = routings[0].sent.new_zeros(2, 3, dtype=torch.int64)
    load.scatter_add_(1, routings[0].expert.flatten(1), routings[0].sent.flatten(1).long())
    assert (load.amax(1) - load.amin(1) <= 1).all()
    assert load.sum() == 10 * 2 + 10  # every token has a full choice and one of importance below 1
    assert out.any()


@pytest.mark.parametrize("how", FORCED)
def test_no_tokens(how):
    gate = TopKGating(DIM, 4)
    with force_routing(gate, how):
        assert gate(torch.randn(2, 0, DIM)).expert.shape == (2, 0)


@pytest.mark.parametrize("how", FORCED)
def test_single_expert_one_choice(how):
    moe = MoE(DIM, 1, priority="token", capacity_factor_train=None)
    with force_routing(moe, how):
        routing = moe.gate(torch.randn(1, 6, DIM))
    assert routing.token[routing.kept].tolist() == list(range(6))


def test_recomputed_choices_are_the_same():
    moe, x = MoE(DIM, gate=TopKGating(DIM, 4)), torch.randn(2, 6, DIM, requires_grad=True)
    with force_routing(moe, "random"):
        torch.manual_seed(0)
        wanted = torch.autograd.grad(moe(x)[0].square().sum(), [x, moe.gate.w_gating])
        torch.manual_seed(0)
        out, _ = checkpoint(moe, x, use_reentrant=False)
        got = torch.autograd.grad(out.square().sum(), [x, moe.gate.w_gating])
    torch.testing.assert_close(got, wanted)


def test_ranks_continue_balanced_forcing(monkeypatch):
    """Four ranks of one token each, as decoding has them, meet all eight experts."""
    found = []
    for rank in range(4):
        monkeypatch.setattr(dist, "get_rank", lambda group, rank=rank: rank)
        found += forced_experts("balanced", (1, 1, 2), 8, "cpu", group=object()).flatten().tolist()  # type: ignore
    assert found == list(range(8))


class CustomGate(TokenChoiceGate):
    def __init__(self):
        super().__init__(DIM, 3, k=1)

    def decide(self, tokens):
        score = tokens.x[..., :3].sigmoid()
        return Choices(torch.zeros(*score.shape[:-1], 1, dtype=torch.int64), score[..., :1], score, {})


def test_rejects_bad_arguments():
    gate, x = TopKGating(DIM, 4), torch.randn(1, 3, DIM)
    both = nn.ModuleList([gate, CustomGate()])
    with pytest.raises(TypeError, match=r"'1' \(CustomGate\): .*given_experts, .*`side_inputs`"), force_routing(both):
        pass
    with pytest.raises(ValueError, match="'balanced', 'random', got 'even'"), force_routing(gate, "even"):  # type: ignore
        pass
    own = ExpertChoiceGating(DIM, 4)
    with pytest.raises(TypeError, match=r"\(ExpertChoiceGating\): its tokens make no choices"), force_routing(own):
        pass
    assert gate.forced is None
    with (
        force_routing(gate),
        pytest.raises(ValueError, match="given_experts cannot be passed while force_routing"),
    ):
        gate(x, given_experts=torch.zeros(1, 3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="forced must be one of"):
        gate.forced = True


# What needs no switch of its own


def test_a_frozen_router():
    """Neither a gradient nor a balancing step moves it; but with a coefficient the balance loss still bends the layers
    below, through the tokens."""
    gate = TopKGating(DIM, 4, score="sigmoid", expert_bias=True)
    moe, below = MoE(DIM, gate=gate), nn.Linear(DIM, DIM)
    parameters = [*moe.parameters(), *below.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    balancing = balance_experts(moe, optimizer)
    gate.requires_grad_(False)
    balancing.rate = 0
    before = {name: value.clone() for name, value in gate.state_dict().items()}
    experts = moe.experts.w1.clone()
    out, aux_loss = moe(below(torch.randn(2, 6, DIM)))
    (bent,) = torch.autograd.grad(aux_loss, below.weight, retain_graph=True)
    assert bent.any()
    moe.loss_coef = 0.0
    out, aux_loss = moe(below(torch.randn(2, 6, DIM)))
    assert aux_loss == 0
    (out.square().sum() + aux_loss).backward()
    optimizer.step()
    assert all(torch.equal(gate.state_dict()[name], value) for name, value in before.items())
    assert not torch.equal(moe.experts.w1, experts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in ROUTERS if "random" not in name and "Noisy" not in name])
def test_a_router_in_float64_in_a_narrower_layer(name, dtype):
    """Its scores and weights are those of float64, what the layer returns has the layer's dtype."""
    moe, x = make_layer_with_router(name).to(dtype), torch.randn(2, 6, DIM).to(dtype).requires_grad_()
    moe.eval().gate.double()
    routing, whole = moe.gate(x), moe.gate(x.double())
    assert routing.weight.dtype == routing.probs.dtype == torch.float64
    torch.testing.assert_close(routing.weight, whole.weight, rtol=1e-12, atol=1e-12)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out, aux_loss = moe(x)
        assert out.dtype == dtype
        (out.float().sum() + aux_loss).backward()
    assert all(p.grad.dtype == torch.float64 for p in moe.gate.parameters() if p.grad is not None)
    assert x.grad.dtype == dtype


def test_a_temperature():
    """Logits divided by it: the multiplier of `RouterLogits`, which can be set at any time; the choices stay."""
    gate, x = TopKGating(DIM, 4, k=2, logits=RouterLogits(DIM, 4)), torch.randn(1, 5, DIM)
    plain = gate(x)
    for temperature in (0.5, 2.0):
        gate.logits.multiplier = 1 / temperature
        routing = gate(x)
        torch.testing.assert_close(routing.probs, (x @ gate.logits.weight / temperature).softmax(-1))
        assert torch.equal(routing.expert, plain.expert)
        assert (routing.weight[0, 0] > plain.weight[0, 0]) == (temperature < 1)
