"""What docs/transformers.md promises, on real models: SmolLM2 (30 layers, d 576) and MiniLM.

Their weights are trained: channels are large, logits are sure, and configurations carry notes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.pretrained import SMOLLM2, folder_of
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.slow, pytest.mark.pretrained]


def smollm2() -> Any:
    return AutoModelForCausalLM.from_pretrained(folder_of(SMOLLM2), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def dense() -> Any:
    """SmolLM2 as it is; tests do not change it."""
    return smollm2()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(folder_of(SMOLLM2))


def test_it_is_a_model_that_knows_something(dense, tokenizer):
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    text = dense.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(text[0]).endswith("The capital of France is Paris.")
