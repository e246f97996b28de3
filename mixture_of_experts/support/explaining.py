"""Takes the first of several ways that can compute a call, and tells whoever listens which one, and why no faster."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Explanation:
    """Which way computed a call, and why no faster one did.

    Attributes:
        way: name of the way; "module" for experts that no way computes: modules on slots, a `compute` of your own, or
            experts on other ranks.
        reasons: for each faster way, why it was not taken.
        gates: the same of each gate, in the order in which they decided; "operators" is a gate's `decide`.
    """

    way: str
    reasons: dict[str, str] = field(default_factory=dict)
    gates: tuple[Explanation, ...] = ()

    def __str__(self) -> str:
        of_gates = [line for gate in self.gates for line in f"gate: {gate}".splitlines()]
        return "\n".join([self.way, *(f"  not {way}: {reason}" for way, reason in self.reasons.items()), *of_gates])


class Listeners(threading.local):
    """The lists, of each thread, to which the way of every call is added; the innermost comes last."""

    def __init__(self) -> None:
        self.lists: list[list[tuple[str, Explanation]]] = []


LISTENERS = Listeners()


@contextmanager
def listening() -> Iterator[list[tuple[str, Explanation]]]:
    """The ways taken in this context, in a list: "gate" or "experts", and which."""
    explanations: list[tuple[str, Explanation]] = []
    LISTENERS.lists.append(explanations)
    try:
        yield explanations
    finally:
        LISTENERS.lists.pop()


def first_way(part: str, ways: Mapping[str, Any], *call: Any) -> str:
    """The name of the first way whose `why_not(*call)` is None; it is told as that of `part`, "gate" or "experts"."""
    reasons: dict[str, str] = {}
    for name, way in ways.items():
        reason = way.why_not(*call)
        if reason is None:
            return tell(part, name, reasons)
        reasons[name] = reason
    raise AssertionError("the last way takes every call")


def tell(part: str, way: str, reasons: dict[str, str]) -> str:
    """Tell which way is taken, and return its name."""
    if LISTENERS.lists:
        LISTENERS.lists[-1].append((part, Explanation(way, reasons)))
    return way
