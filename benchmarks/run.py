"""Run one case: enter the contestants, compare their outputs, count their memory, then time them. Pool what several
processes timed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from benchmarks import timing
from benchmarks.cases import Case, list_cases
from benchmarks.counts import measure_peak_bytes
from benchmarks.problem import forget_weights, inputs, load_of, weights
from benchmarks.registry import build_contestants, check_all


def run_case(case: Case, half: str, rounds: int, attempts: int, clock: timing.Clock = "wall", seed: int = 0) -> dict:
    """The record of one case, ready for JSON."""
    contestants, missing = build_contestants(case)
    errors = check_all(contestants)
    peaks = (
        {name: measure_peak_bytes(contestant) for name, contestant in contestants.items()} if half == "ordinary" else {}
    )
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


def pooled(records: Sequence[dict], cases: Iterable[Case] | None = None) -> dict:
    """One record of the rounds of several processes, of one case (by name among `cases`, else all there are) and half.

    What a process finds depends on where its memory lies, for as long as it runs: `range` says what each found alone.
    """
    first = records[0]
    names = [name for name in first["contestants"] if all(name in record["contestants"] for record in records)]
    alone = [samples_of(record, names) for record in records]
    samples = {
        name: timing.Samples(
            [second for one in alone for second in one[name].seconds],
            [faults for one in alone for faults in one[name].faults],
        )
        for name in names
    }
    contestants = {
        name: first["contestants"][name] | samples[name].summary() | {"seconds": samples[name].seconds}
        for name in names
    }
    peaks = {name: row["peak_bytes"] for name, row in contestants.items() if row["peak_bytes"] is not None}
    case = next(case for case in cases or list_cases() if case.name == first["case"]["name"])
    found = figures(case, samples, peaks, first["half"])
    for figure in found:
        if figure["quantity"] == "time":
            values = [timing.ratio(figure["numerator"], figure["reference"], one)[0] for one in alone]
            figure["range"] = [min(values), max(values)]
    rounds = sum(record["rounds"] for record in records)
    return first | {"rounds": rounds, "processes": len(records), "contestants": contestants, "figures": found}


def samples_of(record: dict, names: Sequence[str]) -> dict[str, timing.Samples]:
    """What a process measured, of the page faults their median."""
    rows = {name: record["contestants"][name] for name in names}
    return {name: timing.Samples(row["seconds"], [row["faults"]]) for name, row in rows.items()}
