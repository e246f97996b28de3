"""A checkpoint of the published mixture-of-experts 0.2.3 loads and gives the numbers it gave there."""

from pathlib import Path

import pytest
import torch
from support.published import OPTIONS
from torch import nn

import mixture_of_experts

PUBLIC = ("Experts", "HeirarchicalMoE", "MoE", "Top2Gating")  # the classes of that package
CASES = torch.load(Path(__file__).parent / "published" / "cases.pt", weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_same_outputs_losses_and_gradients(name):
    case = CASES[name]
    kind, num_experts, options = OPTIONS[name.rpartition("_")[0]]
    layer = getattr(mixture_of_experts, kind)(6, num_experts, **{"activation": nn.ReLU, **options}).to(case["x"].dtype)
    layer.train(name.endswith("train"))
    layer.load_state_dict(case["state"], strict=True)
    x = case["x"].requires_grad_()
    torch.manual_seed(1)  # policy random draws the same second choices
    out, loss = layer(x)
    ((out * case["cotangent"]).sum() + loss).backward()
    tolerance = 1e-9 if out.dtype == torch.double else 2e-6
    close = dict(rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out, case["out"], **close)
    torch.testing.assert_close(loss, case["loss"], **close)
    torch.testing.assert_close(x.grad, case["grad_x"], **close)
    for parameter_name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, case["grads"][parameter_name], **close, msg=parameter_name)


def test_the_recorded_cases_exercise_drops_and_policies():
    everything, some = CASES["moe_all_train"], CASES["moe_random_train"]
    assert not torch.allclose(everything["out"], some["out"].double())
    assert (CASES["moe_drops_train"]["out"] == 0).all(dim=-1).any()


@pytest.mark.parametrize("kind", ["MoE", "HeirarchicalMoE"])
def test_a_module_that_was_saved_whole_says_how_to_load_it(kind):
    with pytest.raises(ValueError, match=r"0\.2\.3: .* save module.state_dict\(\)"):
        torch.load(Path(__file__).parent / "published" / f"{kind}.pt", weights_only=False)


@pytest.mark.parametrize("name", PUBLIC)
def test_its_only_module_can_be_imported(name):
    from mixture_of_experts import mixture_of_experts as theirs

    assert getattr(theirs, name) is getattr(mixture_of_experts, name)
