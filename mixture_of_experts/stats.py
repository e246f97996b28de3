"""Sight of what the routers of a model do: `track_routing` records load, drops, confidence and losses of every gate.

Axes: g routers of a gate (one, or one for each outer expert), b groups, n tokens of a group, e experts.

A forward hook on each gate reduces its `Routing` to one short row of numbers and writes it into a ring of the last
rows, on the gate's device and in place: no host sync until something is read, bounded memory, and a graph that
`torch.compile` can trace. Activation checkpointing runs forwards again in backward; such a forward is recognised by
the fact that no forward of the tracked model is under way, and is not recorded.
"""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from mixture_of_experts.checks import check_choice, check_size
from mixture_of_experts.dispatch import plan
from mixture_of_experts.gating import Gate
from mixture_of_experts.moe import HeirarchicalMoE, MoE
from mixture_of_experts.routing import Routing

When = Literal["always", "training", "eval"]
WHEN: tuple[When, ...] = ("always", "training", "eval")
MOST_LOSSES = 8  # columns of a row that are set aside for losses, the z-loss among them
SUMS = ("tokens", "unseen", "dropped", "entropy", "confidence")  # what a row sums for each router


@contextmanager
def track_routing(model: nn.Module, *, keep: int = 1000, when: When = "always") -> Iterator[RoutingStats]:
    """Record what every gate in `model` decides, while the context lasts.

    Gates are those of `MoE` and `HeirarchicalMoE` layers, of any class, and all other modules derived from `Gate`. The
    hooks are removed on leaving; what was recorded can be read then, or at any time before.

    A step is one forward of `model`, until `stats.step()` is called after an optimizer's step: then all forwards since
    the last call are one step (gradient accumulation).

    Args:
        model: the module that you call; a forward of a gate counts if it happens within a forward of this module.
        keep: forwards of each gate that are remembered, the last ones.
        when: record forwards in "training" mode, in "eval" mode, or "always".

    Raises:
        ValueError: the model has no gate, or an argument is not allowed.
        RuntimeError: in a forward, where the model itself runs inside `torch.utils.checkpoint` or only parts of it are
            called (both: track the module around it); on reading, where nothing was recorded.

    Under activation checkpointing of either kind a forward is recorded once. Under `torch.compile` enter the context
    before the first compiled call. Over ranks, each one sees its own tokens.

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
    stats = RoutingStats(model, keep, when)
    with ExitStack() as hooks:
        hooks.callback(stats._stop)
        stats._start(model, hooks)
        yield stats


@dataclass(frozen=True)
class Record:
    """What one gate decided in one step (or several). Masked tokens appear in nothing; an empty mean is 0.

    Attributes:
        layer: path of the gate in the model.
        step: number of the step, from 0; -1 for all steps together.
        forwards: forwards of the gate that are summed up here.
        load: `(e,)` int64 choices that each expert computes; `(eo, ei)` for the second level of a hierarchy, where it
            is the load of the layer's experts.
        requested: the same before capacity.
        tokens: tokens that took part; on a second level the choices that level one handed on.
        dropped: share of the requested choices that found no slot.
        unseen: share of the tokens that no expert computes.
        entropy: mean entropy of a token's probabilities, in nats: 0 is certain, ln(e) uniform.
        confidence: mean of a token's largest probability.
        losses: the losses by name, without coefficients: the parts of the balancing loss and "z"; means over forwards.
        lost_in_layer: second level only: tokens of the layer that no expert computes, whichever level dropped them;
            None in compiled forwards.
        outer: second level only: the same for each outer expert (without losses).
    """

    layer: str
    step: int
    forwards: int
    load: Tensor
    requested: Tensor
    tokens: int
    dropped: float
    unseen: float
    entropy: float
    confidence: float
    losses: Mapping[str, float]
    lost_in_layer: int | None = None
    outer: tuple[Record, ...] = ()

    @property
    def relative_load(self) -> Tensor:
        """Load over mean load, float64 of the load's shape: 1 is balanced, 0 an expert without a token."""
        return relative(self.load)

    @property
    def relative_requested(self) -> Tensor:
        """The same of the requested choices: what the router wants, where capacity evens the load out."""
        return relative(self.requested)

    @property
    def dead(self) -> list[Any]:
        """Experts that computed no token: their numbers, or pairs (outer, inner)."""
        index = (self.load == 0).nonzero()
        return index.flatten().tolist() if self.load.ndim == 1 else index.tolist()

    def scalars(self) -> dict[str, float]:
        """The single numbers, for a logger."""
        names = ("dropped", "unseen", "entropy", "confidence")
        return {
            **{name: getattr(self, name) for name in names},
            "max_load": float(self.relative_load.max()),
            "max_requested": float(self.relative_requested.max()),
            "dead": len(self.dead),
            **{f"loss/{name}": value for name, value in self.losses.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON knows."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields.update(load=self.load.tolist(), requested=self.requested.tolist(), losses=dict(self.losses))
        fields["outer"] = [record.to_dict() for record in self.outer]
        if not self.outer:  # one level
            del fields["outer"], fields["lost_in_layer"]
        return {**fields, "dead": self.dead}


class RoutingStats:
    """What `track_routing` recorded. Every method but `step` reads from the device: one host sync for each gate."""

    def __init__(self, model: nn.Module, keep: int, when: When) -> None:
        check_size("keep", keep)
        check_choice("when", when, WHEN)
        self._when: str = when
        self._under_way: bool | None = None  # a forward of the model; None: there was none yet
        self._marked = False
        self._clocks: dict[torch.device, Clock] = {}
        self._gates = {place.name: GateTracker(place, self, keep) for place in find_gates(model)}
        if not self._gates:
            raise ValueError(f"{type(model).__name__} has no gate: give track_routing a model with MoE layers")
        for tracker in self._gates.values():
            if tracker.place.outer_gate is not None:
                tracker.outer = self._gates[tracker.place.outer_gate]
                tracker.outer.hands_on = True

    @property
    def layers(self) -> tuple[str, ...]:
        """The gates, by their paths in the model, in the model's order."""
        return tuple(self._gates)

    def level_one(self, layer: str) -> str | None:
        """The gate of level one, if `layer` is level two of a hierarchy."""
        return self._gates[layer].place.outer_gate

    def step(self) -> None:
        """End a step: the forwards since the last call (or the beginning) are reported as one."""
        if not any(tracker.losses for tracker in self._gates.values()):  # no hook ran or was traced
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

    def total(self, layer: str) -> Record:
        """All remembered steps of a gate together: an expert that is dead here got no token in any of them."""
        tracker = self._tracker(layer)
        rows = [rows for _, rows in self._steps(tracker)]
        return tracker.record(-1, torch.cat(rows) if rows else tracker.rows())

    def scalars(self) -> dict[str, float]:
        """The single numbers of every gate's last step, as `{"blocks.0.ffn.gate/dropped": 0.01, ...}`."""
        last = [self.last(layer) for layer in self._recorded() if self._gates[layer].forwards]
        return {f"{record.layer}/{name}": value for record in last for name, value in record.scalars().items()}

    def summary(self) -> str:
        """A table with one line for each gate, over all remembered steps.

        "requested" and "load" are the least and the most of an expert, before and after capacity, relative to a
        balanced load.
        """
        return table([SUMMARY_HEADER] + [summary_cells(self.total(layer)) for layer in self._recorded()])

    def to_dict(self) -> dict[str, Any]:
        """`{"total": {layer: record}, "steps": {layer: [record, ...]}}` in types that JSON knows."""
        layers = self._recorded()
        return {
            "total": {layer: self.total(layer).to_dict() for layer in layers},
            "steps": {layer: [record.to_dict() for record in self.records(layer)] for layer in layers},
        }

    def to_jsonl(self, path: str | PathLike[str]) -> None:
        """Write a file of one JSON object a line: every remembered step of every gate, ordered by step."""
        records = [record for layer in self._recorded() for record in self.records(layer)]
        records.sort(key=lambda record: record.step)
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record.to_dict()) + "\n" for record in records)

    def _tracker(self, layer: str) -> GateTracker:
        if layer not in self._gates:
            raise KeyError(f"no gate {layer!r}: there are {', '.join(map(repr, self._gates))}")
        self._recorded()
        return self._gates[layer]

    def _steps(self, tracker: GateTracker) -> list[tuple[int, Tensor]]:
        """Number and rows `(forwards, width)` of every remembered step."""
        rows = tracker.rows()
        numbers, sizes = rows[:, 0 if self._marked else 1].unique_consecutive(return_counts=True)
        steps = list(zip(map(int, numbers.tolist()), rows.split(sizes.tolist()), strict=True))
        # once rows have been overwritten, some of the oldest step may be missing
        return steps[1:] if len(steps) > 1 and tracker.forwards > tracker.keep else steps

    def _recorded(self) -> tuple[str, ...]:
        """All gates' names, if anything was recorded."""
        if not any(tracker.forwards for tracker in self._gates.values()):
            raise RuntimeError(NOTHING)
        return self.layers

    def _add_clock(self, device: torch.device) -> None:
        """A clock on `device`, showing what the others show."""
        if device not in self._clocks:
            clock = Clock(device)
            for other in list(self._clocks.values())[:1]:
                clock.steps.copy_(other.steps)
                clock.forwards.copy_(other.forwards)
            self._clocks[device] = clock

    def _start(self, model: nn.Module, hooks: ExitStack) -> None:
        """Register the hooks; whoever closes `hooks` removes them."""
        for tracker in self._gates.values():
            tracker.allocate(device_of(tracker.place.gate, model))
            handle = tracker.place.gate.register_forward_hook(tracker.hook, with_kwargs=True)
            hooks.callback(handle.remove)
        hooks.callback(model.register_forward_pre_hook(self._enter).remove)
        # last, so that it runs after the hook of a model that is itself a gate
        hooks.callback(model.register_forward_hook(self._leave, always_call=True).remove)

    def _stop(self) -> None:
        """A compiled graph keeps the hooks it was traced with, but it asks for this before it runs."""
        self._when = "never"
        for tracker in self._gates.values():
            tracker.handed_on = None  # after an error between two levels

    def _enter(self, model: nn.Module, args: object) -> None:
        if not torch.compiler.is_compiling() and model.training and in_checkpoint():
            raise RuntimeError(
                f"the tracked {type(model).__name__} itself runs inside torch.utils.checkpoint, where a recomputation "
                "looks like any other forward: give track_routing the module that calls the checkpoint"
            )
        self._under_way = True
        if self._counts(model):
            for clock in self._clocks.values():
                clock.forwards.add_(1)

    def _leave(self, model: nn.Module, args: object, output: object) -> None:
        self._under_way = False

    def _counts(self, module: nn.Module) -> bool:
        """Whether a forward is to be recorded in the mode that `module` is in."""
        return self._when == "always" or self._when == ("training" if module.training else "eval")


