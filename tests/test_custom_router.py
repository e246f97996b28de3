"""A router of one's own, the one that docs/extending.md shows: it gets everything the package's routers have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.doc_recipes import extract_recipe
from torch import nn

from mixture_of_experts import Experts, HeirarchicalMoE, MoE, NoisyTopKGating, Routing, TopKGating, gating
from mixture_of_experts.gating import Choices, TokenChoiceGate
from mixture_of_experts.losses import z_loss

TopPGating = extract_recipe("A router of your own")["SureGating"]
DIM = 6


class WholeForward(TopPGating):
    """The same router in the form that gates had first: a `forward` that reads its arguments and calls `route`."""

    def forward(self, x, importance=None, mask=None, length=None):
        tokens = self.read(x, importance, mask, length)
        logits = self.product(tokens.x, self.w_gating)
        probs = logits.softmax(dim=-1)
        weight, expert = (ranked[..., : self.k] for ranked in probs.sort(descending=True, stable=True))
        chosen = weight.cumsum(dim=-1) - weight < self.p
        if (allowed := self.allowed(tokens)) is not None:
            chosen = chosen & allowed
        counted = True if tokens.loss_mask is None else tokens.loss_mask.unsqueeze(-1)
        balance = self.balance(expert, chosen & counted, (probs * counted).sum(dim=-2), tokens.length)
        z = z_loss(logits, tokens.loss_mask, self.process_group)
        return self.route(tokens, Choices(expert, weight, probs, {"balance": balance, "z": z}, chosen=chosen))


class CarelessGate(TokenChoiceGate):
    """Sends every token to every expert and forgets masks and importance wherever that is possible."""

    def __init__(self, num_experts: int = 3, **settings) -> None:
        super().__init__(DIM, num_experts, num_experts, **settings)

    def decide(self, tokens) -> Choices:
        probs = tokens.x.new_full((*tokens.x.shape[:-1], self.num_experts), 1 / self.num_experts)
        expert = torch.arange(self.num_experts).expand(probs.shape)
        return Choices(expert, probs, probs, {})


class WrappedGate(nn.Module):
    """A module around a gate, of which nothing is known."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.inner = gate

    def forward(self, x, mask=None):
        return self.inner(x, mask=mask)


class CarelessForward(CarelessGate):
    """The same in the first form."""

    def forward(self, x, importance=None, mask=None, length=None):
        tokens = self.read(x, importance, mask, length)
        return self.route(tokens, self.decide(tokens))


