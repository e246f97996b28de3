"""The page of `RoutingStats.report`, which shows what the gates of a model did.

The page is one file, with its pictures, its style, and the script that tells what is under the pointer (`report.html`).
Names of gates and texts of tokens are escaped where they enter.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from html import escape
from importlib.resources import files
from string import Template
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.stats import charts
from mixture_of_experts.stats.colours import OTHERS, PALETTE, ink_on
from mixture_of_experts.stats.fates import (
    Choice,
    Fate,
    choices_of,
    composed_choices,
    expert_colours,
    fate_of,
    share,
    texts_of,
    visible,
)
from mixture_of_experts.stats.record import Record, relative

NOTES, NAMED = 12, 12  # most notes, and most experts that a note names


class History(NamedTuple):
    """The records of one gate, for its part of the page."""

    total: Record
    stretches: Sequence[Record]  # of one step or several each, oldest first
    end: int  # one more than the last step
    level_one: str | None
    sound: Record  # the steps before those of NaN
    late: Record  # the last quarter of these
    when: str  # how that quarter is called
    warnings: Sequence[str]


class Text(NamedTuple):
    """The choices of every token of a text, in one gate."""

    gate: str
    num_experts: int
    choices: list[list[Choice]]
    fates: list[Fate]


def page(
    name: str,
    histories: Sequence[History],
    loss: Sequence[float],
    tokens: str | bytes | Sequence[str] | None,
    texts: Sequence[Text],
) -> str:
    """The page as HTML."""
    shown = [history for history in histories if history.stretches]
    lost = [max(record.dropped, record.unseen) for history in shown for record in history.stretches]
    most = max(lost)
    template = Template(files("mixture_of_experts.stats").joinpath("report.html").read_text(encoding="utf-8"))
    return template.substitute(
        name=escape(name),
        date=date.today().isoformat(),
        facts=facts(shown),
        notes=notes(shown),
        scale=charts.scale(),
        overview="".join(overview_row(i, history) for i, history in enumerate(shown)),
        curves=curves(shown, loss),
        lost="" if most else "hidden",
        gates="".join(card(i, history, most) for i, history in enumerate(shown)),
        text="" if tokens is None else text_section(texts_of(tokens), texts),
        colours=colour_rules(),
        axes=", ".join(map(str, charts.HEAT_MAP)),
        width=str(charts.WIDTH),
        data=in_script({"gates": [numbers(history) for history in shown], "texts": [coded(text) for text in texts]}),
    )


def in_script(data: Any) -> str:
    """Data as JSON in a script; no text in it can end the script."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# Load


def facts(shown: Sequence[History]) -> str:
    first = min(history.stretches[0].step for history in shown)
    end = max(history.end for history in shown)
    forwards = max(history.total.forwards for history in shown)
    gates, steps = plural(len(shown), "gate"), f"step {first}" if end - first == 1 else f"steps {first} to {end - 1}"
    return f"{gates}, {steps}, at most {plural(forwards, 'forward')} of a gate"


