"""The plan of a call by one kernel, where it is of one level of token choice.

Axes: b groups, a assignments of a group (n tokens, k choices), e experts.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mixture_of_experts.dispatch import Decision, Plan, num_slots_held
from mixture_of_experts.ops.triton import operators, tables
from mixture_of_experts.routing import Routing

BLOCK = 128  # assignments of a program


def plan_of(decision: Decision) -> Plan:
    """Rows without gaps; as `decision.plan(ragged=True)`, but that a row may be nobody's and yet have a token."""
    if len(decision.levels) == 1 and decision.levels[0].choices is not None:
        return _plan(decision.levels[0])
    return decision.plan(ragged=True)


def _plan(routing: Routing) -> Plan:
    k, (b, a) = routing.choices, routing.expert.shape
    assert k is not None
    size = num_slots_held(routing)
    row, assignment, token, counts = triton_plan(routing.expert, routing.slot, routing.chosen, routing.kept, size, k)
    weight = routing.weight.flatten()
    return Plan(row, assignment, weight, token, counts, k, b * routing.num_tokens, b * a, (routing.num_experts,))


@torch.library.custom_op("mixture_of_experts::triton_plan", mutates_args=())
def triton_plan(
    expert: Tensor, slot: Tensor, chosen: Tensor, kept: Tensor, size: Tensor, choices: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`row` `(b a,)`, `assignment` and `token` of each row, in int32, and `counts` `(e,)`, as a `Plan` has them.

    Args:
        expert, slot: `(b, a)` int64, of each assignment.
        chosen, kept: `(b, a)` bool, those that hold a place in the queue, and those of them that are computed.
        size: `(b, e)` int64, the rows of each group and expert.
        choices: k.
    """
    (groups, length), experts = expert.shape, size.shape[-1]
    operators.on_one_device(expert, slot, chosen, kept, size)
    operators.check_number(groups * length)
    expert, slot, chosen, kept, size = (tensor.contiguous() for tensor in (expert, slot, chosen, kept, size))
    row, assignment, token = tables_of(expert)
    counts = size.new_empty(experts)
    if groups * length == 0:
        return row, assignment, token, counts.zero_()
    operators.launch(
        tables.find_rows,
        (triton.cdiv(groups * length, BLOCK),),
        expert=expert,
        slot=slot,
        chosen=chosen,
        kept=kept,
        size=size,
        row=row,
        assignment=assignment,
        token=token,
        counts=counts,
        num_groups=groups,
        group_length=length,
        num_experts=experts,
        CHOICES=choices,
        BLOCK=BLOCK,
        BLOCK_E=32,
        num_warps=4,
    )
    return row, assignment, token, counts


@triton_plan.register_fake
def _(expert, slot, chosen, kept, size, choices):
    operators.on_one_device(expert, slot, chosen, kept, size)
    return *tables_of(expert), size.new_empty(size.shape[-1])


def tables_of(expert: Tensor) -> list[Tensor]:
    """Where `row`, `assignment` and `token` are written."""
    return [expert.new_empty(expert.numel(), dtype=torch.int32) for _ in range(3)]
