"""The results of the comparison on a GPU by cases: what was measured, and why something was not.

A contestant without a time on a case has lost nothing there. `unmeasured_reason` is the only place that decides whether
there is a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import exp, inf, log
from typing import Any

from benchmarks.gpu_cases import GPUCase
from benchmarks.gpu_comparison import REFERENCE
from benchmarks.gpu_contestants import list_contestants
from benchmarks.gpu_device import Spread
from benchmarks.tasks import find_failure

Found = dict[str, dict[str, Any]]  # results by piece, and by the names of tasks

MAX_TIED_RATIO = 1.03  # times that differ by less are considered equal
MAX_UNSTEADY_RATIO = 1.05  # how much slower the GPU may have been than at another contestant of the case


@dataclass(frozen=True)
class CaseResults:
    """The results of a case, by the names of its tasks."""

    case: GPUCase
    results: dict[str, Any]

    @property
    def name(self) -> str:
        return self.case.name

    @cached_property
    def contestants(self) -> list[str]:
        """All contestants that belong to the case, measured or not."""
        return list_contestants(self.case)

    @cached_property
    def measured(self) -> list[str]:
        return [name for name in self.contestants if self.unmeasured_reason(name) is None]

    def unmeasured_reason(self, name: str) -> str | None:
        """Return why a contestant has no time, or None if it has one."""
        if failure := find_failure(self.results.get(REFERENCE)):
            return f"the reference failed: {failure[1]}"
        if name not in self.results:
            return "it was not run"
        if failure := find_failure(self.results[name]):
            return failure[1]
        slowdown = self.results[name]["yardstick"] / self.fastest_yardstick
        if slowdown > MAX_UNSTEADY_RATIO:
            return f"the GPU was not steady: a fixed product took {slowdown:.2f}x as long as for another contestant"
        return None

    @cached_property
    def fastest_yardstick(self) -> float:
        """The shortest time of the fixed product that the task of each contestant measures."""
        results = [self.results[name] for name in self.contestants if name in self.results]
        return min(result["yardstick"] for result in results if find_failure(result) is None)

    def time(self, name: str) -> Spread:
        """Return the time of a measured contestant that counts: on the GPU if a graph is replayed, or else that of the
        GPU or of the host, whichever is longer."""
        result = self.results[name]
        if self.case.is_graph:
            return Spread(*result["card"])
        return Spread(*map(max, result["card"], result["host"]))

    def find_fastest(self, names: Iterable[str]) -> str | None:
        """Return the fastest of these contestants, or None if none of them was measured."""
        measured = [name for name in names if name in self.measured]
        return min(measured, key=lambda name: self.time(name).median, default=None)

    def describe_unmeasured(self, names: Iterable[str]) -> str:
        """Return which of these contestants belong to the case and were not measured, with the reasons."""
        reasons = {f"`{name}`": self.unmeasured_reason(name) for name in names if name in self.contestants}
        return join_reasons({name: reason for name, reason in reasons.items() if reason})


def collect_cases(found: Found, cases: Iterable[GPUCase]) -> list[CaseResults]:
    """Return the results of all cases, including those that were not run."""
    return [CaseResults(case, found.get(f"cases/{case.name}", {})) for case in cases]


def list_failures(found: Found, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield piece, task, status and reason of all tasks without a result, in pieces whose names have the prefix."""
    for piece, results in found.items():
        for name, result in results.items() if piece.startswith(prefix) else ():
            if failure := find_failure(result):
                yield piece, name, *failure


def join_reasons(reasons: dict[str, str]) -> str:
    """Return places with the reasons for which something was not measured there. Places with one reason are joined."""
    places: dict[str, list[str]] = {}
    for place, reason in reasons.items():
        places.setdefault(reason, []).append(place)
    return "; ".join(f"{', '.join(where)} ({reason})" for reason, where in places.items())


def geometric_mean(ratios: Iterable[float]) -> float:
    """Return the geometric mean, or infinity if there are no ratios."""
    logs = [log(ratio) for ratio in ratios]
    return exp(sum(logs) / len(logs)) if logs else inf
