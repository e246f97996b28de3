"""Whole models of experts: their blocks become layers of ours, which train, save and load with them, and go back."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.transformers_blocks import compute_gradients, get_grad
from support.transformers_families import build_model as build_family
from support.transformers_families import compute_outputs, make_inputs
from support.transformers_models import ARCHITECTURES, make_two_lengths
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM
from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming

from mixture_of_experts.huggingface import (
    BalanceCallback,
    aux_loss,
    export,
    from_pretrained,
    from_transformers,
    to_transformers,
    upcycle,
)
from mixture_of_experts.huggingface.feed_forward import SparseFeedForward, find_feed_forwards
from mixture_of_experts.huggingface.router_config import INITIAL_COEF_KEY
from mixture_of_experts.huggingface.saving import loader
from mixture_of_experts.quantize import quantize_experts
from mixture_of_experts.stats import track_routing
from mixture_of_experts.support.attachments import HOOK_TABLES

from .test_block_conversion import MODELS, build_model
from .test_loaders import load_with_layer_on_disk
from .test_losses import make_batch, make_trainer
from .test_saving import as_before, same_weights

SOME = ("Mixtral", "DeepseekV3")
each = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SOME else pytest.mark.slow) for name in MODELS]
)


def count_hooks(model: nn.Module) -> list[Any]:
    """The hooks of a model, and the numbers of hooks that it keeps."""
    return [hook for module in model.modules() for table in HOOK_TABLES for hook in getattr(module, table).items()]


@each
def test_round_trip(name):
    convert_both_ways(build_model(name))


def convert_both_ways(stock: Any) -> None:
    """Equal logits of a padded batch, at padding too, and equal text; then the stock model, bit for bit."""
    model, (_, batch) = copy.deepcopy(stock), make_two_lengths("left")
    assert from_transformers(model) is model
    assert {type(layer.mlp) for layer in model.model.layers} == {SparseFeedForward}
    wanted, real = stock(**batch).logits, batch["attention_mask"].bool()
    torch.testing.assert_close(model(**batch).logits, wanted, atol=1e-5, rtol=1e-5)
    settings: Any = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(model.generate(**batch, **settings), stock.generate(**batch, **settings))
    with track_routing(model) as stats:
        model(**batch)
    assert {stats.last(layer).tokens for layer in stats.layers} == {int(real.sum())}

    assert to_transformers(model) is model
    same_weights(model, stock)
    assert torch.equal(model(**batch).logits, wanted)
    assert [type(module) for module in model.modules()] == [type(module) for module in stock.modules()]
    assert not count_hooks(model)
    assert (type(model.config), vars(model.config)) == (type(stock.config), vars(stock.config))
    assert vars(model).keys() - {"save_pretrained"} == vars(stock).keys()  # see test_engine_folders.py
    assert all(module.config is model.config for module in model.modules() if hasattr(module, "config"))


@each
def test_gradients_are_those_of_the_blocks(name):
    """Of every weight; and of a step of our own, which goes back into the blocks."""
    stock: Any = build_model(name)
    _, batch = make_two_lengths("right")
    model = from_transformers(copy.deepcopy(stock), loss_coef=0.0)
    labels = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
    for one in (stock, model):
        one.train()(**batch, labels=labels).loss.backward()
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, stock.model.embed_tokens.weight.grad)
    for block, layer in zip((one.mlp for one in stock.model.layers), find_feed_forwards(model), strict=True):
        theirs = compute_gradients(block)
        for path, parameter in layer.moe.named_parameters():
            torch.testing.assert_close(get_grad(parameter), theirs[path], atol=1e-6, rtol=1e-4)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    after = model.eval()(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(to_transformers(model)(**batch).logits[real], after[real], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(after[real], stock.eval()(**batch).logits[real], atol=1e-3)


def test_loss_is_from_this_package():
    """Asked for by a trainer of TRL or by the configuration, it is there once; the blocks' own loss never is."""
    model = build_model("Mixtral", router_aux_loss_coef=0.25, output_router_logits=True)
    model = from_transformers(model, loss_coef=0.5, z_loss_coef=0.1).train()
    batch = make_batch(3)
    out = model(**batch)
    task = model.eval()(**batch).loss
    torch.testing.assert_close(out.loss, task + aux_loss(model))
    assert out.aux_loss is None
    out = model.train()(**batch, output_router_logits=True)
    torch.testing.assert_close(out.aux_loss * 0.25, aux_loss(model))  # a trainer multiplies by the coefficient
    for factor in (2.0, 0.0):  # which it may set; it is relative to what it was
        model.config.router_aux_loss_coef = factor * 0.25
        torch.testing.assert_close(model(**batch).loss, task + factor * aux_loss(model))
    silent = from_transformers(build_model("Mixtral", router_aux_loss_coef=0.0), loss_coef=0.5).train()
    out = silent(**batch)  # Phi 3.5 MoE is published so
    torch.testing.assert_close(out.loss, silent.eval()(**batch).loss + aux_loss(silent))
    silent.config.router_aux_loss_coef = 0.0  # it is 1.0 before that, or nothing would switch the loss off
    torch.testing.assert_close(silent.train()(**batch).loss, silent.eval()(**batch).loss)
    plain = from_transformers(build_model("DeepseekV3"), loss_coef=0.5).train()
    out = plain(**batch, output_router_logits=True)
    torch.testing.assert_close(out.aux_loss, aux_loss(plain))
    torch.testing.assert_close(out.loss, plain.eval()(**batch).loss + aux_loss(plain))