NOTHING = (
    "no forward of a gate was recorded: call the model that was given to track_routing inside the context. If it was "
    "compiled and called before, its graph has no hooks: call torch.compiler.reset() first, or enter track_routing "
    "before the first compiled call"
)


class Place(NamedTuple):
    """A gate in a model, with the sizes of what it decides."""

    name: str
    gate: nn.Module
    outer: tuple[int, ...]  # its leading dimensions, one router for each index
    num_experts: int
    outer_gate: str | None = None  # level one of the hierarchy whose level two this is


def find_gates(model: nn.Module) -> list[Place]:
    """The gates of both kinds of layers, whatever their class, and all other `Gate`s, in the model's order."""
    # a compiled module is wrapped: its gates are called the same with and without the wrapper
    names = {module: name.replace("_orig_mod.", "") or "gate" for name, module in model.named_modules()}
    found: dict[nn.Module, Place] = {}
    for module, name in names.items():
        if isinstance(module, HeirarchicalMoE):
            outer, inner = module.gate_outer, module.gate_inner
            eo, ei = module.num_experts_outer, module.num_experts_inner
            found[outer] = Place(names[outer], outer, (), eo)
            found[inner] = Place(names[inner], inner, (eo,), ei, names[outer])
        elif isinstance(module, MoE):
            assert isinstance(module.num_experts, int)
            found.setdefault(module.gate, Place(names[module.gate], module.gate, (), module.num_experts))
        elif isinstance(module, Gate):
            found.setdefault(module, Place(name, module, module.outer_expert_dims, module.num_experts))
    return list(found.values())


