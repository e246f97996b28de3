"""The plan of a call by one kernel, where it is of token choice and of one level, or has few assignments.

Axes: a assignments of the call (t tokens, k choices), e experts, b groups.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from mixture_of_experts.decision import Decision
from mixture_of_experts.ops.triton import operators, tables
from mixture_of_experts.plan import Plan
from mixture_of_experts.private_torch import statically_known_true
from mixture_of_experts.tracing import smallest

BLOCK = 128  # assignments of a program
FEW = 2048  # assignments that are compared with each other


def plan_of(decision: Decision, few: int = FEW) -> Plan:
    """Rows without gaps; as `decision.without_gaps()`, but that a row may be nobody's and yet have a token, and that
    there are no more rows than slots.

    Up to `few` assignments need no queues: each counts those before it.
    """
    k, e, number = decision.k, math.prod(decision.num_experts), decision.weight.shape[0]
    if k is not None and statically_known_true(number <= few) and statically_known_true(number == decision.most_rows):
        made, rows = triton_few_plan(decision.expert, decision.kept, e, k), number
    elif k is None or len(decision.num_experts) > 1:
        return decision.without_gaps()
    else:
        queue, queues = decision.queues()
        rows = number if decision.slots is None else smallest(number, decision.num_slots)
        made = triton_plan(queue, queues.position, decision.chosen, decision.kept, queues.length, e, k, rows)
    row, assignment, token, rows_per_expert = made
    sizes = (k, decision.num_tokens, rows, decision.num_experts)
    return Plan(row, assignment, decision.weight, token, rows_per_expert, *sizes)


@torch.library.custom_op("mixture_of_experts::triton_few_plan", mutates_args=())
def triton_few_plan(expert: Tensor, kept: Tensor, num_experts: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tables of `triton_plan` for few assignments, from their experts `(a,)` int64 and what is kept `(a,)` bool.

    It takes time of a squared. Only kept assignments have a row.
    """
    operators.on_one_device(expert, kept)
    expert, kept = expert.contiguous(), kept.contiguous()
    row, assignment, token = tables_of(expert, expert.shape[0])
    counts = expert.new_empty(num_experts)
    operators.launch(
        tables.rank_rows,
        (triton.cdiv(max(expert.shape[0], num_experts), 32),),
        expert=expert,
        kept=kept,
        row=row,
        assignment=assignment,
        token=token,
        counts=counts,
        num_assignments=expert.shape[0],
        num_experts=num_experts,
        CHOICES=k,
        BLOCK=32,
        BLOCK_A=64,
        num_warps=4,
    )
    return row, assignment, token, counts


@triton_few_plan.register_fake
def _(expert, kept, num_experts, k):
    operators.on_one_device(expert, kept)
    return *tables_of(expert, expert.shape[0]), expert.new_empty(num_experts)


@torch.library.custom_op("mixture_of_experts::triton_plan", mutates_args=())
def triton_plan(
    queue: Tensor,
    position: Tensor,
    chosen: Tensor,
    kept: Tensor,
    length: Tensor,
    num_experts: int,
    k: int,
    num_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`row` `(a,)`, `assignment` and `token` of each row, in int32, and the rows of each expert `(e,)`, as in a `Plan`.

    Args:
        queue, position: `(a,)` int64, the queue of each assignment, and its position in it.
        chosen, kept: `(a,)` bool, those that hold a place in the queue, and those of them that are computed.
        length: `(e b,)` int64, the rows of each queue.
        num_experts, k, num_rows: e, the choices of a token, and r, at least the sum of `length` and at most a.
    """
    number, queues = queue.shape[0], length.shape[0]
    operators.on_one_device(queue, position, chosen, kept, length)
    operators.check_number(number)
    queue, position, chosen, kept, length = (tensor.contiguous() for tensor in (queue, position, chosen, kept, length))
    row, assignment, token = tables_of(queue, num_rows)
    counts = length.new_empty(num_experts)
    if number == 0:
        return row, assignment, token, counts.zero_()
    operators.launch(
        tables.find_rows,
        (triton.cdiv(number, BLOCK),),
        queue=queue,
        position=position,
        chosen=chosen,
        kept=kept,
        length=length,
        stop=length.cumsum(0),
        row=row,
        assignment=assignment,
        token=token,
        counts=counts,
        num_assignments=number,
        num_rows=num_rows,
        num_groups=queues // num_experts,
        num_queues=queues,
        num_experts=num_experts,
        CHOICES=k,
        BLOCK=BLOCK,
        BLOCK_E=32,
        num_warps=4,
    )
    return row, assignment, token, counts


@triton_plan.register_fake
def _(queue, position, chosen, kept, length, num_experts, k, num_rows):
    operators.on_one_device(queue, position, chosen, kept, length)
    return *tables_of(queue, num_rows), length.new_empty(num_experts)


def tables_of(queue: Tensor, num_rows: int) -> list[Tensor]:
    """Where `row`, `assignment` and `token` are written."""
    return [queue.new_empty(size, dtype=torch.int32) for size in (queue.shape[0], num_rows, num_rows)]
