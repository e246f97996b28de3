"""`track_routing` records what the gates of a model decide, and `RoutingStats` tells it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from mixture_of_experts.stats.diagnostics import StepRows, diagnose_gate
from mixture_of_experts.stats.html_report import render_page
from mixture_of_experts.stats.plotting import make_axes, plot_gates, plot_steps
from mixture_of_experts.stats.record import Record, format_cells
from mixture_of_experts.stats.ring_buffer import ForwardCounter, GateRingBuffer, PartForwards
from mixture_of_experts.stats.routing_reader import attach_gate_hooks
from mixture_of_experts.support.attachments import Attachments
from mixture_of_experts.support.checks import check_choice, check_size
from mixture_of_experts.whole_model.router_discovery import GateSelection, RouterHandle, find_routers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TrackingMode = Literal["always", "training", "eval"]
MAX_DRAWN = 24  # gates of which a report has pictures: of 300 they took half a minute
NOTHING_RECORDED_ERROR = (
    "no forward of a gate was recorded: call the model that was given to track_routing inside the context. If it was "
    "compiled and called before, its graph has no hooks: call torch.compiler.reset() first, or enter track_routing "
    "before the first compiled call"
)


@contextmanager
def track_routing(
    model: nn.Module, *, keep: int = 1000, when: TrackingMode = "always", gates: GateSelection | None = None
) -> Iterator[RoutingStats]:
    """Record what every gate in `model` decides, while the context lasts.

    It finds the gates of `MoE` and `HeirarchicalMoE` layers, of any class, all other modules derived from `Gate`, and
    the routers of MoE models in `transformers` (Mixtral, Qwen3-MoE, DeepSeek-V3, ...); there the attention mask tells
    which tokens are padding. You can read the records inside the context and after it.

    A step is one forward of `model`, or of a model of `transformers` within it that is called by itself, as `generate`
    calls `model.encoder`. If you call `stats.step()` after each optimizer step, all forwards since the last
    call are one step (gradient accumulation).

    With activation checkpointing of either kind a forward is recorded once. With `torch.compile` enter the context
    before the first compiled call. Each rank records its own tokens. Forwards of all threads are recorded, those
    that had begun before the context are not. A forward that raises does not count.

    Args:
        model: the module that you call; a forward of a gate counts only within a forward of this module.
        keep: how many forwards of each gate are remembered, the last ones.
        when: which forwards to record: those in "training" mode, in "eval" mode, or "always".
        gates: the gates to record, by their names or as modules (gates, or layers around them); by default all.

    Raises:
        ValueError: the model has no gate, or an argument is not allowed.
        TypeError: in a forward: nobody can read what a router returns.
        RuntimeError: in a forward: the model itself runs inside `torch.utils.checkpoint`, or only a part of it is
            called that is no model of `transformers` (in both cases track the module around it); on reading: nothing
            was recorded.

    Example:
        >>> import torch
        >>> from mixture_of_experts import MoE
        >>> moe = MoE(dim=8, num_experts=4)
        >>> with track_routing(moe) as stats:
        ...     out, aux_loss = moe(torch.randn(2, 16, 8))
        >>> stats.layers
        ('gate',)
        >>> stats.last("gate").tokens
        32
    """
    routers = find_routers(model, "track_routing", gates)
    stats = RoutingStats(routers, keep, when)
    with Attachments() as hooks:
        hooks.callback(stats._counter.stop_recording)
        attach_gate_hooks(routers, lambda router, *told: stats._buffers[router.name].write_row(*told), hooks)
        for part in dict.fromkeys(router.enclosing_model for router in routers if router.enclosing_model is not model):
            PartForwards(stats._counter).attach_to(part, hooks)
        stats._counter.attach_to(model, hooks)
        yield stats


class RoutingStats:
    """The records of `track_routing`. Reading them waits for the device; `step` and `layers` do not.

    It can be pickled and copied: the copy has the records so far, on the CPU, and does not record.
    """

    def __init__(self, routers: Sequence[RouterHandle], keep: int, when: TrackingMode) -> None:
        check_size("keep", keep)
        check_choice("when", when, get_args(TrackingMode))
        self._counter, self._steps_are_joined = ForwardCounter(when), False
        self._buffers = {router.name: GateRingBuffer(router, self._counter, keep) for router in routers}

    @property
    def layers(self) -> tuple[str, ...]:
        """The paths of the gates in the model, in the model's order."""
        return tuple(self._buffers)

    def step(self) -> None:
        """End a step: all forwards since the last call, or since the beginning, are one step.

        RuntimeError if no hook of a gate ran or was traced: nothing is recorded.
        """
        if not any(ring.loss_names for ring in self._buffers.values()):
            raise RuntimeError(NOTHING_RECORDED_ERROR)
        self._steps_are_joined = True
        for ring in self._buffers.values():
            ring.clock[0].add_(1)

    def records(self, layer: str) -> list[Record]:
        """The remembered steps of a gate, oldest first."""
        ring = self._get_buffer(layer)
        return [ring.make_record([step]) for step in self._read_steps(layer)]

    def last(self, layer: str) -> Record:
        """The last step of a gate."""
        steps = self._read_steps(layer)
        if not steps:
            raise RuntimeError(f"no forward of {layer!r} was recorded, but some of other gates")
        return self._get_buffer(layer).make_record(steps[-1:])

    def latest(self) -> list[Record]:
        """The last step of every gate that ran."""
        return [self.last(layer) for layer in self.layers if self._read_steps(layer)]

    def total(self, layer: str) -> Record:
        """All remembered steps of a gate as one record: an expert that is `dead` in it got no token in any of them."""
        return replace(self._get_buffer(layer).make_record(self._read_steps(layer)), step=-1)

    def scalars(self) -> dict[str, float]:
        """The scalar numbers of every gate's last step: `{"blocks.0.ffn.gate/dropped": 0.01, ...}`."""
        return {f"{record.layer}/{name}": value for record in self.latest() for name, value in record.scalars().items()}

    def summary(self) -> str:
        """A table with one line for each gate, over all remembered steps.

        "requested" and "load" are the least and the most of an expert, before and after capacity, relative to a
        balanced load. "in a group" is the load of a group's most requested expert: the mean over groups, and the worst.
        "worst step" is the most that any expert was requested in a step, and the step's number. Lines below warn of
        dead experts, of each gate with over 10 % more drops than a balanced load would have, of one that asked an
        expert for over twice, or less than a tenth, of a balanced load in the last quarter of the steps, and of one
        whose probabilities are NaN.
        """
        cells = [self._format_cells(layer) for layer in self.layers]
        rows = [list(cells[0]), *(list(row.values()) for row in cells)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, ["-" * width for width in widths])
        line = "  ".join(f"{{:{'>' if 0 < i < len(widths) - 1 else '<'}{width}}}" for i, width in enumerate(widths))
        warned = [f"warning: {layer}{note}" for layer in self.layers for note in self._diagnose(layer)]
        return "\n".join([*(line.format(*row).rstrip() for row in rows), *warned])

    def to_jsonl(self, path: str | PathLike[str]) -> None:
        """Write a file with one JSON object in each line: every remembered step of every gate, ordered by step.

        A number that is NaN or infinite is null.
        """
        records = [record for layer in self.layers for record in self.records(layer)]
        records.sort(key=lambda record: record.step)
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record.to_dict(), allow_nan=False) + "\n" for record in records)

    def plot(self, layer: str | None = None, *, requested: bool = False, ax: Axes | None = None) -> Figure:
        """Draw a heat map of the experts' load relative to a balanced one: of all gates, or of one gate over its steps.

        Without `layer` there is a row for each gate, in which its experts fill the width, over all remembered steps; a
        cross marks an expert without a token. With `layer` there is a row for each expert and a column for each step.

        Args:
            layer: one of `layers`.
            requested: show the load that the router asked for, before capacity, instead of what the experts computed.
            ax: axes to draw in; by default those of a new figure.

        Returns:
            The figure.

        Raises:
            ImportError: matplotlib is not installed.
            RuntimeError: nothing was recorded.

        Example:
            >>> import torch
            >>> from mixture_of_experts import MoE
            >>> moe = MoE(dim=8, num_experts=4)
            >>> with track_routing(moe) as stats:
            ...     out, aux_loss = moe(torch.randn(2, 16, 8))
            >>> stats.plot().savefig("load.png")  # doctest: +SKIP
        """

        def loads(record: Record) -> Tensor:
            return (record.relative_requested if requested else record.relative_load).flatten()

        if layer is None:
            return self._draw_gates(self.layers, loads, ax)
        last, records = self.last(layer), self.records(layer)
        edges = [*(record.step - 0.5 for record in records), last.step + 0.5]
        ax = make_axes(6, 2.4) if ax is None else ax
        over_steps = torch.stack([loads(record) for record in records], dim=1)
        return plot_steps(ax, edges, over_steps, last.load.shape[-1])

    def report(self, path: str | PathLike[str], *, name: str = "Routing") -> None:
        """Write one HTML page that shows what was recorded. It needs no other file and no network.

        The page shows the load of every gate, before and after capacity, over all remembered steps; the table of
        `summary`; and what each gate requested of its experts over the steps. Of more than 24 gates it draws 24, those
        with notes first, and says so.

        Args:
            path: path of the file; an existing file is replaced.
            name: the title of the page, for example the run's name; the date stands below it.

        Raises:
            ImportError: matplotlib is not installed.
            RuntimeError: nothing was recorded.

        Example:
            >>> import torch
            >>> from mixture_of_experts import MoE
            >>> moe = MoE(dim=8, num_experts=4)
            >>> with track_routing(moe) as stats:
            ...     out, aux_loss = moe(torch.randn(2, 16, 8))
            >>> stats.report("routing.html")  # doctest: +SKIP
        """
        layers = [layer for layer in self.layers if self._read_steps(layer)]
        notes = {layer: list(self._diagnose(layer)) for layer in layers}
        drawn, left_out = gates_to_draw(layers, notes), ""
        if len(drawn) < len(layers):
            left_out = (
                f"{len(drawn)} of {len(layers)} gates are drawn: those with notes first, and others from all over the "
                "model. The table has all; RoutingStats.plot(gate) draws each."
            )
        html = render_page(
            name,
            cells=[self._format_cells(layer) for layer in layers],
            notes=notes,
            overview={
                "requested": self._draw_gates(drawn, lambda record: record.relative_requested.flatten()),
                "load": self._draw_gates(drawn, lambda record: record.relative_load.flatten()),
            },
            over_steps={layer: self.plot(layer, requested=True) for layer in drawn},
            left_out=left_out,
        )
        text = html.encode("utf-8", "backslashreplace")  # before the file is opened: names may have surrogates
        with open(path, "wb") as file:
            file.write(text)

    def _draw_gates(self, layers: Sequence[str], loads: Callable[[Record], Tensor], ax: Axes | None = None) -> Figure:
        totals = {gate: loads(total) for gate in layers if (total := self.total(gate)).forwards}
        return plot_gates(make_axes(8, 0.8 + 0.3 * len(totals)) if ax is None else ax, totals)

    def _get_buffer(self, layer: str) -> GateRingBuffer:
        if layer not in self._buffers:
            raise KeyError(f"no gate {layer!r}: there are {', '.join(map(repr, self._buffers))}")
        return self._buffers[layer]

    def _read_steps(self, layer: str) -> list[StepRows]:
        """The remembered steps of a gate; RuntimeError if nothing was recorded of any gate."""
        ring = self._get_buffer(layer)
        if not any(int(each.num_written) for each in self._buffers.values()):
            raise RuntimeError(NOTHING_RECORDED_ERROR)
        return ring.read_steps(self._steps_are_joined)

    def _diagnose(self, layer: str) -> Iterator[str]:
        ring = self._get_buffer(layer)
        return diagnose_gate(self._read_steps(layer), ring.make_record, has_bias=ring.has_bias)

    def _format_cells(self, layer: str) -> dict[str, str]:
        return format_cells(self.total(layer), self.records(layer))


def gates_to_draw(layers: Sequence[str], notes: Mapping[str, Sequence[str]]) -> list[str]:
    """At most `MAX_DRAWN` gates in the model's order: those with notes first, then others from all over the model."""
    noted = [layer for layer in layers if notes[layer]][:MAX_DRAWN]
    others, room = [layer for layer in layers if not notes[layer]], MAX_DRAWN - len(noted)
    if room < len(others):
        others = [others[i * len(others) // room] for i in range(room)]
    drawn = {*noted, *others}
    return [layer for layer in layers if layer in drawn]
