"""What is under way: the calls of a model from their beginning to their end, each known to its own thread alone.

Losses, masks and statistics of a forward belong to that forward. They lie neither on modules nor in the process but in
a call, an object on a stack of the thread that makes it; compiled graphs read it and are guarded by it. What activation
checkpointing runs again in a backward, which on a GPU is another thread, is no part of a call that is under way: it
brings its own along (`within`), or has none.
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
    """One forward of a module. What is known of it, and what it gathers, are attributes of subclasses."""

    keys: Sequence[Hashable] = ()  # by which it is found
    returned = False  # whether the forward came to its end
    frame: FrameType | None = None  # in which it runs; None where that is traced
    backward: int | None = None  # the number of the backward in which it runs; None where that is traced


class Stacks(threading.local):
    """The calls of a thread that are under way, by their keys; the innermost stands last."""

    def __init__(self) -> None:
        self.calls: dict[Hashable, list[Any]] = {}


HERE = Stacks()


def begin(call: CallUnderWay, *keys: Hashable) -> None:
    """From now to `end` the call is the current one of all its keys. For a hook: the call runs in the frame from which
    this function's caller was called."""
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

    One that is under way around a backward is not that of what the backward runs again.
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
    """Have keys have calls, while the context lasts."""
    for key, call in calls:
        begin(call, key)
        call.frame = None
    try:
        yield
    finally:
        for key, _ in calls:
            end(key)


def forget_interrupted(calls: list[Any]) -> None:
    """Take out what was interrupted: no hook tells of a KeyboardInterrupt, but what it left has no frame any more."""
    while calls and calls[-1].frame is not None and not runs(calls[-1].frame):
        calls.pop()


def runs(frame: FrameType) -> bool:
    """Whether a frame is on the stack of this thread."""
    above: FrameType | None = sys._getframe(1)
    while above is not None and above is not frame:
        above = above.f_back
    return above is frame
