"""Computes each call with one of several implementations: either the requested one, or the first that supports the
call.

An implementation is a module or an `Implementation` that provides two functions with the same arguments.
`unsupported_reason` returns why the implementation does not support the call, or None if it does. `run` computes the
call. Gates and each kind of experts have a table of implementations, keyed by name. The fastest implementation comes
first, and the last one supports all calls.

The requested implementation of experts and the use of router kernels are process-wide settings. The environment
variable `MIXTURE_OF_EXPERTS_KERNELS` sets the initial implementation, and `ops.use` changes both.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

ENVIRONMENT_VARIABLE = "MIXTURE_OF_EXPERTS_KERNELS"

# read only once, because compiled graphs can have guards on a variable but not on the environment
INITIAL_IMPLEMENTATION: str = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
_requested: tuple[str, bool | None] = (INITIAL_IMPLEMENTATION, None)
# active contexts of `use` in all threads; the most recent context applies
_open_contexts: dict[object, tuple[str, bool | None]] = {}
_REQUEST_LOCK = threading.Lock()


def requested_implementation() -> str:
    """Return the name of the implementation that the user requested, or "auto"."""
    return _requested[0]


def requested_router_kernels() -> bool | None:
    """Return whether the user requested kernels for routers and queues, or None for the device's default."""
    implementation, router_kernels = _requested
    return True if router_kernels is None and implementation == "triton" else router_kernels


def update_requests(opened: Mapping[object, tuple[str, bool | None]], closed: Sequence[object]) -> None:
    """Register contexts of `use` when they are entered, and remove them when they exit. Contexts in different threads
    may exit in any order."""
    global _requested
    with _REQUEST_LOCK:
        _open_contexts.update(opened)
        for context in closed:
            del _open_contexts[context]
        _requested = next(reversed(_open_contexts.values()), (INITIAL_IMPLEMENTATION, None))


@dataclass(frozen=True)
class Explanation:
    """Describes which implementation computed a call, and why faster ones were not used.

    Attributes:
        implementation: name of the implementation, as in `use`. For quantized experts, the name is "row_by_row" or
            "expert_by_expert". For experts that no implementation computes (modules on slots, experts with a custom
            `compute`, and experts on other ranks), the name is "module".
        reasons: why each faster implementation was not selected, keyed by name.
        gates: the explanation for each gate, in call order. The name "operators" refers to a gate's `decide` method.
    """

    implementation: str
    reasons: dict[str, str] = field(default_factory=dict)
    gates: tuple[Explanation, ...] = ()

    def __str__(self) -> str:
        of_gates = [line for gate in self.gates for line in f"gate: {gate}".splitlines()]
        return "\n".join(
            [self.implementation, *(f"  not {name}: {reason}" for name, reason in self.reasons.items()), *of_gates]
        )


class ListenerStack(threading.local):
    """A thread-local stack of lists to which the implementations of calls are appended. The innermost list is last."""

    def __init__(self) -> None:
        self.lists: list[list[tuple[str, Explanation]]] = []


LISTENERS = ListenerStack()


@contextmanager
def collect_explanations() -> Iterator[list[tuple[str, Explanation]]]:
    """Context manager that yields a list of explanations. Each entry is a tuple that contains "gate" or "experts",
    followed by an `Explanation`."""
    explanations: list[tuple[str, Explanation]] = []
    LISTENERS.lists.append(explanations)
    try:
        yield explanations
    finally:
        LISTENERS.lists.pop()


class Implementation(NamedTuple):
    """An implementation that consists of two functions instead of a module."""

    unsupported_reason: Callable[..., str | None]
    run: Callable[..., Any]


def run_first_supported(part: str, implementations: Mapping[str, Any], *call: Any, requested: str = "auto") -> Any:
    """Compute a call with the first implementation that supports it.

    Args:
        part: "gate" or "experts", which is reported to listeners.
        implementations: the table of implementations, keyed by name.
        call: the arguments to pass to `unsupported_reason` and `run`.
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
            f"no implementation of the {part} supports this call ({reasons}); end the table with an implementation "
            "that supports all calls, as in TokenChoiceGate.implementations"
        )
    reason = reasons.get(requested, "it is not available for this kind of network")
    raise ValueError(f"{requested!r} is requested, but it does not support this call: {reason}; request 'auto' instead")