def make_layer(gate: nn.Module, seed: int = 0) -> MoE:
    """A layer in float64 around a gate, its gate weights drawn wide enough to choose now one expert, now three."""
    torch.manual_seed(seed)
    moe = MoE(DIM, gate=gate, experts=Experts(DIM, gate.num_experts, 8)).double()
    nn.init.normal_(gate.w_gating)
    return moe


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("settings", [{}, {"capacity_factor_train": 0.5, "min_expert_capacity": 1}], ids=str)
def test_gate_with_custom_forward_still_works(settings, padded):
    """At one level, and at both of two."""
    mask = torch.rand(2, 9) < 0.6 if padded else None
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    results = []
    for kind in (TopPGating, WholeForward):
        torch.manual_seed(0)
        one = make_layer(kind(DIM, 5, k=3, **settings))
        gates = kind(DIM, 3, k=2, **settings), kind(DIM, 4, k=3, outer_expert_dims=(3,), **settings)
        two = HeirarchicalMoE(DIM, gate_outer=gates[0], gate_inner=gates[1]).double()
        results.append([*one(x, mask=mask), *two(x, mask=mask)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("factor", [None, 1.0])
@pytest.mark.parametrize("gate", [CarelessGate, CarelessForward])
def test_missing_mask_raises(gate, factor):
    gate, mask = gate(capacity_factor_train=factor), torch.tensor([[True, False, True, False, False]])
    routing = gate(torch.randn(1, 5, DIM), mask=mask)
    assert routing.kept.view(5, 3).all(dim=1).tolist() == mask[0].tolist()
    assert routing.sent.equal(routing.kept)
    assert routing.queue_length.tolist() == [[2, 2, 2]]
    if factor is not None:
        assert routing.limit.tolist() == [4]  # the least: the real length, 2, would give int(3 * 2 / 3)


def test_missing_importance_raises():
    """Neither can the rule that only tokens of importance 1 make more than one choice."""
    routing = CarelessGate()(torch.randn(1, 3, DIM), importance=torch.tensor([[1.0, 0.5, 0.0]]))
    assert routing.kept.view(3, 3).tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert routing.z_loss == routing.balance_loss == 0  # it reports none


def test_missing_gate_method_is_named():
    class Empty(TokenChoiceGate):
        pass

    with pytest.raises(NotImplementedError, match=r"Empty must implement decide\(tokens\)"):
        Empty(DIM, 3, 2)(torch.randn(1, 4, DIM))


# ---- a loss of one's own ----


@pytest.mark.parametrize("kind", [TopPGating, gating.TopPGating])
def test_custom_loss(kind):
    moe = make_layer(kind(DIM, 5, k=3))
    x, mask = torch.randn(2, 9, DIM, dtype=torch.float64), torch.rand(2, 9) < 0.6
    probs = (x @ moe.gate.w_gating).softmax(dim=-1)
    entropy = torch.distributions.Categorical(probs=probs[mask]).entropy().mean()
    _, plain = moe(x, mask=mask)
    moe.loss_coefs = {"entropy": 0.3}
    _, with_entropy = moe(x, mask=mask)
    torch.testing.assert_close(with_entropy, plain + 0.3 * entropy)
    (gradient,) = torch.autograd.grad(with_entropy - plain, moe.gate.w_gating)
    (expected,) = torch.autograd.grad(0.3 * entropy, moe.gate.w_gating)
    torch.testing.assert_close(gradient, expected)


def test_losses_are_weighed_by_name():
    moe = MoE(
        DIM, gate=NoisyTopKGating(DIM, 4), loss_coef=0, z_loss_coef=0.3, loss_coefs={"importance": 0.1, "load": 0.2}
    )
    nn.init.normal_(moe.gate.w_gating)
    x = torch.randn(2, 9, DIM)
    losses = moe.eval().gate(x).losses
    wanted = 0.1 * losses["importance"] + 0.2 * losses["load"] + 0.3 * losses["z"]
    torch.testing.assert_close(moe(x)[1], wanted)


def test_two_levels_weigh_the_losses_of_those_that_have_them():
    inner = TopPGating(DIM, 4, outer_expert_dims=(3,))
    moe = HeirarchicalMoE(DIM, (3, 4), gate_inner=inner, loss_coef=0, loss_coefs={"entropy": 0.5}, priority="token")
    routings = []
    inner.register_forward_hook(lambda gate, args, routing: routings.append(routing))
    _, aux_loss = moe(torch.randn(2, 9, DIM))
    assert aux_loss == 0.5 * routings[0].losses["entropy"]


@pytest.mark.parametrize(
    "wrap", [lambda gate: type("Own", (TopKGating,), {"decide": TopKGating.decide})(DIM, 4), WrappedGate]
)
def test_unknown_loss_is_reported_in_forward(wrap):
    moe = MoE(DIM, 4, gate=wrap(TopKGating(DIM, 4)), loss_coefs={"entropy": 0.1})
    with pytest.raises(ValueError, match=r"loss_coefs contains 'entropy', .* gates report only.*\['balance', 'z'\]"):
        moe(torch.randn(1, 5, DIM))


def test_a_hook_may_add_a_loss():
    gate = TopKGating(DIM, 4)
    gate.register_forward_hook(
        lambda gate, args, routing: replace(routing, losses={**routing.losses, "own": routing.probs.sum()})
    )
    x = torch.randn(1, 5, DIM)
    torch.testing.assert_close(MoE(DIM, 4, gate=gate, loss_coef=0, loss_coefs={"own": 0.1})(x)[1], torch.tensor(0.5))


class AddsALoss(TopKGating):
    """Adds a loss neither in `decide` nor in `forward`."""

    def route(self, tokens, choices):
        own = {"own": choices.losses["z"].new_tensor(3.0)}
        return super().route(tokens, choices._replace(losses={**choices.losses, **own}))


def test_a_subclass_may_report_more_than_its_base():
    moe = MoE(DIM, gate=AddsALoss(DIM, 4), loss_coef=0, loss_coefs={"own": 0.5})
    assert moe(torch.randn(1, 5, DIM))[1] == 1.5


def test_unknown_loss_raises():
    for kind, sizes in ((MoE, 4), (HeirarchicalMoE, (2, 2))):
        moe = kind(DIM, sizes)
        for name, argument in (("balance", "loss_coef"), ("z", "z_loss_coef")):
            wrong = f"loss_coefs must not contain '{name}'; set {argument} instead"
            with pytest.raises(ValueError, match=wrong):
                kind(DIM, sizes, loss_coefs={name: 0.1})
            with pytest.raises(ValueError, match=wrong):
                moe.loss_coefs = {name: 0.1}
    with pytest.raises(ValueError, match=r"loss_coefs\['load'\] must be .*got -1"):
        MoE(DIM, gate=NoisyTopKGating(DIM, 4), loss_coefs={"load": -1})
    with pytest.raises(TypeError, match=r"loss_coefs must be a dict"):
        MoE(DIM, 4, loss_coefs=0.1)  # type: ignore[arg-type]


# ---- what a Routing promises ----


@pytest.mark.parametrize("factor", [None, 1.0])
def test_chosen_equals_queued(factor):
    class WithZero(CarelessGate):
        def decide(self, tokens) -> Choices:
            made = super().decide(tokens)
            return made._replace(weight=made.weight * (made.expert != 1))

    routing = WithZero(capacity_factor_train=factor)(torch.randn(1, 4, DIM))
    queued = torch.zeros(1, 3, dtype=torch.int64).scatter_add(-1, routing.expert, routing.sent.long())
    assert queued.equal(routing.queue_length)
    assert queued.tolist() == [[4, 0 if factor is None else 4, 4]]
    assert routing.kept.equal(routing.weight != 0)


def test_routings_are_compared_by_identity():
    gate, x = TopKGating(DIM, 4), torch.randn(1, 5, DIM)
    routing = gate(x)
    assert routing == routing
    assert routing != gate(x)
    assert len({routing, routing}) == 1


def test_unpacking_builds_the_dense_tensor_once(monkeypatch):
    routing, built, build = TopKGating(DIM, 4)(torch.randn(1, 5, DIM)), [], Routing.combine_tensor
    monkeypatch.setattr(Routing, "combine_tensor", lambda self: built.append(build(self)) or built[-1])
    dispatch, combine, loss = routing
    assert len(built) == 1
    assert combine is built[0]
    assert dispatch.equal((combine != 0).float())
    assert loss is routing.balance_loss


def test_buffers_of_its_own_keep_their_dtype():
    class Counting(TokenChoiceGate):
        keep_dtype = ("mean", "missing")

        def __init__(self):
            super().__init__(8, 4, 2)
            self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))
            self.register_buffer("missing", None)
            self.register_buffer("other", torch.zeros(4))

    gate = Counting().bfloat16()
    assert (gate.mean.dtype, gate.other.dtype) == (torch.float64, torch.bfloat16)
    assert gate.to("meta").mean.dtype == torch.float64
