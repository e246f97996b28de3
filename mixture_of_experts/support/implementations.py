"""Computes a call with one of several implementations: the requested one, or the first that supports the call.

An implementation is a module or an `Implementation` with two functions that take the same call. `unsupported_reason`
returns the reason why the implementation does not support the call, or None, and `run` computes the call. Gates and all
kinds of experts have tables of implementations by name, fastest first, the last of which supports all calls.

The user's request is global to the process: an implementation of experts, and whether routers use kernels.
`MIXTURE_OF_EXPERTS_KERNELS` sets the initial implementation, and `ops.use` changes both.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

ENVIRONMENT_VARIABLE = "MIXTURE_OF_EXPERTS_KERNELS"

# read once, because compiled graphs can be guarded by a variable, but not by the environment
INITIAL_IMPLEMENTATION: str = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
_requested: tuple[str, bool | None] = (INITIAL_IMPLEMENTATION, None)
# active contexts of `use` in all threads; the last one applies
_open_contexts: dict[object, tuple[str, bool | None]] = {}
_REQUEST_LOCK = threading.Lock()


def requested_implementation() -> str:
    """Return the name of the implementation that the user requests, or "auto"."""
    return _requested[0]


def requested_router_kernels() -> bool | None:
    """Return whether the user requests kernels for routers and queues, or None for the device's default."""
    implementation, router_kernels = _requested
    return True if router_kernels is None and implementation == "triton" else router_kernels


def update_requests(opened: Mapping[object, tuple[str, bool | None]], closed: Sequence[object]) -> None:
    """Register contexts of `use` that are entered, and remove those that end. Contexts of several threads may end in
    any order."""
    global _requested
    with _REQUEST_LOCK:
        _open_contexts.update(opened)
        for context in closed:
            del _open_contexts[context]
        _requested = next(reversed(_open_contexts.values()), (INITIAL_IMPLEMENTATION, None))


@dataclass(frozen=True)
class Explanation:
    """The implementation that computed a call, and the reasons why faster ones were not used.

    Attributes:
        implementation: name of the implementation, as in `use`; "row_by_row" or "expert_by_expert" for quantized
            experts; "module" for experts that no implementation computes, which are modules on slots, experts with a
            custom `compute`, and experts on other ranks.
        reasons: why each faster implementation was not selected.
        gates: the explanation of each gate, in the order of their calls; "operators" is a gate's `decide`.
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
    """The lists of each thread to which the implementations of calls are appended, innermost last."""

    def __init__(self) -> None:
        self.lists: list[list[tuple[str, Explanation]]] = []


LISTENERS = ListenerStack()


@contextmanager
def collect_explanations() -> Iterator[list[tuple[str, Explanation]]]:
    """Context manager that yields a list of the selected implementations, as pairs of "gate" or "experts" and the
    `Explanation`."""
    explanations: list[tuple[str, Explanation]] = []
    LISTENERS.lists.append(explanations)
    try:
        yield explanations
    finally:
        LISTENERS.lists.pop()


class Implementation(NamedTuple):
    """The two functions of an implementation that has no module of its own."""

    unsupported_reason: Callable[..., str | None]
    run: Callable[..., Any]


def run_first_supported(part: str, implementations: Mapping[str, Any], *call: Any, requested: str = "auto") -> Any:
    """Compute a call with the first implementation that supports it.

    Args:
        part: "gate" or "experts", which is reported to listeners.
        implementations: the table of implementations.
        call: the arguments of `unsupported_reason` and `run`.
        requested: "auto", or the name of the only implementation to try.

    Raises:
        ValueError: the requested implementation does not support the call, or no implementation does.
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
            f"no implementation of the {part} supports this call ({reasons}); add an implementation that supports all "
            "calls to the end of the table, as in TokenChoiceGate.implementations"
        )
    reason = reasons.get(requested, "it is not available for this kind of network")
    raise ValueError(f"{requested!r} is requested, but does not support this call: {reason}; request 'auto' instead")
