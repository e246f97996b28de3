"""What this package relies on in PEFT beyond its documentation: each test says one thing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import layer
from peft.utils import ModulesToSaveWrapper
from support.transformers_families import build_model as build_family
from torch import Tensor, nn

from mixture_of_experts.huggingface import from_transformers
from mixture_of_experts.huggingface import private_peft as private

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
E, DIM, HIDDEN = 3, 5, 7


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(E, DIM, HIDDEN))

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        return x @ self.up


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(DIM, E, bias=False), Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x) * self.gate(x).sum()


def make_config(**settings: Any) -> LoraConfig:
    fixed: Any = dict(r=2, target_modules=[], target_parameters=["experts.up"], init_lora_weights=False)
    return LoraConfig(**fixed, **settings)


def make_adapted() -> Any:
    """A model with LoRA on its experts, whose gate is trained and saved whole."""
    return get_peft_model(Model(), make_config(modules_to_save=["gate"]))


def test_saved_module_computes_in_one_copy():
    model = make_adapted()
    model.add_adapter("other", make_config())
    gate = model.base_model.model.gate
    assert isinstance(gate, ModulesToSaveWrapper)
    assert private.is_peft_wrapper(gate)
    copies = [copy for copy, _ in private.list_copies(gate) or ()]
    assert copies == [gate.original_module, gate.modules_to_save["default"]]
    assert private.get_peft_wrapped_module(gate) is copies[1]
    with model.disable_adapter():
        assert private.get_peft_wrapped_module(gate) is copies[0]
        assert private.list_copies(gate) == [(copies[0], True), (copies[1], False)]
    model.base_model.set_adapter("other")  # which has no copy
    x = torch.randn(E, 2, DIM)
    computing = private.get_peft_wrapped_module(gate)
    assert computing is not None
    assert torch.equal(gate(x), computing(x))


def test_a_wrapper_of_a_layer_keeps_it():
    model = make_adapted()
    wrapper = model.base_model.model.experts
    assert type(wrapper) is layer.ParamWrapper
    assert isinstance(private.get_peft_wrapped_module(wrapper), Experts)
    assert wrapper.get_base_layer() is private.get_peft_wrapped_module(wrapper)
    assert private.get_peft_wrapped_module(model.base_model.model.gate.original_module) is None


def test_adapter_files_content():
    """Their own weights, and whole modules that they save: of these the copy, not the original."""
    model = make_adapted()
    inner = model.base_model.model
    tensors = {"gate": private.get_peft_wrapped_module(inner.gate).weight, "up": inner.experts.get_base_layer().up}
    assert private.find_tensors_not_saved(model, tensors) == ["up"]
    assert private.find_tensors_not_saved(Model(), tensors) == []
    state = {name for name, _ in model.named_parameters() if ".modules_to_save." in name}
    assert state == {"base_model.model.gate.modules_to_save.default.weight"}


@pytest.mark.parametrize("transposed", [True, False])
def test_the_parts_of_a_stacked_weight(transposed: bool):
    """A is `(e k, width)`, expert by expert; of B `(width, k e)` the experts come last."""
    torch.manual_seed(0)
    plain = Model()
    plain.experts.is_transposed = transposed
    model = get_peft_model(plain, make_config(lora_alpha=6))
    wrapper: Any = model.base_model.model.experts
    left, right = private.read_stack_factors(wrapper, "default")
    assert (left.shape, right.shape) == ((E, DIM, 2), (E, 2, HIDDEN))
    torch.testing.assert_close(left @ right, wrapper.get_delta_weight("default"))
    assert private.applies_b_first(wrapper) != transposed
    assert (wrapper.num_experts, wrapper.parameter_name, wrapper.merged) == (E, "up", False)
    assert wrapper.active_adapters == ["default"]
    assert wrapper.disable_adapters is False


@pytest.mark.parametrize("transposed", [True, False])
def test_the_parts_can_be_set(transposed: bool):
    plain = Model()
    plain.experts.is_transposed = transposed
    wrapper: Any = get_peft_model(plain, make_config(lora_alpha=2)).base_model.model.experts
    left, right = torch.randn(E, DIM, 2), torch.randn(E, 2, HIDDEN)
    shapes = [wrapper.lora_A["default"].weight.shape, wrapper.lora_B["default"].weight.shape]
    private.write_stack_factors(wrapper, "default", left, right)
    assert shapes == [wrapper.lora_A["default"].weight.shape, wrapper.lora_B["default"].weight.shape]
    torch.testing.assert_close(wrapper.get_delta_weight("default"), left @ right)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")  # only merging needs a bias there
def test_variants_of_lora():
    """DoRA, and biases of B, are kept for each adapter."""
    model: Any = get_peft_model(Model(), LoraConfig(r=2, target_modules=["gate"]))
    model.add_adapter("dora", LoraConfig(r=2, target_modules=["gate"], use_dora=True))
    model.add_adapter("biased", LoraConfig(r=2, target_modules=["gate"], lora_bias=True))
    wrapper = model.base_model.model.gate
    assert [private.is_plain_lora(wrapper, name) for name in ("default", "dora", "biased")] == [True, False, False]


def test_names_of_wrapped_modules():
    model: Any = get_peft_model(Model(), LoraConfig(target_modules=["gate"], target_parameters=["experts.up"]))
    inner = model.base_model.model
    found = {
        private.strip_wrappers(name) for name, module in inner.named_modules() if isinstance(module, layer.LoraLayer)
    }
    assert found == {"gate", "experts"}


def test_names_that_peft_changes_on_loading():
    """It applies the rules of the model's class, which insert `.mlp` before `.experts.` in Mistral Large 4."""
    model = from_transformers(build_family("mistral_large4_text"))
    targets: Any = dict(target_modules=["o_proj"], target_parameters=["experts.w1"])
    inject_adapter_in_model(LoraConfig(r=2, **targets), model, adapter_name="mine")
    names = [name for name, _ in model.named_parameters() if ".lora_" in name]
    renamed = private.find_renamed_weights(model, names, "mine")
    assert {*renamed.values()} == {name for name in names if ".experts." in name}
    for new, name in renamed.items():
        assert new == name.replace(".experts.", ".mlp.experts.").replace(".mine.", ".")
    plain = inject_adapter_in_model(LoraConfig(r=2, **targets), from_transformers(build_family("mixtral")))
    names = [name for name, _ in plain.named_parameters() if ".lora_" in name]
    assert private.find_renamed_weights(plain, names, "default") == {}
