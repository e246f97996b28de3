"""Generates warnings about a gate from its records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mixture_of_experts.stats.record import Record

WARN_DROPPED_ABOVE = 0.1  # warn if the fraction of avoidable drops exceeds this value
# warn if an expert's load in late steps exceeds this multiple of a balanced load
WARN_LOAD_ABOVE = 2.0
BIAS_REMEDY = "update its expert bias with balance_experts, or increase the rate if you already do"
WARN_LOAD_BELOW = 0.1  # warn if the load is below this fraction of a balanced load
MAX_LISTED_EXPERTS = 12  # maximum number of experts listed in a warning

StepRows = tuple[int, Tensor]  # step number, and the rows of the step's forward passes


def diagnose_gate(
    steps: Sequence[StepRows], make_record: Callable[[Sequence[StepRows]], Record], has_bias: bool = False
) -> Iterator[str]:
    """Yield warnings about a gate. Each warning is a phrase that follows the gate's name.

    Args:
        steps: the recorded steps of the gate.
        make_record: a function that combines several steps into one record.
        has_bias: whether the gate is balanced by an expert bias instead of a loss.
    """
    if not steps:
        return
    total = make_record(steps)
    if math.isnan(total.entropy):
        first = next(number for number, rows in steps if math.isnan(make_record([(number, rows)]).entropy))
        yield (
            f" computed NaN probabilities, first in step {first}, because its weights or inputs are not finite. "
            "Return to a checkpoint from before that step"
        )
        return
    late_steps = steps[-max(len(steps) // 4, 1) :]
    late, number = make_record(late_steps), late_steps[-1][0] + 1 - late_steps[0][0]
    when = "in the last step" if number == 1 else f"in the last {number} steps"
    dead = total.load == 0
    for idle, since in ((dead, "in any step"), ((late.load == 0) & ~dead, when)):
        if idle.any():
            yield (
                f": {int(idle.sum())} of {idle.numel()} experts computed no tokens {since}: {format_expert_list(idle)}"
            )
    if (starved := find_starved_experts(late) & ~dead).any():
        yield (
            f": {int(starved.sum())} of {starved.numel()} experts were requested less than {WARN_LOAD_BELOW:g} times a "
            f"balanced load {when}, which indicates router collapse: {format_expert_list(starved)}. Increase "
            "loss_coef, or balance with an expert bias"
        )
    if total.dropped - total.unavoidable > WARN_DROPPED_ABOVE:
        yield (
            f" dropped {total.dropped:.0%} of its choices; with a balanced load it would have dropped "
            f"{total.unavoidable:.0%}. On average, the most requested expert of a group has {total.imbalance:.1f} "
            f"times its share. Increase {'the rate of balance_experts' if has_bias else 'loss_coef'}, the capacity "
            "factor or group_size"
        )
    max_requested, mean = late.requested.max(), late.requested.to(torch.float64).mean()
    # the margin allows for random variation if there are few choices
    if max_requested > WARN_LOAD_ABOVE * mean + 5 * mean.sqrt():
        yield (
            f": expert {format_expert_names(late.requested == max_requested)[0]} was requested "
            f"{max_requested / mean:.1f} times a balanced load "
            f"{when}: {BIAS_REMEDY if has_bias else 'increase loss_coef, or balance with an expert bias'}"
        )


def find_starved_experts(late: Record) -> Tensor:
    """Return a bool mask in the load's shape. It marks experts that compute some tokens, but far fewer than chance can
    explain."""
    mean = late.requested.to(torch.float64).mean()
    few = (late.requested < WARN_LOAD_BELOW * mean) & (late.requested < mean - 5 * mean.sqrt())
    return few & (late.load > 0)


def format_expert_list(experts: Tensor) -> str:
    """Format the experts selected by a bool mask as a list of at most `MAX_LISTED_EXPERTS` names."""
    names = format_expert_names(experts)
    return ", ".join(names[:MAX_LISTED_EXPERTS]) + (
        f" and {len(names) - MAX_LISTED_EXPERTS} more" if len(names) > MAX_LISTED_EXPERTS else ""
    )


def format_expert_names(experts: Tensor) -> list[str]:
    """Return the names of the experts selected by a bool mask, such as "1.3" for outer index 1 and inner index 3."""
    return [".".join(map(str, expert)) for expert in experts.nonzero().tolist()]
