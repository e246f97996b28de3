"""`track_routing`: hooks on every gate of a model write rows of numbers into a ring.

A forward hook on each gate reduces its `Routing` to one short row. It writes the row in place into a ring of the last
rows, on the gate's device. So memory is bounded, `torch.compile` can trace the hook, and there is no host sync until
something is read. Activation checkpointing runs forwards again in a backward; they are not recorded, because no forward
of the tracked model is under way then. The state of one forward lies in a `TrackedCall`, so threads do not mix.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.stats.colours import need_matplotlib
from mixture_of_experts.stats.external_routers import Reader, readers_of, why_no_routing
from mixture_of_experts.stats.measures import SUMS, lost_tokens, measure
from mixture_of_experts.stats.record import (
    SUMMARY_HEADER,
    Record,
    in_the_last,
    summary_cells,
    summed_up,
    table,
    warning_of_nan,
    warnings_of,
)
from mixture_of_experts.stats.report import History, page, texts_of_gates
from mixture_of_experts.support.attached import Attached
from mixture_of_experts.support.checks import check_choice, check_size
from mixture_of_experts.support.private_torch import constant_in_graphs, number_of_backward
from mixture_of_experts.whole_model import call_stack
from mixture_of_experts.whole_model.call_stack import ForwardCall, Watch
from mixture_of_experts.whole_model.sites import Gates, Site, find_sites, serve

When = Literal["always", "training", "eval"]
WHEN: tuple[When, ...] = ("always", "training", "eval")
WRITING = threading.Lock()
MOST_LOSSES = 12  # columns of a row for losses, the z-loss among them
LOST = -1.0  # in a row, instead of the number of a forward that raised
STRETCHES = 60  # most columns of a chart in a report
NOTHING = (
    "no forward of a gate was recorded: call the model that was given to track_routing inside the context. If it was "
    "compiled and called before, its graph has no hooks: call torch.compiler.reset() first, or enter track_routing "
    "before the first compiled call"
)


@contextmanager
def track_routing(
    model: nn.Module, *, keep: int = 1000, when: When = "always", gates: Gates | None = None
) -> Iterator[RoutingStats]:
    """Record what every gate in `model` decides, while the context lasts.

    It finds the gates of `MoE` and `HeirarchicalMoE` layers, of any class, all other modules derived from `Gate`, and
    the routers of MoE models in `transformers` (Mixtral, Qwen3-MoE, DeepSeek-V3, ...); there the attention mask tells
    which tokens are padding. You can read the records inside the context and after it.

    A step is one forward of `model`. If you call `stats.step()` after each optimizer step, all forwards since the last
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
        TypeError: nobody can read what a router returns.
        RuntimeError: in a forward: the model itself runs inside `torch.utils.checkpoint`, or only a part of it is
            called (in both cases track the module around it); on reading: nothing was recorded.

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
    stats = RoutingStats(serve(find_sites(model, "track_routing", gates), "track_routing", why_no_routing), keep, when)
    with Attached() as hooks:
        hooks.callback(stats._stop)
        stats._start(model, hooks)
        yield stats


