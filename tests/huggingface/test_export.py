"""Models with experts in classes of `transformers` that have them: equal logits, or a reason why not."""

from __future__ import annotations

import pytest
import torch
from support.transformers_models import ARCHITECTURES
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForQuestionAnswering

from mixture_of_experts import NoisyTopKGating, Top2Gating, TopKGating
from mixture_of_experts.gating import RouterLogits
from mixture_of_experts.gating.steps import AlwaysChosen, LearnedScale, NormalizeBy
from mixture_of_experts.huggingface import export, replace_ffn, upcycle
from mixture_of_experts.huggingface.feed_forward import find_feed_forwards

pytestmark = pytest.mark.slow


def make_gate(k: int = 2, **settings):
    return lambda d, e: TopKGating(d, e, k, **settings)


EXPORTS = [
    ("llama", {}, "Mixtral"),
    ("llama", dict(gate=make_gate(1, normalize=True)), "Mixtral"),
    ("llama", dict(gate=make_gate(3)), "Mixtral"),
    ("llama", dict(gate=make_gate(2, capacity_factor_train=1.25, jitter=0.1), z_loss_coef=0.1), "Mixtral"),
    ("mistral", {}, "Mixtral"),
    ("qwen3", {}, "Qwen3Moe"),
    ("qwen3", dict(layers=[1]), "Qwen3Moe"),
    ("qwen3", dict(gate=make_gate(2, normalize=False)), "Qwen3Moe"),
    ("qwen2", {}, "Qwen2Moe"),
    ("qwen2", dict(shared_expert=24, layers=[0]), "Qwen2Moe"),
    ("llama", dict(layers=[0]), "Qwen2Moe"),
    ("llama", dict(shared_expert=24), "Qwen2Moe"),
    ("llama", dict(gate=make_gate(2, normalize=False)), "Qwen2Moe"),
]


@pytest.mark.parametrize(("name", "settings", "family"), EXPORTS)
def test_logits_are_equal(name, settings, family, tmp_path):
    """Of experts that differ and routers that decide; with a mask, with a cache, and once saved and loaded."""
    model, inputs = ARCHITECTURES[name].build(), ARCHITECTURES[name].inputs()
    replace_ffn(model, num_experts=4, hidden_dim=24, **settings)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    exported = export(model)
    assert type(exported).__name__ == f"{family}ForCausalLM"
    assert not any("mixture_of_experts" in type(module).__module__ for module in exported.modules())
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :3] = 0
    for more in ({}, {"attention_mask": mask}):
        expected, found = model(**inputs, **more).logits, exported(**inputs, **more).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # at padding too
    made = [its.generate(**inputs, max_new_tokens=5, do_sample=False) for its in (model, exported)]
    assert torch.equal(made[0], made[1])

    exported.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(exported)
    torch.testing.assert_close(loaded(**inputs).logits, exported(**inputs).logits, atol=1e-6, rtol=0)
    with torch.no_grad():
        for parameter in exported.parameters():
            parameter.zero_()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())  # they share nothing


def test_tied_embeddings_dtype_and_mode():
    model = ARCHITECTURES["llama"].build(tie_word_embeddings=True).to(torch.bfloat16).train()
    upcycle(model, num_experts=4)
    exported = export(model)
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    assert {parameter.dtype for parameter in exported.parameters()} == {torch.bfloat16}
    assert exported.training
    assert exported.config.tie_word_embeddings


