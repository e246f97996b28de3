"""State of one forward: calls of a model that are under way, each known only to its own thread.

The losses, masks and statistics of a forward do not lie on modules or in the process. They lie in a `CallUnderWay`, on
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

from mixture_of_experts.private_torch import number_of_backward


class CallUnderWay:
    """One forward of a module. Subclasses add what is known of it and what it collects. This class alone marks a thread
    in which somebody collects or records, while no forward is under way."""

    keys: Sequence[Hashable] = ()  # `current` finds the call by any of them
    returned = False  # whether the forward came to its end
    frame: FrameType | None = None  # the frame in which it runs; None in a traced graph
    backward: int | None = None  # the number of the backward in which it runs; None in a traced graph


class Stacks(threading.local):
    """The calls of a thread that are under way, by key; the innermost stands last."""

    def __init__(self) -> None:
        self.calls: dict[Hashable, list[Any]] = {}


HERE = Stacks()


def begin(call: CallUnderWay, *keys: Hashable) -> None:
    """Make a call the current one of all its keys, until `end`.

    A hook calls this function: the call runs in the frame that called the hook.
    """
    call.keys = keys
    if not torch.compiler.is_compiling():
        call.frame, call.backward = sys._getframe(2), number_of_backward()
    for key in keys:
        calls = HERE.calls.get(key)
        if calls is None:
            HERE.calls[key] = [call]
        else:
            forget_interrupted(calls)
            calls.append(call)


def end(key: Hashable) -> Any:
    """End the innermost call of `key`, for all its keys, and return it; None if there is none."""
    calls = HERE.calls.get(key)
    if not calls:
        return None
    call = calls[-1]
    for each in call.keys:
        calls = HERE.calls.get(each)
        if calls and calls[-1] is call:
            calls.pop()
        if not calls:
            HERE.calls.pop(each, None)
    call.frame = None
    return call


def current(key: Hashable) -> Any:
    """The innermost call of `key` that is under way in this thread; None if there is none.

    Inside a backward, calls that began outside of it do not count: what runs there is a recomputation.
    """
    calls = HERE.calls.get(key)
    if not calls:
        return None
    if torch.compiler.is_compiling():
        return calls[-1]
    forget_interrupted(calls)
    if not calls:
        HERE.calls.pop(key)
        return None
    return calls[-1] if calls[-1].backward in (None, number_of_backward()) else None


@contextmanager
def within(calls: Sequence[tuple[Hashable, CallUnderWay]]) -> Iterator[None]:
    """Make each call the current one of its key, while the context lasts."""
    for key, call in calls:
        begin(call, key)
        call.frame = None
    try:
        yield
    finally:
        for key, _ in calls:
            end(key)


def forget_interrupted(calls: list[Any]) -> None:
    """Remove calls that a KeyboardInterrupt ended, after which no hook runs: their frames are not on the stack."""
    while calls and calls[-1].frame is not None and not runs(calls[-1].frame):
        calls.pop()


def runs(frame: FrameType) -> bool:
    """Whether a frame is on the stack of this thread."""
    above: FrameType | None = sys._getframe(1)
    while above is not None and above is not frame:
        above = above.f_back
    return above is frame
