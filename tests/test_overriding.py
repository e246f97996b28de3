"""Shortcuts serve subclasses that leave alone what a shortcut replaces, and no others."""

import re
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import parametrize

import mixture_of_experts
from mixture_of_experts import Experts, HeirarchicalMoE, MoE, RoutedExperts, Top2Gating, TopKGating, gating, ops
from mixture_of_experts.gating import Choices, Gate, TokenChoiceGate, top2_by_kernel, topk_by_kernel, topk_by_numbers
from mixture_of_experts.huggingface.pruning.slicing import gate_pruning_unsupported_reason
from mixture_of_experts.support.subclassing import find_overridden, is_unchanged

D, E = 8, 4


class Same(TopKGating):
    """Another name, another constructor, methods and attributes of its own: it decides as its base does."""

    remark = "same"

    def __init__(self) -> None:
        super().__init__(D, E)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.w_gating)

    def own_method(self) -> None:
        raise AssertionError("nobody calls it")


class Mixin(TokenChoiceGate):
    def balance_loss(self, *args, **kwargs):
        return 2 * super().balance_loss(*args, **kwargs)


class Mixed(TopKGating, Mixin):
    """Its method stands behind those of `TopKGating` in the order of resolution, and overrides that of their base."""


def changed_by_fsdp(gate):
    """As `fully_shard` changes the class."""
    gate.__class__ = type("FSDPTopKGating", (FSDPModule, type(gate)), {})
    return gate


def parametrized(gate):
    parametrize.register_parametrization(gate, "w_gating", nn.Identity())
    return gate


