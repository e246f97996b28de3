"""The rounds that several processes timed, as one record."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks import timing
from benchmarks.cases import Case, every_case
from benchmarks.run import figures


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
    case = next(case for case in cases or every_case() if case.name == first["case"]["name"])
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
