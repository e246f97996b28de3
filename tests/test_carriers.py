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
from support.carriers import CARRIERS, EXPERTS, OF_TRANSFORMERS, ONE_RANK, Carried, K, observe, run
from support.left import hooks_of
from torch import Tensor

from mixture_of_experts import balance_experts, collect_aux, force_routing
from mixture_of_experts.replay import record_routing, replay_routing
from mixture_of_experts.stats import routing_of, track_routing
from mixture_of_experts.summary import summary

pytestmark = [  # torch's own, while it traces
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    # gradients of logits are enough here
    pytest.mark.filterwarnings("ignore:a gradient reached the outputs of feed-forward networks:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# Abilities. Each takes what is carried, and asserts.


def balance(case: Carried) -> None:
    loads = observe(case, case.inputs[0])[1]
    before = [bias.detach().clone() for bias in case.biases(case.model)]
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.0)
    balancing = balance_experts(case.model, optimizer, rate=0.5)
    run(case.model, case.inputs[0]).square().sum().backward()
    optimizer.step()
    biases = case.biases(case.model)
    assert len(biases) == len(loads)
    for bias, start, load in zip(biases, before, loads, strict=True):
        mean = load.sum() / EXPERTS
        torch.testing.assert_close(bias.detach(), start + 0.5 * (mean - load).sign())
    assert not any(bias.any() for bias in case.untouched(case.model))
    balancing.remove()


def statistics(case: Carried) -> None:
    loads = observe(case, case.inputs[0])[1]
    with track_routing(case.model) as stats:
        run(case.model, case.inputs[0]).square().sum().backward()
    assert len(stats.layers) == len(loads)
    for name, load in zip(stats.layers, loads, strict=True):
        assert stats.last(name).load.tolist() == load.tolist()
        assert stats.last(name).tokens * K == int(load.sum())


def one_forward(case: Carried) -> None:
    choices = observe(case, case.inputs[0])[0]
    inputs = case.inputs[0]
    found = routing_of(case.model, **inputs) if isinstance(inputs, dict) else routing_of(case.model, inputs)
    assert len(found) == len(choices)
    for routing, expected in zip(found.values(), choices, strict=True):
        torch.testing.assert_close(routing.expert.view(2, -1, K), expected[-1])  # of the last call


def record_and_replay(case: Carried) -> None:
    choices = observe(case, case.inputs[1])[0]
    if len(case.gates) == 1:  # one gate has a record in each of its layers
        choices = list(choices[0].unsqueeze(1))
    with record_routing(case.model) as records:
        run(case.model, case.inputs[1]).square().sum().backward()
    assert len(records.layers) == len(choices)
    for name, expected in zip(records.layers, choices, strict=True):
        torch.testing.assert_close(torch.stack(records[name]).long(), expected[0])
    with record_routing(case.twin) as twins:
        run(case.twin, case.inputs[1])
    with replay_routing(case.twin, twins):
        expected = run(case.twin, case.inputs[0])
    with replay_routing(case.model, records):
        out = run(case.model, case.inputs[0])
        out.square().sum().backward()
    assert not torch.equal(expected, run(case.twin, case.inputs[0]))
    torch.testing.assert_close(out, expected)


def forcing(case: Carried) -> None:
    with force_routing(case.model, "balanced"):
        out = run(case.model, case.inputs[0])
    expected = forced_by_hand(case)
    torch.testing.assert_close(out, expected)
    free = run(case.twin, case.inputs[0])
    assert not torch.equal(expected, free)
    torch.testing.assert_close(run(case.model, case.inputs[0]), free)


def forced_by_hand(case: Carried) -> Tensor:
    """The twin's output where its gates take experts in turn."""

    def in_turn(router: object, args: object, output: Any) -> Any:
        expert = output[2]
        return (*output[:2], torch.arange(expert.numel(), device=expert.device).view_as(expert) % EXPERTS)

    gates, handles = [gate for site in case.gates for gate in site], []
    for gate in gates:
        if case.ours:
            gate.forced = "balanced"
        else:
            handles.append(gate.register_forward_hook(in_turn))
    out = run(case.twin, case.inputs[0])
    for gate in gates if case.ours else ():
        gate.forced = None
    for handle in handles:
        handle.remove()
    return out


def collected_losses(case: Carried) -> None:
    expected = torch.stack([*observe(case, case.inputs[0])[2], torch.zeros(())]).sum()
    with collect_aux(case.model) as aux:
        run(case.model, case.inputs[0])
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


def counts(case: Carried) -> None:
    twin, model = summary(case.twin), summary(case.model)
    assert len(model.layers) == 2
    assert [cost.active for cost in model.layers.values()] == [cost.active for cost in twin.layers.values()]
    assert all(cost.active < cost.parameters for cost in model.layers.values())
    assert model.active < model.parameters


def copies(case: Carried) -> None:
    bare = hooks_of(copy.deepcopy(case.model))
    expected = run(case.twin, case.inputs[0])
    made = []
    for context in (track_routing, record_routing, *([collect_aux] if case.ours else [])):
        with context(case.model):
            told = refused(lambda: run(case.model, case.inputs[0]))
            assert not told or (context is record_routing and "ran twice" in told)
            made += [] if told else [copy.deepcopy(case.model)]
    for each in made:
        assert hooks_of(each) == bare
        torch.testing.assert_close(run(each, case.inputs[0]), expected)


def refused(call: Callable[[], object]) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


def logging(case: Carried) -> None:
    pytest.importorskip("transformers")
    from mixture_of_experts.huggingface import RoutingCallback

    loads = observe(case, case.inputs[0])[1]
    callback = RoutingCallback(layers=True)
    arguments: Any = (None, SimpleNamespace(log_history=[]), None)
    callback.on_train_begin(*arguments, model=case.model)
    run(case.model, case.inputs[0]).square().sum().backward()
    callback.on_step_end(*arguments)
    logs = {"loss": 1.0}
    callback.on_log(*arguments, logs=logs)
    callback.on_train_end(*arguments)
    largest = max(float(load.max() / load.float().mean()) for load in loads)
    assert logs["routing/max_load"] == pytest.approx(largest)
    assert logs["routing/dead_experts"] == sum(int((load == 0).sum()) for load in loads)
    assert len([name for name in logs if name.endswith("/dropped")]) == len(loads) + 1


ABILITIES: dict[str, Callable[[Carried], None]] = {
    "balance": balance,
    "statistics": statistics,
    "one forward": one_forward,
    "record and replay": record_and_replay,
    "forcing": forcing,
    "collected losses": collected_losses,
    "summary": counts,
    "copies": copies,
    "logging": logging,
}

#: what cannot be served, with the words by which it is refused
REFUSED: dict[tuple[str, str], tuple[type[Exception], str]] = {
    ("record and replay", "layers called twice"): (RuntimeError, r"blocks\.0\.moe\.gate.* ran twice"),
    ("balance", "Mixtral"): (ValueError, "no gate of MixtralForCausalLM has an expert bias"),
    ("collected losses", "Mixtral"): (TypeError, r"model\.layers\.0\.mlp\.gate"),
}
#: faults that are known
NOT_YET: set[tuple[str, str]] = set()
#: what torch itself cannot do
IMPOSSIBLE = {("copies", "DDP"): "a process group is not copied", ("copies", "FSDP2"): "a sharded module is not copied"}

PAIRS = [(ability, carrier) for ability in ABILITIES for carrier in CARRIERS]
CHEAP = [carrier for carrier in CARRIERS if "compiled" not in carrier and carrier not in OF_TRANSFORMERS]
DIAGONAL = {(ability, CHEAP[place % len(CHEAP)]) for place, ability in enumerate([*ABILITIES, *ABILITIES])}


def marks(pair: tuple[str, str]) -> list[pytest.MarkDecorator]:
    return [*([] if pair in DIAGONAL else [pytest.mark.slow]), *([pytest.mark.xfail] if pair in NOT_YET else [])]


@pytest.mark.parametrize(("ability", "carrier"), [pytest.param(*pair, marks=marks(pair)) for pair in PAIRS])
def test_ability_over_carrier(ability: str, carrier: str, request: pytest.FixtureRequest):
    if (ability, carrier) in IMPOSSIBLE:
        pytest.skip(IMPOSSIBLE[ability, carrier])
    if carrier in OF_TRANSFORMERS:
        pytest.importorskip("transformers")
    if "PEFT" in carrier:
        pytest.importorskip("peft")
    if carrier in ONE_RANK:
        request.getfixturevalue("one_process")
    case = CARRIERS[carrier]()
    if (ability, carrier) not in REFUSED:
        ABILITIES[ability](case)
        return
    kind, words = REFUSED[ability, carrier]
    before = {name: value.clone() for name, value in case.model.state_dict().items()}, hooks_of(case.model)
    with pytest.raises(kind, match=words):
        ABILITIES[ability](case)
    assert hooks_of(case.model) == before[1]
    for name, value in case.model.state_dict().items():
        assert torch.equal(value, before[0][name]), name


def test_every_refusal_and_every_pair_exists():
    assert set(REFUSED) | set(IMPOSSIBLE) | NOT_YET <= set(PAIRS)
    assert {carrier for _, carrier in DIAGONAL} == set(CHEAP)
    assert {ability for ability, _ in DIAGONAL} == set(ABILITIES)


def test_the_comparison_sees_a_wrong_number():
    """One expert's load is off by one in the twin's observation: each comparison of loads must fail."""
    case = CARRIERS["plain"]()
    other = CARRIERS["plain"]()
    case.twin.blocks[1].moe.gate.expert_bias += torch.tensor([9.0, 0.0, 0.0, 0.0])
    for ability in (balance, statistics, one_forward, record_and_replay, forcing, collected_losses):
        with pytest.raises(AssertionError):
            ability(Carried(copy.deepcopy(other.model), case.twin, case.gates, case.biases, case.inputs))
