"""What this package relies on in PEFT beyond its documentation: each test says one thing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

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
    a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    a, b = a.view(E, 2, -1), b.view(b.shape[0], 2, E).permute(2, 0, 1)
    down, up = (b, a) if private.applies_b_first(wrapper) else (a.mT, b.mT)
    delta = wrapper.scaling["default"] * down @ up
    torch.testing.assert_close(delta, wrapper.get_delta_weight("default"))
    assert private.applies_b_first(wrapper) != transposed
    assert (wrapper.num_experts, wrapper.parameter_name, wrapper.merged) == (E, "up", False)
    assert wrapper.active_adapters == ["default"]
    assert wrapper.disable_adapters is False