def test_rejects_meta_weights():
    model = ARCHITECTURES["llama"].build()
    upcycle(model, num_experts=4)
    with pytest.raises(ValueError, match="LlamaForCausalLM has weights on the meta device; load"):
        export(model.to("meta"))


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_other_heads(auto):
    dense, inputs = ARCHITECTURES["llama"].build(num_labels=3), ARCHITECTURES["llama"].inputs()
    model = auto.from_config(dense.config).eval()
    upcycle(model, num_experts=4)
    exported = export(model)
    assert type(exported).__name__ == type(model).__name__.replace("Llama", "Mixtral")
    torch.testing.assert_close(exported(**inputs)[0], model(**inputs)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "settings", "problem"),
    [
        ("gpt2", {}, "no mixture-of-experts class for GPT2LMHeadModel; supported models: Llama"),
        ("llama_bias", {}, "Unsupported: Mixtral: experts.b1 has shape .*; Qwen2Moe: experts.b1 has shape"),
        ("llama", dict(gate=lambda d, e: Top2Gating(d, e)), "Mixtral: the gate is Top2Gating, .*; Q"),
        ("llama", dict(gate=lambda d, e: NoisyTopKGating(d, e)), "the gate is NoisyTopKGating"),
        ("llama", dict(gate=make_gate(score="sigmoid")), "the gate has score 'sigmoid'"),
        ("llama", dict(gate=make_gate(scale=2.5)), "the gate has scale 2.5, but the block has 1.0"),
        ("llama", dict(gate=make_gate(select=AlwaysChosen(1))), r"select AlwaysChosen\(1\)"),
        ("llama", dict(gate=make_gate(weigh="softmax", normalize=False)), "Qwen2Moe: the gate has weigh 'softmax'"),
        ("llama", dict(gate=lambda d, e: TopKGating(d, e, weigh=LearnedScale(e))), "Qwen2Moe: the gate has weigh Lear"),
        ("llama", dict(gate=lambda d, e: TopKGating(d, e, normalize=NormalizeBy(2.0))), r"normalize NormalizeBy\(p=2"),
        ("llama", dict(gate=make_gate(eps=1.0)), "Mixtral: the gate has eps 1.0, .*; Qwen2Moe"),
        ("llama", dict(gate=lambda d, e: TopKGating(d, e, logits=RouterLogits(d, e))), "logits RouterLogits"),
        ("llama", dict(gate=make_gate(bias=True)), r"gate\.b_gating has shape \(4,\)"),
        ("llama", dict(gate=make_gate(expert_bias=True)), r"gate\.expert_bias has shape"),
        ("llama", dict(gate=make_gate(num_groups=2, top_groups=1)), "num_groups 2, but the block has None"),
        ("llama", dict(gate=make_gate(capacity_factor_eval=1.0)), "capacity_factor_eval 1.0, but the block has None"),
        ("mistral", dict(layers=[0]), r"Mixtral: layers without experts \(1\).*; Qwen2Moe: sliding attention"),
        ("qwen3", dict(shared_expert=8), r"shared_expert\.gate_proj\.weight has shape .*, but the block has None"),
    ],
)
def test_unsupported_settings_are_named(name, settings, problem):
    model = ARCHITECTURES[name].build()
    replace_ffn(model, num_experts=4, **settings)
    with pytest.raises(ValueError, match=problem):
        export(model)


def test_layers_that_differ():
    model = ARCHITECTURES["llama"].build()
    replace_ffn(model, num_experts=4, layers=[0])
    replace_ffn(model, num_experts=2, layers=[1])
    with pytest.raises(ValueError, match=r"w1 .*\(2, 32, 48\).*\(4, 32, 48\)"):
        export(model)


def test_settings_and_activations():
    model = ARCHITECTURES["llama"].build()
    with pytest.raises(ValueError, match="has no layers with experts"):
        export(model)
    upcycle(model, num_experts=4)
    find_feed_forwards(model)[1].moe.experts.act = nn.GELU()
    with pytest.raises(ValueError, match="the activation GELU"):
        export(model)
    biased = ARCHITECTURES["llama"].build(attention_bias=True)
    upcycle(biased, num_experts=4)
    with pytest.raises(ValueError, match="Mixtral: attention_bias=True"):
        export(biased)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_notes_of_a_configuration_are_carried_over(name):
    """What no computation reads. A note that only the other class would read is left out."""
    notes = dict(_model_name_or_path="here", unk_token_id=0, mine={"a": 1})
    model = ARCHITECTURES[name].build(**notes, router_jitter_noise=0.5, moe_intermediate_size=7, num_labels=3)
    upcycle(model, num_experts=4)
    exported, inputs = export(model), ARCHITECTURES[name].inputs()
    assert notes.items() <= exported.config.to_dict().items()
    assert exported.config.num_labels == 3
    assert getattr(exported.config, "router_jitter_noise", 0.0) == (0.0 if name in ("llama", "mistral") else 0.5)
    torch.testing.assert_close(exported(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=0)


def test_rejects_unknown_sliding_window():
    model = ARCHITECTURES["llama"].build(sliding_window=4)
    upcycle(model, num_experts=4)
    with pytest.raises(ValueError, match="Mixtral: sliding attention; Qwen2Moe: sliding attention"):
        export(model)


def test_a_class_with_another_prefix_is_rejected():
    """Llama's model for question answering has its weights in `transformer`, Mixtral's in `model`."""
    model = LlamaForQuestionAnswering(ARCHITECTURES["llama"].build().config)
    upcycle(model, num_experts=4)
    with pytest.raises(ValueError, match=r"Mixtral: weights with the prefix 'transformer' \(its prefix is 'model'\)"):
        export(model)


def test_code_of_the_dense_model_is_not_referred_to():
    model = ARCHITECTURES["llama"].build()
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_dense.DenseForCausalLM"}
    upcycle(model, num_experts=4)
    assert not hasattr(export(model).config, "auto_map")
