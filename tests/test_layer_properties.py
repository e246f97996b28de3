"""What both layers guarantee, over many random configurations (float64); tests/test_matrix.py has the reference."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import strategies as make
from torch import Tensor, nn

from mixture_of_experts import HeirarchicalMoE, MoE

LEVEL = st.sampled_from([3, 2, 4, 1])  # experts of one level of two


def shared(dim: int, seed: int) -> nn.Module:
    module = nn.Linear(dim, dim).double()
    with torch.no_grad():
        module.weight.copy_(make.normal(make.generator(seed), dim, dim))
    return module


@st.composite
def quiet_layers(draw, kind: str | tuple[str, str], **limits) -> Any:
    """In eval, with routers that draw nothing: of one kind, or a pair of kinds for two levels."""
    dim, kinds = draw(make.dims), (kind,) if isinstance(kind, str) else kind
    sizes = tuple(draw(make.counts_for(each, *([LEVEL] if len(kinds) == 2 else []))) for each in kinds)
    drawn = [draw(make.routers(*of, policies=make.QUIET, **limits)) for of in zip(kinds, sizes, strict=True)]
    gates = [r.build(dim, e, draw(make.seeds), sizes[:i]) for i, (r, e) in enumerate(zip(drawn, sizes, strict=True))]
    num_experts = sizes[0] if len(sizes) == 1 else sizes
    experts = draw(make.banks()).build(dim, num_experts, draw(make.seeds))
    coefs = {"loss_coef": draw(st.sampled_from([1e-2, 0.5])), "z_loss_coef": draw(st.sampled_from([0.0, 0.1]))}
    beside = shared(dim, draw(make.seeds)) if draw(st.booleans()) else None
    names = ("gate",) if len(gates) == 1 else ("gate_outer", "gate_inner")
    layer: Any = MoE if len(gates) == 1 else HeirarchicalMoE
    given = dict(zip(names, gates, strict=True))
    return layer(dim, num_experts, experts=experts, shared_expert=beside, **coefs, **given).eval()


# Guarantees of both layers, in eval with routers that draw nothing, a sequence being a group

PAIRS = [(outer, inner) for outer in make.TOKEN_CHOICE for inner in make.TOKEN_CHOICE]


def each_layer(*more):
    """Parametrize over layers: a kind of router, or a pair of kinds for two levels."""
    kinds = [*make.TOKEN_CHOICE, *more, *PAIRS]
    return pytest.mark.parametrize("kind", kinds, ids=lambda kind: kind if isinstance(kind, str) else "-".join(kind))


@each_layer("expert_choice")
@given(data=st.data())
@settings(max_examples=12)
def test_padding_changes_nothing(kind, data):
    """Outputs, losses and gradients of a padded batch are those of the batch, NaN in the padding notwithstanding."""
    layer = data.draw(quiet_layers(kind))
    batch = data.draw(make.padded_batches(layer.dim))
    (out, aux_loss), (expected, expected_loss) = layer(batch.x, mask=batch.mask), layer(batch.plain)
    real = batch.tokens(out)
    make.assert_same(real, expected, "out")
    make.assert_same(aux_loss, expected_loss, "aux_loss")
    assert out[~batch.mask].count_nonzero() == 0
    cotangent = make.normal(make.generator(1), *expected.shape)
    loss = (out.masked_fill(~batch.mask.unsqueeze(-1), 0) * 0).sum() + (real * cotangent).sum() + aux_loss
    (of_padding,) = make.gradients(loss, [batch.x])
    assert of_padding[~batch.mask].count_nonzero() == 0
    parameters = dict(layer.named_parameters())
    make.assert_same_gradients(loss, (expected * cotangent).sum() + expected_loss, {"x": batch.plain, **parameters})


@each_layer()
@given(data=st.data())
@settings(max_examples=10)
def test_token_priority_is_causal(kind, data):
    """Changing tokens after t changes no output up to t."""
    layer = data.draw(quiet_layers(kind, priority="token"))
    n = data.draw(st.sampled_from([8, 5, 3, 2]))
    t = data.draw(st.sampled_from([n // 2, 0, n - 2]))
    gen = make.generator(data.draw(make.seeds))
    x = make.normal(gen, 2, n, layer.dim)
    changed = torch.cat([x[:, : t + 1], 3 * make.normal(gen, 2, n - t - 1, layer.dim)], dim=1)
    mask = data.draw(make.masks(2, n))
    before, after = (layer(v, mask=mask)[0][:, : t + 1] for v in (x, changed))
    make.assert_same(after, before, "out")


@each_layer()
@given(data=st.data())
@settings(max_examples=8)
def test_a_nan_stays_in_its_token_when_dropless(kind, data):
    layer = data.draw(quiet_layers(kind, dropless=True))
    n = data.draw(st.sampled_from([8, 5, 2]))
    x = make.normal(make.generator(data.draw(make.seeds)), 2, n, layer.dim)
    broken = x.clone()
    broken[0, n // 2] = torch.nan
    expected, found = layer(x)[0], layer(broken)[0]
    assert found[0, n // 2].isnan().all()
    others = torch.ones(2, n, dtype=torch.bool)
    others[0, n // 2] = False
    make.assert_same(found[others], expected[others], "other tokens")


def build_layer(kind: str, name: str, **options) -> nn.Module:
    """A small layer of one or two levels with a router of ANY_ROUTER."""
    router, bank = ANY_ROUTER[name], make.Bank("gated")
    if kind == "one level":
        return MoE(3, 4, gate=router.build(3, 4, 5), experts=bank.build(3, 4, 6), **options)
    return HeirarchicalMoE(
        3,
        (4, 4),
        gate_outer=router.build(3, 4, 5),
        gate_inner=router.build(3, 4, 7, outer=(4,)),
        experts=bank.build(3, (4, 4), 6),
        **options,
    )


ANY_ROUTER = {
    "top2": make.Router("top2", {"second_place_loss": True, "second_policy_train": "all"}),
    "top2 random": make.Router("top2", {}),
    "top2 dropless": make.Router("top2", {"capacity_factor_train": None, "capacity_factor_eval": None}),
    "softmax k=1": make.Router("topk", {"k": 1}),
    "softmax": make.Router("topk", {"k": 2, "capacity_factor_train": 1.0, "balance_over": "batch"}),
    "sigmoid": make.Router("topk", {"k": 2, "score": "sigmoid", "num_groups": 2, "top_groups": 1, "expert_bias": True}),
    "noisy": make.Router("noisy", {"k": 2}),
    "expert choice": make.Router("expert_choice", {}),
}
LAYERS = ("one level", "two levels")
COMBINATIONS = [
    (kind, name) for kind in LAYERS for name in ANY_ROUTER if (kind, name) != ("two levels", "expert choice")
]


@pytest.mark.parametrize(("kind", "name"), COMBINATIONS)
def test_router_learns_from_the_task_alone(kind, name):
    """With both loss coefficients 0 every gate still gets a gradient, through the weights of the combination."""
    layer = build_layer(kind, name, loss_coef=0.0, z_loss_coef=0.0).train()
    x = make.normal(make.generator(2), 2, 9, 3)
    out, aux_loss = layer(x)
    assert aux_loss == 0
    (out.square().sum() + aux_loss).backward()
    for path, parameter in layer.named_parameters():
        if path.endswith("w_gating"):
            assert parameter.grad.abs().max() > 1e-6, path


EXTREMES = {
    "saturated": lambda x: x * 1e4,
    "saturated down": lambda x: -x.abs() * 1e4,
    "equal tokens": torch.zeros_like,
    "all masked": lambda x: x * torch.nan,
    "no tokens": lambda x: x[:, :0],
    "no groups": lambda x: x[:0],
}


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize(("kind", "name"), COMBINATIONS)
def test_no_nan(kind, name, extreme):
    for training, dtype in itertools.product((True, False), (torch.float32, torch.float64)):
        layer = build_layer(kind, name, z_loss_coef=0.1, shared_expert=shared(3, 8)).to(dtype).train(training)
        x = EXTREMES[extreme](make.normal(make.generator(2), 2, 5, 3).to(dtype)).requires_grad_()
        mask = torch.zeros(x.shape[:-1], dtype=torch.bool) if extreme == "all masked" else None
        out, aux_loss = layer(x, mask=mask)
        loss = (out * make.normal(make.generator(1), *out.shape)).sum() + aux_loss
        assert loss.isfinite()
        for gradient in make.gradients(loss, [x, *layer.parameters()]):
            assert gradient.isfinite().all()
        if extreme in ("all masked", "no tokens", "no groups"):
            assert aux_loss == 0
            assert out.count_nonzero() == 0


class Unchanged(nn.Module):
    """Batched experts that return what they are given."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("num_experts", [1, 2])
