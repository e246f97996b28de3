"""Stores the most recent forward passes of each gate in a ring buffer on the gate's device, with one row per pass.

A forward hook on each gate reduces its `Routing` to one short row and writes the row into the ring buffer in place.
This design bounds memory use, lets `torch.compile` trace the hook, and needs no host sync until the records are read.
Recomputation under activation checkpointing is not recorded, because it runs outside of a forward pass of the tracked
model. Each forward pass keeps its state in its own `TrackedCall`, so threads do not interfere.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.stats.diagnostics import StepRows
from mixture_of_experts.stats.record import Record, count_measurements, make_record, measure_routing
from mixture_of_experts.support.private_torch import assume_constant_result, get_backward_id
from mixture_of_experts.whole_model import call_stack
from mixture_of_experts.whole_model.call_stack import ForwardCall, ForwardWatch
from mixture_of_experts.whole_model.router_discovery import RouterHandle

WRITE_LOCK = threading.Lock()
MAX_LOSSES = 12  # maximum number of losses in a row, including the z-loss
# forward number of unwritten rows, and of rows whose forward pass raised an error
INVALID_FORWARD = -1


@dataclass(eq=False)
class TrackedCall(ForwardCall):
    """An ongoing forward pass of the tracked model."""

    is_recorded: bool = True
    clocks: dict[GateRingBuffer, Tensor] = field(default_factory=dict)  # clock values at the start of the pass


@dataclass(eq=False)
class ForwardCounter(ForwardWatch):
    """Assigns numbers to the tracked model's forward passes, and discards the rows of passes that raised an error.

    Args:
        when: which forward passes to record, as in `track_routing`.

    Attributes:
        requires_grad: whether to ignore forward passes that begin with gradients disabled, such as sampling.
    """

    when: str
    buffers: list[GateRingBuffer] = field(default_factory=list)
    was_called: bool = False
    requires_grad: bool = False
    thread_id: int = field(default_factory=threading.get_ident)  # ID of the thread that entered the context

    def stop_recording(self) -> None:
        """Stop recording. A compiled graph keeps its hooks, but is recompiled because it guards on `when`."""
        self.when = "never"

    def is_recorded(self, module: nn.Module) -> bool:
        """Return whether forward passes in the current mode of `module` are recorded."""
        return self.when in ("always", "training" if module.training else "eval")

    def make_call(self, module: nn.Module, args: object, kwargs: object) -> TrackedCall | None:
        if not torch.compiler.is_compiling() and get_backward_id() != -1:
            return None  # a recomputation
        self.was_called = True
        call = TrackedCall(is_recorded=torch.is_grad_enabled() or not self.requires_grad)
        if call.is_recorded and self.is_recorded(module):
            with hold_write_lock():
                for ring in self.buffers:
                    ring.clock[1].add_(1)
                    call.clocks[ring] = ring.clock.clone()
        return call

    @torch.no_grad()
    def on_failure(self, call: TrackedCall) -> None:
        with hold_write_lock():
            for ring, clock in call.clocks.items():
                forwards = ring.numbers[:, 1]
                forwards.masked_fill_(forwards == clock[1], INVALID_FORWARD)


class PartForwards(ForwardWatch):
    """Records forward passes of a submodule outside the tracked model's forward pass, for example when `generate` calls
    `model.encoder`.

    While the tracked model's forward pass is running, the submodule's forward pass counts as part of it.
    """

    def __init__(self, forwards: ForwardCounter) -> None:
        super().__init__()
        self.forwards = forwards

    def make_call(self, module: nn.Module, args: object, kwargs: object) -> TrackedCall | None:
        if call_stack.current_call(self.forwards) is not None:
            return None
        call = self.forwards.make_call(module, args, kwargs)
        if call is not None:
            call.keys = (self.forwards,)
        return call

    def on_failure(self, call: TrackedCall) -> None:
        self.forwards.on_failure(call)


def hold_write_lock() -> AbstractContextManager[Any]:
    """Return a context manager that allows only one thread at a time to write. The context manager does nothing in a
    traced graph."""
    return nullcontext() if torch.compiler.is_compiling() else WRITE_LOCK


@dataclass(eq=False)
class GateRingBuffer:
    """The most recent rows of one gate. A row stores the losses, the index of their names in `loss_names`, and the
    statistics in float32, which is exact for up to 16 million choices per forward pass. A row's step number and
    forward-pass number are int64, so runs can have any length.

    Attributes:
        loss_names: the different tuples of loss names that forward passes reported.
        load_shape: shape of the load.
    """

    router: RouterHandle
    counter: ForwardCounter
    keep: int
    loss_names: list[tuple[str, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        router = self.router
        self.name: str = router.name  # stored as an attribute that `torch.compile` can read
        self.load_shape: tuple[int, ...] = (*router.outer_expert_dims, router.num_experts)
        self.has_bias: bool = router.expert_bias is not None
        # a traced graph cannot store names, but it can call a function (not a method) with a constant result
        self.index_loss_names: Any = assume_constant_result(lambda names: self._index_loss_names(names))
        with torch.inference_mode(False), router.device:  # outside inference mode, inference tensors cannot be modified
            # the additional row shows whether the step after it is complete
            size = self.keep + 1
            width = MAX_LOSSES + 1 + count_measurements(self.load_shape)
            self.rows: Tensor = torch.zeros(size, width, dtype=torch.float32)
            # step number and forward number of each row
            self.numbers: Tensor = torch.full((size, 2), INVALID_FORWARD, dtype=torch.int64)
            self.clock: Tensor = torch.tensor([0, -1], dtype=torch.int64)  # current step number and forward number
            self.num_written: Tensor = torch.zeros(1, dtype=torch.int64)
        self.counter.buffers.append(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return the records on the CPU, without the model. A copy can be read, but it does not record anything."""
        state = {name: value for name, value in vars(self).items() if name not in ("router", "index_loss_names")}
        return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()}

    def _index_loss_names(self, names: tuple[str, ...]) -> int:
        if len(names) > MAX_LOSSES:
            raise ValueError(f"{self.name!r} has {len(names)} losses, but at most {MAX_LOSSES} can be recorded")
        if names not in self.loss_names:
            self.loss_names.append(names)
        return self.loss_names.index(names)

    def write_row(self, gate: nn.Module, routing: Routing, importance: Tensor | None) -> None:
        """Append the row of a forward pass. This method only modifies tensors in place, because `torch.compile` traces
        it."""
        names_index = self.index_loss_names(tuple(routing.losses))
        if not self.counter.is_recorded(gate):
            return
        call, compiling = call_stack.current_call(self.counter), torch.compiler.is_compiling()
        if call is None:
            if not self.counter.was_called and (compiling or threading.get_ident() == self.counter.thread_id):
                raise RuntimeError(
                    f"{self.name!r} ran outside a forward pass of the module passed to track_routing; pass the module "
                    "that you actually call"
                )
            return  # a recomputation, or a forward pass that another thread started before the context
        if not call.is_recorded:
            return
        # a graph cannot read the tensors of `call`, which was created outside of the graph
        clock = self.clock if compiling else call.clocks.get(self, self.clock)
        with torch.no_grad():
            losses = [value.float().reshape(1) for value in routing.losses.values()]
            rest = self.rows.new_full((MAX_LOSSES + 1 - len(losses),), names_index)
            row = torch.cat([*losses, rest, measure_routing(routing, importance)])
            with hold_write_lock():
                place = self.num_written % (self.keep + 1)
                self.rows.index_copy_(0, place, row.unsqueeze(0))
                self.numbers.index_copy_(0, place, clock.unsqueeze(0))
                self.num_written.add_(1)

    def read_steps(self, by_steps: bool) -> list[StepRows]:
        """Return every stored step if `by_steps` is True, and every forward pass otherwise, from oldest to newest. Each
        item contains the number of the step or forward pass, and the rows `(forwards, width)` in float64 on the CPU."""
        call_stack.current_call(self.counter)  # detects interrupted forward passes in this thread
        numbers, rows = self.numbers.cpu(), self.rows.cpu().to(torch.float64)
        written = numbers[:, 1] != INVALID_FORWARD
        numbers, rows = numbers[written, 0 if by_steps else 1], rows[written]
        rows = rows[numbers.argsort(stable=True)]  # threads may write their rows in any order
        numbers, sizes = numbers.unique(return_counts=True)
        steps = list(zip(numbers.tolist(), rows.split(sizes.tolist()), strict=True))
        if not steps or int(self.num_written) <= self.keep:
            return steps
        # once rows have been overwritten, the oldest step may be incomplete
        if len(steps) == 1:
            warnings.warn(
                f"step {steps[0][0]} of {self.name!r} may be incomplete, because track_routing keeps only the last "
                f"forward passes of each gate; pass a larger keep than {self.keep}",
                stacklevel=2,
            )
        return steps[1:] or steps

    def make_record(self, steps: Sequence[StepRows]) -> Record:
        """Combine several steps into one record with the first step's number."""
        rows = torch.cat([self.rows[:0].cpu().to(torch.float64), *(rows for _, rows in steps)])
        losses, numbers = rows[:, : MAX_LOSSES + 1], rows[:, MAX_LOSSES + 1 :]
        reported: dict[str, list[float]] = {}
        for *values, names_index in losses.tolist():
            for name, value in zip(self.loss_names[int(names_index)], values, strict=False):
                reported.setdefault(name, []).append(value)
        means = {name: sum(values) / len(values) for name, values in reported.items()}
        return make_record(self.name, steps[0][0] if steps else -1, means, numbers, self.load_shape)
