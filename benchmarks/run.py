"""Run one case: enter the contestants, compare their outputs, count their memory, then time them."""

from __future__ import annotations

from dataclasses import asdict

from benchmarks import timing
from benchmarks.cases import Case
from benchmarks.counts import peak_bytes
from benchmarks.field import check_all, enter
from benchmarks.loop import load_of
from benchmarks.problem import forget_weights, inputs, weights


def run_case(case: Case, half: str, rounds: int, attempts: int, clock: timing.Clock = "wall", seed: int = 0) -> dict:
    """The record of one case, ready for JSON."""
    contestants, missing = enter(case)
    errors = check_all(contestants)
    peaks = {name: peak_bytes(contestant) for name, contestant in contestants.items()} if half == "ordinary" else {}
    samples = timing.measure(case, contestants, rounds, attempts, clock, seed)
    forget_weights()
    return {
        "case": {key: value for key, value in asdict(case).items() if key not in ("figures", "extras", "quick")},
        "half": half,
        "load": {} if case.inner else load_of(case, weights(case), inputs(case)),
        "rounds": rounds,
        "clock": clock,
        "contestants": {
            name: samples[name].summary()
            | {"peak_bytes": peaks.get(name.removesuffix(timing.AGAIN))}
            | {"error": errors.get(name), "note": contestants[name.removesuffix(timing.AGAIN)].note}
            | {"seconds": samples[name].seconds}
            for name in samples
        },
        "missing": missing,
        "figures": figures(case, samples, peaks, half),
    }


def figures(case: Case, samples: dict[str, timing.Samples], peaks: dict[str, int], half: str) -> list[dict]:
    rows = []
    for figure in case.figures:
        if figure.quantity == "time":
            rows.append(timing.time_figure(figure, samples, half))
        else:
            rows.append(timing.memory_figure(figure, peaks, half))
    return [found for found in rows if found is not None]
