"""The picture for the docs: every case's times over the time of its reference."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.cases import Case
from benchmarks.report import heading

# Okabe and Ito's colours, which stay apart for colour-blind readers; shapes say the same a second time.
STYLES = {
    "layer": ("#0072B2", "o"),
    "compiled": ("#56B4E9", "d"),
    "0.2.3": ("#D55E00", "s"),
    "st-moe": ("#E69F00", "D"),
    "loop": ("#CC79A7", "^"),
    "dense": ("#000000", "|"),
    "eager": ("#009E73", "v"),
    "grouped_mm": ("#009E73", "P"),
    "batched_mm": ("#009E73", "X"),
}
NAMES = {name: f"transformers, {name}" for name in ("eager", "grouped_mm", "batched_mm")}
NAMES |= {"layer": "mixture_of_experts", "compiled": "mixture_of_experts, compiled"}
NAMES |= {"0.2.3": "mixture-of-experts 0.2.3", "st-moe": "st-moe-pytorch", "loop": "a loop over experts"}
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
    """Save the picture: one line a case, ordinary pages, the layer with huge pages as a hollow mark."""
    cases: dict[str, dict[str, dict]] = {}
    for record in filter(drawable, result["records"]):
        cases.setdefault(record["case"]["name"], {})[record["half"]] = record
    lines = lines_of([halves for halves in cases.values() if "ordinary" in halves])
    figure, axes = plt.subplots(figsize=(9.5, 1.6 + 0.29 * len(lines)), layout="constrained")
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
    plt.close(figure)


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


def legend(cases: dict[str, dict[str, dict]]) -> list[Line2D]:
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
