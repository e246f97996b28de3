"""`mixture_of_experts.verify`: layers that keep all, layers with one fault, and random layers of our own."""

import json

import pytest
import torch
from torch import nn

from mixture_of_experts import ExpertChoiceGating, Experts, MoE, NoisyTopKGating, TopKGating, TopPGating
from mixture_of_experts.verify import assert_holds, verify
from mixture_of_experts.verify.__main__ import main
from mixture_of_experts.wrappers import ZeroComputationExperts
from tests.support.faulty_layers import DESCRIPTION, FAULTS, ReferenceMixture, ReferenceRouter, make_faulty_layer
from tests.support.verify_random_layers import (
    DEFAULT_PROPERTIES,
    draw_configurations,
    find_wrong_verdicts,
    sample_configurations,
)


def make_layer() -> nn.Module:
    return MoE(dim=8, gate=TopKGating(8, 4, expert_bias=True))


def make_layer_with_fault():
    return make_faulty_layer(FAULTS[0]), DESCRIPTION


def make_other_width():
    return nn.Linear(8, 8), {"dim": 4}


def test_reference_layer_has_all_properties():
    report = verify(make_faulty_layer(), **DESCRIPTION)
    assert {name: f.verdict for name, f in report.findings.items()} == dict.fromkeys(DEFAULT_PROPERTIES, "holds"), str(
        report
    )
    assert report.failed == []


@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_faulty_layer_is_detected(kind):
    report = verify(make_faulty_layer(kind), properties=kind.breaks, **DESCRIPTION)
    assert set(report.failed) == set(kind.breaks), str(report)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_faulty_layer_breaks_only_listed_properties(kind):
    report = verify(make_faulty_layer(kind), properties=set(DEFAULT_PROPERTIES) - set(kind.breaks), **DESCRIPTION)
    assert report.failed == [], str(report)


def test_every_property_that_can_fail_has_a_planted_fault():
    assert {name for kind in FAULTS for name in kind.breaks} == set(DEFAULT_PROPERTIES)


def test_one_balanced_batch_is_no_fault():
    """The loss of two tokens that choose all experts has no gradient, as in two of these layers."""
    for seed in range(117, 124):
        torch.manual_seed(seed)
        assert verify(MoE(16, gate=TopKGating(16, 4)), properties=["loss_accumulation"]).failed == [], seed


class SmallLoss(ReferenceMixture, breaks=()):
    """A correct layer whose float32 router rounds the loss, so that finite differences are inexact."""

    coefficient = 1.0

    class Gate(ReferenceRouter):
        def logits(self, x):
            return super().logits(x).float()

    def compute_loss(self, chosen, probs, real):
        return self.coefficient * super().compute_loss(chosen, probs, real)


@pytest.mark.parametrize("coefficient", [1, 1e-2, 1e-4, 0])
def test_small_loss_is_no_fault(coefficient):
    for seed in range(4):  # seed 2 has a balanced batch: its loss has no gradient
        torch.manual_seed(seed)
        layer = SmallLoss()
        layer.coefficient = coefficient
        assert_holds(layer, "gradients", "loss_scale", loss=1, dim=8)


def make_layer_with_identity_experts() -> nn.Module:
    """Experts 6 and 7 have no weights. The weights of expert 0 and a parameter of the same shape are unused."""
    experts = ZeroComputationExperts(Experts(8, 6), num_identity=2)
    layer = MoE(8, gate=TopKGating(8, 8, expert_bias=True), experts=experts)
    layer.gate.expert_bias[0] = -9.0
    layer.unused = nn.Parameter(torch.ones(experts.experts.w1.shape[1:]))
    return layer


CORRECT = {
    "k=1": lambda: MoE(8, gate=TopKGating(8, 16, k=1)),
    "k=2": lambda: MoE(8, gate=TopKGating(8, 8, k=2)),
    "top-p": lambda: MoE(8, gate=TopPGating(8, 8, 4)),
    "list": lambda: MoE(8, gate=TopKGating(8, 4, k=1), experts=[nn.Linear(8, 8) for _ in range(4)]),
    "identity": make_layer_with_identity_experts,
}


