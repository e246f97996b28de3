"""Computes the permutation for token choice in a single kernel.

Axes: a (assignments per call), t (tokens), k (choices), r (rows), e (experts), b (groups).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mixture_of_experts.dispatch.assignments import Assignments, count_queue_rows
from mixture_of_experts.dispatch.permutation import Permutation
from mixture_of_experts.kernels import permutation as kernels
from mixture_of_experts.kernels.launching import make_contiguous
from mixture_of_experts.ops.triton import operators
from mixture_of_experts.ops.triton.schedule import MAX_COMPARED_ASSIGNMENTS, count_permuted_rows, uses_comparison

ROW_TABLE_BLOCK = 128  # assignments per program


class RowTables(NamedTuple):
    """The outputs of the kernels. Each field has the same name as the corresponding kernel argument.

    Attributes:
        row: `(a,)` int32, row of each assignment.
        assignment, token: `(r,)` int32, assignment and token of each row.
        counts: `(e,)` int64, row count of each expert.
    """

    row: Tensor
    assignment: Tensor
    token: Tensor
    counts: Tensor


def permute_by_kernel(assignments: Assignments, max_compared: int = MAX_COMPARED_ASSIGNMENTS) -> Permutation:
    """Return a permutation that arranges tokens in rows without gaps. It differs from
    `permute_without_gaps(assignments)` in two ways.

    First, an assignment with weight 0 that occupies a slot has a row with a token, although this row is never read.
    Second, there are at most as many rows as slots. Up to `max_compared` assignments are ranked without queues, by
    comparing all pairs of assignments.
    """
    k, e, rows = assignments.k, math.prod(assignments.expert_dims), count_permuted_rows(assignments, max_compared)
    assert k is not None
    if uses_comparison(assignments, max_compared):
        made = triton_permute_few(assignments.expert, assignments.kept, e, k)
    else:
        made = triton_permute(*queued_choices(assignments), e, k, rows)
    row, assignment, token, rows_per_expert = made
    sizes = (k, assignments.num_tokens, rows, assignments.expert_dims)
    return Permutation(row, assignment, assignments.weight, token, rows_per_expert, *sizes)


def queued_choices(
    assignments: Assignments,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, int, int, int]:
    """Return the kernel's inputs. In a two-level layer, the choices are the level-two choices.

    The first four inputs have one element per choice: its expert, its position, whether it is queued, and whether it
    is kept. They are followed by each queue's row count `(e b,)`, `Assignments.slot_of_outer_choice`, and
    the numbers of tokens per group, choices per token and experts per router.
    """
    routing, k = assignments.routing, assignments.k
    assert k is not None
    if routing is None:  # all tokens form one group
        queue, position, length = assignments.locate()
        sizes = (assignments.num_tokens, k, math.prod(assignments.expert_dims))
        return queue, position, assignments.kept, assignments.kept, length, None, *sizes
    assert routing.k is not None
    flat = (values.flatten() for values in (routing.expert, routing.position, routing.sent, routing.kept))
    sizes = (routing.num_tokens, routing.k, routing.num_experts)
    return *flat, count_queue_rows(routing), assignments.slot_of_outer_choice, *sizes  # type: ignore[return-value]


@torch.library.custom_op("mixture_of_experts::triton_permute_few", mutates_args=())
def triton_permute_few(expert: Tensor, kept: Tensor, num_experts: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the `RowTables` for a small number of assignments, given `expert` `(a,)` int64 and `kept` `(a,)` bool.

    The run time is quadratic in a. Only kept assignments have rows.
    """
    number = expert.shape[0]
    tables = allocate_tables(number, number, num_experts, expert, kept)
    operators.launch_kernel(
        kernels.rank_rows_kernel,
        (triton.cdiv(max(number, num_experts), 32),),
        **make_contiguous(expert=expert, kept=kept),
        **tables._asdict(),
        num_assignments=number,
        num_experts=num_experts,
        CHOICES=k,
        BLOCK=32,
        BLOCK_A=64,
    )
    return tables


@triton_permute_few.register_fake
def _(expert, kept, num_experts, k):
    return allocate_tables(expert.shape[0], expert.shape[0], num_experts, expert, kept)


@torch.library.custom_op("mixture_of_experts::triton_permute", mutates_args=())
def triton_permute(
    expert: Tensor,
    position: Tensor,
    chosen: Tensor,
    kept: Tensor,
    length: Tensor,
    slot: Tensor | None,
    tokens_of_group: int,
    choices_of_gate: int,
    experts_of_router: int,
    num_experts: int,
    k: int,
    num_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the `RowTables` for an arbitrary number of assignments.

    Args:
        expert, ..., experts_of_router: outputs of `queued_choices`.
        num_experts: e.
        k: number of choices per token.
        num_rows: number of rows r, which is at least the sum of `length` and at most a.
    """
    number = count_assignments(expert, slot, choices_of_gate)
    operators.check_row_count(number)
    tables = allocate_tables(number, num_rows, num_experts, expert, position, chosen, kept, length, slot)
    # custom gates may choose experts for slots without a token; the rows of these slots are unused
    if slot is not None:
        tables.assignment.fill_(number)
        tables.token.fill_(number // k)
    if number == 0:
        tables.counts.zero_()
        return tables
    operators.launch_kernel(
        kernels.find_rows_kernel,
        (triton.cdiv(number, ROW_TABLE_BLOCK),),
        **make_contiguous(expert=expert, position=position, chosen=chosen, kept=kept, length=length, slot=slot),
        stop=length.cumsum(0),
        **tables._asdict(),
        num_assignments=number,
        num_rows=num_rows,
        num_tokens=tokens_of_group,
        num_groups=length.shape[0] // num_experts,
        num_queues=length.shape[0],
        num_slots=expert.shape[0] // choices_of_gate,
        num_experts=num_experts,
        experts_of_router=experts_of_router,
        OF_GATE=choices_of_gate,
        CHOICES=k,
        BLOCK=ROW_TABLE_BLOCK,
        BLOCK_E=32,
    )
    return tables


@triton_permute.register_fake
def _(expert, position, chosen, kept, length, slot, tokens_of_group, choices_of_gate, experts_of_router, e, k, rows):
    number = count_assignments(expert, slot, choices_of_gate)
    return allocate_tables(number, rows, e, expert, position, chosen, kept, length, slot)


def count_assignments(expert: Tensor, slot: Tensor | None, choices_of_gate: int) -> int:
    """Return the number of assignments a. In a two-level layer, each level-one choice has `choices_of_gate`
    assignments."""
    return expert.shape[0] if slot is None else slot.shape[0] * choices_of_gate


def allocate_tables(number: int, num_rows: int, num_experts: int, expert: Tensor, *others: Tensor | None) -> RowTables:
    """Allocate the tables on the device of the other tensors."""
    operators.check_same_device(expert, *others)
    row, assignment, token = (expert.new_empty(size, dtype=torch.int32) for size in (number, num_rows, num_rows))
    return RowTables(row, assignment, token, expert.new_empty(num_experts))
