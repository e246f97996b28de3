"""`Property`: a promise, and how it is measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from mixture_of_experts.verify.trial import ONE, Case, DoesNotApplyError, Gaps, Trial
from mixture_of_experts.verify.verdicts import Finding

Measure = Callable[[Trial], Gaps]

SMALL = (Case(1, 2, 0), Case(1, 4, 1, True), Case(2, 8, 2))
CASES = (*SMALL, Case(2, 16, 3, True), Case(3, 32, 4), Case(3, 32, 5, True))
ONLY = (ONE,)
TRAINING, EVAL = (True,), (False,)


@dataclass(frozen=True)
class Property:
    """What a mixture layer is to keep.

    Attributes:
        measure: yields the gaps between what is and what is promised.
        promise: one sentence.
        needs: what has to be told: "mask", "loss" or "router".
        cases: from small to large: the first that fails is the smallest example.
        modes: the modes in which it is promised, True for training.
        steady: whether it is measured only in modes in which the module draws no random numbers.
        limit: the largest gap that keeps the promise; None: that of rounding.
        by_name: whether it is measured only if it is named.
    """

    measure: Measure
    promise: str
    needs: str = ""
    cases: tuple[Case, ...] = SMALL
    modes: tuple[bool, ...] = (True, False)
    steady: bool = False
    limit: float | None = None
    by_name: bool = False

    @property
    def name(self) -> str:
        return self.measure.__name__

    def find(self, trial: Trial) -> Finding:
        """Measure a module."""
        say, limit = partial(Finding, self.name, self.promise), trial.limit if self.limit is None else self.limit
        if self.needs and getattr(trial, self.needs) is None:
            return say("not asked", detail=f"tell {self.needs}=")
        modes = [training for training in self.modes if training in trial.steady or not self.steady]
        if not modes:
            return say("does not apply", detail="random numbers are drawn")
        worst = 0.0
        try:
            for case, training in product(self.cases, modes):
                trial = replace(trial, case=case, training=training)
                for gap in self.measure(trial):
                    if not gap.number <= limit:
                        number = gap.number if math.isfinite(gap.number) else None
                        return say("fails", number, limit, f"{trial}: {gap.where}")
                    worst = max(worst, gap.number)
        except DoesNotApplyError as reason:
            return say("does not apply", detail=str(reason))
        except Exception as error:  # whatever the module raises
            return say("fails", detail=f"{trial}: {type(error).__name__}: {str(error).strip()}".splitlines()[0])
        return say("holds", worst, limit)


def keeps(promise: str, **settings: Any) -> Callable[[Measure], Property]:
    """Make a property of the function that measures it."""
    return partial(Property, promise=promise, **settings)
