"""Ways to compute a call: the one that the user asks for, or the first that serves it; and who is told which.

The way that the user asks for is state of the process. `MIXTURE_OF_EXPERTS_KERNELS` sets it at the start, `ops.use`
later.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

ENVIRONMENT_VARIABLE = "MIXTURE_OF_EXPERTS_KERNELS"

# read once: a compiled graph can be guarded by a variable, but not by the environment
INITIAL_IMPLEMENTATION: str = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
_requested = INITIAL_IMPLEMENTATION
_open_contexts: dict[object, str] = {}  # the open contexts of `use`, of all threads; the last one holds
_REQUEST_LOCK = threading.Lock()


def requested_implementation() -> str:
    """The name of the way that the user asks for, or "auto"."""
    return _requested


def update_requests(opened: Mapping[object, str], closed: Sequence[object]) -> None:
    """Note contexts of `use` that open and close. Each takes out its own entry: those of several threads may end in any
    order."""
    global _requested
    with _REQUEST_LOCK:
        _open_contexts.update(opened)
        for context in closed:
            del _open_contexts[context]
        _requested = next(reversed(_open_contexts.values()), INITIAL_IMPLEMENTATION)


@dataclass(frozen=True)
class Explanation:
    """Which way computed a call, and why no faster one did.

    Attributes:
        way: name of the way; "module" for experts that no way computes: modules on slots, a `compute` of your own, or
            experts on other ranks.
        reasons: for each faster way, why it was not taken.
        gates: the same of each gate, in the order in which they decided; "operators" is a gate's `decide`.
    """

    implementation: str
    reasons: dict[str, str] = field(default_factory=dict)
    gates: tuple[Explanation, ...] = ()

    def __str__(self) -> str:
        of_gates = [line for gate in self.gates for line in f"gate: {gate}".splitlines()]
        return "\n".join(
            [self.implementation, *(f"  not {way}: {reason}" for way, reason in self.reasons.items()), *of_gates]
        )


class ListenerStack(threading.local):
    """The lists, of each thread, to which the way of every call is added; the innermost comes last."""

    def __init__(self) -> None:
        self.lists: list[list[tuple[str, Explanation]]] = []


LISTENERS = ListenerStack()


@contextmanager
def collect_explanations() -> Iterator[list[tuple[str, Explanation]]]:
    """The ways taken in this context, in a list: "gate" or "experts", and which."""
    explanations: list[tuple[str, Explanation]] = []
    LISTENERS.lists.append(explanations)
    try:
        yield explanations
    finally:
        LISTENERS.lists.pop()


def select_implementation(part: str, implementations: Mapping[str, Any], *call: Any, requested: str = "auto") -> str:
    """The name of the first way whose `why_not(*call)` is None, else "operators"; it is told as that of `part`: of a
    "gate", or of "experts". If another way than "auto" is `asked` for, only that one is tried.

    Raises:
        ValueError: the way that is asked for cannot compute the call.
    """
    taken, reasons = "operators", {}
    for name in implementations if requested == "auto" else [name for name in implementations if name == requested]:
        reason = implementations[name].unsupported_reason(*call)
        if reason is None:
            taken = name
            break
        reasons[name] = reason
    if requested not in ("auto", taken):
        reason = reasons.get(requested, "it computes another kind of network")
        raise ValueError(f"{requested!r} was asked for and cannot compute this call: {reason}; ask for 'auto'")
    if LISTENERS.lists:
        LISTENERS.lists[-1].append((part, Explanation(taken, reasons)))
    return taken
