"""Layers against the slow reference, on every path: first seeds of the long run, `python -m tests.support.matrix`."""

import dataclasses
from typing import Any

import pytest
import torch
from support import configurations as matrix
from support.matrix import read_lines, run_all_seeds, run_seed
from support.strategies import Bank, Router

from mixture_of_experts import MoE

QUICK_SEEDS, SLOW_SEEDS = range(3), range(3, 20)  # seeds of 100 configurations
slow = pytest.mark.slow


def assert_no_mismatch(kind: str, number: int, count: int) -> None:
    """No configuration of a seed differs; most are compared, some are refused."""
    line = run_seed(kind, number, count)
    assert line["mismatches"] == []
    assert line["equal"] > count / 2


@pytest.mark.parametrize("number", [*QUICK_SEEDS, *(pytest.param(number, marks=slow) for number in SLOW_SEEDS)])
def test_eager(number):
    assert_no_mismatch("eager", number, 100)


@slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces
@pytest.mark.parametrize("kind", ["compiled", "exported"])
def test_traced(kind):
    assert_no_mismatch(kind, 3, 6)  # a seed of which most can be exported


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
    implementation="auto",
    run="eager",
    seed=1,
)
FAULTS = {"float64": 1 + 1e-6, "float32": 1.001, "bfloat16": 1.3}


def perturb_output(module: Any, factor: float) -> None:
    """Its outputs, times a factor."""
    module.register_forward_hook(lambda *arguments: arguments[-1] * factor)


def perturb_loss(layer: MoE, factor: float) -> None:
    def scaled(gate, args, routing):
        return dataclasses.replace(routing, losses={**routing.losses, "balance": routing.balance_loss * factor})

    layer.gate.register_forward_hook(scaled)


def perturb_gradient(layer: MoE, factor: float) -> None:
    layer.experts.w3.register_hook(lambda grad: grad * factor)


SABOTAGE = {
    "out is off": lambda layer, factor: perturb_output(layer.experts, factor),
    "aux_loss is off": perturb_loss,
    "gradient of experts.w3 is off": perturb_gradient,
    "masked tokens are not 0": lambda layer, factor: layer.register_forward_hook(
        lambda *arguments: (arguments[-1][0] + 1e-12, arguments[-1][1])
    ),
}


@pytest.mark.parametrize("what", SABOTAGE)
@pytest.mark.parametrize("dtype", FAULTS)
def test_a_wrong_layer_is_a_mismatch(what, dtype, monkeypatch):
    c, build = dataclasses.replace(PLAIN, dtype=dtype), matrix.build_layer
    assert matrix.check_configuration(c) == "equal"

    def wrong(c):
        layer = build(c)
        SABOTAGE[what](layer, FAULTS[dtype])
        return layer

    # the reference is made from the right one
    monkeypatch.setattr(matrix, "run_layer", lambda c, layer, call, run=matrix.run_layer: run(c, wrong(c), call))
    with pytest.raises(matrix.Mismatch, match=what):
        matrix.check_configuration(c)


def test_missing_rejection_is_a_mismatch(monkeypatch):
    impossible = dataclasses.replace(PLAIN, routers=(Router("topk", {"k": 4}),))
    assert matrix.check_configuration(impossible) == "refused"
    monkeypatch.setattr(matrix, "find_expected_error", lambda c: "another reason")
    for c, text in ((PLAIN, "not refused"), (impossible, "refused, but not by 'another reason'")):
        with pytest.raises(matrix.Mismatch, match=text):
            matrix.check_configuration(c)


def test_ties_are_not_mismatches(monkeypatch):
    """Logits that rounding turns, and logits that it does not."""
    for apart, tie in ((1e-7, True), (0.5, False)):
        c = dataclasses.replace(PLAIN, routers=(Router("topk", {"k": 1}),), sizes=(2,), dtype="float32", masked=None)
        call = matrix.make_call(c)
        call.x.fill_(1.0)
        layer = matrix.build_layer(c)
        with torch.no_grad():
            layer.gate.w_gating.copy_(torch.eye(4, 2) * torch.tensor([1.0, 1.0 + apart]))
        monkeypatch.setattr(matrix, "build_layer", lambda c, layer=layer: layer)
        assert matrix.is_tie(c, call) == tie
        monkeypatch.undo()


def test_run_resumes(tmp_path, monkeypatch):
    """Seeds that have a line are not run again; a line that was cut off is."""
    monkeypatch.setitem(run_all_seeds.__globals__["KINDS"], "eager", 3)
    path = tmp_path / "matrix.jsonl"
    run_all_seeds("eager", 6, path)
    before = list(read_lines(path))
    assert [line["seed"] for line in before] == [0, 1]
    whole = path.read_text()
    path.write_text(whole[: whole.rindex('"axes"')])
    run_all_seeds("eager", 8, path)
    assert [line["seed"] for line in read_lines(path)] == [0, 1, 2]