class RoutingStats:
    """The records of `track_routing`. Reading them waits for the device; `step`, `layers` and `level_one` do not."""

    def __init__(self, sites: Sequence[Site], keep: int, when: When) -> None:
        check_size("keep", keep)
        check_choice("when", when, WHEN)
        self._when: str = when
        self._was_called = False
        self._marked = False
        self._clocks: dict[torch.device, Clock] = {}
        readers = readers_of(sites)
        self._forwards = Forwards(self)
        self._thread = threading.get_ident()  # of the context
        self._gates = {site.name: GateTracker(site, readers.get(site), self, keep) for site in sites}
        for tracker in self._gates.values():
            level_one = tracker.site.level_one
            if level_one is not None and level_one.name in self._gates:
                tracker.outer = self._gates[level_one.name]
                tracker.outer.hands_on = True

    @property
    def layers(self) -> tuple[str, ...]:
        """The paths of the gates in the model, in the model's order."""
        return tuple(self._gates)

    def level_one(self, layer: str) -> str | None:
        """The gate of level one if `layer` is level two of a hierarchy, else None."""
        outer = self._gate(layer).outer
        return None if outer is None else outer.name

    @property
    def any_hook_ran(self) -> bool:
        """Whether a hook ran or was traced, so that forwards are recorded."""
        return any(tracker.losses for tracker in self._gates.values())

    def step(self) -> None:
        """End a step: all forwards since the last call, or since the beginning, are one step."""
        if not self.any_hook_ran:
            raise RuntimeError(NOTHING)
        self._marked = True
        for clock in self._clocks.values():
            clock.steps.add_(1)

    def records(self, layer: str) -> list[Record]:
        """The remembered steps of a gate, oldest first."""
        tracker = self._tracker(layer)
        return [tracker.record(step, rows) for step, rows in self._steps(tracker)]

    def last(self, layer: str) -> Record:
        """The last step of a gate."""
        tracker = self._tracker(layer)
        steps = self._steps(tracker)
        if not steps:
            raise RuntimeError(f"no forward of {layer!r} was recorded, but some of other gates")
        return tracker.record(*steps[-1])

    def latest(self) -> list[Record]:
        """The last step of every gate that ran."""
        return [self.last(layer) for layer in self._recorded() if len(self._gates[layer].rows())]

    def total(self, layer: str) -> Record:
        """All remembered steps of a gate as one record: an expert that is `dead` in it got no token in any of them."""
        tracker = self._tracker(layer)
        rows = [rows for _, rows in self._steps(tracker)]
        return tracker.record(-1, torch.cat(rows) if rows else tracker.rows())

    def scalars(self) -> dict[str, float]:
        """The scalar numbers of every gate's last step: `{"blocks.0.ffn.gate/dropped": 0.01, ...}`."""
        return {f"{record.layer}/{name}": value for record in self.latest() for name, value in record.scalars().items()}

    def summary(self) -> str:
        """A table with one line for each gate, over all remembered steps.

        "requested" and "load" are the least and the most of an expert, before and after capacity, relative to a
        balanced load. "worst step" is the most that any expert was requested in a step, and the step's number. "in a
        group" is the load of a group's most requested expert: the mean over groups, and the worst. Lines below warn of
        each gate with over 10 % more drops than a balanced load would have, of one that asked an expert for over twice
        a balanced load in the last quarter of the steps, and of one whose probabilities are NaN.
        """
        totals = [self.total(layer) for layer in self._recorded()]
        rows = [summary_cells(total, self.records(total.layer)) for total in totals]
        warned = (line for total in totals for line in self._judged(total)[-1])
        return "\n".join([table([SUMMARY_HEADER, *rows]), *warned])

    def to_dict(self) -> dict[str, Any]:
        """`{"total": {layer: record}, "steps": {layer: [record, ...]}}` in types that JSON knows; NaN is None."""
        layers = self._recorded()
        return {
            "total": {layer: self.total(layer).to_dict() for layer in layers},
            "steps": {layer: [record.to_dict() for record in self.records(layer)] for layer in layers},
        }

    def to_jsonl(self, path: str | PathLike[str]) -> None:
        """Write a file with one JSON object in each line: every remembered step of every gate, ordered by step.

        A number that is NaN or infinite is null.
        """
        records = [record for layer in self._recorded() for record in self.records(layer)]
        records.sort(key=lambda record: record.step)
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record.to_dict(), allow_nan=False) + "\n" for record in records)

    def report(
        self,
        path: str | PathLike[str],
        *,
        tokens: str | bytes | Sequence[str] | None = None,
        routing: Mapping[str, Routing] | None = None,
        name: str = "Routing",
        loss: Sequence[float] = (),
    ) -> None:
        """Write one HTML page that shows what was recorded. It needs no other file and no network.

        The page shows the load of every gate, before and after capacity, over all remembered steps and in each; dropped
        choices, and how many drops were unavoidable; tokens without an expert; dead experts; curves of the balancing
        loss and of the most requested expert. Its words are those of `summary`. With `tokens` it also
        shows a text coloured by expert, with all choices and weights of the token under the pointer.

        Args:
            path: path of the file; an existing file is replaced.
            tokens: the texts of the tokens of one sequence. In a string every character is a token, in bytes every
                byte.
            routing: the gates' routing of that sequence, as `routing_of` returns it.
            name: the title of the page, for example the run's name; the date stands below it.
            loss: the training loss of each step, from step 0, to draw beside the gates' curves.

        Raises:
            ImportError: matplotlib is not installed.
            RuntimeError: nothing was recorded.
            ValueError: tokens and routing do not fit, or one is given without the other.

        Example:
            >>> import torch
            >>> from mixture_of_experts import MoE
            >>> from mixture_of_experts.stats import routing_of, track_routing
            >>> moe = MoE(dim=8, num_experts=4)
            >>> with track_routing(moe) as stats:
            ...     out, aux_loss = moe(torch.randn(2, 16, 8))
            >>> routing = routing_of(moe, torch.randn(1, 5, 8))
            >>> stats.report("routing.html", tokens="hello", routing=routing)  # doctest: +SKIP
        """
        need_matplotlib()
        if (tokens is None) == bool(routing):
            raise ValueError("tokens and routing belong together: give both, as routing_of(model, ...), or neither")
        histories = [self._history(layer) for layer in self._recorded()]
        level_one = {layer: self.level_one(layer) for layer in self.layers}
        texts = texts_of_gates(routing or {}, level_one, len(tokens or ""))
        html = page(name, histories, [float(value) for value in loss], tokens, texts)
        with open(path, "w", encoding="utf-8") as file:
            file.write(html)

    def _history(self, layer: str) -> History:
        """The steps of a gate for a report; if there are many, consecutive ones are summed up."""
        tracker = self._tracker(layer)
        steps = self._steps(tracker)
        size = max(-(-len(steps) // STRETCHES), 1)
        parts = [steps[i : i + size] for i in range(0, len(steps), size)]
        stretches = [tracker.record(part[0][0], torch.cat([rows for _, rows in part])) for part in parts]
        end, total = steps[-1][0] + 1 if steps else 0, self.total(layer)
        return History(total, stretches, end, self.level_one(layer), *self._judged(total))

    def _judged(self, total: Record) -> tuple[Record, Record, str, list[str]]:
        """A gate's steps before its probabilities were NaN as one record, the last quarter of them as another, how that
        is called, and the warnings of the gate."""
        tracker, sound, end, found = self._tracker(total.layer), total, "", []
        steps = self._steps(tracker)
        if math.isnan(total.entropy):
            first = next(record.step for record in self.records(total.layer) if math.isnan(record.entropy))
            steps, end = [step for step in steps if step[0] < first], " before NaN"
            found = [warning_of_nan(total.layer, first)]
            sound = tracker.record(-1, torch.cat([rows for _, rows in steps])) if steps else total
        if not steps:
            return total, total, "", found
        quarter = steps[-max(len(steps) // 4, 1) :]
        late = tracker.record(quarter[0][0], torch.cat([rows for _, rows in quarter]))
        when = in_the_last(quarter[-1][0] + 1 - late.step) + end
        return sound, late, when, [*found, *warnings_of(sound, late, when)]

    def _gate(self, layer: str) -> GateTracker:
        if layer not in self._gates:
            raise KeyError(f"no gate {layer!r}: there are {', '.join(map(repr, self._gates))}")
        return self._gates[layer]

    def _tracker(self, layer: str) -> GateTracker:
        tracker = self._gate(layer)
        self._recorded()
        return tracker

    def _steps(self, tracker: GateTracker) -> list[tuple[int, Tensor]]:
        """The number and the rows `(forwards, width)` of every remembered step."""
        rows = tracker.rows()
        numbers = rows[:, 0 if self._marked else 1]
        rows = rows[numbers.argsort(stable=True)]  # rows of threads lie in any order
        numbers, sizes = numbers.unique(return_counts=True)
        steps = list(zip(map(int, numbers.tolist()), rows.split(sizes.tolist()), strict=True))
        # once rows are overwritten, the oldest step may be incomplete
        return steps[1:] if len(steps) > 1 and tracker.forwards > tracker.keep else steps

    def _recorded(self) -> tuple[str, ...]:
        """The names of all gates; RuntimeError if nothing was recorded."""
        if not any(tracker.forwards for tracker in self._gates.values()):
            raise RuntimeError(NOTHING)
        return self.layers

    def _add_clock(self, device: torch.device) -> None:
        """Add a clock on `device` that shows the same as the others."""
        if device not in self._clocks:
            clock = Clock(device)
            for other in list(self._clocks.values())[:1]:
                clock.steps.copy_(other.steps)
                clock.forwards.copy_(other.forwards)
            self._clocks[device] = clock

    def _start(self, model: nn.Module, hooks: Attached) -> None:
        """Set the hooks; closing `hooks` removes them."""
        for tracker in self._gates.values():
            tracker.allocate(tracker.site.device)
            hooks.after(tracker.site.called, tracker.hook, with_kwargs=True)
        for reader in {reader for tracker in self._gates.values() if (reader := tracker.reader) is not None}:
            reader.follow(reader.model, hooks)
        self._forwards.follow(model, hooks)

    def _stop(self) -> None:
        """Stop recording. A compiled graph keeps its hooks, but it is guarded by `_when`, and so traced again."""
        self._when = "never"

    def _in_its_thread(self) -> bool:
        return torch.compiler.is_compiling() or threading.get_ident() == self._thread

    def _counts(self, module: nn.Module) -> bool:
        """Whether forwards in the current mode of `module` are recorded."""
        return self._when == "always" or self._when == ("training" if module.training else "eval")


class Forwards(Watch):
    """Numbers the forwards of the tracked model. What one of them wrote before it raised does not count."""

    def __init__(self, stats: RoutingStats) -> None:
        super().__init__()
        self.stats = stats

    def begins(self, module: nn.Module, args: object, kwargs: object) -> TrackedCall | None:
        if not torch.compiler.is_compiling() and number_of_backward() != -1:
            return None  # a recomputation
        self.stats._was_called = True
        call = TrackedCall()
        if self.stats._counts(module):
            with exclusively():
                for device, clock in self.stats._clocks.items():
                    clock.forwards.add_(1)
                    call.numbers[device] = clock.forwards.clone()
        return call

    @torch.no_grad()
    def lost(self, call: TrackedCall) -> None:
        with exclusively():
            for tracker in self.stats._gates.values():
                number = call.numbers.get(tracker.ring.device)
                if number is not None:
                    tracker.forget(number)


class TrackedCall(ForwardCall):
    """A forward, under way, of the tracked model."""

    def __init__(self) -> None:
        self.numbers: dict[torch.device, Tensor] = {}  # the number of the forward, on each device
        self.handed_on: dict[str, Routing] = {}  # routing of level one, for level two, by level one's name


def exclusively() -> AbstractContextManager[Any]:
    """A lock, so that one thread writes at a time. In a traced graph there is none."""
    return nullcontext() if torch.compiler.is_compiling() else WRITING


class Clock:
    """Counts steps and forwards, on the device of the rows that hold these numbers."""

    steps: Tensor
    forwards: Tensor

    def __init__(self, device: torch.device) -> None:
        self.steps = torch.zeros(1, device=device, dtype=torch.float32)
        self.forwards = self.steps - 1


def columns(routers: int, num_experts: int) -> dict[str, int]:
    """The columns of a row by name, in their order, and how many numbers each has."""
    before = {"step": 1, "forward": 1, "load": routers * num_experts, "requested": routers * num_experts}
    of_routers = dict.fromkeys((*SUMS, "worst_imbalance"), routers)
    return before | of_routers | {"lost_in_layer": 1, "losses": MOST_LOSSES}


class GateTracker:
    """The last rows of one gate. A row has the columns of `columns`; it is float32, which counts up to 16 million
    choices of one forward exactly."""

    site: Site
    reader: Reader | None
    stats: RoutingStats
    keep: int
    name: str
    routers: int
    columns: dict[str, int]
    learn_names: Callable[[tuple[str, ...]], None]

    def __init__(self, site: Site, reader: Reader | None, stats: RoutingStats, keep: int) -> None:
        self.site, self.reader, self.stats, self.keep = site, reader, stats, keep
        self.name = site.name  # `torch.compile` reads it
        self.routers = math.prod(site.outer)
        self.columns = columns(self.routers, site.num_experts)
        self.outer: GateTracker | None = None  # the tracker of level one
        self.hands_on = False  # whether this is level one of a hierarchy
        self.losses: tuple[str, ...] = ()
        # a traced graph cannot store names, but it calls a constant function, which no method is
        self.learn_names = constant_in_graphs(lambda losses: self._learn_names(losses))
        self.ring: Tensor
        self.written: Tensor

    def allocate(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # inference tensors cannot be written to outside of that mode
            # one row more than `keep`: the oldest shows whether the step after it is complete
            self.ring = torch.zeros(self.keep + 1, sum(self.columns.values()), device=device, dtype=torch.float32)
            self.written = torch.zeros(1, dtype=torch.int64, device=device)
            self.stats._add_clock(device)

    def _learn_names(self, losses: tuple[str, ...]) -> None:
        if len(losses) > MOST_LOSSES:
            raise ValueError(f"{self.name!r} has {len(losses)} losses, at most {MOST_LOSSES} can be recorded")
        self.losses = losses

    def hook(self, gate: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], routing: Any = None) -> None:
        if routing is None:
            return  # the hook is being set or taken off
        if self.reader is not None:
            routing = self.reader.routing(self.site, routing)
            args = ()  # a router of transformers gets no importance
        if not isinstance(routing, Routing):
            raise TypeError(f"{self.name!r} must return a Routing to be tracked, got {type(routing).__name__}")
        losses = routing.losses
        self.learn_names(tuple(losses))
        if not self.stats._counts(gate):
            return
        call = call_stack.current(self.stats._forwards)
        if call is None:
            if not self.stats._was_called and self.stats._in_its_thread():
                raise RuntimeError(
                    f"{self.name!r} ran, but not within a forward of the module given to track_routing: give it "
                    "the module that you call"
                )
            return  # a recomputation in backward, or a forward that another thread had begun before
        importance = kwargs.get("importance", args[1] if len(args) > 1 else None)
        with torch.no_grad():
            self.write(call, routing, importance, list(losses.values()))

    def write(self, call: TrackedCall, routing: Routing, importance: Tensor | None, losses: list[Tensor]) -> None:
        """Add a row. `torch.compile` traces this method, so it only changes tensors, in place."""
        device = routing.probs.device
        if self.ring.device != device:
            self.allocate(device)  # the model moved
        clock = self.stats._clocks[device]
        # a graph cannot read the tensors of `call`, which was made outside of it
        number = clock.forwards if torch.compiler.is_compiling() else call.numbers.get(device, clock.forwards)
        numbers = {"step": clock.steps, "forward": number, "lost_in_layer": self.lost_in_layer(call, routing)}
        numbers |= measure(routing, importance)
        row = [numbers[name].float().flatten() for name in self.columns if name != "losses"]
        row += [value.detach().float().reshape(1) for value in losses]
        row.append(self.ring.new_zeros(MOST_LOSSES - len(losses)))
        with exclusively():
            self.ring.index_copy_(0, self.written % (self.keep + 1), torch.cat(row).unsqueeze(0))
            self.written.add_(1)

    def lost_in_layer(self, call: TrackedCall, routing: Routing) -> Tensor:
        """`(1,)`, the number of tokens that no expert computes, at level two of a hierarchy; NaN elsewhere."""
        if torch.compiler.is_compiling():  # a traced checkpoint can store nothing
            return self.ring.new_full((1,), torch.nan)
        if self.hands_on:
            call.handed_on[self.name] = routing
        outer = None if self.outer is None else call.handed_on.pop(self.outer.name, None)
        return self.ring.new_full((1,), torch.nan) if outer is None else lost_tokens(outer, routing)

    def forget(self, number: Tensor) -> None:
        """Mark the rows of a forward that raised."""
        numbers = self.ring[:, 1]
        numbers.masked_fill_(numbers == number, LOST)

    @property
    def forwards(self) -> int:
        """The number of recorded forwards, overwritten ones included."""
        return int(self.written)

    def rows(self) -> Tensor:
        """The rows, `(forwards, width)` float64 on the CPU, oldest first."""
        call_stack.current(self.stats._forwards)  # finds a forward of this thread that was interrupted
        ring, forwards = self.ring.cpu().to(torch.float64), self.forwards
        rows = ring[:forwards] if forwards <= self.keep else ring.roll(-(forwards % (self.keep + 1)), 0)
        return rows[rows[:, 1] != LOST]

    def record(self, step: int, rows: Tensor) -> Record:
        """The record of rows `(r, width)`."""
        g, e = self.routers, self.site.num_experts
        found = dict(zip(self.columns, rows.split(list(self.columns.values()), dim=1), strict=True))
        worst = torch.nn.functional.pad(found["worst_imbalance"], (0, 0, 1, 0)).amax(dim=0)  # there may be no row
        found = {name: values.sum(dim=0) for name, values in found.items()}
        sums, lost = torch.stack([found[name] for name in SUMS]), found["lost_in_layer"]
        load, requested = (found[name].to(torch.int64).view(g, e) for name in ("load", "requested"))
        forwards, shape = len(rows), (*self.site.outer, e)
        means = (found["losses"] / max(forwards, 1)).tolist()
        outer = ()
        if self.site.outer:
            names = [f"{self.name}[{router}]" for router in range(g)]
            outer = tuple(
                summed_up(name, step, forwards, load[i], requested[i], sums[:, i], worst[i])
                for i, name in enumerate(names)
            )
        return summed_up(
            self.name,
            step,
            forwards,
            load.view(shape),
            requested.view(shape),
            sums.sum(dim=1),
            worst,
            losses=dict(zip(self.losses, means[: len(self.losses)], strict=True)),
            lost_in_layer=None if lost.isnan() else int(lost),
            outer=outer,
        )
