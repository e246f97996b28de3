"""The commands on folders end with one line that names what is wrong and what to do, and leave nothing behind."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.transformers_families import build_model as build_sparse
from support.transformers_models import ARCHITECTURES
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mixture_of_experts.huggingface import export, from_pretrained, from_transformers, upcycle
from mixture_of_experts.huggingface.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore:.*unclosed file:ResourceWarning")


def save_dense(folder: Path) -> None:
    ARCHITECTURES["llama"].build().save_pretrained(folder)


def save_mixture(folder: Path) -> None:
    model = ARCHITECTURES["llama"].build(intermediate_size=64)
    upcycle(model, num_experts=4)
    model.save_pretrained(folder)


def save_stock(folder: Path) -> None:
    build_sparse("mixtral").save_pretrained(folder)


#: a command, and what saves a folder for it
COMMANDS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "upcycle": ("upcycle", save_dense),
    "export": ("export", save_mixture),
    "quantize": ("quantize", save_mixture),
    "quantize a stock model": ("quantize", save_stock),
}
each_command = pytest.mark.parametrize("case", COMMANDS)


def run_command(command: str, folder: Path, *options: str) -> int:
    return main([command, str(folder / "in"), str(folder / "out"), *options])


def read_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of standard error, which is the error; progress bars and reports of transformers precede it."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.rstrip("\n").rpartition("\n")[2].rpartition("\r")[2]


def rewrite_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    (file,) = folder.glob("*.safetensors")
    held = {name: value.clone() for name, value in load_file(file).items()}
    change(held)
    save_file(held, file, metadata={"format": "pt"})


# ---- a full disk ----


@contextmanager
def limited_file_size(size: int) -> Iterator[None]:
    """Make the system refuse to write more bytes than these into a file, as a full disk does."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


@each_command
def test_full_disk_while_weights_are_written(case, tmp_path, capsys):
    command, save = COMMANDS[case]
    save(tmp_path / "in")
    with limited_file_size(10_000):
        assert run_command(command, tmp_path) == 1
    error = read_error(capsys)
    assert error.startswith(f"error: cannot write {tmp_path / 'out'}")
    assert "free up disk space, or choose a target on another disk" in error
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json", "model.safetensors.index.json"])
def test_full_disk_while_other_files_are_written(file, tmp_path, capsys, monkeypatch):
    """The file is the only one that exceeds the limit."""
    save_dense(tmp_path / "in")
    large, size = " " * 500_000, "1GB"
    if file == "tokenizer.json":
        (tmp_path / "in" / file).write_text(large)
    elif file == "config.json":
        config = json.loads((tmp_path / "in" / file).read_text())
        (tmp_path / "in" / file).write_text(json.dumps({**config, "notes": large}))
    else:  # a small model has a small index
        size = "1KB"
        monkeypatch.setattr("mixture_of_experts.huggingface.saving.folders.json.dumps", lambda *_, **__: large)
    with limited_file_size(400_000):
        assert run_command("upcycle", tmp_path, "--num-experts", "2", "--max-shard-size", size) == 1
    error = read_error(capsys)
    assert error.startswith(f"error: cannot write {tmp_path / 'out'}")
    assert file in error
    assert os.listdir(tmp_path) == ["in"]


# ---- config.json ----


