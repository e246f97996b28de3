"""Who can run: contestants by the names that the cases use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks import layer, rivals, yardsticks
from benchmarks.cases import Case
from benchmarks.contest import Contestant, MissingError, check
from benchmarks.loop import expected_output
from benchmarks.problem import Inputs, Weights
from benchmarks.problem import inputs as make_inputs
from benchmarks.problem import weights as make_weights
from benchmarks.whole_batch import whole_batch

Builder = Callable[[Case, Weights, Inputs], Contestant]

BUILDERS: dict[str, Builder] = {
    "layer": layer.layer,
    "layer balanced": layer.variant("layer balanced", skew=0.0),
    "layer dropless": layer.variant("layer dropless", factor=None),
    "layer bfloat16": layer.variant("layer bfloat16", dtype="bfloat16"),
    "layer compiled": layer.compiled,
    "products": yardsticks.products,
    "router + products": yardsticks.router_and_products,
    "roofline": yardsticks.roofline,
    "whole batch": whole_batch,
    "whole batch in new memory": partial(whole_batch, ready=False),
    "dense": yardsticks.dense,
    "by hand": yardsticks.by_hand,
    "loop": rivals.loop,
    "0.2.3": rivals.published,
    "st-moe": rivals.st_moe,
    **{
        f"{family} {backend}": rivals.transformers_block(family, backend)
        for family in ("mixtral", "qwen3")
        for backend in ("eager", "grouped_mm", "batched_mm")
    },
}


def enter(case: Case) -> tuple[dict[str, Contestant], dict[str, str]]:
    """The case's contestants, and why each that is missing is missing."""
    found = {name: build(name, case) for name in case.contestants}
    present = {name: one for name, one in found.items() if isinstance(one, Contestant)}
    return present, {name: one for name, one in found.items() if isinstance(one, str)}


def build(name: str, case: Case) -> Contestant | str:
    """The contestant, or why it is missing."""
    try:
        return BUILDERS[name](case, make_weights(case), make_inputs(case))
    except MissingError as reason:
        return str(reason)


def check_all(contestants: dict[str, Contestant]) -> dict[str, float]:
    """Compare everyone that computes the layer with the plain loop (two levels: with each other). Error by name."""
    errors: dict[str, float] = {}
    known: dict[Case, object] = {}
    for name, contestant in contestants.items():
        if contestant.output is None:
            continue
        case = contestant.case
        if case not in known:
            known[case] = contestant.output() if case.inner else expect(case)
        errors[name] = check(contestant, known[case])
    return errors


def expect(case: Case):
    return expected_output(case, make_weights(case), make_inputs(case))
