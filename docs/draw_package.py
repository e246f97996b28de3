"""Draws the pictures of CONTRIBUTING.md: the rooms of the package, and the way of one token through it.

    python docs/draw_package.py [--out docs/images]

The rooms and their order are read from the table in `tests/test_imports.py`, which holds the package to it. Needs
matplotlib (the extra `plot`).
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))

from draw_concepts import WIDTH, canvas, say  # noqa: E402
from draw_moe import FAINT, HUES, INK, PALE, arrow, box, tint  # noqa: E402

BLUE, ORANGE, GREEN, PINK = (tint(hue, 0.75) for hue in HUES)
GREY = "#f2f2f2"
# What the rooms of one line are for, from the ground up
LINES = (
    "names and hooks of torch",
    "checks, and calls under way",
    "what a gate tells",
    "decides; moves tokens",
    "ways of computing",
    "experts and their weights",
    "experts around others",
    "what a layer is given",
    "the layer",
    "models and their gates",
    "what acts on a whole model",
    "what the package exports",
)
COLOURS = {
    "gating": ORANGE,
    "ops": GREEN,
    "experts": GREEN,
    "moe": BLUE,
    "decision": PINK,
    "routing": PINK,
    "plan": PINK,
}
LINE, LEFT, RIGHT = 6.4, 33.5, 77.0  # of a line: its height, and where its rooms begin and end


def tables() -> tuple[list[list[str]], dict[str, list[str]]]:
    """The lines of the core, from the ground up, and the rooms outside with those of them that they import from."""
    tree = ast.parse((DOCS.parent / "tests" / "test_imports.py").read_text(encoding="utf-8"))
    found: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in ("CORE", "OUTSIDE"):
                code = compile(ast.Expression(node.value), "test_imports.py", "eval")
                found[name] = eval(code, {"set": set})
    core = [sorted(rooms) for rooms in found["CORE"]]
    return core, {room: sorted(others) for room, others in found["OUTSIDE"].items()}


def draw_package() -> Figure:
    """The core as lines of rooms: each imports from its own line and those below it. Beside it what is outside."""
    core, outside = tables()
    height = LINE * len(core) + 9.0
    figure, ax = canvas(height)
    say(ax, LEFT, height - 3.0, "the core", weight="bold")
    say(ax, RIGHT + 5.0, height - 3.0, "outside: import\nany of it", weight="bold", fontsize=9.5)
    for line, rooms in enumerate(core):
        y = 4.0 + LINE * line
        if line < len(LINES):
            say(ax, LEFT - 1.5, y, LINES[line], ha="right", color=FAINT, fontsize=8.5)
        width = (RIGHT - LEFT - 1.0 * (len(rooms) - 1)) / len(rooms)
        for i, room in enumerate(rooms):
            look = {"facecolor": COLOURS.get(room, GREY), "edgecolor": FAINT, "linewidth": 0.8}
            text = room.replace("_", "_\n") if len(rooms) > 3 else room or "__init__"
            box(
                ax,
                LEFT + i * (width + 1.0),
                y,
                width,
                LINE - 1.4,
                text,
                size=8.5 if len(rooms) < 5 else 7 if len(rooms) < 7 else 5.8,
                **look,
            )
    top = 4.0 + LINE * (len(core) - 1)
    arrow(ax, (4.0, top), (4.0, 4.0), color=INK)
    say(ax, 2.2, (top + 4.0) / 2, "imports run down", rotation=90, ha="center", fontsize=8.5)
    step = (top - 4.0) / max(len(outside) - 1, 1)
    for i, (room, others) in enumerate(outside.items()):
        y = top - i * step
        text = room + (f"\n(imports {', '.join(others)})" if others else "")
        box(ax, RIGHT + 5.0, y, 17.0, LINE - 1.0, text, size=7, facecolor="white", edgecolor=FAINT, linewidth=0.8)
        arrow(ax, (RIGHT + 4.6, y), (RIGHT + 0.8, y), color=FAINT)
    return figure


# Of a token's way: what is there, of which shape, and the function that makes the next of it
WAY = (
    ("inputs", "(..., n, d)", "mask_and_group", GREY),
    ("groups", "(b, n, d)", "the gate: decide(tokens)", GREY),
    ("Choices", "expert, weight, probs: k of a token", "queue_up, capacity", ORANGE),
    ("Routing", "assignments of each group, losses", "decision_of (of two levels: compose)", PINK),
    ("Decision", "assignments of the call, (t k,)", "routed_ffn asks each way: why_not(call)", PINK),
    ("Call", "tokens, Decision, Network", "the way lays out rows, and gathers", GREEN),
    ("Plan, rows", "(r, d), sorted by expert or in slots", "the experts' products", GREEN),
    ("rows", "(r, d)", "combine: each token's weighted sum", GREEN),
    ("outputs of tokens", "(t, d)", "ungroup_and_add_shared", GREY),
    ("out, aux_loss", "(..., n, d), a scalar", "", BLUE),
)
READERS = ("aux_loss", "statistics and pictures", "the papers' dense tensors")


def draw_way() -> Figure:
    """Objects in boxes, from above to below; functions beside the arrows between them."""
    step = 10.4
    height = step * len(WAY) + 1.0
    figure, ax = canvas(height)
    left, width = 8.0, 46.0
    for i, (name, what, function, colour) in enumerate(WAY):
        y = height - 4.0 - step * i
        box(ax, left, y, width, 5.8, facecolor=colour, edgecolor=FAINT, linewidth=0.8)
        say(ax, left + 2.0, y, name, weight="bold", fontsize=9.5)
        say(ax, left + width - 2.0, y, what, ha="right", fontsize=7.5)
        if function:
            arrow(ax, (left + width / 2, y - 3.1), (left + width / 2, y - step + 3.1), color=INK)
            say(ax, left + width / 2 + 2.0, y - step / 2, function, fontsize=8.5, color=FAINT)
        if name == "Routing":
            draw_readers(ax, left + width, y)
    return figure


def draw_readers(ax: Axes, x: float, y: float) -> None:
    """Who else reads what a gate tells."""
    for i, reader in enumerate(READERS):
        at = y + 6.0 * (2 - i)
        box(ax, x + 14.0, at, WIDTH - x - 16.0, 4.6, reader, size=8, facecolor="white", edgecolor=PALE, linewidth=1.0)
        arrow(ax, (x + 0.4, y), (x + 13.4, at), color=FAINT)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=DOCS / "images")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, figure in {"package": draw_package(), "token": draw_way()}.items():
        figure.savefig(args.out / f"{name}.png", dpi=200, facecolor="white")
        plt.close(figure)


if __name__ == "__main__":
    main()
