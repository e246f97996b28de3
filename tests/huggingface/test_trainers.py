"""Whatever a trainer computes, an optimizer's step receives the auxiliary loss once, or somebody is told."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.transformers_models import ARCHITECTURES
from support.transformers_trainers import (
    CASES,
    COEFFICIENT,
    Probe,
    build_model,
    in_two_processes,
    make_rows,
    measure_factor,
    run_sft,
)
from torch import nn

from mixture_of_experts.huggingface import Adapter, aux_loss, replace_ffn

from .test_block_conversion import build_model as build_sparse

# warnings of the trainers; those of this package are asked for
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
NOT = "`Trainer`, label smoothing"


def skip_without(package: str | None) -> None:
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")


def expected_factor(name: str) -> float:
    return 0.0 if name == NOT else 1.0


SLOW = ("TRL, DPO", "TRL, KTO", "TRL, GRPO", "Lightning")


@pytest.mark.parametrize(("accumulation", "padding"), [pytest.param(1, False, marks=pytest.mark.slow), (4, True)])
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_one_process(name, accumulation, padding):
    case, package = CASES[name]
    skip_without(package)
    assert measure_factor(case, accumulation, padding) == pytest.approx(expected_factor(name), abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TRL, SFT", "TRL, DPO"])
def test_another_architecture(name):
    skip_without("trl")
    assert measure_factor(CASES[name][0], 4, True, "gpt2") == pytest.approx(1.0, abs=1e-3)


@pytest.mark.slow
def test_two_processes(tmp_path: Path):
    names = [name for name, (_, package) in CASES.items() if package is None or importlib.util.find_spec(package)]
    for name, found in in_two_processes(names, tmp_path).items():
        assert found == pytest.approx([expected_factor(name)] * 3, abs=1e-3), name


def test_trl_switches_it_off(tmp_path: Path):
    """With no word of ours: it was asked for."""
    skip_without("trl")

    def off(model: nn.Module, accumulation: int, padding: bool, folder: Path) -> None:
        run_sft(model, accumulation, padding, folder, router_aux_loss_coef=0.0)

    assert measure_factor(off, 1, False) == 0
    model, batch = build_model(), {name: value[None] for name, value in make_rows(False)[0].items()}
    off(model, 1, False, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = model.eval()(**batch).loss
        torch.testing.assert_close(model.train()(**batch).loss, task)


@pytest.mark.parametrize("name", ["TRL, DPO", "TRL, KTO", "TRL, GRPO"])
def test_other_trainers_of_trl_switch_it_off(name, tmp_path: Path):
    """They change no configuration: that they do not ask for router logits tells."""
    skip_without("trl")
    model: Any = build_model()
    case: Any = CASES[name][0]
    with warnings.catch_warnings(record=True) as described:
        warnings.simplefilter("always")
        case(model, 2, False, tmp_path, router_aux_loss_coef=0.0)
        model(**{name: value[None] for name, value in make_rows(False)[0].items()})
    assert not [str(one.message) for one in described if "does not balance the experts" in str(one.message)]
    assert not model.probe.grad


@pytest.mark.slow
def test_trl_weighs_it():
    skip_without("trl")

    def weighed(model: nn.Module, accumulation: int, padding: bool, folder: Path) -> None:
        run_sft(model, accumulation, padding, folder, router_aux_loss_coef=COEFFICIENT / 2)

    assert measure_factor(weighed, 4, False) == pytest.approx(0.5, abs=1e-3)


def test_trl_evaluates(tmp_path: Path):
    skip_without("trl")
    from support.transformers_trainers import make_dataset, make_settings, make_texts, make_tokenizer
    from trl import SFTConfig, SFTTrainer

    model = build_model()
    data = make_dataset([{"text": text} for text in make_texts(True)])
    config = SFTConfig(**make_settings(1, tmp_path), bf16=False)
    made = SFTTrainer(model, args=config, train_dataset=data, eval_dataset=data, processing_class=make_tokenizer())
    assert made.evaluate()["eval_aux_loss"] > 0


def test_aux_loss_is_returned_on_request():
    """The Trainer's predictions stay what they were."""
    model, batch = build_model().eval(), {name: value[None] for name, value in make_rows(False)[0].items()}
    assert set(model(**batch)) == set(ARCHITECTURES["llama"].build()(**batch))
    out = model(**batch, output_router_logits=True)
    torch.testing.assert_close(out.aux_loss * COEFFICIENT, aux_loss(model))  # a trainer multiplies by it
    out.logits.sum().backward()


def test_a_model_with_routers_of_its_own():
    """Theirs is in `aux_loss` already, times their coefficient; ours comes to it."""
    model = build_sparse("Qwen3Moe", mlp_only_layers=[1], router_aux_loss_coef=0.125, output_router_logits=True).train()
    batch = {key: value[None] for key, value in make_rows(False)[0].items()}
    before = model(**batch)
    llama = Adapter(up="up_proj", down="down_proj", gate="gate_proj")
    assert len(replace_ffn(model, num_experts=4, loss_coef=COEFFICIENT, adapters={"Qwen3MoeMLP": llama})) == 1
    out = model(**batch, output_router_logits=True)
    theirs = out.aux_loss - aux_loss(model) / 0.125
    torch.testing.assert_close(theirs, before.aux_loss, atol=0.2, rtol=0.2)  # of other hidden states
    logits = model.eval()(**batch).logits
    task = nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:])
    torch.testing.assert_close(out.loss, task + 0.125 * theirs + aux_loss(model), atol=1e-4, rtol=1e-4)


def test_the_probe():
    """It is what it measures."""
    model = build_model()
    batch = {name: value[None] for name, value in make_rows(False)[0].items()}
    (0.5 * model(**batch).loss).backward()
    layers = sum(isinstance(hook, Probe) for module in model.modules() for hook in module._forward_hooks.values())
    assert model.probe.grad.item() / (COEFFICIENT * layers) == pytest.approx(0.5)