def device_of(gate: nn.Module, model: nn.Module) -> torch.device:
    """Where the gate's parameters are, else the model's."""
    for module in (gate, model):
        for tensor in (*module.parameters(), *module.buffers()):
            return tensor.device
    return torch.get_default_device()


def in_checkpoint() -> bool:
    """Whether a function of torch's activation checkpointing is on the stack."""
    return any(frame.f_code.co_filename == checkpoint.__file__ for frame, _ in traceback.walk_stack(None))


class Clock:
    """Counts steps and forwards on a device, for the rows that are written there."""

    def __init__(self, device: torch.device) -> None:
        self.steps = torch.zeros(1, device=device)
        self.forwards = torch.full((1,), -1.0, device=device)


class GateTracker:
    """The last rows of one gate: `[step, forward, load, requested, sums, lost in layer, losses]`.

    They are float32, which counts up to 16 million choices in one forward without error.
    """

    def __init__(self, place: Place, stats: RoutingStats, keep: int) -> None:
        self.place, self.stats, self.keep = place, stats, keep
        self.routers = math.prod(place.outer)
        self.outer: GateTracker | None = None  # of level one
        self.hands_on = False  # whether this is level one of a hierarchy
        self.handed_on: Routing | None = None  # from the hook of level one to that of level two
        self.losses: tuple[str, ...] = ()
        # where torch.compile traces, nothing may be stored, but a function of constants is called; methods are none
        self.learn_names = torch.compiler.assume_constant_result(lambda losses: self._learn_names(losses))
        self.ring: Tensor
        self.written: Tensor

    def allocate(self, device: torch.device) -> None:
        cells = self.routers * self.place.num_experts
        width = 2 + 2 * cells + len(SUMS) * self.routers + 1 + MOST_LOSSES
        with torch.inference_mode(False):  # such tensors could not be written to outside of it
            # one more than is kept: the oldest shows that the step after it is whole
            self.ring = torch.zeros(self.keep + 1, width, device=device)
            self.written = torch.zeros(1, dtype=torch.int64, device=device)
            self.stats._add_clock(device)

    def _learn_names(self, losses: tuple[str, ...]) -> None:
        if len(losses) > MOST_LOSSES:
            raise ValueError(f"{self.place.name!r} has {len(losses)} losses, at most {MOST_LOSSES} can be recorded")
        self.losses = losses

    def hook(self, gate: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], routing: Routing) -> None:
        if not isinstance(routing, Routing):
            raise TypeError(f"{self.place.name!r} must return a Routing to be tracked, got {type(routing).__name__}")
        losses = dict(routing.losses) or {"balance": routing.balance_loss}
        losses["z"] = routing.z_loss
        self.learn_names(tuple(losses))
        if not self.stats._counts(gate):
            return
        if self.stats._under_way is None:
            raise RuntimeError(
                f"{self.place.name!r} ran, but not within a forward of the module given to track_routing: give it the "
                "module that you call"
            )
        if not self.stats._under_way:
            return  # a recomputation in backward
        importance = kwargs.get("importance", args[1] if len(args) > 1 else None)
        with torch.no_grad():
            self.write(routing, importance, list(losses.values()))

    def write(self, routing: Routing, importance: Tensor | None, losses: list[Tensor]) -> None:
        """Add a row. Everything here is traced by `torch.compile`: only tensors change, and they in place."""
        device = routing.probs.device
        if self.ring.device != device:
            self.allocate(device)  # the model moved
        clock = self.stats._clocks[device]
        values = [value.detach().float().reshape(1) for value in losses]
        rest = self.ring.new_zeros(MOST_LOSSES - len(values))
        row = [clock.steps, clock.forwards, measure(routing, importance), self.lost_in_layer(routing), *values, rest]
        self.ring.index_copy_(0, self.written % (self.keep + 1), torch.cat(row).unsqueeze(0))
        self.written.add_(1)

    def lost_in_layer(self, routing: Routing) -> Tensor:
        """`(1,)`: tokens that no expert of a hierarchy computes, if this is its level two and level one was seen."""
        if torch.compiler.is_compiling():  # nothing may be stored inside a checkpoint that is traced
            return self.ring.new_full((1,), torch.nan)
        if self.hands_on:
            self.handed_on = routing
        if self.outer is None or self.outer.handed_on is None:
            return self.ring.new_full((1,), torch.nan)
        outer, self.outer.handed_on = self.outer.handed_on, None
        return lost_tokens(outer, routing)

    @property
    def forwards(self) -> int:
        """All recorded forwards, those that are overwritten too."""
        return int(self.written)

    def rows(self) -> Tensor:
        """`(forwards, width)` float64 on the CPU, oldest first."""
        ring, forwards = self.ring.cpu().to(torch.float64), self.forwards
        return ring[:forwards] if forwards <= self.keep else ring.roll(-(forwards % (self.keep + 1)), 0)

    def record(self, step: int, rows: Tensor) -> Record:
        """Sum rows `(r, width)` up."""
        g, e = self.routers, self.place.num_experts
        parts = rows.split([2, g * e, g * e, len(SUMS) * g, 1, MOST_LOSSES], dim=1)
        _, load, requested, sums, lost, losses = (part.sum(dim=0) for part in parts)
        forwards, shape = len(rows), (*self.place.outer, e)
        load, requested = load.to(torch.int64).view(g, e), requested.to(torch.int64).view(g, e)
        sums, means = sums.view(len(SUMS), g), (losses / max(forwards, 1)).tolist()
        outer = ()
        if self.place.outer:
            names = [f"{self.place.name}[{router}]" for router in range(g)]
            outer = tuple(
                summed_up(name, step, forwards, load[i], requested[i], sums[:, i]) for i, name in enumerate(names)
            )
        return summed_up(
            self.place.name,
            step,
            forwards,
            load.view(shape),
            requested.view(shape),
            sums.sum(dim=1),
            losses=dict(zip(self.losses, means[: len(self.losses)], strict=True)),
            lost_in_layer=None if lost.isnan() else int(lost),
            outer=outer,
        )


