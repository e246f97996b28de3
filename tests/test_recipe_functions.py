"""`mixture_of_experts.recipes`: one line for each published router, and the table that they are made from."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from support.recipe_tables import FUNCTIONS, PAGE, replace_tables
from torch import nn

from mixture_of_experts import ExpertChoiceGating, MoE, TopKGating, recipes
from mixture_of_experts.recipes import MODELS, Recipe
from tests.support import recipe_tables, strategies
from tests.write import EXPORTS, with_routers

PRINTED = "import sys; import mixture_of_experts.recipes as r; print(len(r.MODELS), 'transformers' in sys.modules)"


def test_the_page_has_the_tables_of_the_recipes():
    text = PAGE.read_text(encoding="utf-8")
    assert replace_tables(text) == text, "`python -m tests.write` writes them"
    assert text.index("| model |") < 900


def test_every_router_recipe_has_a_function():
    assert {name: make.__name__ for name, make in FUNCTIONS.items()} == {
        n: n for n, model in MODELS.items() if model.summary
    }
    assert all(make.__doc__ == MODELS[name].summary for name, make in FUNCTIONS.items())


def test_a_router_is_exported_and_has_a_row(monkeypatch: pytest.MonkeyPatch):
    source, page = EXPORTS.read_text(encoding="utf-8"), recipe_tables.CONCEPTS.read_text(encoding="utf-8")
    assert with_routers(source) == source, "`python -m tests.write` writes it"
    new = type("NewGating", (), {"__module__": "mixture_of_experts.gating.new"})
    row = "`NewGating` | a token | by default | yes | loss"
    kind = replace(strategies.KINDS["noisy"], make=new, row=row)
    monkeypatch.setitem(strategies.KINDS, "new", kind)
    lines = with_routers(source).splitlines()
    place = lines.index("from mixture_of_experts.gating.new import NewGating")
    assert lines[place + 1] == "from mixture_of_experts.gating.noisy_topk import NoisyTopKGating"
    assert lines[lines.index('    "NewGating",') + 1] == '    "NoisyTopKGating",'
    assert set(recipe_tables.replace_router_table(page).splitlines()) - set(page.splitlines()) == {f"| {row} | none |"}


def test_published_sizes_are_possible():
    for name, model in MODELS.items():
        if model.published is not None:
            active, total = model.published.active, model.published.total
            assert total is None or (active or 0) < total, name
            assert model.gate.get("k", 0) < model.published.num_experts, name


@pytest.mark.slow
def test_the_table_is_read_without_transformers():
    done = subprocess.run([sys.executable, "-c", PRINTED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(MODELS)), "False"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_plain_layer_whose_weights_are_all_trained(name):
    torch.manual_seed(0)
    moe = FUNCTIONS[name](16, 32, 12)
    assert type(moe) is MoE
    out, aux_loss = moe(torch.randn(4, 64, 16))
    (out.square().sum() + aux_loss).backward()
    assert [path for path, p in moe.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert ("capacity_factor_train=" in repr(moe)) == (name in ("gshard", "switch"))


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "expert_choice"])
def test_decoding_token_by_token_is_the_prefill(name):
    torch.manual_seed(0)
    moe, x = FUNCTIONS[name](16, 32, 12).eval(), torch.randn(3, 24, 16)
    with torch.no_grad():
        whole = moe(x)[0]
        tokens = torch.cat([moe(x[:, i : i + 1])[0] for i in range(24)], dim=1)
    torch.testing.assert_close(tokens, whole, atol=1e-5, rtol=1e-5)


def test_kimi_k3_is_its_formula():
    """Token by token: sigmoid scores, the 16 best biased ones, SiTU in half the width, a norm, shared experts."""
    torch.manual_seed(0)
    moe, x = recipes.kimi_k3(16, 20, 12).double(), torch.randn(1, 5, 16, dtype=torch.float64)
    moe.gate.expert_bias.normal_()
    around, shared = moe.experts, moe.shared_expert
    norm, up = around.after.children()
    nn.init.normal_(norm.weight)

    def situ(gate, linear):
        return 4 * torch.tanh(gate / 4) * torch.sigmoid(gate) * 25 * torch.tanh(linear / 25)

    for token, out in zip(x[0], moe(x)[0][0], strict=True):
        score = torch.sigmoid(token @ moe.gate.w_gating)
        chosen = (score + moe.gate.expert_bias).topk(16).indices.tolist()
        narrow, experts = around.before(token), around.experts
        routed = torch.zeros(8, dtype=torch.float64)
        for e in chosen:
            hidden = situ(narrow @ experts.w1[e], narrow @ experts.w3[e])
            routed += score[e] / score[chosen].sum() * (hidden @ experts.w2[e])
        normed = routed * (routed.square().mean() + 1e-5).rsqrt() * norm.weight
        always = shared.down_proj(situ(shared.gate_proj(token), shared.up_proj(token)))
        torch.testing.assert_close(out, up(normed) + always, atol=1e-6, rtol=1e-6)
    assert shared.up_proj.out_features == 2 * 12


def test_expert_choice_does_not_decode():
    """It looks at the whole group, as its recipe says."""
    torch.manual_seed(0)
    moe, x = recipes.expert_choice(16, 8, 12).eval(), torch.randn(1, 24, 16)
    assert not torch.allclose(moe(x[:, :1])[0], moe(x)[0][:, :1], atol=1e-3)
    assert "Not suitable for generative models" in inspect.getdoc(recipes.expert_choice)


def test_dtype_device_and_custom_recipe():
    moe = recipes.mixtral(16, 8, 12, k=3, capacity_factor_train=1.0, dtype=torch.bfloat16, device="meta")
    assert (moe.gate.k, moe.gate.capacity_factor_train) == (3, 1.0)
    assert {(p.dtype, p.device.type) for p in moe.parameters()} == {(torch.bfloat16, "meta")}
    assert recipes.deepseek_v3(16, 32).experts.hidden_dim == 64
    latent = recipes.nemotron_h(16, 32, 12, latent_dim=4)
    assert latent.experts.before.out_features == latent.experts.experts.dim == 4
    own = recipes.build(Recipe(gate=dict(k=3), zero=2, shared=0.5, experts=dict(activation="gelu")), 16, 8, 12)
    assert (own.num_experts, own.experts.num_zero, own.shared_expert.up_proj.out_features) == (10, 2, 6)


# their loss is of a softmax without a bias, whatever the router does
OF_A_SOFTMAX = ["mixtral", "olmoe", "qwen2", "qwen3", "qwen3_next", "gpt_oss", "granite4"]


@pytest.mark.parametrize("name", OF_A_SOFTMAX)
def test_coefficients_are_those_of_the_table_of_conversions(name):
    """Of L equal layers, ours together are their coefficient times their loss over all layers."""
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    torch.manual_seed(0)
    moe = FUNCTIONS[name](16, 32, 12)
    assert moe.gate.balance_over == "batch"
    coef, layers = MODELS[name].router_aux_loss_coef or (0.0, 0)
    x = torch.randn(2, 20, 16)
    gate, routing = moe.gate, moe.gate(x)
    logits = gate.product(x, gate.w_gating, gate.b_gating).flatten(0, 1)
    theirs = mixtral.load_balancing_loss_func((logits,) * 3, 32, gate.k)
    torch.testing.assert_close(layers * moe.loss_coef * routing.balance_loss, coef * theirs)


# what the model's own config.json says, where it is not what its class in transformers does
PUBLISHED = {"mixtral": 0.02, "gpt_oss": 0.9, "dbrx": 0.05}


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.router_aux_loss_coef])
def test_coefficients_are_those_that_are_published(name):
    """Of the model's class of configuration in transformers, by the first of its blocks, but for those above."""
    transformers = pytest.importorskip("transformers")
    from mixture_of_experts.huggingface.blocks.block_classes import BLOCK_CLASSES

    model = MODELS[name]
    assert model.router_aux_loss_coef is not None
    coef, layers = model.router_aux_loss_coef
    moe = recipes.build(model, 16, 32, 12)
    assert moe.loss_coef == pytest.approx(coef * moe.gate.k / layers)
    if name in PUBLISHED:
        assert coef == PUBLISHED[name]
        return
    known = {key.replace("_", ""): key for key in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES}
    block = BLOCK_CLASSES[name].split()[0].lower().replace("text", "").replace("_", "")
    family = max((key for key in known if block.startswith(key)), key=len)
    config = transformers.AutoConfig.for_model(known[family]).get_text_config()
    assert config.router_aux_loss_coef == coef