@pytest.mark.parametrize("before", [0.25, 0.0])
def test_the_factor_of_the_loss_is_saved(before, tmp_path):
    """The file tells what a trainer set, and what the blocks had; a stock model again has nothing of it."""
    model, batch = from_transformers(build_model("Mixtral", router_aux_loss_coef=before), loss_coef=0.5), make_batch(3)
    model.config.router_aux_loss_coef = 0.5
    for number in range(3):
        task = model.eval()(**batch).loss
        out = model.train()(**batch)
        torch.testing.assert_close(out.loss, task + 0.5 / (before or 1.0) * aux_loss(model))
        model.save_pretrained(tmp_path / str(number))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
    assert hasattr(model.config, INITIAL_COEF_KEY)
    stock = to_transformers(model).config
    assert not hasattr(stock, INITIAL_COEF_KEY)
    assert stock.router_aux_loss_coef == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Mixtral", "DeepseekV3"])
def test_steps_of_a_trainer(name, tmp_path):
    """With accumulation, checkpointing and a bias that moves; then saved, loaded and stock again."""
    model = from_transformers(build_model(name), loss_coef=0.1)
    before = copy.deepcopy(model.state_dict())
    settings: Any = dict(max_steps=2, gradient_accumulation_steps=2, activation_checkpointing=True, learning_rate=0.1)
    made = make_trainer(model, make_batch(8), tmp_path, **settings)
    if name == "DeepseekV3":
        made.add_callback(BalanceCallback(rate=1e-2))
    made.train()
    del model.zero_grad
    for key, value in model.state_dict().items():
        if not key.endswith(("mlp.gate.weight", "expert_counts")):  # what stands for a matrix of the block
            assert not torch.equal(value, before[key]), key
    model.eval().save_pretrained(tmp_path / "moe")
    again, inputs = AutoModelForCausalLM.from_pretrained(tmp_path / "moe"), make_batch(2)
    same_weights(again, model)
    to_transformers(again).save_pretrained(tmp_path / "stock")
    stock = type(model).from_pretrained(tmp_path / "stock")
    torch.testing.assert_close(stock(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


LOADS = """
import sys
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM
import mixture_of_experts.huggingface
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(folder)
    given, wanted = torch.load(folder / "expected.pt")
    assert torch.equal(model(**given).logits, wanted), folder
    print(folder.name, type(model.model.layers[0].mlp).__name__)
"""


@pytest.mark.slow
def test_another_process_loads_them(tmp_path):
    """With the import; without it the folder is refused, as test_loaders.py shows."""
    for name in MODELS:
        model, (_, batch) = from_transformers(build_model(name), balance_over="group"), make_two_lengths("left")
        model.save_pretrained(tmp_path / name, max_shard_size="50KB")
        torch.save((batch, model(**batch).logits.detach()), tmp_path / name / "expected.pt")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert [repr(one) for one in find_feed_forwards(again)] == [repr(one) for one in find_feed_forwards(model)]
        assert find_feed_forwards(again)[0].moe.gate.balance_over == "group"
    root = Path(__file__).resolve().parents[2]
    run = [sys.executable, "-c", LOADS, str(tmp_path)]
    done = subprocess.run(run, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == [word for name in sorted(MODELS) for word in (name, "SparseFeedForward")], done.stderr


@pytest.mark.slow
def test_stock_class_rejects_converted_weights(tmp_path):
    """What it would not find it would draw: the name of its router's matrix has another shape."""
    model = from_transformers(build_model("Mixtral"))
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        type(model).from_pretrained(tmp_path, config=to_transformers(model).config)


@pytest.mark.slow
def test_keeps_dtypes_modes_and_frozen_weights():
    stock = build_model("DeepseekV3").to(torch.bfloat16).train()
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_("experts.gate_up_proj" not in name)
    model = from_transformers(copy.deepcopy(stock))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name.rpartition(".")[2] for name in frozen} == {"w1", "w3"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(layer.training for layer in find_feed_forwards(model))
    back = {name: p.requires_grad for name, p in to_transformers(model).named_parameters()}
    assert back == {name: p.requires_grad for name, p in stock.named_parameters()}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(module.training for module in model.modules())


@pytest.mark.slow
def test_dense_layers_are_kept(tmp_path):
    """They are upcycled beside the blocks, saved and loaded; such a model has no stock class."""
    model, batch = build_model("DeepseekV3", hidden=48, first_k_dense_replace=1), make_batch(2)
    before = model(**batch).logits
    from_transformers(model)
    assert upcycle(model, num_experts=4) == ["model.layers.0.mlp"]
    torch.testing.assert_close(model(**batch).logits, before, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(DeepseekV3ForCausalLM.from_pretrained(tmp_path)(**batch).logits, model(**batch).logits)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="DeepseekV3ForCausalLM has layers from replace_ffn or upcycle"):
        to_transformers(model)
    assert state.keys() == model.state_dict().keys()


INDEXER = dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=8, indexer_compress_ratio=4)
MORE = {"qwen4_exp_text": dict(layer_types=["linear_attention", "indexed_attention"], **INDEXER)}


def make_family(name: str) -> Any:
    return build_family(name, **MORE.get(name, {}))


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: build_model("Mixtral", router_jitter_noise=0.1), "MixtralSparseMoeBlock has jitter_noise=0.1"),
        (lambda: ARCHITECTURES["llama"].build(), "LlamaForCausalLM has no sparse blocks; use upcycle or replace_ffn"),
        (lambda: from_transformers(build_model("Mixtral")), "MixtralForCausalLM has no sparse blocks"),
        (lambda: make_family("jetmoe"), "JetMoeAttention at model.layers.0.self_attention has an unknown class"),
        (
            lambda: make_family("diffusion_gemma"),
            "DiffusionGemmaEncoderTextLayer at .* is a whole decoder layer that also holds",
        ),
        (
            lambda: add_lora(build_model("Mixtral"), "mlp.gate.weight"),
            "MixtralSparseMoeBlock has PEFT adapters, which would be lost",
        ),
        (lambda: add_lora(build_model("Mixtral"), "experts.down_proj"), "MixtralSparseMoeBlock has PEFT adapters"),
        (
            lambda: quantize_model(build_model("Mixtral")),
            "MixtralForCausalLM is quantized; load it without quantization_config",
        ),
    ],
    ids=["jitter", "dense", "changed", "JetMoe", "DiffusionGemma", "router's", "experts'", "quantised"],
)
def test_rejected_models_are_unchanged(make, problem):
    model = make()
    kinds, state, config = [type(m) for m in model.modules()], model.state_dict(), dict(vars(model.config))
    hooks = len(count_hooks(model))
    with pytest.raises(ValueError, match=problem):
        from_transformers(model)
    assert [type(module) for module in model.modules()] == kinds
    assert all(value.data_ptr() == state[key].data_ptr() for key, value in model.state_dict().items())
    assert (vars(model.config), len(count_hooks(model))) == (config, hooks)