ALIKE = {
    "subclass": lambda: type("Trivial", (TopKGating,), {})(D, E),
    "constructor": Same,
    "FSDP2": lambda: changed_by_fsdp(TopKGating(D, E)),
    "FSDP2, subclass": lambda: changed_by_fsdp(Same()),
    "parametrization": lambda: parametrized(Same()),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_a_gate_that_is_alike_takes_the_same_way(kind):
    base, gate = TopKGating(D, E), ALIKE[kind]()
    with torch.no_grad():
        gate.w_gating.copy_(base.w_gating)
    layers = [MoE(D, E, gate=one, experts=Experts(D, E)).eval() for one in (base, gate)]
    layers[1].experts.load_state_dict(layers[0].experts.state_dict())
    token = torch.randn(1, 1, D)
    assert [ops.explain_call(layer, token).gates for layer in layers] == 2 * [(ops.Explanation("numbers"),)]
    with torch.no_grad():
        for got, wanted in zip(*(layer(token) for layer in layers), strict=True):
            assert torch.equal(got, wanted)
    assert topk_by_kernel.unsupported_settings_reason(gate) is None
    assert is_unchanged(gate) == (kind in ("subclass", "FSDP2"))  # `Same` draws its weights otherwise


@pytest.mark.parametrize("name", topk_by_numbers.REPLACED_METHODS)
def test_a_gate_that_overrides_what_numbers_replace(name):
    """In a subclass, and on one gate."""
    method, token = vars(TopKGating).get(name) or getattr(TopKGating, name), torch.randn(1, 1, D)
    if isinstance(method, property):
        own = property(lambda self: TopKGating.first_is_likeliest.__get__(self))
    else:
        own = lambda self, *args, **kwargs: method(self, *args, **kwargs)  # noqa: E731
    gates = [type("Own", (TopKGating,), {name: own})(D, E)]
    if not isinstance(method, property):
        gates.append(TopKGating(D, E))
        setattr(gates[1], name, getattr(gates[1], name))
    for gate in gates:
        found = ops.explain_call(MoE(D, E, gate=gate).eval(), token).gates[0]
        assert found.implementation == "operators"
        assert found.reasons["numbers"] == f"{type(gate).__name__} overrides {name}"
        assert (topk_by_kernel.unsupported_settings_reason(gate) is None) == (
            name not in topk_by_kernel.REPLACED_METHODS
        )
        assert not is_unchanged(gate)


def test_a_method_behind_those_of_the_class():
    assert find_overridden(Mixed(D, E), TopKGating, ["decide", "balance_loss"]) == "balance_loss"
    assert not is_unchanged(Mixed(D, E))


def called(gate, function):
    """The methods and properties of a gate that a call enters."""
    names = set()

    def enter(frame, event, argument):
        if event == "call" and frame.f_locals.get("self") is gate:
            names.add(frame.f_code.co_name)

    sys.setprofile(enter)
    try:
        with torch.no_grad():
            function()
    finally:
        sys.setprofile(None)
    return names & {name for name in dir(type(gate)) if not name.startswith("__")}


@pytest.mark.parametrize("settings", [{}, dict(score="sigmoid", expert_bias=True), dict(weigh="softmax", k=1)], ids=str)
def test_whatever_numbers_pass_over_is_listed(settings):
    gate = TopKGating(D, E, **settings).eval()
    tokens = gate.read(torch.randn(1, 1, D))
    by_operators = called(gate, lambda: gate.decide_and_route(tokens))
    by_numbers = called(gate, lambda: topk_by_numbers.run(gate, tokens)) | {"process_group"}  # `why_unknown` reads it
    assert {"decide", "route"} <= by_operators - by_numbers <= {*topk_by_numbers.REPLACED_METHODS}


@pytest.mark.parametrize("settings", [{}, dict(second_policy_eval="all"), dict(outer_expert_dims=2)], ids=str)
def test_whatever_the_kernel_of_two_choices_passes_over_is_listed(settings):
    gate = Top2Gating(D, E, **settings).eval()
    tokens = gate.read(torch.randn(*gate.outer_expert_dims, 2, 9, D))
    names = called(gate, lambda: gate.decide(tokens)) - {"second", "process_group"}  # `choose` reads these too
    assert (
        {"decide", "_compute_scores"} <= names <= {*top2_by_kernel.REPLACED_METHODS, "apply_overrides", "given"}
    )  # never with `given`


def test_kernels_of_two_choices(monkeypatch):
    monkeypatch.setattr(top2_by_kernel, "has_kernel", lambda *tensors: True)
    monkeypatch.setattr(top2_by_kernel, "is_fake_tensor", lambda tensor: True)

    class Alike(Top2Gating):
        def __init__(self) -> None:
            super().__init__(D, E)

    class Other(Alike):
        def _sent(self, weight):
            return None

    replaced = Alike()
    replaced.decide = replaced.decide
    for gate, reason in ((Alike(), None), (Other(), "overrides _sent"), (replaced, "overrides decide")):
        found = top2_by_kernel.unsupported_reason(gate, gate.read(torch.randn(2, 9, D)))
        assert found is None if reason is None else reason in found
    assert (
        top2_by_kernel.unsupported_reason(Top2Gating(D, 1025), gate.read(torch.randn(2, 9, D)))
        == "the kernels support at most 1024 experts"
    )


ROUTERS = [kind for kind in vars(gating).values() if isinstance(kind, type) and issubclass(kind, Gate)]


@pytest.mark.parametrize("kind", ROUTERS)
def test_gates_of_the_package_are_unchanged(kind):
    for one in (kind, type("Own", (kind,), {})):
        gate = one.__new__(one)
        nn.Module.__init__(gate)
        gate.forward = gate.forward  # as hooks of other libraries do
        assert is_unchanged(gate)


def test_values_are_checked_for_gates_that_override_a_method(monkeypatch):
    checked = []
    monkeypatch.setattr("mixture_of_experts.gating.base.check_experts_of_tokens", lambda name, *_: checked.append(name))

    class Other(TopKGating):
        def decide(self, tokens) -> Choices:
            return super().decide(tokens)

    for gate in (TopKGating(D, E), ALIKE["subclass"](), ALIKE["FSDP2"](), Other(D, E), Mixed(D, E)):
        gate(torch.randn(2, 9, D))
    assert checked == ["Other", "Mixed"]


def test_a_level_two_that_fills_empty_slots():
    """The check is skipped only for gates that do what the package's do."""

    class Unmasked(TopKGating):
        def forward(self, x, importance=None, mask=None, **others):
            return super().forward(x, **others)

    class Same(TopKGating):
        pass

    for kind, error in ((Same, None), (Unmasked, "chose experts for")):
        layer = HeirarchicalMoE(
            D,
            (2, 2),
            gate_outer=TopKGating(D, 2, 1, capacity_factor_train=4.0),
            gate_inner=kind(D, 2, 1, outer_expert_dims=2),
        )
        if error is None:
            layer(torch.randn(2, 9, D))
            continue
        with pytest.raises(ValueError, match=error):
            layer(torch.randn(2, 9, D))


def test_a_gate_is_pruned_if_its_methods_are_known():
    class Other(TopKGating):
        def _rank_experts(self, logits, score):
            return score

    assert gate_pruning_unsupported_reason(ALIKE["subclass"]()) is None
    assert gate_pruning_unsupported_reason(ALIKE["FSDP2"]()) is None
    assert "its class" in gate_pruning_unsupported_reason(Other(D, E))


def test_experts_whose_outputs_may_be_their_inputs():
    class Own(Experts):
        pass

    class Passed(RoutedExperts):
        def forward(self, x, assignments=None):
            return x

    class Inherits(Passed):
        pass

    assert [kind.allocates_outputs for kind in (Experts, Own, Passed, Inherits)] == [True, True, False, False]


def test_no_literal_names_a_module_of_the_package():
    """A class is not known by the name of its module, which moving a file changes."""
    root, found = Path(mixture_of_experts.__file__).parent, {}
    for path in root.rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if re.search(r"__module__", line) and re.search(r"startswith|partition|==|!=| in ", line):
                found.setdefault(str(path.relative_to(root)), []).append(line.strip())
    of_others = {"private_peft.py", "private_transformers.py", "providers.py", "blocks/block_settings.py"}
    assert found.keys() == {f"huggingface/{name}" for name in of_others} | {"providers.py", "support/subclassing.py"}
    assert not [line for lines in found.values() for line in lines if "mixture_of_experts" in line]


def test_a_subclass_that_declares_its_implementations_anew():
    """It is compared with the class of this package, not with itself."""

    class Anew(TopKGating):
        implementations: ClassVar = {**TopKGating.implementations}

        def decide(self, tokens):
            choices = super().decide(tokens)
            return choices._replace(weight=torch.full_like(choices.weight, 7.0))

    with torch.no_grad():
        assert Anew(8, 4).eval()(torch.randn(1, 1, 8)).weight.tolist() == [[7.0, 7.0]]
