"""What docs/recipes.md and docs/specification.md say: recipes, two levels of any two routers, losses and capacities."""

from __future__ import annotations

import re

import pytest
import torch
from support.doc_recipes import DOCS, extract_recipe
from torch import Tensor, nn

from mixture_of_experts import (
    Experts,
    HeirarchicalMoE,
    MoE,
    NoisyTopKGating,
    Top2Gating,
    TopKGating,
    recipes,
)

# Recipes: choices of a token, experts, sum of a token's weights (None: whatever the scores are)
RECIPES = {
    "gshard": (2, 8, 1.0),
    "switch": (1, 8, None),
    "shazeer": (4, 16, 1.0),
    "expert_choice": (None, 8, None),
    "mixtral": (2, 8, 1.0),
    "olmoe": (8, 64, None),
    "qwen3": (8, 64, 1.0),
    "DeepSeek-V3": (8, 64, 2.5),
    "dynamic_moe": (8, 16, None),
    "ReMoE": (8, 16, None),
    "GPT-OSS": (4, 32, 1.0),
    "Chen 2022": (1, 8, None),
    "llama4": (1, 16, None),
    "qwen2": (4, 60, None),
}
# the functions of those that the page builds under a heading
FUNCTIONS = {
    "DeepSeek-V3": recipes.deepseek_v3,
    "ReMoE": recipes.remoe,
    "GPT-OSS": recipes.gpt_oss,
}


def make_layer(name: str) -> MoE:
    """The layer of a section of the page, or of a function."""
    made = getattr(recipes, name, None)
    return extract_recipe(name)["moe"] if made is None else made(64, RECIPES[name][1], 32)


def cheat_sheet() -> dict[tuple[str, bool], list[str]]:
    """The table of routers in docs/concepts.md: by class, and whether with an expert bias, the other cells of a row."""
    text = (DOCS / "concepts.md").read_text(encoding="utf-8").split("## Routing\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)`(.*?) \| (.*) \|$", text, re.MULTILINE)
    return {(router, "expert bias" in variant): cells.split(" | ") for router, variant, cells in rows}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_section_balances_like_its_recipe(name):
    def balancing(gate: nn.Module) -> list:
        return [getattr(gate, "balance_over", None), getattr(gate, "expert_bias", None) is None]

    layer = extract_recipe(name)["moe"]
    assert balancing(layer.gate) == balancing(FUNCTIONS[name](64, layer.num_experts, 32).gate)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_routing_matches_its_row(name):
    torch.manual_seed(0)
    choices, num_experts, total = RECIPES[name]
    moe = make_layer(name)
    if name in ("gshard", "switch"):  # a capacity in training alone
        assert moe.gate(torch.randn(2, 32, 64)).capacity == int({"gshard": 2.0, "switch": 1.25}[name] * 32 / 8)
    routing = moe.gate.eval()(torch.randn(2, 32, 64))
    assert (routing.num_experts, routing.k) == (num_experts, choices)
    parts = ("importance", "load") if name == "shazeer" else ()
    assert tuple(routing.losses) == ("balance", *parts, "z")
    if name == "expert_choice":
        assert routing.capacity == 2 * 32 // 8
        assert (routing.expert.flatten().bincount() == 2 * routing.capacity).all()
    else:
        assert routing.capacity is None
        assert routing.kept.equal(routing.sent)
        assert routing.kept.all() != (name in ("dynamic_moe", "ReMoE"))
    if total is not None:
        weight = routing.weight.unflatten(-1, (32, choices)).sum(dim=-1)
        torch.testing.assert_close(weight, torch.full_like(weight, total))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_causality_matches_cheat_sheet(name):
    """A later token that changes leaves the outputs before it as they were, or does not."""
    torch.manual_seed(0)
    moe = make_layer(name).eval()
    rows = cheat_sheet()
    claim = rows.get((type(moe.gate).__name__, False), rows["TopKGating", False])[2]  # one of one's own chooses as it
    assert claim in ('if dropless or `priority="token"`', "**no**")
    if name in ("gshard", "switch"):
        moe.gate.priority = "token"
        moe.gate.capacity_factor_eval = 0.5  # so that experts overflow
    common = torch.randn(64)
    past, future, other_future = (
        torch.randn(1, 20, 64) + common,
        torch.randn(1, 12, 64),
        torch.randn(1, 12, 64) + common,
    )
    outputs = []
    for later in (future, other_future):
        torch.manual_seed(1)
        outputs.append(moe(torch.cat([past, later], dim=1))[0][:, :20])
    assert torch.allclose(*outputs, atol=1e-5) == (claim != "**no**")


