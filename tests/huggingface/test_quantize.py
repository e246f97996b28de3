"""Experts in 8 and 4 bits in a model of transformers: folders, adapters, checkpointing."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.transformers_models import ARCHITECTURES, disable_dropout, make_two_lengths
from torch import nn
from transformers import AutoModelForCausalLM

from mixture_of_experts import GatedExperts
from mixture_of_experts.huggingface import fast_lora, from_pretrained, from_transformers, upcycle
from mixture_of_experts.huggingface.lora import weights_shown
from mixture_of_experts.ops import int4
from mixture_of_experts.quantize import QuantizedExperts, iter_unpacked, quantize_experts
from mixture_of_experts.unstack import UnstackedExperts, restack, unstack

from .test_block_conversion import MODELS, build_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),  # in PEFT
    pytest.mark.filterwarnings(
        "ignore:the routers in .* were initialized in memory:UserWarning"
    ),  # see test_adapter_checkpoints.py
]


BITS = (8, 4)


def make_model() -> Any:
    torch.manual_seed(0)
    model = disable_dropout(ARCHITECTURES["llama"].build(intermediate_size=64)).eval()
    upcycle(model, num_experts=4, noise=0.5)
    return model.requires_grad_(False)


def quantize_model(model: Any, bits: Any) -> Any:
    return quantize_experts(model, bits, group=32)


@pytest.mark.parametrize("bits", BITS)
def test_quantized_folder_matches_model(tmp_path, bits):
    """One layer of two."""
    moe, (_, batch) = make_model(), make_two_lengths("left")
    quantize_model(moe.model.layers[1], bits)
    wanted = moe(**batch).logits
    moe.save_pretrained(tmp_path)
    for load in (AutoModelForCausalLM.from_pretrained, type(moe).from_pretrained, from_pretrained):
        loaded = load(tmp_path)
        assert [isinstance(layer.mlp.moe.experts, QuantizedExperts) for layer in loaded.model.layers] == [False, True]
        assert loaded(**batch).logits.equal(wanted)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)(**batch).logits.isfinite().all()
    loaded.save_pretrained(tmp_path / "again")
    assert from_pretrained(tmp_path / "again")(**batch).logits.equal(wanted)


@pytest.mark.parametrize("block", [2, 32, 64])
def test_a_folder_in_4_bits_moves_between_machines(block, tmp_path, monkeypatch):
    """It tells how it is arranged, and is rearranged for the machine that loads it."""
    moe, (_, batch) = make_model(), make_two_lengths("left")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(int4, "find_cpu_block", lambda: block)
        copy.deepcopy(quantize_model(moe, 4)).save_pretrained(tmp_path)
    for experts in get_experts(moe):
        experts.repack()
    layers = json.loads((tmp_path / "config.json").read_text())["dense_config"]["quantization_config"]["layers"]
    form = {"class": "QuantizedExperts", "bits": 4, "group": 32, "block": block}
    assert [entry["forms"] for entry in layers] == [{"moe.experts": form}]
    loaded = from_pretrained(tmp_path)
    for found, wanted in zip(get_experts(loaded), get_experts(moe), strict=True):
        assert found.settings() == {**wanted.settings(), "block": int4.find_cpu_block()}
    assert loaded(**batch).logits.equal(moe(**batch).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert from_pretrained(tmp_path / "again")(**batch).logits.equal(moe(**batch).logits)


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, from_pretrained])
def test_unstacked_folder_matches_model(load, tmp_path):
    """Its experts were drawn anew: names of weights are others than those of stacks. One layer of two."""
    moe, (_, batch) = make_model(), make_two_lengths("left")
    moe.model.layers[0].mlp.moe.experts.dropout = 0.25
    stacked = moe(**batch).logits
    unstack(moe.model.layers[1])
    moe.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert [isinstance(layer.mlp.moe.experts, UnstackedExperts) for layer in loaded.model.layers] == [False, True]
    assert loaded(**batch).logits.equal(moe(**batch).logits)
    assert loaded.model.layers[0].mlp.moe.experts.dropout == 0.25
    assert restack(loaded)(**batch).logits.equal(stacked)
    loaded.save_pretrained(tmp_path / "stacked")
    assert load(tmp_path / "stacked")(**batch).logits.equal(stacked)


def test_rejects_unstacked_folder_of_blocks(tmp_path):
    """A Mixtral's class makes stacks of its own of all `experts.*.w1`. Nothing is written."""
    moe, tokens = unstack(from_transformers(build_model("Mixtral"))), torch.randint(3, 64, (2, 9))
    with pytest.raises(ValueError, match=r"MixtralConfig has unstacked experts in .*; call restack\(\) on the model"):
        moe.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    restack(moe).save_pretrained(tmp_path)
    assert from_pretrained(tmp_path)(tokens).logits.equal(moe(tokens).logits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "Mixtral" else pytest.mark.slow) for n in MODELS])
