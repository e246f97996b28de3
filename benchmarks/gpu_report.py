"""The report of a first hour: the decisions, and then what each piece has found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import decisions, results_file
from benchmarks.case_results import CaseResults, collect_cases
from benchmarks.gpu_cases import list_cases
from benchmarks.gpu_contestants import YARDSTICK
from benchmarks.gpu_device import Device
from benchmarks.gpu_tasks import get_path, pieces
from benchmarks.tasks import find_failure
from mixture_of_experts.ops.triton import schedule

LOG_LINES = 8  # last lines of the log of a piece that failed


def write_report(folder: Path, device: Device) -> str:
    """Write `report.md` from all results in a folder, and return its text."""
    machine, cases = device.describe(), list(list_cases(device.shapes()))
    entries = schedule.find_entries(torch.device(device.name), torch.bfloat16)
    paths = {name: get_path(folder, name, machine) for name in pieces(device)}
    stored = {name: results_file.read(path, machine) for name, path in paths.items()}
    found = {name: results.found for name, results in stored.items()}
    tables = {f"cases/{case.name}": case for case in collect_cases(found, cases)}
    text = [f"# First hour on {machine['card']}", "", format_value(machine), *decisions.lines(found, cases, entries)]
    not_run = [name for name, path in paths.items() if not path.exists() and not path.with_suffix(".log").exists()]
    text += ["\n## Not run\n", ", ".join(not_run) or "All pieces were run."]
    for name, results in ((name, results) for name, results in stored.items() if name not in not_run):
        text += [f"\n## {name}\n", *(describe_case(tables[name]) if name in tables else describe_piece(results.found))]
        text += describe_end(results, paths[name].with_suffix(".log"))
    written = "\n".join(text) + "\n"
    (folder / "report.md").write_text(written)
    return written


def describe_case(case: CaseResults) -> Iterator[str]:
    """Yield a table of all contestants of a case."""
    yield "| | ÷ the fastest | GPU, ms | host, ms | peak, MB | error | clock |\n|---|---:|---:|---:|---:|---:|---|"
    best = case.find_fastest(name for name in case.contestants if name != YARDSTICK)
    for name in case.contestants:
        if reason := case.unmeasured_reason(name):
            yield f"| {name} | not measured: {reason} | | | | | |"
            continue
        row = case.results[name]
        ratio = case.time(name).median / case.time(best or name).median
        spreads = ["{1:.3g} ({0:.3g}–{2:.3g})".format(*(1e3 * q for q in row[who])) for who in ("card", "host")]
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        clock = " to ".join(state.get("clocks.sm", "unknown") for state in row["state"])
        yield f"| {name} | {ratio:.2f} | {' | '.join(spreads)} | {peak} | {error} | {clock} |"


def describe_piece(found: dict[str, Any]) -> Iterator[str]:
    """Yield the results of a piece, except for the times of blocks, which are in its file."""
    for name, result in found.items():
        if failure := find_failure(result):
            yield f"- {name}: not measured ({failure[1]})"
        elif " tiles " not in name:
            yield f"- {name}: {format_value(result)}"


def describe_end(stored: results_file.StoredResults, log: Path) -> Iterator[str]:
    """Yield whether a piece is incomplete, and the end of its log if anything failed."""
    if not stored.complete:
        yield "It did not finish."
    failures = [find_failure(result) for result in stored.found.values()]
    if log.exists() and (not stored.complete or any(failure and failure[0] == "ended" for failure in failures)):
        yield "\n" + "\n".join(f"      {line}" for line in log.read_text().strip().splitlines()[-LOG_LINES:])


def format_value(value: Any) -> str:
    """Return a value as text for a line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {format_value(part)}" for key, part in value.items()) or "none"
    if isinstance(value, list):
        return "\n  " + "\n  ".join(map(str, value)) if value else "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
