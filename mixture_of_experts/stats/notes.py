"""What a reader of a gate's records should look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mixture_of_experts.stats.record import Record

HIGH_DROPS = 0.1  # a note stands above this share of avoidable drops
HIGH_LOAD = 2.0  # and above this load of an expert in late steps, relative to a balanced load
MOVE_BIAS = "let balance_experts move its expert bias, or raise the rate if it does"
STARVED_LOAD = 0.1  # and below this load
NAMED = 12  # most experts that a note names

Step = tuple[int, Tensor]  # the number of a step, and the rows of its forwards


def notes_of(
    steps: Sequence[Step], record: Callable[[Sequence[Step]], Record], has_bias: bool = False
) -> Iterator[str]:
    """The notes on a gate, to stand behind its name, from its steps and what makes one record of some of them. An
    expert bias balances the gate in the place of a loss."""
    if not steps:
        return
    total = record(steps)
    if math.isnan(total.entropy):
        first = next(number for number, rows in steps if math.isnan(record([(number, rows)]).entropy))
        yield (
            f" computed probabilities that are NaN, first in step {first}: its weights or its inputs are not finite. "
            "Go back to a checkpoint from before that step"
        )
        return
    quarter = steps[-max(len(steps) // 4, 1) :]
    late, number = record(quarter), quarter[-1][0] + 1 - quarter[0][0]
    when = "in the last step" if number == 1 else f"in the last {number} steps"
    dead = total.load == 0
    for idle, since in ((dead, "in any step"), ((late.load == 0) & ~dead, when)):
        if idle.any():
            yield f": {int(idle.sum())} of {idle.numel()} experts computed no token {since}: {listed(idle)}"
    if (starved := starved_experts(late) & ~dead).any():
        yield (
            f": {int(starved.sum())} of {starved.numel()} experts were requested less than {STARVED_LOAD:g} times a "
            f"balanced load {when}, a sign of a router that collapses: {listed(starved)}: raise loss_coef, or balance "
            "by an expert bias"
        )
    if total.dropped - total.unavoidable > HIGH_DROPS:
        yield (
            f" dropped {total.dropped:.0%} of its choices; of a balanced load it would have dropped "
            f"{total.unavoidable:.0%}. In a group the most requested expert has {total.imbalance:.1f} times its share: "
            f"raise {'the rate of balance_experts' if has_bias else 'loss_coef'}, the capacity factor or group_size"
        )
    most, mean = late.requested.max(), late.requested.to(torch.float64).mean()
    if most > HIGH_LOAD * mean + 5 * mean.sqrt():  # what chance adds to a few choices is no sign
        yield (
            f": expert {names_of(late.requested == most)[0]} was requested {most / mean:.1f} times a balanced load "
            f"{when}: {MOVE_BIAS if has_bias else 'raise loss_coef, or balance by an expert bias'}"
        )


def starved_experts(late: Record) -> Tensor:
    """Bool of the load's shape: the experts that compute tokens, but far fewer than chance would leave them."""
    mean = late.requested.to(torch.float64).mean()
    few = (late.requested < STARVED_LOAD * mean) & (late.requested < mean - 5 * mean.sqrt())
    return few & (late.load > 0)


def listed(experts: Tensor) -> str:
    """The names of the experts where a bool tensor is True, as a list that ends after `NAMED`."""
    names = names_of(experts)
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def names_of(experts: Tensor) -> list[str]:
    """The names of the experts where a bool tensor of the load's shape is True; "1.3" on a second level."""
    return [".".join(map(str, expert)) for expert in experts.nonzero().tolist()]