def test_quantized_folder_of_blocks(name, bits, tmp_path):
    """The files have the names of the class's checkpoints, which may be others than the model's."""
    moe, tokens = from_transformers(build_model(name, hidden=32)).requires_grad_(False), torch.randint(3, 64, (2, 9))
    quantize_model(moe, bits).save_pretrained(tmp_path)
    for load in (AutoModelForCausalLM.from_pretrained, type(moe).from_pretrained, from_pretrained):
        assert load(tmp_path)(tokens).logits.equal(moe(tokens).logits)


LORA = LoraConfig(
    r=3, target_modules=[], target_parameters=["experts.w1", "experts.w3", "experts.w2"], init_lora_weights=False
)


def with_rounded_weights(quantised: Any, plain: Any) -> Any:
    """A model whose stacked experts have the numbers that quantised experts stand for."""
    for small, experts in zip(get_experts(quantised), get_experts(plain), strict=True):
        for name in ("w1", "w3", "w2"):
            packed, groups, scale = (small._buffers.get(f"{name}_{part}") for part in ("packed", "groups", "scale"))
            for i, weight in enumerate(getattr(experts, name).data):
                for inputs, part in iter_unpacked(packed[i], groups if groups is None else groups[i], scale[i]):
                    weight[inputs] = part * scale[i]
    return plain


def get_experts(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, QuantizedExperts | GatedExperts)]


def compute_gradients(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By name, of all that trains; the logits among them."""
    model.zero_grad()
    out = model(**batch, labels=batch["input_ids"])
    out.loss.backward()
    return {"logits": out.logits, **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_adapters_with_quantized_experts(checkpointed, bits):
    """They are PEFT's own: outputs and gradients as on plain experts of the same numbers; two adapters, one, none."""
    tuned: Any = get_peft_model(make_model().double(), LORA, autocast_adapter_dtype=False)
    tuned.add_adapter("other", LORA)
    small = quantize_model(fast_lora(copy.deepcopy(tuned)), bits)
    plain, (_, batch) = with_rounded_weights(small, tuned), make_two_lengths("left")
    if checkpointed:
        small.gradient_checkpointing_enable()
        small.enable_input_require_grads()
    for each in (small, plain):
        each.base_model.set_adapter(["default", "other"])
        each.train()
    found, wanted = compute_gradients(small, batch), compute_gradients(plain, batch)
    assert sum(".lora_A." in name for name in found) == 2 * 2 * 3
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")
    for each in (small, plain):
        each.set_adapter("other")
    torch.testing.assert_close(compute_gradients(small, batch)["logits"], compute_gradients(plain, batch)["logits"])
    with small.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(*(each(**batch).logits for each in (small, plain)))


@pytest.mark.parametrize("bits", BITS)
def test_adapters_for_quantized_folder(tmp_path, bits):
    """A folder is loaded, adapters are put beside its experts or loaded, train, are saved and loaded elsewhere."""
    plain, (_, batch) = make_model(), make_two_lengths("left")
    tuned: Any = fast_lora(get_peft_model(copy.deepcopy(plain), LORA))
    tuned.save_pretrained(tmp_path / "adapters")
    wanted = quantize_model(tuned, bits).eval()(**batch).logits
    quantize_model(plain, bits).save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with weights_shown(loaded):
        again: Any = PeftModel.from_pretrained(loaded, str(tmp_path / "adapters"))
    assert not any(isinstance(p, nn.Parameter) for e in get_experts(again) for p in e.parameters())
    assert fast_lora(again).eval()(**batch).logits.equal(wanted)
    with weights_shown(again):
        again.add_adapter("new", LORA)
    again.set_adapter("new")
    names = [name for name, p in again.named_parameters() if p.requires_grad]
    again(**batch, labels=batch["input_ids"]).loss.backward()
    assert len(names) == 2 * 3 * 2
    assert all(p.grad.any() for p in again.parameters() if p.requires_grad)
    ids = again.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=3, do_sample=False)
    assert ids.shape[1] == batch["input_ids"].shape[1] + 3


