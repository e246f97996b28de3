"""The page of `RoutingStats.report`, which shows what the gates of a model did.

The page is one file, with its pictures and its style (`report.html`). Names of gates are escaped where they enter.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from html import escape
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WELL = (
    "<li class=good>Every expert computes tokens, in late steps none is requested over twice a balanced load, and no "
    "gate drops much more than it has to.</li>"
)
STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "report"}


def page(
    name: str,
    cells: Sequence[Mapping[str, str]],
    notes: Mapping[str, Iterable[str]],
    overview: Mapping[str, Figure],
    over_steps: Mapping[str, Figure],
) -> str:
    """The page as HTML.

    Args:
        name: its title.
        cells: lines of the table, by headers.
        notes: those of each gate.
        overview: pictures of all gates, by their titles.
        over_steps: that of each gate, in the order of the notes.
    """
    template = Template(files("mixture_of_experts.stats").joinpath("report.html").read_text(encoding="utf-8"))
    rows = [cells[0], *(row.values() for row in cells)]
    told = [
        f'<li><a href="#gate-{place}">{escape(layer)}</a>{escape(note)}</li>'
        for place, (layer, of_gate) in enumerate(notes.items())
        for note in of_gate
    ]
    return template.substitute(
        name=escape(name),
        date=date.today().isoformat(),
        notes="".join(told) or WELL,
        overview="".join(picture(title, figure) for title, figure in overview.items()),
        rows="".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows),
        gates="".join(picture(layer, figure, place) for place, (layer, figure) in enumerate(over_steps.items())),
    )


def picture(title: str, figure: Figure, place: int | None = None) -> str:
    """A picture under its title; notes lead to the one of the gate at a place."""
    import matplotlib as mpl

    file = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None})
    source = f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
    image = f'<img alt="{escape(title)}" src="{source}" loading=lazy>'
    anchor = "" if place is None else f' id="gate-{place}"'
    return f"<figure{anchor}><figcaption>{escape(title)}</figcaption>{image}</figure>"