def measure(routing: Routing, importance: Tensor | None = None) -> Tensor:
    """`(2 g e + 5 g,)` float32: load and requested of every expert, and the `SUMS` of every router."""
    *outer, b, n, e = routing.probs.shape
    load = torch.zeros(*outer, e, dtype=torch.int64, device=routing.expert.device)
    load = load.scatter_add(-1, routing.expert.flatten(-2), routing.kept.flatten(-2).to(torch.int64))
    seen = seen_tokens(routing)
    part = taking_part(routing, importance)
    probs = routing.probs.detach().float()
    # -p log p, in place of the clamp's result: a third of the time of torch.special.entr
    entropy, top = -probs.clamp(min=1e-30).log_().mul_(probs).sum(dim=-1), probs.amax(dim=-1)
    if part is None:
        tokens = seen.new_full(tuple(outer), b * n, dtype=torch.int64)
        unseen = ~seen
    else:
        tokens = part.sum(dim=(-2, -1))
        unseen, entropy, top = part & ~seen, torch.where(part, entropy, 0.0), torch.where(part, top, 0.0)
    sums = (unseen.sum(dim=(-2, -1)), dropped(routing), entropy.sum(dim=(-2, -1)), top.sum(dim=(-2, -1)))
    parts = (load, routing.queued.sum(dim=-2), tokens, *sums)
    return torch.cat([values.float().flatten() for values in parts])


