"""Adapters for stock models: what they compute there, and the names and shapes that engines read."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.transformers_families import build_model as build_family
from support.transformers_families import compute_outputs, make_inputs
from support.transformers_models import ARCHITECTURES
from torch import Tensor, nn

from mixture_of_experts.huggingface import (
    export,
    fast_lora,
    from_transformers,
    save_adapter,
    upcycle,
    weights_shown,
)
from mixture_of_experts.huggingface.private_peft import ADAPTER_FILE
from mixture_of_experts.quantize import quantize_experts

from .test_block_conversion import build_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),  # in PEFT
    pytest.mark.filterwarnings("ignore:.*initialized in memory:UserWarning"),
]
TOKENS = torch.arange(3, 27).view(2, 12)
OURS = ["experts.w1", "experts.w3", "experts.w2"]


def make_lora(targets: list[str] = OURS, **settings: Any) -> LoraConfig:
    fixed = dict(r=3, lora_alpha=5, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    return LoraConfig(**{**fixed, **settings}, target_parameters=targets)


def compute_logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def make_upcycled(name: str = "llama", **settings: Any) -> Any:
    model = ARCHITECTURES[name].build()
    upcycle(model, num_experts=4, noise=0.5, **settings)
    return model.double()


def make_pair(name: str) -> tuple[Any, Any]:
    """A model with layers of this package in float64, and the equivalent stock model."""
    if name in ARCHITECTURES:
        model = make_upcycled(name)
        return model, export(model)
    stock = build_model(name).double()
    return from_transformers(copy.deepcopy(stock)), stock


def train(model: Any, steps: int = 2) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        model.train()(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def check_equal(adapted: Any, stock: Any, folder: Path) -> None:
    """The stock model computes with the saved adapter what the model does, and without it something else."""
    stock.set_experts_implementation("eager")  # grouped products have no float64
    wanted, before = compute_logits(adapted), compute_logits(stock)
    again = PeftModel.from_pretrained(stock, str(folder))
    torch.testing.assert_close(compute_logits(again), wanted, atol=1e-6, rtol=1e-6)  # routers compute in float32
    assert (before - wanted).abs().max() > 1e-2


PAIRS = ["Mixtral", "Qwen3Moe", "GptOss", "DeepseekV3", "llama", "qwen3", "qwen2"]


@pytest.mark.parametrize("name", PAIRS)
def test_stock_model_computes_the_same(name, tmp_path):
    model, stock = make_pair(name)
    adapted = fast_lora(get_peft_model(model, make_lora()))
    train(adapted)
    before = {key: value.clone() for key, value in adapted.state_dict().items()}
    save_adapter(adapted, tmp_path, base_model="the stock model")
    assert all(torch.equal(value, before[key]) for key, value in adapted.state_dict().items())
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "the stock model"
    check_equal(adapted, stock, tmp_path)


def test_adapters_of_stock_models(tmp_path):
    """An adapter that was trained there; the projections of gate and up share a factor, so the rank stays."""
    stock = build_model("GptOss").double()
    stock.set_experts_implementation("eager")
    base = copy.deepcopy(stock)
    adapted = get_peft_model(stock, make_lora(["experts.gate_up_proj", "experts.down_proj"]))
    save_adapter(adapted, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 3
    check_equal(adapted, base, tmp_path)


@pytest.mark.parametrize("name", ["llama4_text", "longcat_flash", "nemotron_h"])
def test_other_families(name, tmp_path):
    """Weights that PEFT reads the other way, rows for zero-computation experts, and no gate projection."""
    stock = build_family(name).eval()
    given, weights = make_inputs(stock), OURS if name != "nemotron_h" else ["experts.w1", "experts.w2"]
    adapted = get_peft_model(from_transformers(copy.deepcopy(stock)), make_lora(weights, target_modules=[]))
    save_adapter(adapted, tmp_path)
    again: Any = PeftModel.from_pretrained(copy.deepcopy(stock), str(tmp_path))
    with torch.no_grad():
        wanted = compute_outputs(adapted.eval(), given)
        torch.testing.assert_close(compute_outputs(again.eval(), given), wanted, atol=1e-5, rtol=1e-5)
        assert (compute_outputs(stock, given) - wanted).abs().max() > 1e-2


def test_stock_models_that_lose_adapters(tmp_path):
    """Of Mistral Large 4 PEFT renames the adapter's weights when it loads them."""
    adapted = get_peft_model(from_transformers(build_family("mistral_large4_text")), make_lora(target_modules=[]))
    with pytest.raises(ValueError, match=r"PEFT would rename an adapter weight to .*mlp.mlp.experts.*, which Mistral"):
        save_adapter(adapted, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "DeepseekV3"])