def plural(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def notes(shown: Sequence[History]) -> str:
    """A list of what a reader should look at, or a line that all is well."""
    lines = [
        linked(i, history.total.layer, line)
        for i, history in enumerate(shown)
        for line in (*idle(history), *history.warnings)
    ]
    if not lines:
        return (
            "<p class=good>Every expert computes tokens, in late steps none is requested over twice a balanced load, "
            "and no gate drops much more than it has to.</p>"
        )
    more = [f"and {plural(len(lines) - NOTES, 'note')} more"] if len(lines) > NOTES else []
    return "<ul class=notes>" + "".join(f"<li>{item}</li>" for item in (*lines[:NOTES], *more)) + "</ul>"


def linked(i: int, layer: str, line: str) -> str:
    """A note, escaped; the gate's name, with which it begins, leads to the gate's charts."""
    rest = line.removeprefix("warning: ").removeprefix(layer)
    return f'<a href="#gate-{i}">{escape(layer)}</a>{escape(rest)}'


def idle(history: History) -> Iterator[str]:
    """Notes on experts that computed no token: in all steps, or in the last quarter of them."""
    if math.isnan(history.sound.entropy):  # its choices mean nothing
        return
    dead = history.sound.load == 0
    stopped = (history.late.load == 0) & ~dead
    for experts, when in ((dead, "in any step"), (stopped, history.when)):
        names = [".".join(map(str, expert)) for expert in experts.nonzero().tolist()]
        if names:
            listed = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
            yield f"{history.total.layer}: {plural(len(names), 'expert')} computed no token {when}: {listed}"


def overview_row(i: int, history: History) -> str:
    """One gate over all steps, as a table row."""
    total = history.total
    strips = "".join(
        f'<td class=strip><img data-gate="{i}" data-of="{of}" alt="" src="{charts.strip(load.flatten())}"></td>'
        for of, load in (("requested", total.requested), ("load", total.load))
    )
    avoidable = max(total.dropped - total.unavoidable, 0.0)
    bar = f'<i class=bar><i style="width:{total.unavoidable:.2%}"></i><i style="width:{avoidable:.2%}"></i></i>'
    cells = (
        ("most requested", f"{float(total.relative_requested.max()):.2f}×"),
        ("dead", str(len(total.dead))),
        ("dropped", f"{total.dropped:.1%}{bar}"),
        ("unseen", f"{total.unseen:.1%}"),
        ("entropy", f"{total.entropy:.2f} <small>of {math.log(total.load.shape[-1]):.2f}</small>"),
    )
    numbers = "".join(f"<td data-name={name}>{value}</td>" for name, value in cells)
    experts = "×".join(map(str, total.load.shape))
    return f"<tr><th>{gate_name(total.layer)} <small>{experts}</small></th>{strips}{numbers}</tr>\n"


def gate_name(layer: str) -> str:
    """A gate's name, escaped, with places where a line may break."""
    return escape(layer).replace(".", ".<wbr>").replace("_", "_<wbr>")


def curves(shown: Sequence[History], loss: Sequence[float]) -> str:
    """Charts of one number each, where it is not 0: the given loss, each gate's balancing loss, its busiest expert."""
    balance = [[record.losses.get("balance", math.nan) for record in history.stretches] for history in shown]
    busiest = [[float(record.relative_requested.max()) for record in history.stretches] for history in shown]
    places = [[record.step for record in history.stretches] for history in shown]
    figures = (
        ("loss", [range(len(loss))], [loss]),
        ("balance loss <small>a line for each gate, the first dark</small>", places, balance),
        ("most requested expert <small>over the mean; a line for each gate, the first dark</small>", places, busiest),
    )
    return "".join(
        f'<figure><figcaption>{title}</figcaption><img alt="{title.split(" <")[0]} over steps" '
        f'src="{charts.curves(steps, values)}" loading=lazy></figure>\n'
        for title, steps, values in figures
        if any(math.isfinite(value) and value for line in values for value in line)
    )


def card(i: int, history: History, most: float) -> str:
    """The figure of one gate over its steps."""
    level = "" if history.level_one is None else " <small>level two, a line between outer experts</small>"
    picture = charts.over_steps(history.stretches, history.end, most)
    alt = escape(f"load of the experts of {history.total.layer} over steps", quote=True)
    return (
        f"<figure id=gate-{i}><figcaption>{gate_name(history.total.layer)}{level}</figcaption>"
        f'<img class=steps data-gate="{i}" alt="{alt}" src="{picture}" loading=lazy></figure>\n'
    )


def numbers(history: History) -> dict[str, Any]:
    """The numbers that the pointer shows: loads in hundredths of a balanced load."""
    total = history.total

    def hundredths(load: Tensor) -> list[int]:
        return (100 * relative(load.flatten())).round().to(torch.int64).tolist()

    return {
        "inner": total.load.shape[1] if total.load.ndim == 2 else 0,
        "requested": hundredths(total.requested),
        "load": hundredths(total.load),
        "begins": [*(record.step for record in history.stretches), history.end],
        "steps": [hundredths(record.requested) for record in history.stretches],
        "lost": [
            [round(1000 * share) for share in (record.dropped, record.unavoidable, record.unseen)]
            for record in history.stretches
        ],
    }


# Text


def texts_of_gates(routing: Mapping[str, Routing], level_one: Mapping[str, str | None], num_tokens: int) -> list[Text]:
    """The choices of every gate for every token; the two levels of a layer are one text.

    Args:
        routing: the routing of each gate, by name, on one sequence.
        level_one: for each gate of level two the gate of level one, else None.
        num_tokens: number of tokens of the text.
    """
    found = []
    for gate, told in routing.items():
        first = level_one.get(gate)
        if first is not None and first not in routing:
            raise ValueError(f"{gate!r} is a second level: give the routing of {first!r} too")
        outer = told if first is None else routing[first]
        groups, n = outer.probs.shape[:-2], outer.num_tokens
        if len(groups) != 1:
            raise ValueError(
                f"{gate!r} has several routers, of shape {tuple(groups[:-1])}: leave it out of the routing"
            )
        if groups[0] * n != num_tokens:
            raise ValueError(
                f"there are {num_tokens} tokens, but the routing of {gate!r} has {groups[0] * n}: give the model one "
                "sequence, the text's tokens alone"
            )
        if first is None:
            choices = [of_token for group in range(groups[0]) for of_token in choices_of(told, group)]
            num_experts = told.num_experts
        else:
            choices, num_experts = composed_choices(outer, told), outer.num_experts * told.num_experts
        real = [True] * num_tokens if outer.real is None else outer.real.flatten().tolist()
        chooses = told.k is not None
        fates = [fate_of(of, 0, is_real, chooses) for of, is_real in zip(choices, real, strict=True)]
        found.append(Text(gate, num_experts, choices, fates))
    return found


def coded(text: Text) -> dict[str, Any]:
    """A text as the page's script reads it: the class and the choices of each token, and the legend."""
    names = {choice.expert: choice.name for of_token in text.choices for choice in of_token if choice.kept}
    colours = list(expert_colours(text.fates, text.num_experts))
    kinds = {expert: str(i) for i, expert in enumerate(colours)}
    classes = [class_of(fate, kinds) for fate in text.fates]
    tokens = [fate for fate in text.fates if fate.kind != "padding"]
    counts = Counter(cls.rstrip("u") for cls in classes)
    legend = [[kinds[e], share(f"expert {names[e]}", counts[kinds[e]], tokens)] for e in colours if counts[kinds[e]]]
    legend += [
        [cls, share(label, count, tokens)]
        for cls, label, count in (
            ("o", "other experts", counts["o"]),
            ("u", "first choice full", sum(cls.endswith("u") for cls in classes)),
            ("x", "no expert", counts["x"]),
        )
        if count
    ]
    choices = [
        [[choice.name, thousandths(choice.weight), int(choice.kept)] for choice in in_order(of_token)]
        for of_token in text.choices
    ]
    return {"classes": classes, "legend": legend, "choices": choices}


def thousandths(weight: float) -> int | None:
    return round(1000 * weight) if math.isfinite(weight) else None


def in_order(choices: Sequence[Choice]) -> list[Choice]:
    """Choices with the kept ones first, by weight; the others in the gate's order."""
    return sorted(choices, key=lambda choice: (not choice.kept, -choice.weight))


def class_of(fate: Fate, kinds: Mapping[int, str]) -> str:
    if fate.kind in ("padding", "unseen"):
        return {"padding": "p", "unseen": "x"}[fate.kind]
    return kinds.get(fate.expert, "o") + ("u" if fate.kind == "other" else "")


def text_section(tokens: Sequence[str], texts: Sequence[Text]) -> str:
    options = "".join(f'<option value="{i}">{escape(text.gate)}</option>' for i, text in enumerate(texts))
    spans = "".join(
        f"<b data-token={i}>{escape(visible(token))}</b>{'<br>' if token.endswith(chr(10)) else ''}"
        for i, token in enumerate(tokens)
    )
    return (
        "<section><h2>A text</h2><p>Every token has the colour of the expert that computes it with the largest weight. "
        "Point at one, or tap it, to see all its choices and their weights.</p>"
        f"<p><label>Gate <select id=gate>{options}</select></label></p>"
        f"<p id=legend class=legend></p><div id=text class=text translate=no>{spans}</div></section>"
    )


def colour_rules() -> str:
    """The style rules for tokens and for their legend."""
    colours = {**{str(i): colour for i, colour in enumerate(PALETTE)}, "o": OTHERS}
    return "".join(f".t{name}{{background:{colour};color:{ink_on(colour)}}}" for name, colour in colours.items())
