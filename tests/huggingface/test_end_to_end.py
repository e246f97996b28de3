"""The whole life of a mixture on SmolLM2, as docs/fine_tuning.md describes it: at each step an equality or a loss."""

from __future__ import annotations

import inspect
import textwrap
import time
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.pretrained import SMOLLM2, find_folder
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2MoeForCausalLM

from mixture_of_experts.huggingface import expert_scores, export, fast_lora, prune, upcycle

LAYERS, EXPERTS, KEPT = [28, 29], 4, 3


def make_windows() -> Tensor:
    """Python's own sources as windows of tokens `(w, 64)`."""
    tokenizer = AutoTokenizer.from_pretrained(find_folder(SMOLLM2))
    ids = tokenizer(inspect.getsource(textwrap), return_tensors="pt").input_ids[0]
    return ids[: len(ids) // 64 * 64].view(-1, 64)


def compute_logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(tokens, use_cache=False).logits


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * wanted.abs().max().item())


@pytest.mark.slow
@pytest.mark.pretrained
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # in peft
def test_end_to_end(tmp_path):
    text, losses, start = make_windows(), {}, time.process_time()
    train, held_out = text[:16].split(4), text[-6:]

    def note(step: str, model: Any) -> Tensor:
        found = compute_logits(model, held_out)
        losses[step] = torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), held_out[:, 1:].flatten()).item()
        print(f"{step}: held-out loss {losses[step]:.4f}, {time.process_time() - start:.0f} s")
        return found

    model = AutoModelForCausalLM.from_pretrained(find_folder(SMOLLM2), dtype=torch.float32)
    dense = note("dense", model)

    upcycle(model, num_experts=EXPERTS, layers=LAYERS)
    assert_close(note("upcycled", model), dense)

    experts = ["experts.w1", "experts.w3", "experts.w2"]
    lora = LoraConfig(r=8, target_modules=[], target_parameters=experts, modules_to_save=["gate"])
    adapted = fast_lora(get_peft_model(model, lora))
    trained_names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert all(".mlp.moe." in name for name in trained_names)  # PEFT's default adapts attention too
    assert len(trained_names) == len(LAYERS) * (2 * len(experts) + 1)
    assert_close(compute_logits(adapted, held_out), dense)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for tokens in train + train[:2]:
        adapted.train()(tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = note("LoRA", adapted)
    assert losses["LoRA"] < losses["dense"] - 0.03

    merged = adapted.merge_and_unload()
    assert_close(note("merged", merged), trained)

    scores = expert_scores(merged, calibration=train[:2])
    kept = prune(merged, KEPT, scores)
    assert [len(ids) for ids in kept.values()] == [KEPT] * len(LAYERS)
    pruned = note("pruned", merged)
    assert losses["LoRA"] < losses["pruned"] + 1e-3
    assert losses["pruned"] < losses["dense"]

    export(merged).save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(stock) is Qwen2MoeForCausalLM
    assert_close(note("stock class, loaded", stock), pruned)
