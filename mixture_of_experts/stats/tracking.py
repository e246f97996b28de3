"""Defines `track_routing`, which records the routing decisions of a model's gates, and `RoutingStats`, which provides
access to them."""

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
MAX_DRAWN = 24  # maximum number of gates that a report draws; drawing 300 gates took half a minute
NOTHING_RECORDED_ERROR = (
    "no forward pass of a gate was recorded; call the model that was passed to track_routing inside the context. Calls "
    "that raise an error are not recorded. If the model was compiled and called before, its graph has no hooks; call "
    "torch.compiler.reset() first, or enter track_routing before the first compiled call"
)


@contextmanager
def track_routing(
    model: nn.Module, *, keep: int = 1000, when: TrackingMode = "always", gates: GateSelection | None = None
) -> Iterator[RoutingStats]:
    """Context manager that records the routing decisions of every gate in `model`.

    The context covers all gates in `MoE` and `HeirarchicalMoE` layers, all other modules derived from `Gate`, and the
    routers from other libraries that have a provider (see `mixture_of_experts.providers`). A layer's gate may be of any
    class. For routers from other libraries, the attention mask determines which tokens are padding. The records can be
    read inside the context and after it has exited.

    A step is one forward pass of `model`. If an inner model whose arguments describe the tokens is called on its own,
    as when generation calls an encoder, that call also counts as a step. To support gradient accumulation, call
    `stats.step()` after each optimizer step; all forward passes since the last such call then form one step.

    With activation checkpointing (reentrant or not), each forward pass is recorded once. With `torch.compile`, enter
    the context before the first compiled call. Each rank records its own tokens. Forward passes in all threads are
    recorded, except those that started before the context was entered. A forward pass that raises an error is not
    counted.

    Args:
        model: the module that you call. Gates are recorded only during a forward pass of this module.
        keep: number of forward passes to keep per gate. The oldest passes are discarded. If a step has more forward
            passes, its record is incomplete, and reading it warns.
        when: "training" or "eval" to record only forward passes in that mode, or "always" to record all.
        gates: the gates to record, specified as gate names, gate modules, or layers that contain gates. Default: all.

    Raises:
        ValueError: the model has no gate, or an argument is invalid.
        TypeError: during a forward pass, a router returned outputs that cannot be read.
        RuntimeError: during a forward pass, a gate ran outside of `model` and its inner models, or `model` itself ran
            inside `torch.utils.checkpoint`. In both cases, track the module that you call. Reading the records also
            raises this error if nothing was recorded.

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
        attach_gate_hooks(routers, lambda router, *arguments: stats._buffers[router.name].write_row(*arguments), hooks)
        for part in dict.fromkeys(router.enclosing_model for router in routers if router.enclosing_model is not model):
            PartForwards(stats._counter).attach_to(part, hooks)
        stats._counter.attach_to(model, hooks)
        yield stats


class RoutingStats:
    """The routing records that `track_routing` collects. Reading records synchronizes with the device, but `step` and
    `layers` do not.

    The object can be pickled and copied. A copy holds the existing records on the CPU, and does not record anything
    further.
    """

    def __init__(self, routers: Sequence[RouterHandle], keep: int, when: TrackingMode) -> None:
        check_size("keep", keep)
        check_choice("when", when, get_args(TrackingMode))
        self._counter, self._steps_are_joined = ForwardCounter(when), False
        self._buffers = {router.name: GateRingBuffer(router, self._counter, keep) for router in routers}

    @property
    def layers(self) -> tuple[str, ...]:
        """The paths of all gates, in the model's order."""
        return tuple(self._buffers)

    def step(self) -> None:
        """End a step. All forward passes since the last call to `step`, or since the context was entered, form one
        step.

        Raises a RuntimeError if no gate hook ran or was traced, because nothing is recorded in this case.
        """
        if not any(ring.loss_names for ring in self._buffers.values()):
            raise RuntimeError(NOTHING_RECORDED_ERROR)
        self._steps_are_joined = True
        for ring in self._buffers.values():
            ring.clock[0].add_(1)

    def records(self, layer: str) -> list[Record]:
        """Return the stored steps of a gate, oldest first."""
        ring = self._get_buffer(layer)
        return [ring.make_record([step]) for step in self._read_steps(layer)]

    def last(self, layer: str) -> Record:
        """Return the last step of a gate."""
        steps = self._read_steps(layer)
        if not steps:
            raise RuntimeError(f"no forward pass of {layer!r} was recorded, although other gates ran")
        return self._get_buffer(layer).make_record(steps[-1:])

    def latest(self) -> list[Record]:
        """Return the last step of every gate that ran."""
        return [self.last(layer) for layer in self.layers if self._read_steps(layer)]

    def total(self, layer: str) -> Record:
        """Return all stored steps of a gate as one record. The record's `dead` list contains experts that received no
        tokens in any step."""
        return replace(self._get_buffer(layer).make_record(self._read_steps(layer)), step=-1)

    def scalars(self) -> dict[str, float]:
        """Return the scalar statistics of each gate's last step, such as `{"blocks.0.ffn.gate/dropped": 0.01, ...}`."""
        return {f"{record.layer}/{name}": value for record in self.latest() for name, value in record.scalars().items()}

    def summary(self) -> str:
        """Return a table with one row per gate, aggregated over all stored steps.

        The columns "requested" and "load" contain the minimum and maximum relative load over the experts, before and
        after capacity is applied. The column "in a group" contains the `imbalance` and `worst_imbalance` of `Record`.
        The column "worst step" contains the highest `relative_requested` of any expert in any step, and the number of
        that step. Lines below the table warn about dead experts, NaN probabilities, and gates whose avoidable drops
        exceed 10% of their choices. Further lines warn about gates that, in the last quarter of the steps, requested an
        expert more than twice as often as under a balanced load, or less than a tenth as often.
        """
        cells = [self._format_cells(layer) for layer in self.layers]
        rows = [list(cells[0]), *(list(row.values()) for row in cells)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, ["-" * width for width in widths])
        line = "  ".join(f"{{:{'>' if 0 < i < len(widths) - 1 else '<'}{width}}}" for i, width in enumerate(widths))
        warned = [f"warning: {layer}{note}" for layer in self.layers for note in self._diagnose(layer)]
        return "\n".join([*(line.format(*row).rstrip() for row in rows), *warned])

    def to_jsonl(self, path: str | PathLike[str]) -> None:
        """Write every stored step of every gate to a JSON Lines file, ordered by step.

        NaN and infinity are written as null.
        """
        records = [record for layer in self.layers for record in self.records(layer)]
        records.sort(key=lambda record: record.step)
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record.to_dict(), allow_nan=False) + "\n" for record in records)

    def plot(self, layer: str | None = None, *, requested: bool = False, ax: Axes | None = None) -> Figure:
        """Draw a heat map of the experts' relative load, where 1 is balanced.

        Without `layer`, each row of the map shows the experts of one gate over all stored steps. A cross marks an
        expert without tokens. With `layer`, the map has one row per expert and one column per step.

        Args:
            layer: the path of a gate, as listed in `layers`.
            requested: whether to show the router's requests before capacity is applied, instead of the load.
            ax: matplotlib axes to draw on. By default, a new figure is created.

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
        """Write a self-contained HTML report of the recorded routing decisions.

        The report contains the table of `summary`, each gate's load over all stored steps (before and after capacity is
        applied), and the requests for each gate's experts, step by step. If there are more than 24 gates, the report
        draws only 24 of them, starting with those that have warnings, and says that others were left out.

        Args:
            path: path of the HTML file. An existing file is overwritten.
            name: title of the report, such as the name of the run. The date is shown below the title.

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
                f"{len(drawn)} of {len(layers)} gates are drawn: those with warnings first, then others from across "
                "the model. The table lists all gates; RoutingStats.plot(gate) draws a single one."
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
        # encode before opening the file, because names may contain surrogates
        text = html.encode("utf-8", "backslashreplace")
        with open(path, "wb") as file:
            file.write(text)

    def _draw_gates(self, layers: Sequence[str], loads: Callable[[Record], Tensor], ax: Axes | None = None) -> Figure:
        totals = {gate: loads(total) for gate in layers if (total := self.total(gate)).forwards}
        return plot_gates(make_axes(8, 0.8 + 0.3 * len(totals)) if ax is None else ax, totals)

    def _get_buffer(self, layer: str) -> GateRingBuffer:
        if layer not in self._buffers:
            raise KeyError(f"there is no gate named {layer!r}; the gates are {', '.join(map(repr, self._buffers))}")
        return self._buffers[layer]

    def _read_steps(self, layer: str) -> list[StepRows]:
        """Return the stored steps of a gate. Raise a RuntimeError if nothing was recorded for any gate."""
        steps = self._get_buffer(layer).read_steps(self._steps_are_joined)
        if not steps and not any(ring.read_steps(self._steps_are_joined) for ring in self._buffers.values()):
            raise RuntimeError(NOTHING_RECORDED_ERROR)
        return steps

    def _diagnose(self, layer: str) -> Iterator[str]:
        ring = self._get_buffer(layer)
        return diagnose_gate(self._read_steps(layer), ring.make_record, has_bias=ring.has_bias)

    def _format_cells(self, layer: str) -> dict[str, str]:
        return format_cells(self.total(layer), self.records(layer))


def gates_to_draw(layers: Sequence[str], notes: Mapping[str, Sequence[str]]) -> list[str]:
    """Select at most `MAX_DRAWN` gates: first those with warnings, then others spread evenly over the model. The gates
    are returned in the model's order."""
    noted = [layer for layer in layers if notes[layer]][:MAX_DRAWN]
    others, room = [layer for layer in layers if not notes[layer]], MAX_DRAWN - len(noted)
    if room < len(others):
        others = [others[i * len(others) // room] for i in range(room)]
    drawn = {*noted, *others}
    return [layer for layer in layers if layer in drawn]
