"""State of one forward: calls of a model that are under way, each known only to its own thread; and `Watch`, which
tells when a forward begins and how it ends.

The losses, masks and statistics of a forward do not lie on modules or in the process. They lie in a `ForwardCall`, on
a stack of the thread that runs the forward. Compiled graphs read it and are guarded by it. Activation checkpointing
runs modules again in a backward, on a GPU in another thread. Such a run does not see the calls under way around the
backward; `within` gives it calls of its own.
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
    """One forward of a module. Subclasses add what is known of it and what it collects. This class alone marks a thread
    in which somebody collects or records, while no forward is under way."""

    keys: Sequence[Hashable] = ()  # `current` finds the call by any of them
    replaced_arguments: tuple[Any, Any] | None = None  # arguments that the forward gets in the place of the caller's
    watch: ForwardWatch | None = None  # what is told of the call's end
    frame: FrameType | None = None  # the frame in which it runs; None in a traced graph
    backward_id: int | None = None  # the number of the backward in which it runs; None in a traced graph


class CallStacks(threading.local):
    """The calls of a thread that are under way, by key; the innermost stands last."""

    def __init__(self) -> None:
        self.calls: dict[Hashable, list[Any]] = {}


CALL_STACKS = CallStacks()


def push_call(call: ForwardCall, *keys: Hashable) -> None:
    """Make a call the current one of all its keys, until `end`.

    A hook calls this function: the call runs in the frame that called the hook.
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
    """End the innermost call of `key`, for all its keys, and return it; None if there is none."""
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
    """The innermost call of `key` that is under way in this thread; None if there is none.

    Inside a backward, calls that began outside of it do not count: what runs there is a recomputation.
    """
    calls = active_calls(key)
    if not calls:
        return None
    counts = torch.compiler.is_compiling() or calls[-1].backward_id in (None, get_backward_id())
    return calls[-1] if counts else None


@contextmanager
def activate_calls(calls: Sequence[tuple[Hashable, ForwardCall]]) -> Iterator[None]:
    """Make each call the current one of its key, while the context lasts."""
    for key, call in calls:
        push_call(call, key)
        call.frame = None
    try:
        yield
    finally:
        for key, _ in calls:
            pop_call(key)


def active_calls(key: Hashable) -> list[Any] | None:
    """The calls of `key` that are under way in this thread, the innermost last.

    Calls that did not come to their end are removed: their frames are not on the stack. After a KeyboardInterrupt no
    hook runs, so it is found here.
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
    """Whether a frame is on the stack of this thread."""
    caller: FrameType | None = sys._getframe(1)
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return caller is frame


class ForwardWatch:
    """Tells when a forward of a module begins, and how it ends.

    Hooks on the module begin a call, which `current(watch)` returns until it ends. A forward that was compiled with
    its hooks does the same in its graph. A call ends well, `ended`, or it does not, `lost`: the forward raised, or was
    interrupted. What is only to count when the forward ended well waits in the call, or is taken back by `lost`.

    Attributes:
        owner: forwards count only in a thread in which a call of `owner` is under way, and in no backward; None: all
            count.
    """

    owner: Hashable | None = None

    def __init__(self, owner: Hashable | None = None) -> None:
        self.owner = owner

    def make_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardCall | None:
        """The call of a forward that begins, which `current` finds by this watch and by its `keys`; None to leave it
        alone."""
        raise NotImplementedError

    def on_success(self, call: Any, output: Any) -> Any:
        """The forward of a call ended well and returned `output`; what this returns, but None, takes its place."""

    def on_failure(self, call: Any) -> None:
        """The forward of a call raised, or was interrupted."""

    def attach_to(self, module: nn.Module, hooks: Attachments, *, prepend: bool = True) -> None:
        """Set the hooks on a module. They run around all hooks that it has, if this is called last; with `first=False`
        a forward begins after the other pre-hooks."""
        hooks.callback(current_call, self)  # an interrupted call is not kept beyond the hooks
        hooks.add_forward_pre_hook(module, self.begin, prepend=prepend)
        hooks.add_forward_hook(module, self.end, always_call=True)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if kwargs is None:
            return None  # the hook is being set or taken off
        if self.owner is not None and current_call(self.owner) is None:
            return None  # in another thread, or in a backward
        call = self.make_call(module, args, kwargs)
        if call is None:
            return None
        call.watch = self
        push_call(call, self, *call.keys)
        return call.replaced_arguments

    def end(self, module: nn.Module, args: object, output: Any) -> Any:
        calls = active_calls(self)  # after an error this hook runs outside of the call's frame
        if not calls:
            return None
        if not torch.compiler.is_compiling():
            caller = sys._getframe(1)
            resumed = caller.f_code.co_name.startswith("torch_dynamo_resume")  # after a break of a compiled graph
            if not (calls[-1].frame in (None, caller) or resumed):
                return None
            if calls[-1].watch is not self:
                return None  # `within` made it the current one: this forward failed before it began
        return self.on_success(pop_call(self), output)
