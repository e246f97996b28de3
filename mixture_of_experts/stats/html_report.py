"""Renders the HTML report of `RoutingStats.report`, which shows the routing decisions of a model's gates.

The report is a single file with embedded figures and styles, rendered from the template `report.html`. Gate names are
HTML-escaped.
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

ALL_GOOD_HTML = (
    "<li class=good>Every expert computes tokens. In late steps, no expert is requested more than twice or less than a "
    "tenth as often as with a balanced load. No gate drops many more choices than it must.</li>"
)
SVG_SETTINGS: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "report"}


def render_page(
    name: str,
    cells: Sequence[Mapping[str, str]],
    notes: Mapping[str, Iterable[str]],
    overview: Mapping[str, Figure],
    over_steps: Mapping[str, Figure],
    left_out: str = "",
) -> str:
    """Render the report as HTML.

    Args:
        name: title of the report.
        cells: rows of the table, each a dictionary that maps column headers to cell text.
        notes: warnings about each gate, keyed by gate name.
        overview: figures that show all gates, keyed by title.
        over_steps: figures that show a single gate over the steps, keyed by gate name.
        left_out: a sentence about the gates that are not drawn.
    """
    template = Template(files("mixture_of_experts.stats").joinpath("report.html").read_text(encoding="utf-8"))
    places = {layer: number for number, layer in enumerate(over_steps)}
    rows = [cells[0], *(row.values() for row in cells)]
    items = [
        f"<li>{link_gate(layer, places.get(layer))}{escape(note)}</li>"
        for layer, gate_notes in notes.items()
        for note in gate_notes
    ]
    return template.substitute(
        name=escape(name),
        date=date.today().isoformat(),
        notes="".join(items) or ALL_GOOD_HTML,
        overview="".join(render_figure(title, figure) for title, figure in overview.items()),
        rows="".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows),
        gates="".join(render_figure(layer, figure, places[layer]) for layer, figure in over_steps.items()),
        left_out=f"<p>{escape(left_out)}</p>" if left_out else "",
    )


def link_gate(layer: str, place: int | None) -> str:
    """Return a gate's name as HTML, with a link to the gate's figure if it was drawn."""
    return f"<b>{escape(layer)}</b>" if place is None else f'<a href="#gate-{place}">{escape(layer)}</a>'


def render_figure(title: str, figure: Figure, number: int | None = None) -> str:
    """Return a figure and its title as HTML. If `number` is given, the figure gets the anchor that `link_gate` links
    to."""
    import matplotlib as mpl

    file = io.BytesIO()
    with mpl.rc_context(SVG_SETTINGS):
        figure.savefig(file, format="svg", metadata={"Date": None})
    source = f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
    image = f'<img alt="{escape(title)}" src="{source}" loading=lazy>'
    anchor = "" if number is None else f' id="gate-{number}"'
    return f"<figure{anchor}><figcaption>{escape(title)}</figcaption>{image}</figure>"
