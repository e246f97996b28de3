"""Abilities over carriers: each ability that acts on a model, on each way in which a model may be wrapped, is right, or
refused by an error that names the site.

Right means equal to the plain twin: choices, loads and losses that hooks of the tests observe there, biases computed
from these loads by hand, outputs of gates that are forced by hand. By default each carrier and each ability is tried
once; all pairs are slow.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.record_helpers import count_hooks
from support.wrapped_models import (
    EXPERTS,
    SINGLE_RANK,
    TRANSFORMERS_ONLY,
    WRAPPED_MODELS,
    K,
    WrappedModel,
    observe_choices,
    run_model,
)
from torch import Tensor

from mixture_of_experts import balance_experts, collect_aux, force_routing
from mixture_of_experts.replay import record_routing, replay_routing
from mixture_of_experts.stats import routing_of, track_routing
from mixture_of_experts.summary import summary

pytestmark = [  # torch's own, while it traces
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    # gradients of logits are enough here
    pytest.mark.filterwarnings("ignore:gradients reached the outputs of feed-forward networks:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# Abilities. Each takes what is carried, and asserts.


def check_balancing(case: WrappedModel) -> None:
    loads = observe_choices(case, case.inputs[0])[1]
    before = [bias.detach().clone() for bias in case.biases(case.model)]
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.0)
    balancing = balance_experts(case.model, optimizer, rate=0.5)
    run_model(case.model, case.inputs[0]).square().sum().backward()
    optimizer.step()
    biases = case.biases(case.model)
    assert len(biases) == len(loads)
    for bias, start, load in zip(biases, before, loads, strict=True):
        mean = load.sum() / EXPERTS
        torch.testing.assert_close(bias.detach(), start + 0.5 * (mean - load).sign())
    assert not any(bias.any() for bias in case.untouched(case.model))
    balancing.remove()


def check_tracking(case: WrappedModel) -> None:
    loads = observe_choices(case, case.inputs[0])[1]
    with track_routing(case.model) as stats:
        run_model(case.model, case.inputs[0]).square().sum().backward()
    assert len(stats.layers) == len(loads)
    for name, load in zip(stats.layers, loads, strict=True):
        assert stats.last(name).load.tolist() == load.tolist()
        assert stats.last(name).tokens * K == int(load.sum())


def check_routing_of(case: WrappedModel) -> None:
    choices = observe_choices(case, case.inputs[0])[0]
    inputs = case.inputs[0]
    found = routing_of(case.model, **inputs) if isinstance(inputs, dict) else routing_of(case.model, inputs)
    assert len(found) == len(choices)
    for routing, expected in zip(found.values(), choices, strict=True):
        torch.testing.assert_close(routing.expert.view(2, -1, K), expected[-1])  # of the last call


def check_replay(case: WrappedModel) -> None:
    choices = observe_choices(case, case.inputs[1])[0]
    if len(case.gates) == 1:  # one gate has a record in each of its layers
        choices = list(choices[0].unsqueeze(1))
    with record_routing(case.model) as records:
        run_model(case.model, case.inputs[1]).square().sum().backward()
    assert len(records.layers) == len(choices)
    for name, expected in zip(records.layers, choices, strict=True):
        torch.testing.assert_close(torch.stack(records[name]).long(), expected[0])
    with record_routing(case.twin) as twins:
        run_model(case.twin, case.inputs[1])
    with replay_routing(case.twin, twins):
        expected = run_model(case.twin, case.inputs[0])
    with replay_routing(case.model, records):
        out = run_model(case.model, case.inputs[0])
        out.square().sum().backward()
    assert not torch.equal(expected, run_model(case.twin, case.inputs[0]))
    torch.testing.assert_close(out, expected)


def check_forcing(case: WrappedModel) -> None:
    with force_routing(case.model, "balanced"):
        out = run_model(case.model, case.inputs[0])
    expected = force_by_hand(case)
    torch.testing.assert_close(out, expected)
    free = run_model(case.twin, case.inputs[0])
    assert not torch.equal(expected, free)
    torch.testing.assert_close(run_model(case.model, case.inputs[0]), free)


def force_by_hand(case: WrappedModel) -> Tensor:
    """The twin's output where its gates take experts in turn."""

    def in_turn(router: object, args: object, output: Any) -> Any:
        expert = output[2]
        return (*output[:2], torch.arange(expert.numel(), device=expert.device).view_as(expert) % EXPERTS)

    gates, handles = [gate for site in case.gates for gate in site], []
    for gate in gates:
        if case.has_our_gates:
            gate.forced = "balanced"
        else:
            handles.append(gate.register_forward_hook(in_turn))
    out = run_model(case.twin, case.inputs[0])
    for gate in gates if case.has_our_gates else ():
        gate.forced = None
    for handle in handles:
        handle.remove()
    return out


def check_collect_aux(case: WrappedModel) -> None:
    expected = torch.stack([*observe_choices(case, case.inputs[0])[2], torch.zeros(())]).sum()
    with collect_aux(case.model) as aux:
        run_model(case.model, case.inputs[0])
        loss = aux.take()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    found = [p.grad for name, p in case.model.named_parameters() if "w_gating" in name and p.grad is not None]
    wanted = [p.grad for name, p in case.twin.named_parameters() if "w_gating" in name]
    total = sum(each.sum() for each in wanted)
    got = sum((each.full_tensor() if hasattr(each, "full_tensor") else each).sum() for each in found)
    if found:  # a frozen gate has none
        torch.testing.assert_close(got, total)


