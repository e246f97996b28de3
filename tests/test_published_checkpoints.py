"""A checkpoint of the published mixture-of-experts 0.2.3 loads and gives the numbers it gave there."""

from collections import OrderedDict
from io import BytesIO
from pathlib import Path

import pytest
import torch
from support.published_layers import OPTIONS
from torch import nn

import mixture_of_experts
from mixture_of_experts.unstack import unstack

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


def written_by_0_2_3(state: dict) -> OrderedDict:
    """A recorded state with what `state_dict()` of 0.2.3 writes beside the weights, after a way through a file."""
    written = OrderedDict(state)
    paths = ("", *sorted({name.rpartition(".")[0] for name in state}), "experts.act")
    written._metadata = OrderedDict((path, {"version": 1}) for path in paths)
    file = BytesIO()
    torch.save(written, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", ["moe_all_eval", "hierarchy_all_eval"])
def test_activation_mismatch_warns_once(name, recwarn):
    case = CASES[name]
    kind, num_experts, options = OPTIONS[name.rpartition("_")[0]]
    make = getattr(mixture_of_experts, kind)
    state = written_by_0_2_3(case["state"])
    for activation in (nn.ReLU, nn.functional.relu):
        make(6, num_experts, activation=activation, **options).load_state_dict(state)
    gelu = make(6, num_experts, **options)
    gelu.load_state_dict(dict(state))  # who wrote it is not known
    gelu.load_state_dict(gelu.state_dict())
    assert not recwarn
    with pytest.warns(UserWarning, match=r"by mixture-of-experts 0\.2\.3.* use GELU.*activation=nn\.ReLU") as warned:
        nn.ModuleDict({"ffn": gelu}).load_state_dict(in_a_model(state))
    assert len(warned) == 1
    assert all(torch.equal(value, state[key]) for key, value in gelu.state_dict().items())


def in_a_model(state: OrderedDict) -> OrderedDict:
    """The same state of a model that has the layer under the name "ffn"."""
    found = OrderedDict((f"ffn.{name}", value) for name, value in state.items())
    found._metadata = OrderedDict((f"ffn.{path}".rstrip("."), version) for path, version in state._metadata.items())
    return found


def test_the_states_of_this_package_never_warn():
    """Of stacked experts in every form that has the same keys, through a file."""
    moe = mixture_of_experts.MoE(8, 4)
    shared = mixture_of_experts.GatedExperts(8, 4, 16, nn.ReLU)
    for layer in (moe, mixture_of_experts.HeirarchicalMoE(8, (2, 2)), mixture_of_experts.MoE(8, experts=shared)):
        file = BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        layer.load_state_dict(torch.load(file, weights_only=True))
        assert layer.state_dict()._metadata["experts"] == {"version": 2}
    assert unstack(moe).state_dict()._metadata["experts"] == {"version": 2}


def test_the_recorded_cases_exercise_drops_and_policies():
    everything, some = CASES["moe_all_train"], CASES["moe_random_train"]
    assert not torch.allclose(everything["out"], some["out"].double())
    assert (CASES["moe_drops_train"]["out"] == 0).all(dim=-1).any()


@pytest.mark.parametrize("kind", ["MoE", "HeirarchicalMoE"])
def test_whole_pickle_error_names_remedy(kind):
    with pytest.raises(ValueError, match=r"0\.2\.3. .* save module.state_dict\(\)"):
        torch.load(Path(__file__).parent / "published" / f"{kind}.pt", weights_only=False)


@pytest.mark.parametrize("name", PUBLIC)
def test_its_only_module_can_be_imported(name):
    from mixture_of_experts import mixture_of_experts as theirs

    assert getattr(theirs, name) is getattr(mixture_of_experts, name)
