"""Folders that others made: none of their code runs, and what they describe is checked before it is used."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.transformers_families import build_model as build_sparse
from support.transformers_models import ARCHITECTURES
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from mixture_of_experts.huggingface import from_pretrained, from_transformers, replace_ffn
from mixture_of_experts.huggingface.__main__ import main
from mixture_of_experts.huggingface.feed_forward import find_feed_forwards
from mixture_of_experts.huggingface.saving.folders import INDEX_FILE

COMMANDS = ("upcycle", "quantize", "export")
EVIL = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
"""
AUTO_MAP = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    held = json.loads(path.read_text())
    change(held)
    path.write_text(json.dumps(held))


@pytest.fixture
def evil(tmp_path: Path) -> tuple[Path, Path]:
    """A folder whose configuration asks for its own code, and the file that this code writes."""
    folder, marker = tmp_path / "evil", tmp_path / "marker"
    ARCHITECTURES["llama"].build().save_pretrained(folder)
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    change_config(folder, lambda held: held.update(model_type="evil", auto_map=AUTO_MAP))
    return folder, marker


@pytest.fixture
def answers_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))


# ---- code ----


@pytest.mark.parametrize("settings", [{}, {"trust_remote_code": False}], ids=["default", "False"])
def test_from_pretrained_runs_no_code_of_a_folder(settings, evil, answers_yes):
    folder, marker = evil
    with pytest.raises(ValueError, match="trust_remote_code"):
        from_pretrained(folder, **settings)
    assert not marker.exists()


def test_from_pretrained_runs_code_that_the_caller_trusts(evil):
    folder, marker = evil
    with pytest.raises(ValueError, match="has no experts"):
        from_pretrained(folder, trust_remote_code=True)
    assert marker.exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_no_code_of_a_folder(command, evil, answers_yes, tmp_path, capsys):
    folder, marker = evil
    assert main([command, str(folder), str(tmp_path / "out")]) == 1
    assert "trust_remote_code" in capsys.readouterr().err
    assert not marker.exists()


@pytest.mark.slow
def test_a_command_in_a_process_of_its_own(evil, tmp_path):
    folder, marker = evil
    words = [sys.executable, "-m", "mixture_of_experts.huggingface", "upcycle", str(folder), str(tmp_path / "out")]
    done = subprocess.run(words, input="y\n" * 20, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "Do you wish to run" not in done.stdout
    assert not marker.exists()


@pytest.mark.parametrize("architecture", ["AutoModelForCausalLM", "pipeline", "LlamaConfig", "EvilModel"])
def test_the_class_in_config_json_must_be_a_model(architecture, answers_yes, tmp_path, capsys):
    """An Auto class there would ask for the code of the folder; a function is no class."""
    folder, marker = tmp_path / "in", tmp_path / "marker"
    model = ARCHITECTURES["llama"].build()
    replace_ffn(model, num_experts=4)
    model.save_pretrained(folder)
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))

    def change(held: dict[str, Any]) -> None:
        held["architectures"] = held["dense_config"]["architectures"] = [architecture]
        held["auto_map"] = held["dense_config"]["auto_map"] = AUTO_MAP

    change_config(folder, change)
    with pytest.raises(ValueError, match=f"transformers has no model class '{architecture}'"):
        from_pretrained(folder)
    assert main(["export", str(folder), str(tmp_path / "out")]) == 1
    assert "has no model class" in capsys.readouterr().err
    assert type(from_pretrained(folder, AutoModelForCausalLM)).__name__ == "LlamaForCausalLM"
    assert not marker.exists()


# ---- settings of layers ----


def with_changed(tmp_path: Path, changed: dict[str, Any], block: bool = False) -> Path:
    """A folder whose description of the first layers has these entries of "changed"."""
    if block:
        from_transformers(build_sparse("mixtral")).save_pretrained(tmp_path)
    else:
        model = ARCHITECTURES["llama"].build()
        replace_ffn(model, num_experts=4)
        model.save_pretrained(tmp_path)

    def change(held: dict[str, Any]) -> None:
        held["dense_config"]["quantization_config"]["layers"][0]["changed"] = changed

    change_config(tmp_path, change)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("moe.experts.gated", False),  # other logits
        ("moe.experts.w1", None),  # passed the check for missing weights
        ("moe.gate.w_gating", None),
        ("moe.experts.act", None),
        ("moe.experts.act.inplace", True),
        ("moe.shared_expert", None),
        ("moe.gate.num_experts", 2),
        ("moe.gate.training", True),
        ("moe.gate.forced", "random"),
        ("record", None),
        ("moe.nothing.here", 1),
        ("forward", "x"),
        ("", 1),
    ],
)
@pytest.mark.parametrize("block", [False, True], ids=["network", "block"])
def test_an_entry_that_is_no_setting_is_rejected(block, path, value, tmp_path):
    folder = with_changed(tmp_path, {"moe.group_size": 6, path: value}, block)
    for load in (from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=rf"sets {path!r} to {value!r}, but the layer has no such setting"):
            load(folder)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("moe.gate.k", None),
        ("moe.gate.k", 0),
        ("moe.gate.k", 5),
        ("moe.gate.k", "2"),
        ("moe.gate.logits", 5),
        ("moe.gate.num_groups", 3),
        ("moe.gate.score", "nothing"),
        ("moe.gate.normalize", 2),
        ("moe.gate.capacity_factor_train", -1),
        ("moe.gate.weigh", None),
        ("moe.group_size", 0),
        ("moe.experts.dropout", 2.0),
        ("moe.experts.dropout", None),
        ("moe.gate.scale", [1, 2]),
        ("moe.gate.scale", {"a": 1}),
    ],
)
def test_a_value_that_no_setting_has_is_rejected(path, value, tmp_path):
    """In a block, whose gate is no part of the description."""
    folder = with_changed(tmp_path, {path: value}, block=True)
    with pytest.raises(ValueError, match=r"config.json") as raised:
        from_pretrained(folder)
    assert path in str(raised.value)
    assert repr(value) in str(raised.value)


