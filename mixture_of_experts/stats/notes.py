"""What a reader of a gate's records should look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from mixture_of_experts.stats.record import Record

HIGH_DROPS = 0.1  # a warning stands above this share of avoidable drops
HIGH_LOAD = 2.0  # and above this load of an expert in late steps, relative to a balanced load
NAMED = 12  # most experts that a note names

Step = tuple[int, Tensor]  # the number of a step, and the rows of its forwards


class Note(NamedTuple):
    """What follows a gate's name; the summary has warnings alone."""

    text: str
    is_warning: bool = True


def notes_of(steps: Sequence[Step], record: Callable[[Sequence[Step]], Record]) -> Iterator[Note]:
    """The notes on a gate, from its steps and what makes one record of some of them."""
    sound = list(takewhile(lambda step: not math.isnan(record([step]).entropy), steps))
    if len(sound) < len(steps):
        yield Note(
            f" computed probabilities that are NaN, first in step {steps[len(sound)][0]}: its weights or its inputs "
            "are not finite. Go back to a checkpoint from before that step"
        )
    if not sound:
        return
    quarter = sound[-max(len(sound) // 4, 1) :]
    total, late = record(sound), record(quarter)
    number = quarter[-1][0] + 1 - quarter[0][0]
    when = "in the last step" if number == 1 else f"in the last {number} steps"
    when += " before NaN" if len(sound) < len(steps) else ""
    dead = total.load == 0
    for idle, since in ((dead, "in any step"), ((late.load == 0) & ~dead, when)):
        if names := [".".join(map(str, expert)) for expert in idle.nonzero().tolist()]:
            listed = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
            experts = "1 expert" if len(names) == 1 else f"{len(names)} experts"
            yield Note(f": {experts} computed no token {since}: {listed}", is_warning=False)
    if total.dropped - total.unavoidable > HIGH_DROPS:
        yield Note(
            f" dropped {total.dropped:.0%} of its choices; of a balanced load it would have dropped "
            f"{total.unavoidable:.0%}. In a group the most requested expert has {total.imbalance:.1f} times its share: "
            "raise loss_coef, the capacity factor or group_size"
        )
    most, mean = late.requested.max(), late.requested.to(torch.float64).mean()
    if most > HIGH_LOAD * mean + 5 * mean.sqrt():  # what chance adds to a few choices is no sign
        expert = ".".join(str(int(i)) for i in (late.requested == most).nonzero()[0])
        yield Note(
            f": expert {expert} was requested {most / mean:.1f} times a balanced load {when}: raise loss_coef, or "
            "balance by an expert bias"
        )
