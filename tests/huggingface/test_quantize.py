"""Experts in int8 in a model of transformers: folders, adapters, checkpointing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.transformers_models import ARCHITECTURES, two_lengths, without_dropout
from transformers import AutoModelForCausalLM

from mixture_of_experts.huggingface import fast_lora, from_pretrained, upcycle
from mixture_of_experts.quantize import QuantizedExperts, quantize_experts

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # in PEFT


def model() -> Any:
    torch.manual_seed(0)
    model = without_dropout(ARCHITECTURES["llama"].build()).eval()
    upcycle(model, num_experts=4, noise=0.5)
    return model.requires_grad_(False)


def test_a_folder_has_int8_where_the_model_has(tmp_path):
    """One layer of two."""
    moe, (_, batch) = model(), two_lengths("left")
    quantize_experts(moe.model.layers[1])
    wanted = moe(**batch).logits
    moe.save_pretrained(tmp_path)
    for load in (AutoModelForCausalLM, type(moe)):
        loaded = load.from_pretrained(tmp_path)
        assert [isinstance(layer.mlp.moe.experts, QuantizedExperts) for layer in loaded.model.layers] == [False, True]
        assert loaded(**batch).logits.equal(wanted)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)(**batch).logits.isfinite().all()
    with pytest.raises(ValueError, match="has experts in int8: load it by an Auto class"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("fast", [False, True])
def test_adapters_of_experts_are_merged_first(fast):
    lora, (_, batch) = (
        LoraConfig(target_parameters=["experts.w1", "experts.w2"], init_lora_weights=False),
        two_lengths("left"),
    )
    tuned: Any = get_peft_model(model(), lora)
    tuned = fast_lora(tuned) if fast else tuned
    with pytest.raises(ValueError, match=r"around experts, .*: merge adapters, or quantise before experts are wrapped"):
        quantize_experts(tuned)
    wanted = tuned(**batch).logits
    found = quantize_experts(tuned.merge_and_unload().requires_grad_(False))(**batch).logits
    assert (found - wanted).norm() <= 0.03 * wanted.norm()


def test_adapters_of_attention_train_through_them():
    """With activation checkpointing as without."""
    lora, (_, batch) = LoraConfig(target_modules=["q_proj"], init_lora_weights=False), two_lengths("left")
    tuned: Any = get_peft_model(quantize_experts(model()), lora).train()
    other = copy.deepcopy(tuned)
    other.gradient_checkpointing_enable()
    other.enable_input_require_grads()
    grads = []
    for each in (tuned, other):
        each(**batch, labels=batch["input_ids"]).loss.backward()
        grads.append({name: p.grad for name, p in each.named_parameters() if p.requires_grad})
    assert all(grad.any() for grad in grads[0].values())
    assert all(grad.equal(grads[1][name]) for name, grad in grads[0].items())