def test_losses_of_papers():
    """Coefficients of DeepSeek-V2 (section 3.1.2) and V3 (section 4.2), and of the first without expert groups."""
    v2, v3 = recipes.deepseek_v2(16, 32, 12), recipes.deepseek_v3(16, 32, 12)
    assert (v2.loss_coef, v2.loss_coefs) == (0.003, {"balance_device": 0.05, "balance_communication": 0.02})
    assert (v3.loss_coef, v3.loss_coefs) == (0.0, {"balance_score": 0.0001})
    lite = recipes.deepseek_v2(16, 32, 12, num_groups=None, top_groups=None)
    assert lite.loss_coefs == {}
    assert recipes.dynamic_moe(16, 32, 12).loss_coefs == {"entropy": 1e-4}


FIXED = [name for name in FUNCTIONS if "k" in MODELS[name].gate and name not in ("dynamic_moe", "remoe")]


@pytest.mark.parametrize("name", FIXED)
def test_keep_as_many_experts_as_choices(name):
    """At the published k or below every expert would compute every token."""
    model = MODELS[name]
    k = model.gate["k"]
    e = round(k / (1 + model.identity))  # with those beside them as many as choices
    groups = dict(num_groups=None, top_groups=None) if "num_groups" in model.gate else {}
    if k > 1:
        for few in {e, e - 1}:
            described = rf"num_experts={few}\b.*exceed the published model's k={k} .*such as k="
            with pytest.raises(ValueError, match=described):
                FUNCTIONS[name](16, few, 12, **groups)
    if name != "shazeer":  # which needs one expert more
        assert FUNCTIONS[name](16, e, 12, **groups, k=k).gate.k == k
    assert FUNCTIONS[name](16, e, 12, **groups, k=1).gate.k == 1
    assert FUNCTIONS[name](16, e + 1, 12, **groups).gate.k == k