@pytest.mark.parametrize("build", CORRECT.values(), ids=CORRECT)
def test_computed_choices_are_not_lost(build):
    torch.manual_seed(0)
    finding = verify(build(), properties=["every_choice"]).findings["every_choice"]
    assert (finding.verdict, finding.number) == ("holds", 0.0)


class UnderAutocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = make_layer()

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x)


def test_rounding_limit_ignores_changed_choices():
    torch.manual_seed(12)  # a rescaled token chooses another expert
    layer = MoE(8, gate=TopPGating(8, 8, 4))
    assert verify(layer, properties=["order"]).findings["order"].limit == 1e-4
    assert verify(UnderAutocast(), dim=8, properties=["order"]).findings["order"].limit > 1e-3


@pytest.mark.parametrize(("count", "each"), [(3, 4), pytest.param(200, 1, marks=pytest.mark.slow)])
def test_random_layers_of_the_package(count, each):
    lines = [
        line
        for number, c in enumerate(draw_configurations(count))
        for line in find_wrong_verdicts(c, sample_configurations(number, each))
    ]
    assert lines == []


DOCUMENTED = {
    "dropless": (MoE(8, gate=TopKGating(8, 4)), []),
    "expert choice": (MoE(8, gate=ExpertChoiceGating(8, 4)), ["causal", "decoding"]),
    "capacity": (MoE(8, 4, second_policy_train="all", second_policy_eval="all"), ["causal", "decoding"]),
}


@pytest.mark.parametrize(("layer", "failed"), DOCUMENTED.values(), ids=DOCUMENTED)
def test_documented_verdicts(layer, failed):
    report = verify(layer, properties=["padding", "batch", "causal", "decoding", "counts_eval"])
    assert report.failed == failed, str(report)


def test_verify_keeps_module_and_rng_state():
    layer, state = make_layer().eval(), torch.get_rng_state()
    layer.register_forward_hook(lambda *args: pytest.fail("it ran"), always_call=True)
    layer._forward_hooks.clear()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with torch.no_grad():
        assert not verify(layer, properties=["padding", "deepcopy", "save_load", "gradients"]).failed
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert not layer.training
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert torch.equal(torch.get_rng_state(), state)