@torch.no_grad()
def test_hooks_on_a_block_stay():
    """In both directions; those by which a model returns `router_logits` it sets itself."""
    model, (_, batch), called = build_model("Mixtral"), make_two_lengths("left"), []
    model(**batch, output_router_logits=True)
    handle = model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: called.append(out.shape))
    before = model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: called.append("before"))
    model(**batch)
    wanted = called.copy()
    assert len(wanted) == 2
    for change in (from_transformers, to_transformers):
        called.clear()
        change(model)
        model(**batch)
        assert called == wanted
    logits = model(**batch, output_router_logits=True).router_logits
    assert len(logits) == len(model.model.layers)
    called.clear()
    handle.remove()
    before.remove()
    model(**batch)
    assert not called


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("change", ["adapters", "int8"])
def test_what_no_block_has_is_refused(change, whole):
    """By what to do, not by the shapes of weights that differ; nothing is changed."""
    stock = build_model("Mixtral")
    block, model = copy.deepcopy(stock.model.layers[0].mlp), from_transformers(stock)
    if change == "adapters":
        add_lora(model, "experts.w1")
    else:
        quantize_experts(model.requires_grad_(False))
    says = {
        "adapters": r"^the layer has PEFT adapters, .*; call merge_and_unload\(\) first$",
        "int8": r"^the layer has experts quantized to 8 bits, .*; use the unquantized model$",
    }
    before = str(model)
    with pytest.raises(ValueError, match=says[change]):
        to_transformers(model) if whole else to_transformers(model.model.layers[0].mlp.moe, block)
    assert str(model) == before


