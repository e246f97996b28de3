"""What adapters do not hold: the routers of a mixture that was made in memory, and an expert bias that moves."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from support.transformers_models import ARCHITECTURES, VOCABULARY, disable_dropout
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, SchedulerType, Trainer, TrainingArguments

from mixture_of_experts import MoE, TopKGating, balance_experts, control_sparsity
from mixture_of_experts.gating import ReLUGating
from mixture_of_experts.huggingface import (
    BalanceCallback,
    fast_lora,
    from_pretrained,
    from_transformers,
    prune,
    replace_ffn,
    upcycle,
)

from .test_block_conversion import build_model as build_stock

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # in PEFT
DRAWN = r"the routers in .*.0.mlp.moe.gate, .* were initialized in memory and are not saved with the adapters of Llama"
LOST = r"whose files do not contain what changes in .*model.layers.0.mlp.*list the gate in LoraConfig\(modules_to_save"


def make_batch(rows: int = 3) -> dict[str, Tensor]:
    tokens = torch.randint(3, VOCABULARY, (rows, 8))
    return {"input_ids": tokens, "labels": tokens}


def make_lora_config(**settings: Any) -> LoraConfig:
    experts = ["experts.w1", "experts.w3", "experts.w2"]
    return LoraConfig(r=2, target_modules=[], target_parameters=experts, init_lora_weights=False, **settings)


def make_dense(folder: Path) -> str:
    """The folder of a dense model."""
    disable_dropout(ARCHITECTURES["llama"].build()).save_pretrained(folder)
    return str(folder)


def load_upcycled(folder: str, **settings: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    upcycle(model, num_experts=4, **settings)
    return model


def make_upcycled() -> Any:
    model = ARCHITECTURES["llama"].build()
    upcycle(model, num_experts=4)
    return model


def compute_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(batch["input_ids"]).logits


def catch_warnings(run: Any) -> list[str]:
    """What is warned of."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run()
    return [str(one.message) for one in found if "adapters" in str(one.message)]


def get_base_model(folder: Path) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


# Routers


def test_adapters_without_the_routers_of_a_model_made_in_memory(tmp_path):
    """Made again it has other routers, so the adapters are those of nothing. All who use them are told, once."""
    folder, batch = make_dense(tmp_path / "dense"), make_batch()
    model = get_peft_model(load_upcycled(folder, noise=0.5), make_lora_config())
    with pytest.warns(UserWarning, match=DRAWN):
        wanted = compute_logits(model, batch)
    assert catch_warnings(lambda: model.train()(**batch).loss.backward()) == []
    model.save_pretrained(tmp_path / "adapter")
    assert not get_base_model(tmp_path / "adapter")  # with the dense model's name AutoPeftModel would load that
    again = PeftModel.from_pretrained(load_upcycled(folder), str(tmp_path / "adapter"))
    with pytest.warns(UserWarning, match=DRAWN):
        found = compute_logits(again, batch)
    assert (found - wanted).abs().max() > 0.05


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, from_pretrained])
def test_adapters_of_a_folder(load, tmp_path):
    """The mixture is saved and loaded first: nobody is told anything, and everything is equal."""
    batch = make_batch()
    load_upcycled(make_dense(tmp_path / "dense"), noise=0.5).save_pretrained(tmp_path / "mixture")
    model = get_peft_model(load(tmp_path / "mixture"), make_lora_config())
    assert catch_warnings(lambda: compute_logits(model, batch)) == []
    model.save_pretrained(tmp_path / "adapter")
    assert get_base_model(tmp_path / "adapter") == str(tmp_path / "mixture")
    for again in (
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        fast_lora(PeftModel.from_pretrained(load(tmp_path / "mixture"), str(tmp_path / "adapter"))),
    ):
        torch.testing.assert_close(compute_logits(again, batch), compute_logits(model, batch))


def test_adapters_that_hold_the_routers(tmp_path):
    """Experts are copies of the dense network, so the model may be made again."""
    folder, batch = make_dense(tmp_path / "dense"), make_batch()
    model = get_peft_model(load_upcycled(folder), make_lora_config(modules_to_save=["gate"]))
    assert catch_warnings(lambda: compute_logits(model, batch)) == []
    for gate in (part for name, part in model.named_parameters() if name.endswith("default.w_gating")):
        nn.init.normal_(gate)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_upcycled(folder), str(tmp_path / "adapter"))
    assert catch_warnings(lambda: compute_logits(again, batch)) == []
    torch.testing.assert_close(compute_logits(again, batch), compute_logits(model, batch))


def test_warns_only_without_saved_routers(tmp_path):
    """Of routers that were in the files of a stock model nobody is told."""
    load_upcycled(make_dense(tmp_path / "dense")).save_pretrained(tmp_path / "mixture")
    build_stock("Mixtral").save_pretrained(tmp_path / "stock")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture")
    assert loaded.name_or_path == str(tmp_path / "mixture")
    prune(loaded, 3, by="random")
    replaced = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    replace_ffn(replaced, num_experts=4)
    assert loaded.name_or_path == replaced.name_or_path == ""
    stock = from_transformers(AutoModelForCausalLM.from_pretrained(tmp_path / "stock"))
    assert stock.name_or_path == str(tmp_path / "stock")
    model = get_peft_model(stock, make_lora_config())
    assert catch_warnings(lambda: compute_logits(model, make_batch())) == []