class Flat(nn.Module):
    """Tokens without their sequences, and an auxiliary loss that stays on the module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_faulty_layer()

    def forward(self, hidden_states):
        out, self.balance = self.inner(hidden_states)
        return {"hidden_states": out.flatten(0, 1), "load": None}


def test_arguments_can_be_described():
    described = {
        "mask": lambda module, x, real: {"hidden_states": module.inner(x, real)[0]},
        "router": lambda module, x: module.inner.router(x.flatten(0, 1))[2],
    }
    properties = ["counts_eval", "router_autocast", "bfloat16", "nan_padding"]
    assert_holds(Flat(), *properties, **described)
    described["loss"] = lambda module, returned: module.balance
    report = verify(Flat(), properties=["recomputation", "loss_mean"], **described)
    assert report.failed == ["recomputation"], str(report)


def test_requested_property_holds_or_raises():
    assert_holds(make_faulty_layer(), "causal")
    with pytest.raises(AssertionError, match=r"not asked.*\n.*pass mask="):
        assert_holds(make_faulty_layer(), "padding")
    with pytest.raises(AssertionError, match="counts, padded to 2 x 12"):
        assert_holds(make_faulty_layer(FAULTS[0]), "padding", "causal", **DESCRIPTION)
    with pytest.raises(ValueError, match=r"unknown properties \['cheap'\]; the available properties are \['batch', "):
        verify(make_faulty_layer(), properties=["cheap"])


def test_a_property_that_does_not_apply_is_not_shown():
    """A named property that was not measured has not been shown: the error says which, and why."""
    with pytest.raises(AssertionError, match=r"^'padding' was not shown: it does not apply .* the module draws random"):
        assert_holds(MoE(8, 4), "causal", "padding", mask="mask")
    assert_holds(MoE(8, gate=TopKGating(8, 4)), "padding", mask="mask")


@pytest.mark.parametrize("k", [1, 2])
def test_gradients_of_a_noisy_router_at_its_initial_zeros(k):
    gate = NoisyTopKGating(8, 4, k=k)
    assert_holds(MoE(8, gate=gate), "gradients")
    assert not gate.w_gating.any()


def test_a_failure_that_a_kind_of_layer_implies_is_called_expected():
    report = verify(MoE(8, gate=ExpertChoiceGating(8, 4)), properties=["causal", "decoding", "batch"])
    assert report.expected == report.failed == ["causal", "decoding"]
    assert "2 fail, 2 of them as expected" in str(report)
    assert "expected: in expert choice, all tokens of a group compete" in str(report)
    assert json.loads(report.to_json())["expected"] == report.expected
    assert verify(make_faulty_layer(FAULTS[0]), properties=["padding"], **DESCRIPTION).expected == []
    assert not verify(MoE(8, gate=TopKGating(8, 4)), properties=["causal"]).findings["causal"].expected


def test_settings_of_the_caller_are_restored():
    faults = {kind.__name__: kind for kind in FAULTS}
    for name, word in (("ChangesTheDefaultDtype", "default dtype"), ("TurnsGradientsOn", "grad mode")):
        with torch.no_grad():
            report = verify(make_faulty_layer(faults[name]), properties=["side_effects", "strides"], **DESCRIPTION)
            assert report.failed == ["side_effects"], str(report)
            assert word in report.findings["side_effects"].detail
            assert not torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.float32


class InFloat32(nn.Linear):
    def forward(self, x):
        assert x.dtype == torch.float32
        return super().forward(x)


@pytest.mark.parametrize(
    ("build", "name", "reason"),
    [
        (lambda: MoE(8, 4), "order", "the module draws random numbers"),
        (lambda: MoE(8, 4, second_policy_train="all"), "output_eval", "the module draws random numbers in eval mode"),
        (lambda: InFloat32(4, 4), "gradients", "the module does not run in torch.float64"),
    ],
)
def test_inapplicable_properties(build, name, reason):
    finding = verify(build(), properties=[name]).findings[name]
    assert finding.verdict == "does not apply"
    assert finding.detail.startswith(reason)


def test_width_is_inferred_or_requested():
    assert verify(nn.Linear(6, 6), properties=["causal"]).module == "Linear, 6 wide"
    with pytest.raises(ValueError, match=r"the token width of Linear from the candidates \[\]; pass dim="):
        verify(nn.Linear(6, 7))
    with pytest.raises(ValueError, match="pass dim="):
        verify(nn.GELU())


def test_command(capsys: pytest.CaptureFixture):
    assert main([f"{__name__}:make_layer", "--only", "causal", "counts_eval"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("MoE, 8 wide: 0 fail")
    assert [line.split()[:2] for line in lines[2:]] == [["causal", "holds"], ["counts_eval", "holds"]]
    assert main([f"{__name__}:make_layer_with_fault", "--only", "padding", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["failed"] == ["padding"]
    assert found["findings"]["padding"]["detail"].startswith("1 x 2 tokens, seed 0, in training: move of counts")
    wrong = {"nowhere:f": "No module named", f"{__name__}:nothing": "no attribute", "x": "x"}
    wrong |= {f"{__name__}:make_other_width": "cannot be multiplied"}  # no verdict: a layer that fails returns 1
    for factory, error in wrong.items():
        with pytest.raises(SystemExit, match="2"):
            main([factory])
        assert error in capsys.readouterr().err


@pytest.mark.slow
def test_compiled():
    assert_holds(make_layer(), "compile")


@pytest.mark.slow
def test_a_block_of_transformers():
    """All its sequences are one group; its router computes in the dtype of the weights."""
    blocks = pytest.importorskip("tests.support.transformers_blocks", reason="needs transformers")
    report = verify(blocks.BlockInModel(blocks.make_block("MixtralSparseMoeBlock")), dim=blocks.DIM)
    assert report.failed == ["router_bfloat16", "router_autocast"], str(report)
