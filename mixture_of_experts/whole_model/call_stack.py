"""Tracks forward passes. Each running call to a model is visible only in its own thread, and `ForwardWatch` reports
when a forward pass begins and how it ends.

The losses, masks and statistics of a forward pass are not stored on modules or globally. Instead, they are stored in a
`ForwardCall` on a stack that belongs to the thread running the pass. Compiled graphs read this stack and install guards
on it. Activation checkpointing reruns modules during the backward pass, which PyTorch runs in another thread on GPUs. A
recomputation does not see the calls that were running when the backward pass began. Use `activate_calls` to make
specific calls visible to it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn

from mixture_of_experts.support.attachments import Attachments
from mixture_of_experts.support.private_torch import get_backward_id


class ForwardCall:
    """One forward pass of a module. Subclasses add information about the pass and the values collected during it. An
    instance of this base class marks a thread as collecting or recording even while no forward pass is running."""

    keys: Sequence[Hashable] = ()  # `current_call` finds the call under any of these keys
    replaced_arguments: tuple[Any, Any] | None = None  # arguments that replace the caller's arguments
    watch: ForwardWatch | None = None  # the watch to notify when the call ends
    frame: FrameType | None = None  # the frame in which the call runs; None in a traced graph
    backward_id: int | None = None  # ID of the backward pass in which the call runs; None in a traced graph


class CallStacks(threading.local):
    """The running calls of a thread, keyed by `ForwardCall.keys`. The innermost call is last."""

    def __init__(self) -> None:
        self.calls: dict[Hashable, list[Any]] = {}


CALL_STACKS = CallStacks()


def push_call(call: ForwardCall, *keys: Hashable) -> None:
    """Make `call` the current call for each of `keys` until `pop_call` removes it.

    Hooks call this function, and the forward pass runs in the frame that called the hook.
    """
    call.keys = keys
    if not torch.compiler.is_compiling():
        call.frame, call.backward_id = sys._getframe(2), get_backward_id()
    for key in keys:
        if calls := active_calls(key):
            calls.append(call)
        else:
            CALL_STACKS.calls[key] = [call]


def pop_call(key: Hashable) -> Any:
    """End the innermost call for `key`, and remove it from all of its keys. Return the call, or None if there is
    none."""
    calls = CALL_STACKS.calls.get(key)
    if not calls:
        return None
    call = calls[-1]
    remove_call(call)
    return call


def remove_call(call: ForwardCall) -> None:
    for key in call.keys:
        if others := [each for each in CALL_STACKS.calls.get(key, ()) if each is not call]:
            CALL_STACKS.calls[key] = others
        else:
            CALL_STACKS.calls.pop(key, None)
    call.frame = None


def current_call(key: Hashable) -> Any:
    """Return the innermost running call for `key` in this thread, or None if there is none.

    During a backward pass, only recomputations run, so calls that began outside of this pass are ignored.
    """
    calls = active_calls(key)
    if not calls:
        return None
    counts = torch.compiler.is_compiling() or calls[-1].backward_id in (None, get_backward_id())
    return calls[-1] if counts else None


@contextmanager
def activate_calls(calls: Sequence[tuple[Hashable, ForwardCall]]) -> Iterator[None]:
    """Context manager that makes each call the current call for its key."""
    for key, call in calls:
        push_call(call, key)
        call.frame = None
    try:
        yield
    finally:
        for key, _ in calls:
            pop_call(key)


def active_calls(key: Hashable) -> list[Any] | None:
    """Return the running calls for `key` in this thread, innermost last.

    This function also removes interrupted calls whose frames are no longer on the stack, because no hook runs after a
    KeyboardInterrupt.
    """
    calls = CALL_STACKS.calls.get(key)
    if torch.compiler.is_compiling():
        return calls
    while calls and calls[-1].frame is not None and not is_on_stack(calls[-1].frame):
        call = calls[-1]
        remove_call(call)
        if call.watch is not None:
            call.watch.on_failure(call)
        calls = CALL_STACKS.calls.get(key)
    return calls


def is_on_stack(frame: FrameType) -> bool:
    """Return whether a frame is on the current thread's stack."""
    caller: FrameType | None = sys._getframe(1)
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return caller is frame


class ForwardWatch:
    """Base class that observes the beginning and the outcome of a module's forward passes.

    Hooks on the module begin a call, and `current_call(watch)` returns this call until it ends. If the module was
    compiled together with its hooks, the compiled graph also begins and ends calls. A call ends with `on_success`, or
    with `on_failure` if the forward pass raised an error or was interrupted. Results that should count only if the pass
    succeeds are either kept in the call until it ends or undone by `on_failure`.

    Attributes:
        owner: if set, a forward pass is observed only if its thread has a running call for `owner` and is not inside a
            backward pass. If None, all forward passes are observed.
    """

    owner: Hashable | None = None

    def __init__(self, owner: Hashable | None = None) -> None:
        self.owner = owner

    def make_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardCall | None:
        """Return the call for a forward pass that is beginning, or None to ignore the pass. `current_call` finds the
        call under this watch and under each of the call's `keys`."""
        raise NotImplementedError

    def on_success(self, call: Any, output: Any) -> Any:
        """Handle the successful end of a forward pass that returned `output`. If the return value is not None, it
        replaces the output."""

    def on_failure(self, call: Any) -> None:
        """Handle the end of a forward pass that raised an error or was interrupted."""

    def attach_to(self, module: nn.Module, hooks: Attachments) -> None:
        """Register the hooks on a module. If these hooks are registered last, they enclose all other hooks of the
        module."""
        hooks.callback(current_call, self)  # drops interrupted calls when the hooks are removed
        hooks.add_forward_pre_hook(module, self.begin, prepend=True)
        hooks.add_forward_hook(module, self.end, always_call=True)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if kwargs is None:
            return None  # the hook is being registered or removed
        if self.owner is not None and current_call(self.owner) is None:
            return None  # called in another thread or in a backward pass
        call = self.make_call(module, args, kwargs)
        if call is None:
            return None
        call.watch = self
        push_call(call, self, *call.keys)
        return call.replaced_arguments

    def end(self, module: nn.Module, args: object, output: Any) -> Any:
        calls = active_calls(self)  # after an error, this hook runs outside of the call's frame
        if not calls:
            return None
        if not torch.compiler.is_compiling():
            caller = sys._getframe(1)
            # whether the frame was resumed after a graph break
            resumed = caller.f_code.co_name.startswith("torch_dynamo_resume")
            if not (calls[-1].frame in (None, caller) or resumed):
                return None
            if calls[-1].watch is not self:
                # this pass failed before its own call began; the last call was added by `activate_calls`
                return None
        return self.on_success(pop_call(self), output)