def test_adapters_of_stock_models_for_layers(name, tmp_path):
    """There, and back again."""
    stock = build_model(name).double()
    stock.set_experts_implementation("eager")
    layers, theirs = from_transformers(copy.deepcopy(stock)), ["experts.gate_up_proj", "experts.down_proj"]
    adapted = get_peft_model(copy.deepcopy(stock), make_lora(theirs, target_modules=["o_proj"]))
    wanted = compute_logits(adapted)
    save_adapter(adapted, tmp_path / "ours", layout="mixture_of_experts")
    again = fast_lora(PeftModel.from_pretrained(layers, str(tmp_path / "ours")))
    torch.testing.assert_close(compute_logits(again), wanted, atol=1e-6, rtol=1e-6)
    save_adapter(again, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["r"] == 3
    check_equal(again, copy.deepcopy(stock), tmp_path / "back")
    adapted = get_peft_model(stock, make_lora(theirs, target_modules=["o_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match=r"copies of modules \(lm_head\), which layout='mixture_of_experts' does not"):
        save_adapter(adapted, tmp_path / "not", layout="mixture_of_experts")
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize("targets", [["experts.w3"], ["experts.w1", "experts.w2"], ["experts.w2"]])
def test_some_of_the_weights(targets, tmp_path):
    model, stock = make_pair("Mixtral")
    adapted = get_peft_model(model, make_lora(targets, target_modules=[]))
    save_adapter(adapted, tmp_path)
    check_equal(adapted, stock, tmp_path)


@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match any targeted module:RuntimeWarning")  # but are used
def test_ranks_and_scalings(tmp_path):
    """Different ranks, and the scaling of rsLoRA."""
    model, stock = make_pair("llama")
    ranks = {"experts.w1": 2, "experts.w2": 7, "o_proj": 1}
    adapted = get_peft_model(model, make_lora(use_rslora=True, rank_pattern=ranks, alpha_pattern={"experts.w3": 9}))
    save_adapter(adapted, tmp_path)
    check_equal(adapted, stock, tmp_path)


@pytest.mark.parametrize("name", ["llama", "DeepseekV3"])
def test_routers_that_train(name, tmp_path):
    model, stock = make_pair(name)
    adapted = get_peft_model(model, make_lora(modules_to_save=["gate", "lm_head"]))
    for path, value in adapted.named_parameters():
        if ".modules_to_save." in path:
            nn.init.normal_(value, std=0.2)
    save_adapter(adapted, tmp_path)
    check_equal(adapted, stock, tmp_path)
    with pytest.raises(ValueError, match=r"copies of modules \(lm_head, model.layers.\d.mlp.gate.*\), which engines"):
        save_adapter(adapted, tmp_path / "not", layout="per_expert")
    assert not (tmp_path / "not").exists()


def test_one_of_several_adapters(tmp_path):
    model, stock = make_pair("Mixtral")
    adapted: Any = get_peft_model(model, make_lora())
    adapted.add_adapter("other", make_lora())
    save_adapter(adapted, tmp_path, adapter="other")
    adapted.set_adapter("other")
    check_equal(adapted, stock, tmp_path)


def test_adapters_of_quantized_experts(tmp_path):
    """They are adapters of the model that was quantized."""
    model, stock = build_model("Mixtral"), build_model("Mixtral")
    stock.load_state_dict(model.state_dict())
    from_transformers(model).requires_grad_(False)
    quantize_experts(model, bits=8)
    with weights_shown(model):
        adapted = fast_lora(get_peft_model(model, make_lora()))
    save_adapter(adapted, tmp_path)
    again = PeftModel.from_pretrained(stock, str(tmp_path))
    torch.testing.assert_close(compute_logits(again), compute_logits(adapted), atol=0.3, rtol=0)


# Factors for each expert


def read_per_expert(folder: Path) -> dict[str, Tensor]:
    """The sum of each pair of factors with its scaling, by name."""
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / ADAPTER_FILE)
    found = {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            a, b = tensors[key], tensors[f"{name}.lora_B.weight"]
            assert a.shape[0] == b.shape[1]
            for pattern in ("rank_pattern", "alpha_pattern"):  # a scaling of 1, whether it is read or not
                assert config[pattern].get(re.escape(name.removeprefix("base_model.model.")), config["r"]) == len(a)
            found[name] = b @ a
    assert config["r"] == config["lora_alpha"]
    return found


NAMES = {
    "Mixtral": "model.layers.{layer}.block_sparse_moe.experts.{expert}.{w1_w3_w2}",
    "llama": "model.layers.{layer}.block_sparse_moe.experts.{expert}.{w1_w3_w2}",
    "Qwen3Moe": "model.layers.{layer}.mlp.experts.{expert}.{gate_up_down}",
    "qwen3": "model.layers.{layer}.mlp.experts.{expert}.{gate_up_down}",
    "qwen2": "model.layers.{layer}.mlp.experts.{expert}.{gate_up_down}",
    "DeepseekV3": "model.layers.{layer}.mlp.experts.{expert}.{gate_up_down}",
    "GptOss": "model.layers.{layer}.mlp.experts.{expert}.{w1_w3_w2}",
}


@pytest.mark.parametrize("name", PAIRS)
def test_factors_of_each_expert(name, tmp_path):
    """Added to the stock model's weights, by the names of its checkpoints, they are the merged model's weights."""
    model, _ = make_pair(name)
    adapted = get_peft_model(model, make_lora(["experts.w1", "experts.w2"], target_modules=["o_proj"]))
    before = {key: value.clone() for key, value in adapted.get_base_model().state_dict().items()}
    save_adapter(adapted, tmp_path, layout="per_expert")
    found = read_per_expert(tmp_path)
    merged: Any = adapted.merge_and_unload()
    for layer in range(2):
        path = f"model.layers.{layer}"
        added = (
            merged.get_submodule(path).self_attn.o_proj.weight - before[f"{path}.self_attn.o_proj.base_layer.weight"]
        )
        torch.testing.assert_close(found.pop(f"base_model.model.{path}.self_attn.o_proj"), added)
        experts = merged.get_submodule(path).mlp.moe.experts
        for weight, short, long in (("w1", "w1", "gate_proj"), ("w3", "w3", "up_proj"), ("w2", "w2", "down_proj")):
            whole = before[f"{path}.mlp.moe.experts.{'base_layer.base_layer.'}{weight}"]
            added = (getattr(experts, weight) - whole).mT
            for expert, wanted in enumerate(added):
                leaf = NAMES[name].format(layer=layer, expert=expert, w1_w3_w2=short, gate_up_down=long)
                torch.testing.assert_close(found.pop(f"base_model.model.{leaf}"), wanted)
            assert (weight == "w3") != bool(added.any())
    assert not found


@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match any targeted module:RuntimeWarning")  # PEFT's own
def test_transformers_and_peft_read_factors_of_each_expert(tmp_path):
    """Where PEFT knows the older layout of a class, Mixtral's."""
    model, stock = make_pair("Mixtral")
    adapted = get_peft_model(model, make_lora())
    save_adapter(adapted, tmp_path, layout="per_expert")
    check_equal(adapted, stock, tmp_path)


# Errors


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (dict(), dict(layout="3d"), "one of 'peft', 'per_expert', 'mixture_of_experts', but got '3d'"),
        (dict(), dict(adapter="other"), "there is no adapter 'other'; set adapter= to one of default"),
        (dict(targets=[]), {}, "'default' of Llama.* does not adapt any experts; save it with save_pretrained"),
        (dict(targets=[*OURS, "experts.gate_up_proj"]), {}, r"does not adapt experts.gate_up_proj, because PEFT"),
        (dict(target_modules=["q_proj"], use_dora=True, targets=[]), {}, "q_proj uses a LoRA option, such as DoRA"),
        (dict(target_modules=["embed_tokens"]), {}, "embed_tokens has an adapter, but Mixtral.* has no equivalent"),
        (dict(trainable_token_indices=[1]), {}, "embed_tokens is a TrainableTokensWrapper, which has no counterpart"),
    ],
)
def test_what_cannot_be_saved(change, settings, message, tmp_path):
    model = get_peft_model(make_upcycled(), make_lora(**{"targets": OURS, **change}))
    with pytest.raises(ValueError, match=message):
        save_adapter(model, tmp_path / "adapter", **settings)
    assert not (tmp_path / "adapter").exists()


def test_other_models_and_adapters(tmp_path):
    with pytest.raises(TypeError, match="expected model to be a PeftModel, but got a LlamaForCausalLM"):
        save_adapter(make_upcycled(), tmp_path)
    model: Any = get_peft_model(make_upcycled(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="only LoRA adapters can be saved, but the adapter 'default' has type IA3"):
        save_adapter(model, tmp_path)
    model = get_peft_model(make_upcycled(shared_expert=16), make_lora(target_modules=["shared_expert.up_proj"]))
    with pytest.raises(ValueError, match=r"shared_expert.up_proj has an adapter, but Qwen2Moe.* has no equivalent"):
        save_adapter(model, tmp_path)
    model = get_peft_model(make_upcycled("qwen2"), make_lora(bias="all"))
    with pytest.raises(ValueError, match=r"adapter 'default' trains biases \(bias='all'\), .*train with bias='none'"):
        save_adapter(model, tmp_path)
    assert not [*tmp_path.iterdir()]