def test_choices_of_weight_zero_take_no_room_when_dropless(num_experts):
    """Saturated, a token's second choice is its first expert again, with weight 0; an expert still has n slots."""
    settings = {"capacity_factor_train": None, "capacity_factor_eval": None, "second_policy_eval": "all"}
    layer = MoE(1, num_experts, experts=Unchanged(), priority="token", **settings).eval()
    layer.gate.w_gating.data.copy_(torch.tensor([[200.0, 0.0]])[:, :num_experts])
    x = torch.arange(1.0, 5.0).view(2, 2, 1)
    torch.testing.assert_close(layer(x)[0], x)


def test_one_outer_expert_hands_on_no_more_than_its_tokens():
    """Two choices among one expert are one: level two's capacity is that of n tokens, not of 2n."""
    settings = {"capacity_factor_train": None, "capacity_factor_eval": None, "second_policy_eval": "all"}
    inner = make.Router("topk", {"k": 2, "capacity_factor_eval": 0.6, "min_expert_capacity": 1})
    layer = HeirarchicalMoE(3, (1, 3), gate_inner=inner.build(3, 3, 1, outer=(1,)), **settings).double().eval()
    x = make.normal(make.generator(1), 2, 7, 3)
    make.assert_same(layer(x)[0][:1], layer(x[:1])[0], "first sequence")


def test_a_tie_of_level_one_has_no_first_choice_at_level_two():
    """Weights of exactly 0.5 are handed on with importance 0.5 each: one choice at level two, and no loss."""
    layer = HeirarchicalMoE(2, (2, 3), second_policy_eval="all").eval()
    layer.gate_outer.w_gating.data.zero_()
    seen = []
    layer.gate_inner.register_forward_hook(lambda gate, args, routing: seen.append(routing))
    outer = layer.gate_outer(torch.ones(1, 2, 2))
    assert outer.weight.tolist() == [[0.5] * 4]
    layer(torch.ones(1, 2, 2))
    assert seen[0].balance_loss == 0
    assert seen[0].kept.sum() == 4  # two tokens at each of two outer experts