def add_lora(model: Any, parameter: str) -> Any:
    with warnings.catch_warnings():  # of PEFT about transformers
        warnings.simplefilter("ignore")
        get_peft_model(model, LoraConfig(r=2, target_parameters=[parameter]))
    return model


def quantize_model(model: Any) -> Any:
    model.is_quantized = True
    return model


def test_router_logits_are_restored():
    """Hooks with which transformers reads outputs are set once: blocks that come later need theirs too."""
    model, batch = build_model("Mixtral", output_router_logits=True).train(), make_batch(3)
    wanted = model(**batch)
    found = to_transformers(from_transformers(model))(**batch)
    torch.testing.assert_close(found.router_logits, wanted.router_logits, atol=0, rtol=0)
    assert torch.equal(found.loss, wanted.loss)
    assert len(found.hidden_states or ()) == len(wanted.hidden_states or ())


def test_rejects_offloaded_weights(tmp_path):
    from_transformers(build_model("Mixtral")).save_pretrained(tmp_path / "saved")
    model = load_with_layer_on_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp are not in memory"):
        to_transformers(model)
    assert [type(layer.mlp) for layer in model.model.layers] == [SparseFeedForward] * 2


def test_rejects_unconvertible_models():
    model = from_transformers(build_model("Mixtral"))
    with pytest.raises(ValueError, match="layers created by from_transformers; use to_transformers"):
        export(model)
    layer = find_feed_forwards(model)[1]
    layer.moe.gate.scale = 2.0
    with pytest.raises(ValueError, match=r"scale 2.0, but the block has 1.0"):
        to_transformers(model)
    assert len(find_feed_forwards(model)) == 2
    with pytest.raises(ValueError, match="MixtralForCausalLM has no layer that replaced a block"):
        to_transformers(build_model("Mixtral"))
    with pytest.raises(ValueError, match=r"expected a transformers model because .* but got a MoE; pass `block`"):
        to_transformers(layer.moe)