@pytest.mark.filterwarnings("ignore:target_parameters=.* no parameter was matched:RuntimeWarning")  # of PEFT
def test_adapters_that_peft_passed_over_are_no_silent_loss(tmp_path):
    """Outside of weights_shown those on attention are loaded alone. Every forward raises."""
    plain, (_, batch) = make_model(), make_two_lengths("left")
    adapters: Any = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.w1", "experts.w2"])
    get_peft_model(copy.deepcopy(plain), adapters).save_pretrained(tmp_path)
    small: Any = PeftModel.from_pretrained(quantize_model(copy.deepcopy(plain), 8), str(tmp_path))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no adapters for experts.w1, experts.w2 .* weights_shown\(model\)"):
            small(**batch)
    small = quantize_model(plain, 8)
    with weights_shown(small):
        small = PeftModel.from_pretrained(small, str(tmp_path))
    with pytest.raises(ValueError, match=r"adapters on quantized experts, .* call fast_lora\(model\) after"):
        small(**batch)
    assert fast_lora(small)(**batch).logits.isfinite().all()


@pytest.mark.parametrize("bits", BITS)
def test_rejects_adapter_operations_on_quantized_experts(bits):
    tuned: Any = get_peft_model(make_model(), LORA)
    with pytest.raises(ValueError, match=r"ParamWrapper depends on them.*, or call fast_lora\(\) before"):
        quantize_model(tuned, bits)
    small = quantize_model(fast_lora(tuned), bits)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    for refused in (small.merge_adapter, small.merge_and_unload):
        with pytest.raises(
            ValueError,
            match=rf"be merged, because w2 is quantized to {bits} bits; .* into the unquantized model",
        ):
            refused()
    experts = small.base_model.model.model.layers[0].mlp.moe.experts
    with pytest.raises(ValueError, match="adapters cannot be computed for slots, because"):
        experts(torch.randn(4, 2, 32))
    assert all(value.equal(before[name]) for name, value in small.state_dict().items())
    assert isinstance(get_experts(small.unload())[0], QuantizedExperts)
    with pytest.raises(ValueError, match="has no QuantizedExperts"), weights_shown(make_model()):
        pass
    with pytest.raises(ValueError, match="no `target_parameters` found"):
        get_peft_model(quantize_model(make_model(), bits), LORA)


@pytest.mark.parametrize("bits", BITS)
def test_weights_are_shown_within_the_outermost_context(bits):
    small = quantize_model(make_model(), bits)
    shown = lambda: [set(experts._parameters) for experts in get_experts(small)]  # noqa: E731
    with weights_shown(small):
        with weights_shown(small):
            pass
        assert shown() == [{"w1", "w3", "w2"}] * 2
    assert shown() == [set()] * 2
    with pytest.raises(ZeroDivisionError), weights_shown(small):
        raise ZeroDivisionError
    assert shown() == [set()] * 2


@pytest.mark.parametrize("bits", BITS)
def test_adapters_of_attention_train_through_them(bits):
    """With activation checkpointing as without."""
    lora, (_, batch) = LoraConfig(target_modules=["q_proj"], init_lora_weights=False), make_two_lengths("left")
    tuned: Any = get_peft_model(quantize_model(make_model(), bits), lora).train()
    other = copy.deepcopy(tuned)
    other.gradient_checkpointing_enable()
    other.enable_input_require_grads()
    grads = []
    for each in (tuned, other):
        each(**batch, labels=batch["input_ids"]).loss.backward()
        grads.append({name: p.grad for name, p in each.named_parameters() if p.requires_grad})
    assert all(grad.any() for grad in grads[0].values())
    assert all(grad.equal(grads[1][name]) for name, grad in grads[0].items())
