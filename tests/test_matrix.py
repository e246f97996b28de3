"""Layers against the slow reference, on every path: first seeds of the long run, `python -m tests.support.matrix`."""

import dataclasses
from typing import Any

import pytest
import torch
from support import configurations as matrix
from support.matrix import lines_of, run_all, run_seed
from support.strategies import Bank, Router

from mixture_of_experts import MoE

QUICK, SLOW = range(3), range(3, 20)  # seeds of 100 configurations
slow = pytest.mark.slow


def hold(kind: str, number: int, count: int) -> None:
    """No configuration of a seed differs; most are compared, some are refused."""
    line = run_seed(kind, number, count)
    assert line["mismatches"] == []
    assert line["equal"] > count / 2


@pytest.mark.parametrize("number", [*QUICK, *(pytest.param(number, marks=slow) for number in SLOW)])
def test_eager(number):
    hold("eager", number, 100)


@slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces
@pytest.mark.parametrize("kind", ["compiled", "exported"])
def test_traced(kind):
    hold(kind, 3, 6)  # a seed of which most can be exported


# The matrix sees what is wrong

PLAIN = matrix.Configuration(
    routers=(Router("topk", {"k": 2, "bias": True}),),
    sizes=(3,),
    dim=4,
    bank=Bank("gated"),
    recipe=None,
    group_size=None,
    shared=False,
    shape=(2, 5),
    masked=0.7,
    side=(),
    training=True,
    checkpointing=None,
    frozen=(),
    dtype="float64",
    way="auto",
    run="eager",
    seed=1,
)
OFF = {"float64": 1 + 1e-6, "float32": 1.001, "bfloat16": 1.3}


def more(module: Any, factor: float) -> None:
    """Its outputs, times a factor."""
    module.register_forward_hook(lambda *arguments: arguments[-1] * factor)


def more_loss(layer: MoE, factor: float) -> None:
    def scaled(gate, args, routing):
        return dataclasses.replace(routing, losses={**routing.losses, "balance": routing.balance_loss * factor})

    layer.gate.register_forward_hook(scaled)


def more_gradient(layer: MoE, factor: float) -> None:
    layer.experts.w3.register_hook(lambda grad: grad * factor)


SABOTAGE = {
    "out is off": lambda layer, factor: more(layer.experts, factor),
    "aux_loss is off": more_loss,
    "gradient of experts.w3 is off": more_gradient,
    "masked tokens are not 0": lambda layer, factor: layer.register_forward_hook(
        lambda *arguments: (arguments[-1][0] + 1e-12, arguments[-1][1])
    ),
}


@pytest.mark.parametrize("what", SABOTAGE)
@pytest.mark.parametrize("dtype", OFF)
def test_a_wrong_layer_is_a_mismatch(what, dtype, monkeypatch):
    c, build = dataclasses.replace(PLAIN, dtype=dtype), matrix.build
    assert matrix.check(c) == "equal"

    def wrong(c):
        layer = build(c)
        SABOTAGE[what](layer, OFF[dtype])
        return layer

    # the reference is made from the right one
    monkeypatch.setattr(matrix, "run_layer", lambda c, layer, call, run=matrix.run_layer: run(c, wrong(c), call))
    with pytest.raises(matrix.Mismatch, match=what):
        matrix.check(c)


def test_what_should_be_refused_and_is_not_is_a_mismatch(monkeypatch):
    impossible = dataclasses.replace(PLAIN, routers=(Router("topk", {"k": 4}),))
    assert matrix.check(impossible) == "refused"
    monkeypatch.setattr(matrix, "refusal", lambda c: "another reason")
    for c, text in ((PLAIN, "not refused"), (impossible, "refused, but not by 'another reason'")):
        with pytest.raises(matrix.Mismatch, match=text):
            matrix.check(c)


def test_ties_are_told_from_mistakes(monkeypatch):
    """Logits that rounding turns, and logits that it does not."""
    for apart, tie in ((1e-7, True), (0.5, False)):
        c = dataclasses.replace(PLAIN, routers=(Router("topk", {"k": 1}),), sizes=(2,), dtype="float32", masked=None)
        call = matrix.call_of(c)
        call.x.fill_(1.0)
        layer = matrix.build(c)
        with torch.no_grad():
            layer.gate.w_gating.copy_(torch.eye(4, 2) * torch.tensor([1.0, 1.0 + apart]))
        monkeypatch.setattr(matrix, "build", lambda c, layer=layer: layer)
        assert matrix.is_tie(c, call) == tie
        monkeypatch.undo()


def test_a_run_goes_on_where_it_was(tmp_path, monkeypatch):
    """Seeds that have a line are not run again; a line that was cut off is."""
    monkeypatch.setitem(run_all.__globals__["KINDS"], "eager", 3)
    path = tmp_path / "matrix.jsonl"
    run_all("eager", 6, path)
    before = list(lines_of(path))
    assert [line["seed"] for line in before] == [0, 1]
    whole = path.read_text()
    path.write_text(whole[: whole.rindex('"axes"')])
    run_all("eager", 8, path)
    assert [line["seed"] for line in lines_of(path)] == [0, 1, 2]
