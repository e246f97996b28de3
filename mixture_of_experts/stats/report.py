"""The page of `RoutingStats.report`, which shows what the gates of a model did.

The page is one file, with its pictures and its style (`report.html`). Names of gates are escaped where they enter.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from html import escape
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any, NamedTuple

from mixture_of_experts.stats.drawing import draw_lines, new_axes
from mixture_of_experts.stats.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WELL = (
    "<li class=good>Every expert computes tokens, in late steps none is requested over twice a balanced load, and no "
    "gate drops much more than it has to.</li>"
)
STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "report"}


class GateHistory(NamedTuple):
    """What one gate did."""

    layer: str
    cells: Mapping[str, str]  # its line of the summary, by headers
    notes: Sequence[str]
    stretches: Sequence[Record]  # of one step or several each
    over_steps: Figure  # its picture


def page(name: str, gates: Sequence[GateHistory], overview: Mapping[str, Figure], loss: Sequence[float]) -> str:
    """The page as HTML, with pictures of all gates by their titles."""
    template = Template(files("mixture_of_experts.stats").joinpath("report.html").read_text(encoding="utf-8"))
    rows = [gates[0].cells, *(gate.cells.values() for gate in gates)]
    parts: dict[str, Iterable[str]] = {
        "name": escape(name),
        "date": date.today().isoformat(),
        "notes": [
            f'<li><a href="#gate-{place}">{escape(gate.layer)}</a>{escape(note)}</li>'
            for place, gate in enumerate(gates)
            for note in gate.notes
        ]
        or WELL,
        "overview": [picture(title, figure) for title, figure in overview.items()],
        "rows": [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows],
        "curves": curves(gates, loss),
        "gates": [picture(gate.layer, gate.over_steps, place) for place, gate in enumerate(gates)],
    }
    return template.substitute({part: "".join(lines) for part, lines in parts.items()})


def picture(title: str, figure: Figure, place: int | None = None) -> str:
    """A picture under its title; notes lead to the one of the gate at a place."""
    import matplotlib as mpl

    file = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None})
    source = f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
    image = f'<img alt="{escape(title)}" src="{source}" loading=lazy>'
    return f'<figure id="gate-{place}"><figcaption>{escape(title)}</figcaption>{image}</figure>'


def curves(gates: Sequence[GateHistory], loss: Sequence[float]) -> Iterator[str]:
    """Pictures of the loss, and of every scalar that changes, with a line for each gate."""
    lines: dict[str, list[tuple[Sequence[float], Sequence[float]]]] = {"loss": [(range(len(loss)), loss)]}
    for gate in gates:
        steps, scalars = [record.step for record in gate.stretches], [record.scalars() for record in gate.stretches]
        for name in scalars[0]:
            lines.setdefault(name, []).append((steps, [each[name] for each in scalars]))
    for name, of_gates in lines.items():
        if any(len(set(values)) > 1 for _, values in of_gates):
            yield picture(name, draw_lines(new_axes(5.2, 1.9), of_gates))
