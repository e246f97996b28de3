"""`Property`: a promise, and how it is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from mixture_of_experts.verify.subject import MODES, Case, DoesNotApplyError, Gap, Subject, Trial

Verdict = Literal["holds", "fails", "does not apply", "not asked"]
Measure = Callable[[Trial], Iterator[Gap]]

SMALL = (Case(1, 2, 0), Case(1, 4, 1, True), Case(2, 8, 2))
CASES = (*SMALL, Case(2, 16, 3, True), Case(3, 32, 4), Case(3, 32, 5, True))
ONE = (Case(2, 16, 0),)
TRAINING, EVAL = (True,), (False,)


@dataclass(frozen=True)
class Finding:
    """What was found about one property of a module.

    Attributes:
        name, promise: the property, and what it promises in one sentence.
        verdict: "holds", "fails", "does not apply" or "not asked".
        number: the largest number that was measured; None if there is none, or if it is not finite.
        limit: the largest number with which the promise holds.
        detail: where it fails, in the smallest example; or why it does not apply or was not asked.
    """

    name: str
    promise: str
    verdict: Verdict
    number: float | None = None
    limit: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class Property:
    """What a mixture layer is to keep.

    Attributes:
        measure: yields the gaps between what is and what is promised.
        promise: one sentence.
        needs: what has to be told: "mask", "loss", "counts", "router".
        cases: from small to large: the first that fails is the smallest example.
        modes: the modes in which it is promised, True for training.
        steady: whether it is measured only in modes in which the module draws no random numbers.
        limit: the largest gap that keeps the promise; None: that of rounding.
        thorough: whether it is measured only if asked for.
        by_name: whether it is measured only if it is named.
    """

    measure: Measure
    promise: str
    needs: tuple[str, ...] = ()
    cases: tuple[Case, ...] = SMALL
    modes: tuple[bool, ...] = (True, False)
    steady: bool = False
    limit: float | None = None
    thorough: bool = False
    by_name: bool = False

    @property
    def name(self) -> str:
        return self.measure.__name__

    def find(self, subject: Subject) -> Finding:
        """Measure a module."""
        say, limit = partial(Finding, self.name, self.promise), subject.limit if self.limit is None else self.limit
        missing = [f"{what}=" for what in self.needs if subject.told.get(what) is None]
        modes = [training for training in self.modes if not (self.steady and subject.draws[training])]
        if missing:
            return say("not asked", detail=f"tell {' and '.join(missing)}")
        if not modes:
            reason = f"random numbers are drawn in {' and '.join(MODES[training] for training in self.modes)}"
            return say("does not apply", detail=reason)
        worst, trial = 0.0, None
        try:
            for trial in (Trial(subject, case, training) for case in self.cases for training in modes):
                for gap in self.measure(trial):
                    if not gap.number <= limit:
                        number = gap.number if math.isfinite(gap.number) else None
                        return say("fails", number, limit, f"{trial}: {gap.where}")
                    worst = max(worst, gap.number)
        except DoesNotApplyError as reason:
            return say("does not apply", detail=str(reason))
        except Exception as error:
            detail = ": ".join([str(trial), type(error).__name__, *str(error).strip().splitlines()[:1]])
            return say("fails", detail=detail)
        return say("holds", worst, limit)


def keeps(promise: str, *needs: str, **settings: Any) -> Callable[[Measure], Property]:
    """Make a property of the function that measures it."""
    return lambda measure: Property(measure, promise, needs, **settings)