def change_entry(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the description of the first layers with experts."""
    path = folder / "config.json"
    held = json.loads(path.read_text())
    change(held["dense_config"]["quantization_config"]["layers"][0])
    path.write_text(json.dumps(held))


@pytest.mark.parametrize(
    ("path", "form"),
    [
        ("moe.experts", "NoSuchExperts"),
        ("moe.experts", {"class": "NoSuchExperts", "bits": 4}),
        ("moe.experts", {"bits": 4}),
        ("moe.experts", {"class": ["QuantizedExperts"]}),
        ("moe.experts", 5),
        ("moe.experts", None),
        ("moe.experts", {"class": "QuantizedExperts", "bots": 4}),
        ("moe.experts", {"class": "QuantizedExperts", "bits": 4, "group": "x"}),
        ("moe.experts", {"class": "QuantizedExperts", "bits": 4, "group": 48}),
        ("moe.nothing", "QuantizedExperts"),
        ("moe.gate", "QuantizedExperts"),
    ],
)
def test_a_form_that_no_experts_have_is_rejected(path, form, tmp_path, capsys):
    save_mixture(tmp_path / "in")
    change_entry(tmp_path / "in", lambda entry: entry.update(forms={path: form}))
    assert run_command("quantize", tmp_path) == 1
    error = read_error(capsys)
    assert error.startswith(f"error: config.json describes {path!r} as {form!r}")
    assert "QuantizedExperts, UnstackedExperts" in error
    assert "save the model again" in error
    assert os.listdir(tmp_path) == ["in"]
    with pytest.raises(ValueError, match=r"config\.json describes"):
        from_pretrained(tmp_path / "in")


@pytest.mark.parametrize(
    ("key", "value"), [("class", "NoSuchGating"), ("class", ["TopKGating"]), ("arguments", {"kay": 2})]
)
def test_a_gate_that_does_not_exist_is_rejected(key, value, tmp_path, capsys):
    save_mixture(tmp_path / "in")
    change_entry(tmp_path / "in", lambda entry: entry["gate"].update({key: value}))
    assert run_command("export", tmp_path) == 1
    error = read_error(capsys)
    assert error.startswith("error: config.json describes the gate {")
    assert repr(value) in error
    assert "TopKGating" in error
    assert "save the model again" in error


# ---- weights ----

#: a weight outside of layers with experts, and one of them
SHAPED = {
    "upcycle": ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"),
    "export": ("model.norm.weight", "model.layers.0.mlp.moe.experts.w1"),
    "quantize": ("model.norm.weight", "model.layers.0.mlp.moe.gate.w_gating"),
    "quantize a stock model": ("model.norm.weight", "model.layers.0.block_sparse_moe.experts.1.w1.weight"),
}
#: what the error names: for experts that cannot be stacked, the stack
NAMED = {"model.layers.0.block_sparse_moe.experts.1.w1.weight": "model.layers.0.mlp.experts.gate_up_proj"}


@pytest.mark.parametrize("place", [0, 1], ids=["other", "experts"])
@each_command
def test_weights_of_wrong_shapes_are_rejected(case, place, tmp_path, capsys):
    command, save = COMMANDS[case]
    save(tmp_path / "in")
    name = SHAPED[case][place]
    rewrite_weights(tmp_path / "in", lambda held: held.update({name: held[name][..., 1:].clone()}))
    assert run_command(command, tmp_path) == 1
    error = read_error(capsys)
    assert error.startswith("error: ")
    assert "config.json" in error
    assert "shape" in error
    assert NAMED.get(name, name) in error
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("name", ["model.layers.0.extra.weight", "model.layers.7.mlp.up_proj.weight"])
@each_command
def test_weights_without_a_place_are_rejected(case, name, tmp_path, capsys):
    """They were left out of the new folder, with exit status 0."""
    command, save = COMMANDS[case]
    save(tmp_path / "in")
    rewrite_weights(tmp_path / "in", lambda held: held.update({name: torch.zeros(2)}))
    assert run_command(command, tmp_path) == 1
    error = read_error(capsys)
    assert f"the files contain {name}, but the model described by" in error
    assert "load and save the model with transformers" in error
    assert os.listdir(tmp_path) == ["in"]


def test_weights_that_a_class_ignores_are_left_out(tmp_path):
    """As in GPT-2 on the hub: the masks of its attention."""
    ARCHITECTURES["gpt2"].build().save_pretrained(tmp_path / "in")
    rewrite_weights(tmp_path / "in", lambda held: held.update({"transformer.h.0.attn.bias": torch.zeros(2)}))
    assert run_command("upcycle", tmp_path, "--num-experts", "2") == 0


def upcycle_tied() -> Any:
    model = ARCHITECTURES["llama"].build(intermediate_size=64, tie_word_embeddings=True)
    upcycle(model, num_experts=4)
    return model


def build_tied() -> Any:
    return build_sparse("mixtral", tie_word_embeddings=True)


#: commands and functions, with builders of the models in their folders
WITH_TIED_WEIGHTS: dict[str, tuple[str, Callable[[], Any]]] = {
    "convert": ("convert", build_tied),
    "quantize": ("quantize", build_tied),
    "export": ("export", upcycle_tied),
    "export of blocks": ("export", lambda: from_transformers(build_tied())),
    "export()": ("", upcycle_tied),
}


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("case", WITH_TIED_WEIGHTS)
def test_tied_weights_may_be_in_files(case, equal, tmp_path):
    """`lm_head.weight` next to the embedding. If they differ, transformers does not tie them."""
    command, build = WITH_TIED_WEIGHTS[case]
    build().save_pretrained(tmp_path / "in")

    def add_head(held: dict[str, Tensor]) -> None:
        embedding = held["model.embed_tokens.weight"]
        held["lm_head.weight"] = embedding.clone() if equal else torch.randn_like(embedding)

    rewrite_weights(tmp_path / "in", add_head)
    model, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / "in"), torch.arange(3, 21).view(2, 9)
    if command:
        assert run_command(command, tmp_path) == 0
    else:
        export(model).save_pretrained(tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tolerance = 0.5 if command == "quantize" else 1e-4  # logits are up to 20
    torch.testing.assert_close(found(tokens).logits, model(tokens).logits, atol=tolerance, rtol=0)
    assert found.lm_head.weight.equal(model.lm_head.weight)
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == equal
    if "export" in case:  # engines do not compare the weights
        assert found.config.tie_word_embeddings == equal


def to_integers(held: dict[str, Tensor], name: str, dtype: torch.dtype) -> None:
    held[name] = (held[name] * 100).to(dtype)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool])
@pytest.mark.parametrize("place", [0, 1], ids=["other", "experts"])
@each_command
def test_integers_for_floating_point_weights_are_rejected(case, place, dtype, tmp_path, capsys):
    """They were cast, and gave finite, wrong logits."""
    command, save = COMMANDS[case]
    save(tmp_path / "in")
    name = SHAPED[case][place]
    rewrite_weights(tmp_path / "in", lambda held: to_integers(held, name, dtype))
    assert run_command(command, tmp_path) == 1
    error = read_error(capsys)
    assert f"{name} is stored with dtype {dtype}, but" in error
    assert "save the model again" in error
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("name", ["moe.gate.w_gating", "moe.experts.w2"])
def test_loading_rejects_integers_for_floating_point_weights(name, max_shard_size, tmp_path):
    model, name = ARCHITECTURES["llama"].build(intermediate_size=64), f"model.layers.0.mlp.{name}"
    upcycle(model, num_experts=4)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    for file in tmp_path.glob("*.safetensors"):
        held = load_file(file)
        if name in held:
            to_integers(held, name, torch.int64)
            save_file(held, file, metadata={"format": "pt"})
    loaders = (from_pretrained, AutoModelForCausalLM.from_pretrained, LlamaForCausalLM.from_pretrained)
    for load, settings in itertools.product(loaders, ({}, {"dtype": torch.bfloat16})):
        with pytest.raises(ValueError, match=rf"{name} is stored with dtype torch.int64, but"):
            load(tmp_path, **settings)


@pytest.mark.parametrize("bits", [8, 4])
def test_loading_takes_the_bytes_of_quantized_experts(bits, tmp_path):
    save_mixture(tmp_path / "in")
    assert run_command("quantize", tmp_path, "--bits", str(bits), "--group", "32") == 0
    names = [name for name, value in from_pretrained(tmp_path / "out").state_dict().items() if "packed" in name]
    assert names


# ---- signals ----


@pytest.mark.slow
def test_terminated_command_cleans_up(tmp_path):
    """SIGTERM while shards are written: exit status 143, and no folder is left."""
    sizes = dict(vocab_size=64, hidden_size=256, intermediate_size=256, num_attention_heads=4)
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=16, **sizes)).save_pretrained(tmp_path / "in")
    words = ["upcycle", str(tmp_path / "in"), str(tmp_path / "out"), "--max-shard-size", "2MB"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mixture_of_experts.huggingface", *words], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and not list(tmp_path.glob(".out.*.unfinished/part-2.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in error
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("succeeds", [True, False])
def test_signal_handler_is_restored(succeeds, tmp_path):
    save_dense(tmp_path / "in")
    if not succeeds:
        (tmp_path / "out").mkdir()
    before = signal.signal(signal.SIGTERM, handler := lambda *_: None)
    try:
        assert run_command("upcycle", tmp_path, "--num-experts", "2") == 1 - succeeds
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
