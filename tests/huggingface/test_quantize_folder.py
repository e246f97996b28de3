"""`quantize` on folders: what it writes is what `quantize_experts` makes of the loaded model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.transformers_models import ARCHITECTURES
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from mixture_of_experts.huggingface import from_transformers, upcycle
from mixture_of_experts.huggingface.__main__ import main
from mixture_of_experts.huggingface.feed_forward import find_feed_forwards
from mixture_of_experts.huggingface.private_transformers import convert_to_saved
from mixture_of_experts.huggingface.saving import folders
from mixture_of_experts.huggingface.saving.converting import quantize_folder
from mixture_of_experts.quantize import QuantizedExperts, quantize_experts

from .test_block_conversion import MODELS, build_model
from .test_folder_commands import MEASURED

pytestmark = pytest.mark.slow


def run_command(source: Path, target: Path, *more: str) -> int:
    return main(["quantize", str(source), str(target), "--bits", "4", "--group", "32", *more])


def make_upcycled() -> Any:
    model = ARCHITECTURES["llama"].build(intermediate_size=64).eval()
    upcycle(model, num_experts=4, noise=0.5, layers=[1], shared_expert=None)
    return model


#: by the name of what is saved: a function that makes it, and one that makes experts of this package of it
SAVED: dict[str, Any] = {
    "upcycled": (make_upcycled, lambda model: model),
    "converted": (lambda: from_transformers(build_model("DeepseekV3", hidden=32)), lambda model: model),
    **{name: (lambda name=name: build_model(name, hidden=32), from_transformers) for name in MODELS},
    "DeepseekV3, first layer dense": (
        lambda: build_model("DeepseekV3", hidden=32, first_k_dense_replace=1, num_hidden_layers=3),
        from_transformers,
    ),
}


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_command_writes_what_the_function_returns(name, dtype, tmp_path):
    torch.manual_seed(0)
    make, change = SAVED[name]
    model = make().to(dtype)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):  # is loaded in float32 whatever the model's dtype is
            module.e_score_correction_bias = torch.randn(module.e_score_correction_bias.shape)
    model.save_pretrained(tmp_path / "in", max_shard_size="40KB")
    (tmp_path / "in" / "tokenizer_config.json").write_text("{}")
    assert run_command(tmp_path / "in", tmp_path / "out", "--max-shard-size", "40KB") == 0
    assert (tmp_path / "out" / "tokenizer_config.json").exists()
    wanted = change(AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=dtype))
    quantize_experts(wanted.requires_grad_(False), 4, group=32)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    state = found.state_dict()
    assert state.keys() == wanted.state_dict().keys()
    for key, value in wanted.state_dict().items():
        assert state[key].dtype == value.dtype or value.shape == (1, 1, 1), key  # which stands for a layer
        assert state[key].equal(value), key
    assert all(isinstance(layer.moe.experts, QuantizedExperts) for layer in find_feed_forwards(found))
    tokens = torch.randint(3, 64, (2, 9))
    assert found(tokens).logits.equal(wanted(tokens).logits)
    found.save_pretrained(tmp_path / "again")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype)(tokens).logits.equal(
        found(tokens).logits
    )
    assert plain_nibbles(tmp_path / "out")


def plain_nibbles(folder: Path) -> bool:
    """Whether a file has pairs of outputs, whatever the CPU; there are as many as fill 64 outputs."""
    layers = json.loads((folder / "config.json").read_text())["dense_config"]["quantization_config"]["layers"]
    shapes = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            shapes += [weights.get_slice(key).get_shape() for key in weights.keys() if key.endswith("_packed")]  # noqa: SIM118
    assert shapes
    return all(entry["forms"]["moe.experts"]["block"] == 2 for entry in layers) and all(
        shape[-1] == 1 and shape[-3] % 32 == 0 for shape in shapes
    )


def test_weights_keep_the_dtypes_of_their_files(tmp_path):
    """A float32 gate in a model of bfloat16."""
    model = ARCHITECTURES["llama"].build().bfloat16()
    upcycle(model, num_experts=4)
    for layer in find_feed_forwards(model):
        layer.moe.gate.float()
    model.save_pretrained(tmp_path / "in")
    quantize_folder(tmp_path / "in", tmp_path / "out", bits=8)
    wanted, found = (folders.read_weights(tmp_path / name) for name in ("in", "out"))
    same = [name for name in wanted if ".experts." not in name]
    assert {wanted[name].dtype for name in same} == {torch.float32, torch.bfloat16}
    assert all(found[name].dtype == wanted[name].dtype and found[name].equal(wanted[name]) for name in same)


def test_rejects_unsupported_models(tmp_path, capsys):
    """Nothing is left of it."""
    build_model("Mixtral").save_pretrained(tmp_path / "24")
    ARCHITECTURES["llama"].build().save_pretrained(tmp_path / "dense")
    build_model("Mixtral", hidden=32).save_pretrained(tmp_path / "quantised")
    config = json.loads((tmp_path / "quantised" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config))
    for name, error in (
        ("24", "4-bit quantization requires dimensions that are multiples"),
        ("dense", "LlamaForCausalLM has no sparse blocks"),
        ("quantised", "is already quantized (fp8); pass the folder of the unquantized model"),
    ):
        before = sorted(tmp_path.iterdir())
        assert run_command(tmp_path / name, tmp_path / "out") == 1
        assert error in capsys.readouterr().err
        assert sorted(tmp_path.iterdir()) == before
    assert main(["quantize", str(tmp_path / "24"), str(tmp_path / "out")]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {layer.moe.experts.bits for layer in find_feed_forwards(loaded)} == {8}
    assert run_command(tmp_path / "out", tmp_path / "again") == 1
    assert "has no stacked experts (Experts, GatedExperts); it has QuantizedExperts" in capsys.readouterr().err


def write_stock(folder: Path, layers: int) -> float:
    """Write a Mixtral weight by weight; return the megabytes of its files."""
    sizes = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=layers, num_local_experts=8, vocab_size=64)
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, dtype=torch.bfloat16)
    with torch.device("meta"):
        model: Any = MixtralForCausalLM(config)
    folder.mkdir()
    shards = folders.ShardWriter(folder, 10**7, folder)
    for name, weight in model.state_dict().items():
        value = torch.empty(weight.shape, dtype=torch.bfloat16).normal_(std=weight.shape[-1] ** -0.5)
        shards.add_weights(convert_to_saved(model, {name: value}))
    shards.close()
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


LOADED = """
import re, sys
from mixture_of_experts.huggingface import from_pretrained
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1e3
before = peak()
from_pretrained(sys.argv[1], dtype="auto")
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="it tells the peak of a process")
def test_memory(tmp_path):
    """A model ten times as large as the memory that is used is quantised, beside pages of its files, which the system
    may drop. It is loaded without its weights in 16 bits: into memory of its 4 bits, beside as many pages."""
    size = write_stock(tmp_path / "in", layers=80)
    folders, options, peaks = (tmp_path / "in", tmp_path / "out"), ("--bits", "4", "--max-shard-size", "10MB"), []
    for words in ((MEASURED, "quantize", *folders, *options), (LOADED, tmp_path / "out")):
        command = [sys.executable, "-c", *map(str, words)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(float(done.stdout.split()[-1]))
    assert size > 1000
    assert peaks[0] < size / 10, peaks
    assert peaks[1] < 0.7 * size, peaks
