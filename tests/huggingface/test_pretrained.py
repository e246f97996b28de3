"""What docs/upcycling.md and docs/saving_and_exporting.md promise, on SmolLM2 (30 layers, d 576) and MiniLM.

Their weights are trained: channels are large, texts are sensible, and configurations carry notes.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.pretrained import MINILM, SMOLLM2, find_folder
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM

from mixture_of_experts.huggingface import export, fast_lora, save_adapter, upcycle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.pretrained,
    # peft and trl use names that transformers deprecates
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:the routers in .* were initialized in memory:UserWarning"
    ),  # see test_adapter_checkpoints.py
]

TEXTS = [
    "The capital of France is",
    "To be, or not to be: that is the question. Whether 'tis nobler in the mind to suffer",
]
GREEDY: Any = dict(max_new_tokens=6, do_sample=False)


def smollm2() -> Any:
    return AutoModelForCausalLM.from_pretrained(find_folder(SMOLLM2), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(find_folder(SMOLLM2))


# what a process holds at most since it began; `ru_maxrss` also counts what its parent held
MEASURED = """
import sys
from pathlib import Path
from mixture_of_experts.huggingface.__main__ import main

status = main(sys.argv[1:])
(line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(line.split()[1])
sys.exit(status)
"""


@pytest.fixture(scope="module")
def dense() -> Any:
    """SmolLM2 as it is; no test changes it."""
    return smollm2()


@pytest.fixture(scope="module")
def run_command(tmp_path_factory) -> tuple[Path, int]:
    """The folder that the command writes, four experts in each of thirty layers; and the bytes that it held at most."""
    folder = tmp_path_factory.mktemp("upcycled") / "moe"
    words = [str(find_folder(SMOLLM2)), str(folder), "--num-experts", "4", "--max-shard-size", "500MB"]
    process = subprocess.run([sys.executable, "-c", MEASURED, "upcycle", *words], stdout=subprocess.PIPE, text=True)
    assert process.returncode == 0
    return folder, 1024 * int(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def upcycled(run_command) -> Path:
    return run_command[0]


@pytest.fixture(scope="module")
def first_moe(upcycled) -> Any:
    """The model in that folder; no test changes it."""
    return AutoModelForCausalLM.from_pretrained(upcycled, dtype=torch.float32).eval()


def make_batch(tokenizer: Any, side: str = "left") -> Any:
    tokenizer.padding_side = side
    return tokenizer(TEXTS, return_tensors="pt", padding=True)


@torch.no_grad()
def measure_rounding(dense: Any, batch: Any) -> Tensor:
    """The maximum error of the dense model's float32 logits over padding, and over all other tokens: `(b, n, 1)`.

    It depends on the CPU. Padding on the left attends only to masked keys, where the error is several times as large.
    """
    error = (dense(**batch).logits - copy.deepcopy(dense).double()(**batch).logits).abs().amax(-1, keepdim=True)
    padded = (batch["attention_mask"] == 0).unsqueeze(-1)
    return torch.where(padded, error[padded].max(), error[~padded].max())


def assert_close(found: Tensor, wanted: Tensor, rounding: Tensor) -> None:
    """Two models that round differently differ by up to the sum of their errors, here with a margin of two."""
    torch.testing.assert_close(found / rounding, wanted / rounding, rtol=0, atol=4)


def test_pretrained_model_generates_facts(dense, tokenizer):
    prompt = tokenizer(TEXTS[0], return_tensors="pt")
    assert tokenizer.decode(dense.generate(**prompt, **GREEDY)[0]).startswith("The capital of France is Paris.")


def test_command_memory_is_one_layer_and_shard(run_command):
    """Not the model, which has 1.5 GB. What it reads, a shard, and torch with transformers have 0.5 GB each."""
    upcycled, peak = run_command
    index = json.loads((upcycled / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] > 1.4e9
    assert len(set(index["weight_map"].values())) >= 3
    assert peak < 1.8e9


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_logits_and_loss(dense, first_moe, tokenizer, side):
    """At padding too: with padding on the left a loss reads it."""
    batch = make_batch(tokenizer, side)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    wanted, found = (model(**batch, labels=labels) for model in (dense, first_moe))
    assert_close(found.logits, wanted.logits, measure_rounding(dense, batch))
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-4, atol=0)


@pytest.mark.parametrize("cache", [None, "static"])
def test_equal_text(dense, first_moe, tokenizer, cache):
    batch, settings = make_batch(tokenizer), dict(GREEDY, cache_implementation=cache)
    assert first_moe.generate(**batch, **settings).equal(dense.generate(**batch, **settings))
    assert first_moe.generate(**batch, **settings, num_beams=2).equal(dense.generate(**batch, **settings, num_beams=2))


FRESH = """
import sys, torch, transformers, mixture_of_experts.huggingface
folder = sys.argv[1]
pipe = transformers.pipeline("text-generation", folder, dtype=torch.bfloat16, device_map="cpu")
print(type(pipe.model).__name__, type(transformers.AutoConfig.from_pretrained(folder)).__name__)
print(pipe(sys.argv[2], max_new_tokens=6, do_sample=False)[0]["generated_text"])
"""


def test_new_process_loads_by_auto_classes_and_pipeline(upcycled):
    """In bfloat16, with a device map; the tokenizer came along."""
    command = [sys.executable, "-c", FRESH, str(upcycled), TEXTS[0]]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert printed[0] == "LlamaForCausalLM LlamaConfig"
    assert printed[1].startswith("The capital of France is Paris")


@torch.no_grad()
def test_exported(dense, first_moe, tokenizer, upcycled, tmp_path):
    """The stock class has equal logits, at padding too, and equal text; so has what the command writes."""
    batch, exported = make_batch(tokenizer), export(first_moe)
    rounding, wanted = measure_rounding(dense, batch), first_moe(**batch).logits
    assert type(exported) is MixtralForCausalLM
    assert_close(exported(**batch).logits, wanted, rounding)
    assert exported.generate(**batch, **GREEDY).equal(first_moe.generate(**batch, **GREEDY))
    del exported
    words = ["export", str(upcycled), str(tmp_path / "mixtral")]
    subprocess.run([sys.executable, "-m", "mixture_of_experts.huggingface", *words], check=True)
    stock = MixtralForCausalLM.from_pretrained(tmp_path / "mixtral", dtype=torch.float32).eval()
    assert_close(stock(**batch).logits, wanted, rounding)


@torch.no_grad()
def test_embeddings_of_sentences():
    """MiniLM: means over the real tokens, which a router must not change."""
    tokenizer, model = (make.from_pretrained(find_folder(MINILM)) for make in (AutoTokenizer, AutoModel))
    batch = tokenizer([*TEXTS, "Paris is the capital of France"], return_tensors="pt", padding=True)
    mask = batch["attention_mask"].unsqueeze(-1)

    def embed() -> Tensor:
        return nn.functional.normalize((model.eval()(**batch).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)

    wanted = embed()
    assert wanted[0] @ wanted[2] > 0.8 > wanted[0] @ wanted[1]
    assert len(upcycle(model, num_experts=4)) == 6
    torch.testing.assert_close(embed(), wanted, atol=1e-5, rtol=0)


def test_adapters_of_the_exported_model(dense, tokenizer, tmp_path):
    """Trained on the upcycled model, in the exported one they compute the same."""
    model = smollm2()
    upcycle(model, num_experts=4, layers=["model.layers.28.mlp", "model.layers.29.mlp"])
    export(model).save_pretrained(tmp_path / "stock")
    experts = ["experts.w1", "experts.w3", "experts.w2"]
    lora: Any = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], target_parameters=experts)
    adapted: Any = fast_lora(get_peft_model(model, lora)).train()
    batch = tokenizer(TEXTS[1], return_tensors="pt")
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        adapted(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(adapted, tmp_path / "adapter")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float32)
    again = PeftModel.from_pretrained(stock, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        wanted, found = (one.eval()(**batch).logits.log_softmax(-1) for one in (adapted, again))
        before = dense(**batch).logits.log_softmax(-1)
    assert (found - wanted).abs().max() < 1e-3 < 1 < (before - wanted).abs().max()
