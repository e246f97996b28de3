"""Weights are saved under the names of the state dict, which the `Trainer` looks for, and older folders still load."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.earlier_versions import ROOT
from support.transformers_families import build_model as build_family
from support.transformers_families import list_other_classes, list_text_types
from torch import nn
from transformers import AutoModelForCausalLM, ViTForImageClassification
from transformers.trainer_utils import load_sharded_checkpoint

from mixture_of_experts.huggingface import (
    export,
    from_pretrained,
    from_transformers,
    to_transformers,
    upcycle,
)
from mixture_of_experts.huggingface.saving.converting import quantize_folder
from mixture_of_experts.huggingface.saving.folders import upcycle_folder
from mixture_of_experts.quantize import quantize_experts

from .test_block_conversion import build_model
from .test_losses import make_batch, make_trainer
from .test_saving import WrappedGate, as_before, same_weights

#: families whose classes have other names for weights in files, or other forms of them, and how they get layers
RENAMED = {
    "mixtral": from_transformers,
    "minimax": from_transformers,
    "minimax_m2": from_transformers,
    "mistral_large4": from_transformers,
    "nemotron_h": from_transformers,
    "phimoe": from_transformers,
    "deepseek_v3": upcycle,  # its last layer stays a stock block, whose experts files have one by one
    "gpt_neox": upcycle,
    "vit": upcycle,
}
SOME = ("mixtral", "deepseek_v3", "vit")
each = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SOME else pytest.mark.slow) for name in RENAMED]
)
LARGE = 3e7  # parameters of a model that the rules of the tiny ones leave large
#: models whose rows of padding transformers sets to zero when it loads them
PADDED = {"upcycle funnel", "upcycle youtu", "upcycle chinese_clip"}


def changed(name: str) -> Any:
    """A tiny model of a family, with layers."""
    model = build_family(name, ViTForImageClassification if name == "vit" else None)
    RENAMED[name](model)
    return model


def files_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}


def differing(model: Any, folder: Path) -> list[str]:
    """The names that a folder's files and a model's state dict do not have in common, or whose weights differ. Of tied
    weights a file has one."""
    files, state, tied = files_of(folder), model.state_dict(), model.all_tied_weights_keys
    names = {name for name in files.keys() | state.keys() if not (name in tied and name not in files)}
    return sorted(n for n in names if n not in files or n not in state or not torch.equal(files[n], state[n]))


def drawn_again(model: nn.Module) -> Any:
    """A copy with other weights in all places, as a `Trainer` has before it resumes."""
    model = copy.deepcopy(model)
    for weight in model.state_dict().values():
        weight.add_(1)
    return model


@each
def test_files_have_the_names_of_the_state_dict(name, tmp_path):
    model = changed(name)
    model.save_pretrained(tmp_path / "saved")
    assert differing(model, tmp_path / "saved") == []
    again = type(model).from_pretrained(tmp_path / "saved")
    same_weights(again, model)
    again.save_pretrained(tmp_path / "again")  # a loaded one is saved so too
    assert differing(model, tmp_path / "again") == []


@each
def test_folders_of_earlier_versions_load(name, tmp_path):
    model = changed(name)
    as_before(model, tmp_path / "before")
    assert differing(model, tmp_path / "before") != []
    again = type(model).from_pretrained(tmp_path / "before")
    same_weights(again, model)
    again.save_pretrained(tmp_path / "again")
    assert differing(model, tmp_path / "again") == []


def test_what_an_earlier_version_wrote_has_the_names_of_its_class():
    """So that `test_backward_compatibility.py`, which loads it and computes with it, shows that such folders load."""
    names = load_file(ROOT / "folders" / "converted" / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.moe.experts.w1" in names


@pytest.mark.parametrize("name", ["mixtral", "mistral_large4"])
def test_a_part_of_a_model_is_saved_so_too(name, tmp_path):
    """The model without its head; and a model in it, whose own configuration does not tell of layers."""
    model = changed(name)
    base = model.base_model
    base.save_pretrained(tmp_path / "base")
    assert differing(base, tmp_path / "base") == []
    same_weights(type(base).from_pretrained(tmp_path / "base"), base)
    if name == "mistral_large4":
        base.language_model.save_pretrained(tmp_path / "text")
        assert differing(base.language_model, tmp_path / "text") == []


def test_a_model_in_a_module_of_ones_own(tmp_path):
    around = WrappedGate()
    around.first = build_family("deepseek_v3")
    upcycle(around, num_experts=4, layers=["first.model.layers.0.mlp"])
    around.first.save_pretrained(tmp_path)
    assert differing(around.first, tmp_path) == []


def test_the_base_of_a_saved_model_gets_its_stock_blocks(tmp_path):
    """Their own names are none that the class would rename: of `.gate.` it makes `.mlp.gate.` in all that it loads."""
    model = build_family("mistral_large4")
    upcycle(model)
    model.save_pretrained(tmp_path)
    same_weights(type(model.base_model).from_pretrained(tmp_path), model.base_model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_saved_so_too(copied, tmp_path):
    model = copied(changed("mixtral"))
    model.save_pretrained(tmp_path)
    assert differing(model, tmp_path) == []


def test_several_files_are_read_as_they_are(tmp_path):
    """By the function of transformers that a `Trainer` reads them with."""
    model = changed("mixtral")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    assert differing(model, tmp_path) == []
    again = drawn_again(model)
    load_sharded_checkpoint(again, str(tmp_path))
    same_weights(again, model)


def test_quantised_experts(tmp_path):
    model = changed("mixtral").requires_grad_(False)
    quantize_experts(model)
    model.save_pretrained(tmp_path / "saved")
    assert differing(model, tmp_path / "saved") == []
    same_weights(from_pretrained(tmp_path / "saved"), model)
    as_before(model, tmp_path / "before")
    same_weights(from_pretrained(tmp_path / "before"), model)


def test_commands_write_the_same_names(tmp_path):
    """Models whose blocks are quantised, and whose dense layers are upcycled beside stock blocks."""
    for name, change in (("mixtral", quantize_folder), ("deepseek_v3", upcycle_folder)):
        build_family(name).save_pretrained(tmp_path / name)
        change(tmp_path / name, tmp_path / f"{name} changed")
        model = from_pretrained(tmp_path / f"{name} changed")
        assert differing(model, tmp_path / f"{name} changed") == []


# Stock models


def published(model: Any, folder: Path) -> set[str]:
    model.save_pretrained(folder)
    return {*files_of(folder)}


@pytest.mark.parametrize("name", ["mixtral", "phimoe", pytest.param("kimi_linear", marks=pytest.mark.slow)])
@pytest.mark.parametrize("loaded", [False, True])
def test_stock_models_have_the_names_of_their_class_again(name, loaded, tmp_path):
    """Those that were built, and those that were loaded, as they were before they got layers."""
    model = build_family(name)
    wanted = published(model, tmp_path / "stock")
    if loaded:
        model = type(model).from_pretrained(tmp_path / "stock")
    assert published(to_transformers(from_transformers(model)), tmp_path / "there and back") == wanted
    from_transformers(model).save_pretrained(tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved")
    assert published(to_transformers(again), tmp_path / "loaded and back") == wanted
    stock = type(model).from_pretrained(tmp_path / "loaded and back")
    same_weights(stock, to_transformers(model))


def test_exported_models_have_the_names_of_their_class(tmp_path):
    model = build_family("llama")
    upcycle(model, num_experts=4)
    names = published(export(model), tmp_path)
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in names
    assert not any(".mlp." in name for name in names)


# Trainer


def converted() -> Any:
    torch.manual_seed(1)
    return from_transformers(build_model("Mixtral"), loss_coef=0.1).train()


def run(model: Any, folder: Path, resume: str | None = None, **settings: Any) -> list[float]:
    """Train a model; return the losses of its steps."""
    torch.manual_seed(3)
    settings = dict(optim="adamw_torch", learning_rate=0.01, max_steps=4, logging_steps=1, **settings)
    made = make_trainer(model, make_batch(16), folder, **settings)
    del model.zero_grad
    made.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore")  # of the Trainer, on pinned memory and the like
def test_a_resumed_run_of_blocks_is_the_run(tmp_path):
    whole, resumed = converted(), converted()
    losses = run(whole, tmp_path / "whole", save_strategy="steps", save_steps=2)
    assert run(resumed, tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-2")) == losses
    same_weights(resumed, whole)
    assert not torch.equal(whole.model.layers[0].mlp.moe.experts.w1, converted().model.layers[0].mlp.moe.experts.w1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_best_model_is_loaded_whole(tmp_path):
    """Here the first one, of which the last step's model has no weight."""
    model = converted()
    steps: Any = dict(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1)
    best: Any = dict(load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True)
    run(model, tmp_path, **steps, **best)
    same_weights(model, AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1"))
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert not torch.equal(last.model.layers[0].mlp.moe.experts.w1, model.model.layers[0].mlp.moe.experts.w1)


# Every family


def all_changed() -> Iterator[tuple[str, Any]]:
    """Models of all families that can be built tiny: upcycled ones, and ones whose blocks became layers."""
    others = list_other_classes()
    for name in [*list_text_types(), *others]:
        for change in (upcycle, from_transformers):
            with contextlib.suppress(Exception):  # any where the rules do not fit, or the family is refused
                model = build_family(name, others.get(name))
                if sum(weight.numel() for weight in model.parameters()) < LARGE:
                    change(model)
                    yield f"{change.__name__} {name}", model


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_every_family(tmp_path):
    """All that upcycle, and all whose blocks become layers."""
    wrong, names = {}, []
    for name, model in all_changed():
        names.append(name)
        model.save_pretrained(tmp_path / name)
        if found := differing(model, tmp_path / name):
            wrong[name] = found[:3]
        if name not in PADDED:
            same_weights(from_pretrained(tmp_path / name, type(model)), model)
    assert not wrong
    assert len(names) > 290