def test_settings_that_need_each_other_are_accepted(tmp_path):
    """Neither alone is allowed."""
    folder = with_changed(tmp_path, {"moe.gate.num_groups": 2, "moe.gate.top_groups": 1, "moe.gate.k": 1}, block=True)
    gate = find_feed_forwards(from_pretrained(folder))[0].moe.gate
    assert (gate.num_groups, gate.top_groups, gate.k) == (2, 1, 1)


@pytest.mark.parametrize("value", [None, 1.5, "half", -0.5])
def test_a_dropout_that_is_none_is_rejected(value, tmp_path):
    model = ARCHITECTURES["gpt2"].build()
    replace_ffn(model, num_experts=4)
    model.save_pretrained(tmp_path)

    def change(held: dict[str, Any]) -> None:
        held["dense_config"]["quantization_config"]["layers"][0]["changed"] = {"dropout.p": value}

    change_config(tmp_path, change)
    with pytest.raises(ValueError, match=r"dropout.p"):
        from_pretrained(tmp_path)


# ---- shards ----


def sharded(folder: Path) -> dict[str, str]:
    """Save a model with experts in shards; return their index."""
    model: Any = ARCHITECTURES["llama"].build()
    replace_ffn(model, num_experts=4)
    model.save_pretrained(folder, max_shard_size="40KB")
    return json.loads((folder / INDEX_FILE).read_text())["weight_map"]


def rewrite_shard(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    held = {name: value.clone() for name, value in load_file(file).items()}
    change(held)
    save_file(held, file, metadata={"format": "pt"})


LOADERS = [from_pretrained, AutoModelForCausalLM.from_pretrained, LlamaForCausalLM.from_pretrained]


def test_shards_that_disagree_with_their_index(tmp_path, capsys):
    """A copy in the last shard was what all loaders took."""
    folder = tmp_path / "in"
    weight_map = sharded(folder)
    name = "model.layers.0.mlp.moe.experts.w1"
    last = max(file for file in weight_map.values() if file != weight_map[name])
    size = from_pretrained(folder).state_dict()[name].shape
    assert main(["quantize", str(folder), str(tmp_path / "before")]) == 0
    rewrite_shard(folder / last, lambda held: held.update({name: torch.zeros(size)}))
    assert main(["quantize", str(folder), str(tmp_path / "after")]) == 0
    before, after = (load_file(tmp_path / out / "model.safetensors") for out in ("before", "after"))
    assert all(torch.equal(before[key], after[key]) for key in before.keys() | after.keys())
    for load in LOADERS:
        with pytest.raises(ValueError, match=rf"{last} contains {name}, which its index assigns to {weight_map[name]}"):
            load(folder)


def test_weights_that_the_index_lacks(tmp_path, capsys):
    folder = tmp_path / "in"
    file = max(sharded(folder).values())
    rewrite_shard(folder / file, lambda held: held.update({"model.layers.0.extra": torch.zeros(2)}))
    problem = rf"{file} contains model.layers.0.extra, which is not in its index"
    for load in LOADERS:
        with pytest.raises(ValueError, match=problem):
            load(folder)
    assert main(["quantize", str(folder), str(tmp_path / "out")]) == 1
    assert f"{file} contains model.layers.0.extra, which is not in its index" in capsys.readouterr().err


def test_weights_that_a_shard_lacks(tmp_path, capsys):
    """Also where another shard has them."""
    folder = tmp_path / "in"
    weight_map = sharded(folder)
    name = "model.layers.0.mlp.moe.experts.w1"
    other = min(file for file in weight_map.values() if file != weight_map[name])
    moved = load_file(folder / weight_map[name])[name]
    rewrite_shard(folder / weight_map[name], lambda held: held.__delitem__(name))
    rewrite_shard(folder / other, lambda held: held.update({name: moved}))
    for load in LOADERS:
        with pytest.raises(ValueError, match=rf"{name}"):
            load(folder)
    assert main(["quantize", str(folder), str(tmp_path / "out")]) == 1
    assert f"the files have no {name}" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["above", "absolute", "below"])
def test_shards_outside_of_the_folder(how, tmp_path):
    folder, other = tmp_path / "in", tmp_path / "other"
    weight_map = sharded(folder)
    other.mkdir()
    for moved in ({*weight_map.values()}, {min(weight_map.values())}):
        for file in moved & {path.name for path in folder.glob("*.safetensors")}:
            (other / file).write_bytes((folder / file).read_bytes())
        start = {"above": "../other/", "absolute": f"{other}/", "below": "../in/../other/"}[how]
        index = {name: start + file if file in moved else file for name, file in weight_map.items()}
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": index}))
        for load in LOADERS:
            with pytest.raises(ValueError, match=r"other/model-.* is outside the folder"):
                load(folder)


def test_shards_in_a_subfolder(tmp_path):
    sharded(tmp_path / "model" / "inner")
    loaded = from_pretrained(tmp_path / "model", subfolder="inner")
    assert len(find_feed_forwards(loaded)) == 2