def make_trainer(model: Any, folder: Path, steps: int, **settings: Any) -> Trainer:
    batch = make_batch(8)
    data = [{name: value[i] for name, value in batch.items()} for i in range(8)]
    plain = dict(max_steps=steps, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True)
    arguments: Any = TrainingArguments(str(folder), save_steps=1, learning_rate=0.0, **plain)
    return Trainer(model, arguments, train_dataset=data, **settings)


@pytest.mark.slow
def test_resuming_with_other_routers_warns(tmp_path):
    folder = make_dense(tmp_path / "dense")
    for steps, resumes in ((1, False), (2, True)):
        model = get_peft_model(load_upcycled(folder), make_lora_config())
        with pytest.warns(UserWarning, match=DRAWN):
            make_trainer(model, tmp_path / "run", steps).train(resume_from_checkpoint=resumes)


# Expert bias


def make_biased_gate(dim: int, num_experts: int) -> TopKGating:
    return TopKGating(dim, num_experts, k=2, score="sigmoid", expert_bias=True)


def make_mixtures(folder: Path) -> dict[str, Any]:
    """Functions that load a model with an expert bias, from folders."""
    load_upcycled(make_dense(folder / "dense"), gate=make_biased_gate, noise=0.5).save_pretrained(folder / "ours")
    build_stock("DeepseekV3").save_pretrained(folder / "stock")
    return {name: lambda name=name: AutoModelForCausalLM.from_pretrained(folder / name) for name in ("ours", "stock")}


def train_bias(model: Any, batch: dict[str, Tensor]) -> Any:
    """The model after a step in which its bias moves far."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with balance_experts(model, optimizer, rate=0.5):
        model.train()(**batch).loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("name", ["ours", "stock"])
def test_adapters_lack_a_bias_that_moves(name, tmp_path):
    load, batch = make_mixtures(tmp_path)[name], make_batch()
    config = LoraConfig(r=2, target_modules=["o_proj"])
    with pytest.warns(UserWarning, match=LOST):
        model = train_bias(get_peft_model(load(), config), batch)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(), str(tmp_path / "adapter"))
    assert (compute_logits(again, batch) - compute_logits(model, batch)).abs().max() > 1e-3
    merged = model.merge_and_unload()  # this holds it
    merged.save_pretrained(tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(compute_logits(whole, batch), compute_logits(merged, batch))


@pytest.mark.parametrize("name", ["ours", "stock"])
def test_adapters_that_hold_the_bias(name, tmp_path):
    load, batch = make_mixtures(tmp_path)[name], make_batch()
    config = LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["gate"])
    before = compute_logits(load(), batch)
    model: Any = get_peft_model(load(), config)
    assert catch_warnings(lambda: train_bias(model, batch)) == []
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(), str(tmp_path / "adapter"))
    torch.testing.assert_close(compute_logits(again, batch), compute_logits(model, batch))
    assert (compute_logits(again, batch) - before).abs().max() > 1e-3


@pytest.mark.slow
def test_adapter_run_with_bias_resumes(tmp_path):
    """Two steps at once, and two with a new start between them: biases, routers and factors are the same."""
    load = make_mixtures(tmp_path)["ours"]

    def after(name: str, steps: int, resumes: bool) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model: Any = get_peft_model(load(), LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["gate"]))
        made = make_trainer(model, tmp_path / name, steps, callbacks=[BalanceCallback(rate=0.5)])
        made.args.learning_rate, made.args.lr_scheduler_type = 1e-2, SchedulerType.CONSTANT
        made.train(resume_from_checkpoint=resumes)
        return {key: value for key, value in model.state_dict().items() if ".original_module." not in key}

    wanted = after("whole", 2, resumes=False)
    after("parts", 1, resumes=False)
    found = after("parts", 2, resumes=True)
    assert any(key.endswith("expert_bias") and value.any() for key, value in wanted.items())
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow
def test_a_compiled_model_with_adapters_stays_one_graph():
    model: Any = fast_lora(get_peft_model(make_upcycled(), make_lora_config()))
    ids = make_batch()["input_ids"]
    compiled: Any = torch.compile(model.base_model.model, backend="eager", fullgraph=True)
    with torch.no_grad(), pytest.warns(UserWarning, match=DRAWN):  # by the forward that is not compiled
        torch.testing.assert_close(compiled.eval()(ids).logits, compute_logits(model, {"input_ids": ids}))


@pytest.mark.slow
def test_callback_logs_warnings(tmp_path):
    load = make_mixtures(tmp_path)["ours"]
    model = get_peft_model(load(), LoraConfig(r=2, target_modules=["o_proj"]))
    with pytest.warns(UserWarning, match=LOST):
        make_trainer(model, tmp_path / "run", 1, callbacks=[BalanceCallback()]).train()


def test_adapters_lack_the_coefficient_of_relu_routers():
    moe = MoE(8, gate=ReLUGating(8, 4, k=3, mean_choices=2), loss_coef=1.0)
    holder: Any = nn.Sequential(nn.Linear(8, 8), moe)
    model = get_peft_model(holder, LoraConfig(r=2, target_modules=["0"]))
    with pytest.warns(UserWarning, match="whose files do not contain what changes in .*1.gate; list the gate"):
        control_sparsity(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))


@pytest.mark.slow
def test_stale_optimizer_warns_in_trainer(tmp_path):
    model = ARCHITECTURES["llama"].build()
    old = torch.optim.SGD(model.parameters(), lr=1e-3)
    upcycle(model, num_experts=4, gate=make_biased_gate)
    made = make_trainer(model, tmp_path, 1, callbacks=[BalanceCallback()], optimizers=(old, None))
    with pytest.warns(UserWarning, match=r"no longer has, but does not train model.layers.0.mlp.moe.*; construct the"):
        made.train()