@pytest.mark.parametrize("original", [True, False])
def test_weights_that_the_class_renames(original, tmp_path):
    """Mistral Large 4 renames `.gate.` to `.mlp.gate.` in all that it loads."""
    model = from_transformers(make_family("mistral_large4_text"))
    model.save_pretrained(tmp_path / "saved", save_original_format=original)
    again = type(model).from_pretrained(tmp_path / "saved")
    same_weights(again, model)
    same_weights(from_pretrained(tmp_path / "saved"), model)
    again.save_pretrained(tmp_path / "again")
    same_weights(type(model).from_pretrained(tmp_path / "again"), model)


def test_a_headless_model_gets_its_weights(tmp_path):
    """Those of Mistral Large 4, whose layers are then renamed under another path."""
    model = from_transformers(make_family("mistral_large4"))
    model.save_pretrained(tmp_path / "saved")
    base = type(model.base_model).from_pretrained(tmp_path / "saved")
    same_weights(base, model.base_model)
    base.save_pretrained(tmp_path / "base")
    same_weights(type(model.base_model).from_pretrained(tmp_path / "base"), base)


def test_renamed_weights_keep_names(tmp_path, monkeypatch):
    """By a renaming they do not, and a class that would merge them into others is refused, unless they have their own
    names in the file."""
    model = from_transformers(build_model("Mixtral"))
    model.save_pretrained(tmp_path / "own names")
    as_before(model, tmp_path / "names of the class")
    conversions: list[Any] = [WeightRenaming(r"\.experts\.w1", ".experts.w3")]
    convert = loader.ExpertsLoader.update_weight_conversions
    monkeypatch.setattr(
        loader.ExpertsLoader, "update_weight_conversions", lambda self, _, model: convert(self, conversions, model)
    )
    for load in (AutoModelForCausalLM.from_pretrained, from_pretrained):
        for folder in tmp_path.iterdir():
            same_weights(load(folder), model)
    conversions.append(WeightConverter([r"\.w1", r"\.w3"], r"\.gate_up", [Concatenate(dim=1)]))
    for load in (AutoModelForCausalLM.from_pretrained, from_pretrained):
        same_weights(load(tmp_path / "own names"), model)
        with pytest.raises(ValueError, match=r"does not contain .*experts\.w1"):
            load(tmp_path / "names of the class")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("afmoe", "aria_text", "cohere2_moe", "deepseek_v4", "dots3_note", "ernie4_5_moe", "granitemoehybrid"),
        *("glm4v_moe_text", "inkling2_text", "mistral_large4", "mistral_large4_text", "qwen4_exp_text"),
        *("inkling_text", "jamba", "llama4", "minimax_m2", "nemotron_h", "openai_privacy_filter", "phimoe"),
        *("qwen2_moe", "qwen3_5_moe", "qwen3_vl_moe", "zaya"),
    ],
)
def test_other_families(name, tmp_path):
    """Blocks that return pairs, are called with token ids or a state, average, or stand beside other networks."""
    model = make_family(name).eval()
    given, stock = make_inputs(model), copy.deepcopy(model.state_dict())
    before = compute_outputs(model, given)
    from_transformers(model)
    after = compute_outputs(model, given)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(compute_outputs(type(model).from_pretrained(tmp_path).eval(), given), after)
    assert torch.equal(compute_outputs(to_transformers(model), given), before)
    assert all(torch.equal(value, stock[key]) for key, value in model.state_dict().items())
    assert model.state_dict().keys() == stock.keys()