def test_jitter_is_for_the_router_alone():
    """Switch: experts read the tokens as they are; in eval there is no noise."""
    moe = MoE(4, gate=TopKGating(4, 3, k=1, normalize=True, jitter=0.5), experts=[nn.Identity() for _ in range(3)])
    x = torch.randn(2, 9, 4)
    torch.testing.assert_close(moe(x)[0], x)
    assert not torch.equal(moe.gate(x).probs, moe.gate(x).probs)
    assert torch.equal(moe.eval().gate(x).probs, moe.gate(x).probs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_jitter_is_uniform_in_low_precision_too(dtype):
    """bfloat16 itself has four numbers between 0.99 and 1.01."""
    torch.manual_seed(0)
    gate = TopKGating(1, 2, jitter=0.01).to(dtype)
    gate.w_gating.data.copy_(torch.tensor([[1.0, 0.0]]))
    factor = gate(torch.ones(1, 2000, 1, dtype=dtype)).probs[..., 0].logit()  # what the logit 1 was multiplied by
    assert len(factor.unique()) > 1000
    assert (factor.min().item(), factor.max().item()) == pytest.approx((0.99, 1.01), abs=1e-4)
    assert factor.std().item() == pytest.approx(0.01 / 3**0.5, rel=0.05)


# The table of losses


def make_cyclic_logits(num_experts: int, scale: float) -> Tensor:
    """Logits of e tokens, each preferring another expert, the next one after it, and so on."""
    return scale * torch.stack([torch.arange(num_experts, 0.0, -1).roll(shift) for shift in range(num_experts)])


def compute_losses(gate: nn.Module, logits: Tensor) -> dict[str, float]:
    """Losses of a gate that sees these logits `(n, e)`: the tokens are unit vectors."""
    gate.eval().w_gating.data.copy_(logits)
    routing = gate(torch.eye(len(logits)).unsqueeze(0))
    return {**{name: value.item() for name, value in routing.losses.items()}, "total": routing.balance_loss.item()}


def average_over_ranks(*logits: float) -> Tensor:
    """Every token has the same logits."""
    return torch.tensor(logits).expand(len(logits), -1)


@pytest.mark.parametrize("e", [4, 6])
def test_losses_of_top2(e):
    nearly_uniform, collapsed = make_cyclic_logits(e, 1e-5), average_over_ranks(30.0, 22.0, *[-10.0] * (e - 2))
    gate, with_second = Top2Gating(e, e), Top2Gating(e, e, second_place_loss=True)
    assert compute_losses(gate, nearly_uniform)["total"] == pytest.approx(1.0, rel=1e-4)
    assert compute_losses(gate, collapsed)["total"] == pytest.approx(e, rel=1e-3)
    assert compute_losses(with_second, nearly_uniform)["total"] == pytest.approx(1.5, rel=1e-4)
    assert compute_losses(with_second, collapsed) == pytest.approx(
        {"balance": 1.5 * e, "first_place": e, "second_place": e / 2, "total": 1.5 * e, "z": 30.0**2}, rel=1e-3
    )
    saturated = average_over_ranks(200.0, 100.0, *[0.0] * (e - 2))  # the first choice leaves no probability
    assert compute_losses(with_second, saturated) == pytest.approx(
        {"balance": e, "first_place": e, "second_place": 0.0, "total": e, "z": 200.0**2}, rel=1e-3
    )


@pytest.mark.parametrize(("k", "factor", "share"), [(1, None, 1.0), (2, None, 0.5), (2, 1.0, 0.5), (2, 2.0, 0.25)])
def test_losses_of_two_levels(k, factor, share):
    """The inner loss is q² of its own when balanced, q the share of its tokens that are first choices."""
    outer = TopKGating(4, 4, k=k, capacity_factor_train=factor, min_expert_capacity=1)
    moe = HeirarchicalMoE(4, gate_outer=outer, gate_inner=TopKGating(4, 3, k=1, outer_expert_dims=(4,)), loss_coef=1.0)
    outer.w_gating.data.copy_(make_cyclic_logits(4, 1e-3))
    moe.gate_inner.w_gating.data.zero_()  # P is uniform
    _, aux_loss = moe(torch.eye(4).repeat(1, 8, 1))
    assert aux_loss.item() == pytest.approx(1.0 + share**2, rel=1e-4)


# Coefficients from other systems; those of transformers are in test_transformers_blocks.py


@pytest.fixture
def make_batch() -> tuple[Tensor, Tensor]:
    """Tokens `(b, n, d)` of two sequences that differ, and router weights `(d, e)`."""
    torch.manual_seed(0)
    x = torch.randn(2, 12, 6)
    x[1] += 2 * torch.randn(6)
    return x, torch.randn(6, 8)


def counts_and_probs(x: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Written out for one set of tokens: choices that each expert got `(e,)`, and probabilities `(n, e)`."""
    probs = (x.flatten(0, -2) @ weights).softmax(dim=-1)
    return probs.topk(k).indices.flatten().bincount(minlength=8), probs


def with_weights(gate: nn.Module, weights: Tensor) -> nn.Module:
    gate.w_gating.data.copy_(weights)
    return gate


def test_coefficient_of_the_published_layer_and_mesh_tensorflow(make_batch):
    """0.2.3 and Mesh TensorFlow: mean over groups and experts of (mean of p) (share of first choices), times e²."""
    x, weights = make_batch
    terms = []
    for sequence in x:
        counts, probs = counts_and_probs(sequence, weights, 1)
        terms.append(probs.mean(dim=0) * counts / len(sequence))
    expected = torch.stack(terms).mean() * 8**2
    torch.testing.assert_close(with_weights(Top2Gating(6, 8), weights)(x).balance_loss, expected)
    torch.testing.assert_close(with_weights(TopKGating(6, 8, k=1), weights)(x).balance_loss, expected)


def test_coefficient_of_megatron(make_batch):
    """aux_loss: Σ (sum of p) (tokens of the expert) · e / (k T²) of the micro-batch; seq_aux_loss: of each sequence."""
    x, weights = make_batch

    def aux_loss(tokens: Tensor) -> Tensor:
        counts, probs = counts_and_probs(tokens, weights, 2)
        return (probs.sum(dim=0) * counts).sum() * 8 / (2 * len(probs) ** 2)

    over_batch = with_weights(TopKGating(6, 8, k=2, balance_over="batch"), weights)
    torch.testing.assert_close(over_batch(x).balance_loss, aux_loss(x))
    by_sequence = with_weights(TopKGating(6, 8, k=2), weights)
    torch.testing.assert_close(by_sequence(x).balance_loss, (aux_loss(x[0]) + aux_loss(x[1])) / 2)


def test_coefficients_of_shazeer(make_batch):
    """w_importance and w_load times squared coefficients of variation, over the whole batch."""
    x, weights = make_batch
    gate = with_weights(NoisyTopKGating(6, 8, k=2), weights).eval()
    routing = gate(x)
    importance = routing.combine_tensor().sum(dim=(0, 1, 3))
    torch.testing.assert_close(routing.losses["importance"], importance.var(unbiased=False) / importance.mean() ** 2)
    moe = MoE(6, gate=gate, experts=Experts(6, 8, 4), loss_coef=0.1).eval()
    torch.testing.assert_close(moe(x)[1], 0.1 * routing.losses["importance"] + 0.1 * routing.losses["load"])


# Capacity


def test_factor_that_keeps_all_when_balanced():
    """Top2 at 2 and TopK at 1 have just enough slots; Top2 at its published 1.25 drops even then."""
    x = torch.eye(4).repeat(1, 4, 1)
    dropped = {}
    for name, gate in {
        "top2 at 2": Top2Gating(4, 4, second_policy_train="all", capacity_factor_train=2.0),
        "top2 at 1.25": Top2Gating(4, 4, second_policy_train="all", capacity_factor_train=1.25),
        "topk at 1": TopKGating(4, 4, k=2, capacity_factor_train=1.0),
    }.items():
        dropped[name] = int((~with_weights(gate, make_cyclic_logits(4, 1.0))(x).kept).sum())
    assert dropped == {"top2 at 2": 0, "top2 at 1.25": 4 * 3, "topk at 1": 0}


# The task trains the router


def router_gradients(gate: nn.Module) -> list[float]:
    """Largest entry of each router parameter's gradient after a step with loss coefficients 0."""
    torch.manual_seed(0)
    moe = MoE(8, gate=gate, experts=Experts(8, 4, 16), loss_coef=0.0).double()
    out, aux_loss = moe(torch.randn(2, 12, 8, dtype=torch.float64))
    (out.square().sum() + aux_loss).backward()
    return [parameter.grad.abs().max().item() for parameter in gate.parameters()]


def test_single_normalized_choice_needs_aux_loss():
    assert max(router_gradients(NoisyTopKGating(8, 4, k=1))) == 0.0
    assert max(router_gradients(TopKGating(8, 4, k=1, normalize=True))) < 1e-12
