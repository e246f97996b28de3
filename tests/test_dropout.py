"""Dropout inside experts: by numbers, in every way that computes it, and in none that does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixture_of_experts import Experts, GatedExperts, MoE, TopKGating, ops
from mixture_of_experts.ops import ClampedSwiGLU
from mixture_of_experts.unstack import restack, unstack

D, E, H = SIZES = 8, 4, 16
KINDS: dict[str, Any] = {
    "plain": lambda *sizes, **more: Experts(*(sizes or SIZES), bias=True, **more),
    "gated": lambda *sizes, **more: GatedExperts(*(sizes or SIZES), **more),
    "of both": lambda *sizes, **more: GatedExperts(*(sizes or SIZES), activation=ClampedSwiGLU, **more),
}
FACTORS: dict[str, Any] = {"slots": dict(capacity_factor_train=1.0, capacity_factor_eval=1.0), "rows": {}}


def make_layer(kind: str = "plain", dropout: float = 0.4, **settings: Any) -> MoE:
    torch.manual_seed(0)
    return MoE(D, gate=TopKGating(D, E, 2, **settings), experts=KINDS[kind](dropout=dropout))


def run_layer(moe: MoE, x: Tensor, seed: int = 1) -> tuple[Tensor, ...]:
    """The outputs, and the gradients of tokens and weights."""
    torch.manual_seed(seed)
    x = x.detach().requires_grad_()
    out = moe(x)[0]
    return (out, *torch.autograd.grad(out.square().sum(), [x, *moe.parameters()]))


def test_numbers_are_dropped_or_scaled_up_and_only_in_training():
    """The hidden layer is twice the token, and the output is the hidden layer."""
    experts = Experts(D, 1, D, activation=nn.Identity, dropout=0.75)
    for weight, factor in ((experts.w1, 2.0), (experts.w2, 1.0)):
        weight.data.copy_(factor * torch.eye(D))
    x = torch.rand(1, 500, D) + 1
    moe = MoE(D, gate=TopKGating(D, 1, 1, normalize=True), experts=experts)
    for compute in (lambda: moe(x)[0], lambda: experts(x), lambda: experts.compute(x[0], torch.tensor([500]))):
        out = compute().view(x.shape)
        dropped = out == 0
        torch.testing.assert_close(out, torch.where(dropped, 0, 8 * x))
        assert 0.7 < dropped.float().mean() < 0.8
    torch.testing.assert_close(moe.eval()(x)[0], 2 * x)


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_implementation_supports_dropout_or_gives_reason(kind, factors):
    moe, x = make_layer(kind, **FACTORS[factors]), torch.randn(2, 30, D)
    found = {}
    for implementation in ops.IMPLEMENTATIONS:
        with ops.use(implementation):
            if implementation in ("plain", "grouped"):
                found[implementation] = run_layer(moe, x)
            elif implementation != "triton":  # here it says that there is no GPU
                capacity = implementation == "batch_invariant" and factors == "slots"
                says = "limited capacity may drop" if capacity else r"dropout.* draws random"
                with pytest.raises(ValueError, match=f"'{implementation}' is requested.*{says}"):
                    moe(x)
    torch.testing.assert_close(found["plain"], found["grouped"])  # the same layout draws the same numbers
    assert ops.explain_call(moe, x).implementation == "grouped"
    assert not torch.equal(run_layer(moe, x, seed=2)[0], found["plain"][0])
    without = make_layer(kind, dropout=0.0, **FACTORS[factors])
    assert ops.explain_call(moe.eval(), x).implementation == "cpu"
    for one, other in zip(run_layer(moe, x), run_layer(without.eval(), x), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_numbers_that_stayed(kind):
    experts = KINDS[kind](3, 2, 5, dropout=0.4).double()

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        torch.manual_seed(3)
        return torch.func.functional_call(experts, dict(zip(names, weights, strict=True)), (x,))

    names, weights = zip(*experts.named_parameters(), strict=True)
    x = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, *weights))


def test_a_recomputation_drops_the_same_numbers():
    moe, x = make_layer(), torch.randn(2, 30, D)
    expected = run_layer(moe, x)
    inner = moe.forward
    moe.forward = lambda x: checkpoint(inner, x, use_reentrant=False)  # type: ignore[method-assign]
    for one, other in zip(run_layer(moe, x), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_drop_too(kind):
    moe, x = make_layer(kind), torch.randn(2, 30, D)
    before = moe.eval()(x)[0]
    unstack(moe)
    torch.testing.assert_close(moe(x)[0], before)
    torch.manual_seed(0)
    first, second = (moe.train()(x)[0] for _ in range(2))
    assert not torch.equal(first, second)
    assert restack(moe).experts.dropout == 0.4


@pytest.mark.slow
@pytest.mark.parametrize("factors", FACTORS)
def test_compiled_in_one_graph(factors):
    moe, x = make_layer(**FACTORS[factors]), torch.randn(2, 30, D)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    expected = run_layer(moe, x)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(x)[0], expected[0])
    torch.compiler.reset()


def test_the_share_is_checked_whenever_it_is_set():
    for wrong in (1.0, -0.1, "0.1"):
        with pytest.raises(ValueError, match=f"dropout must be .*below 1.0, got {wrong!r}"):
            Experts(D, E, dropout=wrong)  # type: ignore[arg-type]
    experts = GatedExperts(D, E)
    assert "dropout" not in repr(experts)
    experts.dropout = 0.1
    assert "dropout=0.1" in repr(experts)
    with pytest.raises(ValueError, match="dropout must be"):
        experts.dropout = 2.0
    assert experts.dropout == 0.1
