"""What this package relies on in PEFT beyond its documentation: each test says one thing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from mixture_of_experts.support import private_peft as private

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


def config(**settings: Any) -> LoraConfig:
    fixed: Any = dict(r=2, target_modules=[], target_parameters=["experts.up"], init_lora_weights=False)
    return LoraConfig(**fixed, **settings)


def adapted() -> Any:
    """A model with LoRA on its experts, whose gate is trained and saved whole."""
    return get_peft_model(Model(), config(modules_to_save=["gate"]))


def test_of_copies_of_a_module_that_is_saved_one_computes():
    model = adapted()
    model.add_adapter("other", config())
    gate = model.base_model.model.gate
    assert isinstance(gate, ModulesToSaveWrapper)
    assert private.from_peft(gate)
    copies = [copy for copy, _ in private.parts_of(gate)]
    assert copies == [gate.original_module, gate.modules_to_save["default"]]
    assert private.wrapped_module(gate) is copies[1]
    with model.disable_adapter():
        assert private.wrapped_module(gate) is copies[0]
        assert private.parts_of(gate) == [(copies[0], True), (copies[1], False)]
    model.base_model.set_adapter("other")  # which has no copy
    x = torch.randn(E, 2, DIM)
    computing = private.wrapped_module(gate)
    assert computing is not None
    assert torch.equal(gate(x), computing(x))


def test_a_wrapper_of_a_layer_keeps_it():
    model = adapted()
    wrapper = model.base_model.model.experts
    assert type(wrapper) is layer.ParamWrapper
    assert isinstance(private.wrapped_module(wrapper), Experts)
    assert wrapper.get_base_layer() is private.wrapped_module(wrapper)
    assert private.wrapped_module(model.base_model.model.gate.original_module) is None


def test_what_files_of_adapters_hold():
    """Their own weights, and whole modules that they save: of these the copy, not the original."""
    model = adapted()
    inner = model.base_model.model
    tensors = {"gate": private.wrapped_module(inner.gate).weight, "up": inner.experts.get_base_layer().up}
    assert private.lost_by_adapters(model, tensors) == ["up"]
    assert private.lost_by_adapters(Model(), tensors) == []
    state = {name for name, _ in model.named_parameters() if ".modules_to_save." in name}
    assert state == {"base_model.model.gate.modules_to_save.default.weight"}


@pytest.mark.parametrize("transposed", [True, False])
def test_the_parts_of_a_stacked_weight(transposed: bool):
    """A is `(e k, width)`, expert by expert; of B `(width, k e)` the experts come last."""
    torch.manual_seed(0)
    plain = Model()
    plain.experts.is_transposed = transposed
    model = get_peft_model(plain, config(lora_alpha=6))
    wrapper: Any = model.base_model.model.experts
    a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    a, b = a.view(E, 2, -1), b.view(b.shape[0], 2, E).permute(2, 0, 1)
    down, up = (b, a) if private.goes_down_by_b(wrapper) else (a.mT, b.mT)
    delta = wrapper.scaling["default"] * down @ up
    torch.testing.assert_close(delta, wrapper.get_delta_weight("default"))
    assert private.goes_down_by_b(wrapper) != transposed
    assert (wrapper.num_experts, wrapper.parameter_name, wrapper.merged) == (E, "up", False)
    assert wrapper.active_adapters == ["default"]
    assert wrapper.disable_adapters is False
