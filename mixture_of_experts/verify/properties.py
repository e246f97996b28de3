"""Defines `Property`, which consists of a promise and its measurement."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from mixture_of_experts.verify.trial import DEFAULT_CASE, Case, Deviations, NotApplicableError, Trial
from mixture_of_experts.verify.verdicts import Finding

MeasureFunction = Callable[[Trial], Deviations]

SMALL_CASES = (Case(1, 2, 0), Case(1, 4, 1, True), Case(2, 8, 2))
CASES = (*SMALL_CASES, Case(2, 16, 3, True), Case(3, 32, 4), Case(3, 32, 5, True))
SINGLE_CASE = (DEFAULT_CASE,)
TRAINING_ONLY, EVAL_ONLY = (True,), (False,)


@dataclass(frozen=True)
class Property:
    """A property that a mixture-of-experts layer should have.

    Attributes:
        measure: a function that yields the deviations from the promise.
        promise: description of the property in one sentence.
        needs: the required argument of `verify` ("mask", "loss", "router" or "segment_ids"), or an empty string if none
            is required.
        cases: the cases to measure, from small to large, so that the first failing case is the smallest example.
        modes: the modes in which the property must hold. True means training mode, and False means eval mode.
        is_deterministic_only: whether to measure only modes in which the module draws no random numbers.
        limit: the largest deviation for which the property holds. If None, the trial's rounding limit is used.
        is_opt_in: whether the property is measured only on request.
    """

    measure: MeasureFunction
    promise: str
    needs: str = ""
    cases: tuple[Case, ...] = SMALL_CASES
    modes: tuple[bool, ...] = (True, False)
    is_deterministic_only: bool = False
    limit: float | None = None
    is_opt_in: bool = False

    @property
    def name(self) -> str:
        return self.measure.__name__

    def measure_module(self, trial: Trial) -> Finding:
        """Measure the property for all cases and modes."""
        finding, limit = partial(Finding, self.name, self.promise), trial.limit if self.limit is None else self.limit
        if self.needs and getattr(trial, self.needs) is None:
            return finding("not asked", detail=f"pass {self.needs}=")
        modes = [
            training
            for training in self.modes
            if training in trial.deterministic_modes or not self.is_deterministic_only
        ]
        if not modes:
            return finding("does not apply", detail="the module draws random numbers")
        worst = 0.0
        try:
            for case, training in product(self.cases, modes):
                trial = replace(trial, case=case, training=training)
                for gap in self.measure(trial):
                    if not gap.value <= limit:
                        number = gap.value if math.isfinite(gap.value) else None
                        return finding("fails", number, limit, f"{trial}: {gap.where}")
                    worst = max(worst, gap.value)
        except NotApplicableError as reason:
            return finding("does not apply", detail=str(reason))
        except Exception as error:  # the module may raise any error
            return finding("fails", detail=f"{trial}: {type(error).__name__}: {str(error).strip()}".splitlines()[0])
        return finding("holds", worst, limit)


def layer_property(promise: str, **settings: Any) -> Callable[[MeasureFunction], Property]:
    """Return a decorator that creates a `Property` from the function that measures it."""
    return partial(Property, promise=promise, **settings)
