"""Computes a call with one of several implementations: the requested one, or the first that supports the call.

An implementation is a module, or an `Implementation`, with two functions of the same call: `unsupported_reason` returns
None, or the reason why the implementation cannot compute the call, and `run` computes it. A table lists implementations
by name, the fastest first; the last one supports every call. Gates and all kinds of experts have such tables.

The requested implementation is state of the process. `MIXTURE_OF_EXPERTS_KERNELS` sets it at the start, `ops.use`
later.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

ENVIRONMENT_VARIABLE = "MIXTURE_OF_EXPERTS_KERNELS"

# read once: a compiled graph can be guarded by a variable, but not by the environment
INITIAL_IMPLEMENTATION: str = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
_requested = INITIAL_IMPLEMENTATION
_open_contexts: dict[object, str] = {}  # the open contexts of `use`, of all threads; the last one applies
_REQUEST_LOCK = threading.Lock()


def requested_implementation() -> str:
    """Return the name of the implementation that the user requests, or "auto"."""
    return _requested


def update_requests(opened: Mapping[object, str], closed: Sequence[object]) -> None:
    """Register contexts of `use` that open, and remove those that close. Each removes its own entry: those of several
    threads may end in any order."""
    global _requested
    with _REQUEST_LOCK:
        _open_contexts.update(opened)
        for context in closed:
            del _open_contexts[context]
        _requested = next(reversed(_open_contexts.values()), INITIAL_IMPLEMENTATION)


@dataclass(frozen=True)
class Explanation:
    """Which implementation computed a call, and why no faster one did.

    Attributes:
        implementation: its name, one of those of `use`, or "row_by_row" or "expert_by_expert" for quantized experts;
            "module" for experts that none of the implementations computes: modules on slots, a custom `compute`, or
            experts on other ranks.
        reasons: for each faster implementation, why it was not selected.
        gates: the same for each gate, in the order in which they decided; "operators" is a gate's `decide`.
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
    """The lists of each thread to which the implementation of every call is appended; the innermost comes last."""

    def __init__(self) -> None:
        self.lists: list[list[tuple[str, Explanation]]] = []


LISTENERS = ListenerStack()


@contextmanager
def collect_explanations() -> Iterator[list[tuple[str, Explanation]]]:
    """A list of the implementations selected in this context: pairs of "gate" or "experts", and the `Explanation`."""
    explanations: list[tuple[str, Explanation]] = []
    LISTENERS.lists.append(explanations)
    try:
        yield explanations
    finally:
        LISTENERS.lists.pop()


class Implementation(NamedTuple):
    """An implementation that is not a separate module: the two functions that such a module has."""

    unsupported_reason: Callable[..., str | None]
    run: Callable[..., Any]


def run_first_supported(part: str, implementations: Mapping[str, Any], *call: Any, requested: str = "auto") -> Any:
    """Compute a call with the first implementation whose `unsupported_reason(*call)` is None; return `run(*call)`.
    Listeners get its name as that of `part`: "gate" or "experts". If `requested` is not "auto", only that
    implementation is tried.

    Raises:
        ValueError: the requested implementation, or none of them, can compute the call.
    """
    reasons: dict[str, str] = {}
    for name, implementation in implementations.items():
        if requested not in ("auto", name):
            continue
        reason = implementation.unsupported_reason(*call)
        if reason is None:
            if LISTENERS.lists:
                LISTENERS.lists[-1].append((part, Explanation(name, reasons)))
            return implementation.run(*call)
        reasons[name] = reason
    if requested == "auto":
        raise ValueError(
            f"no implementation of the {part} supports this call ({reasons}): end the table with one that supports "
            "every call, as TokenChoiceGate.implementations does"
        )
    reason = reasons.get(requested, "it computes another kind of network")
    raise ValueError(f"{requested!r} was asked for and cannot compute this call: {reason}; ask for 'auto'")
