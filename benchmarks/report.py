"""What is printed: one block a case, then the figures with their targets.

`python -m benchmarks.report result.json` prints the figures of a saved result as a table for the docs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path


def heading(machine: dict) -> str:
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; torch {machine['torch']}, "
        f"{machine['threads']} threads, {machine['cpu_capability']}"
    )


def pages(half: str) -> str:
    return {"ordinary": "ordinary pages", "huge": "huge pages"}[half]


def case_block(record: dict) -> str:
    """Everybody's time, spread, peak memory and page faults, then the case's figures."""
    clock = "" if record["clock"] == "wall" else ", CPU seconds"
    rounds = f"{record['rounds']} rounds" + (f" of {record['processes']} processes" if "processes" in record else "")
    settings = f"{record['case']['mode']}, {pages(record['half'])}, {rounds}{clock}"
    lines = [f"\n{record['case']['name']}  ({settings})"]
    if record["load"]:
        lines.append("  load: " + ", ".join(f"{name} {value:.2f}" for name, value in record["load"].items()))
    lines.append(f"  {'contestant':28}{'median ms':>11}{'q1–q3':>19}{'peak MiB':>11}{'page faults':>13}")
    lines += [contestant_line(name, row) for name, row in record["contestants"].items()]
    lines += [f"  {name:28} missing: {why}" for name, why in record["missing"].items()]
    lines += [f"  = {figure_line(figure)}" for figure in record["figures"]]
    return "\n".join(lines)


def contestant_line(name: str, row: dict) -> str:
    spread = f"{row['q1_s'] * 1e3:.1f}–{row['q3_s'] * 1e3:.1f}"
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
    return f"  {name:28}{row['median_s'] * 1e3:11.1f}{spread:>19}{peak:>11}{row['faults']:13.0f}"


def figure_line(figure: dict) -> str:
    """One ratio, what each process found of it, its A/A ratio, its target and what came of it."""
    alone = "  ({:.3f} to {:.3f})".format(*figure["range"]) if "range" in figure else ""
    aa = f"  A/A {figure['aa']:.3f}" if "aa" in figure else ""
    target = "" if figure["target"] is None else f"  target ≤ {figure['target']:.2f}"
    return f"{figure['label']}: {figure['value']:.3f}{alone}{aa}{target}  {verdict(figure)}"


def verdict(figure: dict) -> str:
    if not figure["valid"]:
        return "INVALID (A/A off by more than 3 %, or too few rounds)"
    return {True: "met", False: "NOT MET", None: ""}[figure["met"]]


def count_line(row: dict) -> str:
    limit = "" if row["limit"] is None else f"  limit ≤ {row['limit']:.2f}  {'met' if row['met'] else 'NOT MET'}"
    numbers = f"{quantity(row['over'], row['unit'])} ÷ {quantity(row['under'], row['unit'])}"
    return f"{row['case']:32} {row['what']:24} {row['note']:26} {numbers:26} = {row['value']:.3f}{limit}"


def quantity(value: float, unit: str) -> str:
    if unit == "B":
        return f"{value / 2**20:.2f} MiB"
    if unit == "FLOP":
        return f"{value / 1e9:.3f} GFLOP"
    return f"{value:.0f}"


def summary(records: Iterable[dict]) -> str:
    """All figures, one a line."""
    lines = ["\nfigures"]
    for record in records:
        where = f"{record['case']['name']}, {pages(record['half'])}"
        lines += [f"  {where:52} {figure_line(figure)}" for figure in record["figures"]]
    return "\n".join(lines)


def markdown(records: Iterable[dict]) -> str:
    """A row for each figure: its value on ordinary and on huge pages, in parentheses where it does not count, and what
    each of several processes found."""
    rows: dict[tuple[str, str], dict[str, dict]] = {}
    for record in records:
        for figure in record["figures"]:
            rows.setdefault((record["case"]["name"], figure["label"]), {})[record["half"]] = figure
    lines = ["| case | ratio | ordinary pages | huge pages | at most |", "|---|---|---:|---:|---:|"]
    for (name, label), halves in rows.items():
        ordinary, huge = (cell(halves.get(half)) for half in ("ordinary", "huge"))
        limits = [figure["target"] for figure in halves.values() if figure["target"] is not None]
        most = " / ".join(f"{limit:.2f}" for limit in dict.fromkeys(limits))
        lines.append(f"| {name} | {label} | {ordinary} | {huge} | {most} |")
    return "\n".join(lines)


def cell(figure: dict | None) -> str:
    if figure is None:
        return ""
    value = f"{figure['value']:.2f}" if figure["valid"] else f"({figure['value']:.2f})"
    return value + (", {:.2f}–{:.2f}".format(*figure["range"]) if "range" in figure else "")


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())["records"]))
