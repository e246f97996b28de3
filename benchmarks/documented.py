"""The picture of `docs/performance.md`, from the table of `benchmarks/measured.md`: `python -m benchmarks.documented`.

Picture and table are one measurement.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.cases import select_cases
from benchmarks.report import FLOORS, draw

MEASURED = Path(__file__).with_name("measured.md")
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "benchmarks.png"
ROW = re.compile(r"^\| (\S+/\S+) \| (.+?) ÷ (.+?) \| (\(?)([\d.]+)\)?(?:, [\d.–]+)? \|", re.MULTILINE)
MACHINE = re.compile(
    r"^> (?P<processor>.+), (?P<cores>\d+) cores, (?P<memory_gib>[\d.]+) GiB; torch (?P<torch>\S+), "
    r"(?P<threads>\d+) threads, (?P<cpu_capability>\S+)$",
    re.MULTILINE,
)
Ratio = tuple[str, str, float]  # over, under, and how many times as long


def result_of(page: str) -> dict[str, Any]:
    """The result of a run, as far as the page tells it: times as multiples of the floor's, and which ratios count."""
    machine = MACHINE.search(page)
    if machine is None:
        raise ValueError("the page does not say, in a line that begins with '> ', on which machine it was measured")
    rows: dict[str, list[Ratio]] = {}
    for name, over, under, bracket, value in ROW.findall(page):
        if not bracket and "peak memory" not in under:
            rows.setdefault(name, []).append((over, fastest(under), float(value)))
    cases = {case.name: case for case in select_cases(None, quick=False)}
    return {"machine": machine.groupdict(), "records": [record(cases[name], rows[name]) for name in rows]}


def fastest(name: str) -> str:
    """Of several references the table tells the fastest alone."""
    return "fastest" if name.startswith("fastest of") else name


def record(case: Any, ratios: list[Ratio]) -> dict[str, Any]:
    fields = {key: value for key, value in asdict(case).items() if key not in ("figures", "extras", "quick")}
    times = {name: {"median_s": time} for name, time in times_of(ratios).items()}
    return {"case": fields, "half": "ordinary", "contestants": times, "figures": [{"valid": True}]}


def times_of(ratios: list[Ratio]) -> dict[str, float]:
    """Everybody's time over the floor's, where ratios lead there; nothing, where no ratio is to a floor."""
    named = {name for over, under, _ in ratios for name in (over, under)}
    known = dict.fromkeys([name for name in FLOORS if name in named][:1], 1.0)
    while found := dict(reached(ratios, known)):
        known |= found
    return known


def reached(ratios: Iterable[Ratio], known: dict[str, float]) -> Iterator[tuple[str, float]]:
    for over, under, value in ratios:
        if under in known and over not in known:
            yield over, known[under] * value
        elif over in known and under not in known:
            yield under, known[over] / value


if __name__ == "__main__":
    draw(result_of(MEASURED.read_text(encoding="utf-8")), str(PICTURE))
    print(f"wrote {PICTURE}")