def seen_tokens(routing: Routing) -> Tensor:
    """`(..., b, n)` bool: the tokens that an expert computes."""
    if routing.choices is not None:
        return routing.kept.unflatten(-1, (routing.num_tokens, routing.choices)).any(dim=-1)
    zeros = torch.zeros_like(routing.probs[..., 0], dtype=torch.int64)
    return zeros.scatter_add(-1, routing.token, routing.kept.to(torch.int64)) > 0


def taking_part(routing: Routing, importance: Tensor | None) -> Tensor | None:
    """`(..., b, n)` bool: real tokens that make a choice; None if all do."""
    if importance is None:
        return routing.real
    return importance > 0 if routing.real is None else (importance > 0) & routing.real


def dropped(routing: Routing) -> Tensor:
    """`(...)` int64: choices that queued beyond the capacity. A choice of weight 0 in a slot is not one of them."""
    limit = routing.capacity if routing.limit is None else routing.limit.unsqueeze(-1)
    if limit is None:
        return routing.queued.new_zeros(routing.queued.shape[:-2])
    return (routing.queued - limit).clamp(min=0).sum(dim=(-2, -1))


def lost_tokens(outer: Routing, inner: Routing) -> Tensor:
    """`(1,)` float32: tokens of a hierarchy that no expert computes. Slots of level one are tokens of level two."""
    assert outer.choices is not None
    seen = seen_tokens(inner).flatten()
    seen = torch.cat([seen, seen.new_zeros(1)])  # for choices without a slot
    unseen = ~seen[plan(outer).row].view(*outer.probs.shape[:-1], outer.choices).any(dim=-1)
    if outer.real is not None:
        unseen = unseen & outer.real
    return unseen.sum().float().reshape(1)


