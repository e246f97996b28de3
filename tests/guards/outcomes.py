"""What became of the cases that both sides were asked: computed by both, refused by both, or not computed there."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

Digests = dict[str, str]


class Uncomputed(str):
    """Why the earlier commit could not answer at all."""


def failed(error: BaseException) -> Digests:
    """The type of an error, which both sides have to agree on; `missing`, if a name was not found."""
    found = {"error": type(error).__name__}
    unknown = isinstance(error, TypeError) and "unexpected keyword argument" in str(error)
    if unknown or isinstance(error, ImportError | AttributeError | NameError):
        found["missing"] = described(error)
    return found


def described(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def differences(before: Digests, now: Digests) -> list[str]:
    names = (before.keys() | now.keys()) - {"missing"}
    return sorted(name for name in names if before.get(name) != now.get(name))


@dataclass
class Outcomes:
    """Counts of cases. A case that the earlier commit lacks a name for is reported, and nothing else is let pass."""

    computed: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    uncomputed: dict[str, list[str]] = field(default_factory=dict)  # cases by reason

    def compare(self, case: str, before: Digests | Uncomputed, now: Digests) -> list[str]:
        """What differs between the sides."""
        if isinstance(before, Uncomputed):
            return self.leave_out(case, before)
        if "missing" in before and "missing" not in now:
            return self.leave_out(case, before["missing"])
        if "error" in before:
            self.refused[before["error"]] += 1
        else:
            self.computed += 1
        return differences(before, now)

    def leave_out(self, case: str, reason: str) -> list[str]:
        self.uncomputed.setdefault(reason, []).append(case)
        return []

    def report(self, guard: str) -> str | None:
        """Print the counts; returns what is wrong if the sides have nothing in common."""
        parts = [f"{self.computed:,} cases computed on both sides"]
        parts += [f"{number:,} refused by both with {error}" for error, number in self.refused.most_common()]
        if self.uncomputed:
            parts.append(f"{sum(map(len, self.uncomputed.values())):,} not computed there:")
        print(f"{guard}: {', '.join(parts)}", flush=True)
        for reason, cases in sorted(self.uncomputed.items(), key=lambda item: -len(item[1])):
            print(f"    {len(cases):,}: {reason}\n        as {cases[0][:300]}", flush=True)
        if self.computed:
            return None
        return "no case was computed on both sides: renames.tsv has to name what the earlier commit calls otherwise"