def check_counts(case: WrappedModel) -> None:
    twin, model = summary(case.twin), summary(case.model)
    assert len(model.layers) == 2
    assert [cost.active for cost in model.layers.values()] == [cost.active for cost in twin.layers.values()]
    assert all(cost.active < cost.parameters for cost in model.layers.values())
    assert model.active < model.parameters


def check_copies(case: WrappedModel) -> None:
    bare = count_hooks(copy.deepcopy(case.model))
    expected = run_model(case.twin, case.inputs[0])
    made = []
    for context in (track_routing, record_routing, *([collect_aux] if case.has_our_gates else [])):
        with context(case.model):
            described = assert_rejected(lambda: run_model(case.model, case.inputs[0]))
            assert not described or (context is record_routing and "ran twice" in described)
            made += [] if described else [copy.deepcopy(case.model)]
    for each in made:
        assert count_hooks(each) == bare
        torch.testing.assert_close(run_model(each, case.inputs[0]), expected)


def assert_rejected(call: Callable[[], object]) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


def check_logging(case: WrappedModel) -> None:
    pytest.importorskip("transformers")
    from mixture_of_experts.huggingface import RoutingCallback

    loads = observe_choices(case, case.inputs[0])[1]
    callback = RoutingCallback(layers=True)
    arguments: Any = (None, SimpleNamespace(log_history=[]), None)
    callback.on_train_begin(*arguments, model=case.model)
    run_model(case.model, case.inputs[0]).square().sum().backward()
    callback.on_step_end(*arguments)
    logs = {"loss": 1.0}
    callback.on_log(*arguments, logs=logs)
    callback.on_train_end(*arguments)
    largest = max(float(load.max() / load.float().mean()) for load in loads)
    assert logs["routing/max_load"] == pytest.approx(largest)
    assert logs["routing/dead_experts"] == sum(int((load == 0).sum()) for load in loads)
    assert len([name for name in logs if name.endswith("/dropped")]) == len(loads) + 1


FEATURES: dict[str, Callable[[WrappedModel], None]] = {
    "balance": check_balancing,
    "statistics": check_tracking,
    "one forward": check_routing_of,
    "record and replay": check_replay,
    "forcing": check_forcing,
    "collected losses": check_collect_aux,
    "summary": check_counts,
    "copies": check_copies,
    "logging": check_logging,
}

#: what cannot be served, with the words by which it is refused
REJECTED: dict[tuple[str, str], tuple[type[Exception], str]] = {
    ("record and replay", "layers called twice"): (RuntimeError, r"blocks\.0\.moe\.gate.* ran twice"),
    ("balance", "Mixtral"): (ValueError, "no gate of MixtralForCausalLM has an expert bias"),
    ("collected losses", "Mixtral"): (TypeError, r"model\.layers\.0\.mlp\.gate"),
}
#: faults that are known
NOT_SUPPORTED: set[tuple[str, str]] = set()
#: what torch itself cannot do
IMPOSSIBLE = {("copies", "DDP"): "a process group is not copied", ("copies", "FSDP2"): "a sharded module is not copied"}

PAIRS = [(ability, carrier) for ability in FEATURES for carrier in WRAPPED_MODELS]
CHEAP = [carrier for carrier in WRAPPED_MODELS if "compiled" not in carrier and carrier not in TRANSFORMERS_ONLY]
DIAGONAL = {(ability, CHEAP[place % len(CHEAP)]) for place, ability in enumerate([*FEATURES, *FEATURES])}


def find_marks(pair: tuple[str, str]) -> list[pytest.MarkDecorator]:
    return [*([] if pair in DIAGONAL else [pytest.mark.slow]), *([pytest.mark.xfail] if pair in NOT_SUPPORTED else [])]


@pytest.mark.parametrize(("ability", "carrier"), [pytest.param(*pair, marks=find_marks(pair)) for pair in PAIRS])
def test_feature_on_wrapped_model(ability: str, carrier: str, request: pytest.FixtureRequest):
    if (ability, carrier) in IMPOSSIBLE:
        pytest.skip(IMPOSSIBLE[ability, carrier])
    if carrier in TRANSFORMERS_ONLY:
        pytest.importorskip("transformers")
    if "PEFT" in carrier:
        pytest.importorskip("peft")
    if carrier in SINGLE_RANK:
        request.getfixturevalue("one_process")
    case = WRAPPED_MODELS[carrier]()
    if (ability, carrier) not in REJECTED:
        FEATURES[ability](case)
        return
    kind, words = REJECTED[ability, carrier]
    before = {name: value.clone() for name, value in case.model.state_dict().items()}, count_hooks(case.model)
    with pytest.raises(kind, match=words):
        FEATURES[ability](case)
    assert count_hooks(case.model) == before[1]
    for name, value in case.model.state_dict().items():
        assert torch.equal(value, before[0][name]), name


def test_rejection_tables_are_current():
    assert set(REJECTED) | set(IMPOSSIBLE) | NOT_SUPPORTED <= set(PAIRS)
    assert {carrier for _, carrier in DIAGONAL} == set(CHEAP)
    assert {ability for ability, _ in DIAGONAL} == set(FEATURES)


def test_comparison_detects_wrong_number():
    """One expert's load is off by one in the twin's observation: each comparison of loads must fail."""
    case = WRAPPED_MODELS["plain"]()
    other = WRAPPED_MODELS["plain"]()
    case.twin.blocks[1].moe.gate.expert_bias += torch.tensor([9.0, 0.0, 0.0, 0.0])
    for ability in (check_balancing, check_tracking, check_routing_of, check_replay, check_forcing, check_collect_aux):
        with pytest.raises(AssertionError):
            ability(WrappedModel(copy.deepcopy(other.model), case.twin, case.gates, case.biases, case.inputs))