def relative(counts: Tensor) -> Tensor:
    """Counts over their mean, float64; zeros if there is nothing."""
    return counts / counts.to(torch.float64).mean().clamp(min=1 / counts.numel())


def summed_up(
    layer: str, step: int, forwards: int, load: Tensor, requested: Tensor, sums: Tensor, **more: Any
) -> Record:
    """A record from the sums `(5,)` of a router, or of all routers of a gate."""
    tokens, unseen, without_slot, entropy, confidence = sums.tolist()
    count = max(tokens, 1)
    return Record(
        layer=layer,
        step=step,
        forwards=forwards,
        load=load,
        requested=requested,
        tokens=int(tokens),
        dropped=without_slot / max(int(requested.sum()), 1),
        unseen=unseen / count,
        entropy=entropy / count,
        confidence=confidence / count,
        **{"losses": {}, **more},
    )


SUMMARY_HEADER = (
    *("gate", "experts", "forwards", "tokens", "requested", "load", "dead"),
    *("dropped", "unseen", "entropy", "confidence", "losses"),
)


def summary_cells(record: Record) -> tuple[str, ...]:
    """A line of the summary. Loads are the least and the most, relative to a balanced one."""
    experts = "x".join(map(str, record.load.shape))
    if not record.forwards:
        return (record.layer, experts, "0", *["-"] * (len(SUMMARY_HEADER) - 3))
    return (
        record.layer,
        experts,
        str(record.forwards),
        str(record.tokens),
        span(record.relative_requested),
        span(record.relative_load),
        str(len(record.dead)),
        f"{record.dropped:.1%}",
        f"{record.unseen:.1%}",
        f"{record.entropy:.2f} of {math.log(record.load.shape[-1]):.2f}",
        f"{record.confidence:.2f}",
        ", ".join(f"{name} {value:.3g}" for name, value in record.losses.items()),
    )


def span(values: Tensor) -> str:
    return f"{float(values.min()):.2f}..{float(values.max()):.2f}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the header first, as lines of aligned columns; first and last column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i in (0, len(row) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
