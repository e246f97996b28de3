"""Adapters that PEFT loads into models with layers of this package: each weight reaches its experts, or it raises."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from support.transformers_families import build_model as build_family
from support.transformers_families import compute_outputs, make_inputs
from torch import Tensor

from mixture_of_experts.huggingface import fast_lora, from_transformers, save_adapter, to_transformers
from mixture_of_experts.huggingface.model_watch import MODEL_WATCH_HOOK

from .test_block_conversion import build_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*initialized in memory:UserWarning"),
    pytest.mark.filterwarnings("ignore:target_parameters=.* no parameter was matched:RuntimeWarning"),
]
OURS = ["experts.w1", "experts.w3", "experts.w2"]


def make_lora(targets: list[str] = OURS, **settings: Any) -> LoraConfig:
    fixed = dict(r=2, target_modules=["q_proj"], init_lora_weights=False)
    return LoraConfig(**{**fixed, **settings}, target_parameters=targets)


def get_logits(model: Any, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return compute_outputs(model.eval(), given)


@pytest.mark.parametrize("name", ["mistral_large4", "mistral_large4_text", "mixtral"])
def test_adapters_of_classes_that_rename_weights(name, tmp_path):
    """Mistral Large 4 renames `.experts.` to `.mlp.experts.` in all that it loads, also in adapters."""
    base = from_transformers(build_family(name))
    given = make_inputs(base)
    adapted: Any = get_peft_model(copy.deepcopy(base), make_lora(target_modules=[]))
    wanted = get_logits(adapted, given)
    adapted.save_pretrained(tmp_path)
    again: Any = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path), adapter_name="mine")
    assert torch.equal(get_logits(again, given), wanted)
    assert (get_logits(base, given) - wanted).abs().max() > 0.01


def test_several_adapters_of_such_a_class(tmp_path):
    """The adapter that is loaded is known by its other weights, or the weights of experts raise."""
    base = from_transformers(build_family("mistral_large4"))
    given = make_inputs(base)
    for name, modules in (("attention too", ["o_proj"]), ("experts", [])):
        adapted: Any = get_peft_model(copy.deepcopy(base), make_lora(target_modules=modules))
        wanted = get_logits(adapted, given)
        adapted.save_pretrained(tmp_path / name)
        again: Any = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / name), adapter_name="first")
        if modules:
            again.load_adapter(str(tmp_path / name), adapter_name="second")
            again.set_adapter("second")
            assert torch.equal(get_logits(again, given), wanted)
        else:
            with pytest.raises(ValueError, match="If it is for this model, load it before any other adapter"):
                again.load_adapter(str(tmp_path / name), adapter_name="second")


def test_adapters_that_were_injected():
    base = from_transformers(build_family("mistral_large4"))
    given = make_inputs(base)
    one, other = (inject_adapter_in_model(make_lora(), copy.deepcopy(base)) for _ in range(2))
    state = {name: value.clone() for name, value in get_peft_model_state_dict(one).items()}
    set_peft_model_state_dict(other, state)
    assert torch.equal(get_logits(other, given), get_logits(one, given))


def test_adapters_of_the_stock_model(tmp_path):
    """PEFT adapts attention, and only warns of the experts."""
    stock = build_model("Mixtral")
    theirs = make_lora(["experts.gate_up_proj", "experts.down_proj"])
    get_peft_model(copy.deepcopy(stock), theirs).save_pretrained(tmp_path / "peft")
    adapted = get_peft_model(from_transformers(copy.deepcopy(stock)), make_lora())
    save_adapter(adapted, tmp_path / "saved")
    for folder in ("peft", "saved"):
        model = from_transformers(copy.deepcopy(stock))
        with pytest.raises(ValueError, match=r"adapter contains .*s.0.mlp.experts.base_layer.lora_A.* no such weight"):
            PeftModel.from_pretrained(model, str(tmp_path / folder))


def test_other_state_dicts_load():
    """Those of whole models with adapters, of attention alone, and of models without adapters."""
    base = from_transformers(build_model("Mixtral"))
    plain = copy.deepcopy(base.state_dict())
    model = fast_lora(get_peft_model(copy.deepcopy(base), make_lora()))
    state = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    model.load_state_dict({name: value for name, value in state.items() if ".q_proj." in name}, strict=False)
    base.load_state_dict(plain)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_check_leaves_with_the_layers():
    model = from_transformers(build_model("Mixtral"))
    assert MODEL_WATCH_HOOK in copy.deepcopy(model)._load_state_dict_pre_hooks
    assert not to_transformers(model)._load_state_dict_pre_hooks


def test_a_deleted_model_is_freed_at_once():
    """The check of adapters refers to the model, which must not wait for a garbage collection."""
    model: Any = from_transformers(build_model("Mixtral"))
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()