@pytest.mark.parametrize("name", ["dynamic_moe", "remoe"])
def test_max_choices_may_equal_num_experts(name):
    assert FUNCTIONS[name](16, 8, 12).gate.k == 8
    with pytest.raises(ValueError, match=r"num_experts=4 must exceed .*k=8"):
        FUNCTIONS[name](16, 4, 12)


def test_coefficient_for_custom_models():
    """Of 12 layers as of the published 32, the losses together are the coefficient times the loss over all layers."""
    assert recipes.mixtral(16, 8).loss_coef == pytest.approx(0.02 * 2 / 32)
    assert recipes.mixtral(16, 8, layers=12).loss_coef == pytest.approx(0.02 * 2 / 12)
    assert recipes.mixtral(16, 8, layers=12, k=3).loss_coef == pytest.approx(0.02 * 3 / 12)
    for recipe in (recipes.switch, recipes.deepseek_v3):
        with pytest.raises(ValueError, match="loss coefficients per layer, so layers=12 would have no effect"):
            recipe(64, 32, layers=12)
    assert recipes.mixtral(16, 8, loss_coef=0.5).loss_coef == 0.5
    with pytest.raises(ValueError, match="layers=12 would have no effect"):
        recipes.mixtral(16, 8, layers=12, loss_coef=0.5)
    with pytest.raises(ValueError, match="layers must be"):
        recipes.mixtral(16, 8, layers=0)


