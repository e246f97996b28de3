"""What is printed: one block a case, then the figures with their targets; and the picture for the docs.

`python -m benchmarks.report result.json` prints the figures of a saved result as a table for the docs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.cases import Case


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
    return f"{value / 1e9:.3f} GFLOP"


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


# Okabe and Ito's colours, which stay apart for colour-blind readers; shapes say the same a second time.
STYLES = {
    "layer": ("#0072B2", "o"),
    "compiled": ("#56B4E9", "d"),
    "0.2.3": ("#D55E00", "s"),
    "loop": ("#CC79A7", "^"),
    "dense": ("#000000", "|"),
    "eager": ("#009E73", "v"),
    "grouped_mm": ("#009E73", "P"),
    "batched_mm": ("#009E73", "X"),
    "fastest": ("#009E73", "P"),
}
NAMES = {name: f"transformers, {name}" for name in ("eager", "grouped_mm", "batched_mm")}
NAMES |= {"fastest": "transformers, at its fastest"}
NAMES |= {"layer": "mixture_of_experts", "compiled": "mixture_of_experts, compiled"}
NAMES |= {"0.2.3": "mixture-of-experts 0.2.3", "loop": "a loop over experts"}
NAMES |= {"dense": "one dense network of as many rows"}
FLOORS = ("products", "router + products", "by hand")


def floor_of(record: dict) -> str | None:
    return next((name for name in FLOORS if name in record["contestants"]), None)


def style_of(name: str) -> str | None:
    """The legend entry of a contestant, None for those that are not drawn."""
    last = name.split()[-1]
    return next((key for key in (name, last) if key in STYLES), None)


def points(record: dict) -> dict[str, float]:
    """Median times over the floor's, by legend entry."""
    contestants = record["contestants"]
    floor = contestants[floor_of(record)]["median_s"]
    times = {style_of(name): row["median_s"] / floor for name, row in contestants.items()}
    return {key: ratio for key, ratio in times.items() if key is not None}


def drawable(record: dict) -> bool:
    """A case of which no figure counts is not drawn."""
    return floor_of(record) is not None and any(figure["valid"] for figure in record["figures"])


def draw(result: dict, path: str) -> None:
    """Save the picture: one line a case, ordinary pages, the layer with huge pages as a hollow mark.

    It needs matplotlib.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    cases: dict[str, dict[str, dict]] = {}
    for record in filter(drawable, result["records"]):
        cases.setdefault(record["case"]["name"], {})[record["half"]] = record
    lines = lines_of([halves for halves in cases.values() if "ordinary" in halves])
    figure = Figure(figsize=(9.5, 1.6 + 0.29 * len(lines)), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(lines)), [line if isinstance(line, str) else title_of(line) for line in lines])
    for y, (line, label) in enumerate(zip(lines, axes.get_yticklabels(), strict=True)):
        if isinstance(line, str):
            label.set(weight="bold", va="center")
        else:
            axes.axhline(y, color="#eeeeee", linewidth=0.8, zorder=0)
            draw_row(axes, y, line)
    axes.axvline(1, color="#555555", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.grid(axis="x", which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("time ÷ the experts' products alone; left is faster\n(decoding: ÷ the chosen experts by hand)")
    figure.supxlabel(heading(result["machine"]), fontsize=8, color="#555555")
    figure.legend(handles=legend(cases), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def lines_of(cases: list[dict[str, dict]]) -> list[str | dict[str, dict]]:
    """The groups' headings, each with its cases below it."""
    groups: dict[str, list[dict[str, dict]]] = {}
    for halves in cases:
        groups.setdefault(case_of(halves).group, []).append(halves)
    return [line for group, members in groups.items() for line in ([group] if group else []) + members]


def case_of(halves: dict[str, dict]) -> Case:
    return Case(**halves["ordinary"]["case"])


def title_of(halves: dict[str, dict]) -> str:
    return case_of(halves).title


def draw_row(axes, y: int, halves: dict[str, dict]) -> None:
    for key, ratio in points(halves["ordinary"]).items():
        colour, marker = STYLES[key]
        axes.plot(ratio, y, marker, color=colour, markersize=7, zorder=4 if key == "layer" else 3)
    if "huge" in halves and "layer" in points(halves["huge"]):
        ratio = points(halves["huge"])["layer"]
        axes.plot(ratio, y, "o", color=STYLES["layer"][0], markersize=11, fillstyle="none", zorder=4)


def legend(cases: dict[str, dict[str, dict]]) -> list[Any]:
    """The marks that are drawn, named."""
    from matplotlib.lines import Line2D

    drawn = {key for halves in cases.values() for record in halves.values() for key in points(record)}
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=NAMES.get(key, key))
        for key, (colour, marker) in STYLES.items()
        if key in drawn
    ]
    if any("huge" in halves for halves in cases.values()):
        hollow = {"marker": "o", "fillstyle": "none", "markersize": 11, "linestyle": ""}
        handles.append(Line2D([], [], color=STYLES["layer"][0], label="the same, huge pages", **hollow))
    return handles


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())["records"]))