def test_arguments_of_the_layer_pass_through():
    shared = nn.Linear(16, 16)
    moe = recipes.deepseek_v3(
        16,
        32,
        12,
        loss_coef=0.5,
        z_loss_coef=0.1,
        loss_coefs={"balance_batch": 1.0},
        group_size=8,
        shared_expert=shared,
    )
    assert (moe.loss_coef, moe.z_loss_coef, moe.loss_coefs) == (0.5, 0.1, {"balance_batch": 1.0})
    assert (moe.group_size, moe.shared_expert) == (8, shared)
    assert recipes.deepseek_v3(16, 32, shared_expert=None).shared_expert is None
    moe = recipes.qwen2(16, 8, 12, activation=nn.ReLU)
    assert isinstance(moe.experts.act, nn.ReLU)
    assert isinstance(moe.shared_expert.module.act, nn.ReLU)
    experts, gate = nn.ModuleList(nn.Linear(16, 16) for _ in range(8)), TopKGating(16, 8, k=3)
    moe = recipes.mixtral(16, 8, experts=experts, gate=gate)
    assert moe.gate is gate
    assert moe.loss_coef == pytest.approx(0.02 * 3 / 32)
    assert moe.experts[0] is experts[0]
    assert recipes.longcat_flash(16, 32, experts=[nn.Identity()] * 32).gate.num_experts == 32
    with pytest.raises(ValueError, match="k=2 cannot be combined with gate; set it on gate instead"):
        recipes.mixtral(16, 8, gate=gate, k=2)
    with pytest.raises(ValueError, match="latent_dim=4 cannot be combined with experts"):
        recipes.mixtral(16, 8, experts=experts, latent_dim=4)
    for unused in (dict(hidden_dim=12), dict(activation=nn.ReLU())):
        with pytest.raises(ValueError, match=f"{next(iter(unused))}=.* cannot be combined with experts"):
            recipes.mixtral(16, 8, experts=experts, **unused)
        with pytest.raises(ValueError, match=f"{next(iter(unused))}=.* cannot be combined with experts"):
            recipes.qwen2(16, 8, experts=experts, shared_expert=shared, **unused)
    moe = recipes.qwen2(16, 8, 12, experts=experts, activation=nn.ReLU)  # of the shared expert
    assert isinstance(moe.shared_expert.module.act, nn.ReLU)
    assert recipes.mixtral(16, 8, experts=experts, gate=ExpertChoiceGating(16, 8)).loss_coef == 0.02 / 32
    with pytest.raises(TypeError, match=r"TopKGating has an argument 'top_k'; .* balance_over, .* k, "):
        recipes.mixtral(16, 8, top_k=4)
    with pytest.raises(TypeError, match=r"Top2Gating has an argument 'k'; .* second_policy_train"):
        recipes.gshard(16, 8, k=2)
    with pytest.raises(TypeError, match=r"expected recipe to be a Recipe, .*got 'mixtral'"):
        recipes.build("mixtral", 16, 8)


def test_print_shows_what_balances():
    """The losses by name, over what they are taken, and how weights are normalised: where it is not the default."""
    assert "loss_coefs={'balance_score': 0.0001}" in repr(recipes.deepseek_v3(16, 32))
    assert "normalize=False, balance_over='batch'" in repr(recipes.olmoe(16, 32).gate)
    assert not any(word in repr(MoE(16, 8, gate=TopKGating(16, 8))) for word in ("loss_coefs", "over", "capacity"))
    assert "min_expert_capacity=1" in repr(MoE(16, 8, min_expert_capacity=1))
    assert "second_policy_eval='all'" in repr(recipes.gshard(16, 8))
    assert "second" not in repr(MoE(16, 8))
    assert "bias=True" in repr(recipes.gpt_oss(16, 8).experts)
    weigh = dict(weigh=lambda logits, score, expert: score.gather(-1, expert))
    assert "normalize=True" in repr(TopKGating(16, 8, normalize=True, **weigh))
