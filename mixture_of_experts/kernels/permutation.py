# type: ignore  (Triton's language, which type checkers take for Python)
"""Kernels that compute the row of each assignment. They use queues or, if there are few assignments, compare all pairs
of assignments.

Axes: a (assignments per call), t (tokens), k (choices), r (rows sorted by expert, without gaps, at most a), e
(experts), b (groups), q (queues, e b in total: one for each expert and group), c (choices of the gate that fills the
queues: all assignments in a single-level layer, or the level-two choices in a two-level layer).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=[
        "num_assignments",
        "num_rows",
        "num_tokens",
        "num_groups",
        "num_queues",
        "num_slots",
        "num_experts",
        "experts_of_router",
    ]
)
def find_rows_kernel(
    expert,  # (c,) int64: expert of each choice
    position,  # (c,) int64: position of each choice in its queue
    chosen,  # (c,) bool: whether each choice is queued
    kept,  # (c,) bool: whether each choice is computed
    slot,  # (a / k2,) int64: level-two token of each level-one choice (s if it has none); None for a single level
    length,  # (q,) int64: number of rows in each queue; choices beyond it have no rows
    stop,  # (q,) int64: end of each queue's rows
    row,  # (a,) int32, output: row of each assignment (r if it has none)
    assignment,  # (r,) int32, output: assignment of each row (a for unused rows at the end)
    token,  # (r,) int32, output: token of each row (t for unused rows at the end)
    counts,  # (e,) int64, output: row count of each expert
    num_assignments,
    num_rows,
    num_tokens,  # tokens per group
    num_groups,
    num_queues,
    num_slots,  # number of tokens that the gate routes (s)
    num_experts,
    experts_of_router,
    OF_GATE: tl.constexpr,  # the gate's choices per token (k2)
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,  # assignments per program
    BLOCK_E: tl.constexpr,
):
    """Compute rows from queues. The rows of each queue follow those of the previous queue.

    Assignments with weight 0 may occupy a slot although their results are not used. The rows of these assignments have
    a token and are computed, but they are never read. In a two-level layer, custom gates may choose experts for slots
    without a token, and may therefore need more than r rows. Rows with index r or higher are omitted.
    """
    number = num_assignments.to(tl.int64)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists, own = index < number, index
    has_place = exists
    if slot is not None:
        its_token = tl.load(slot + index // OF_GATE, mask=exists, other=0)
        own = its_token * OF_GATE + index % OF_GATE
        has_place = exists & (its_token < num_slots)
    group = own // OF_GATE // num_tokens  # group index, counted across all routers
    its = group // num_groups * experts_of_router + tl.load(expert + own, mask=has_place, other=0)
    its_queue = its * num_groups + group % num_groups
    its_length = tl.load(length + its_queue, mask=has_place, other=0)
    place = tl.load(position + own, mask=has_place, other=0)
    holds = tl.load(chosen + own, mask=has_place, other=0).to(tl.int1) & (place < its_length)
    is_kept = tl.load(kept + own, mask=has_place, other=0).to(tl.int1)
    place = tl.minimum(place + tl.load(stop + its_queue, mask=has_place, other=0) - its_length, num_rows)
    holds = holds & (place < num_rows)
    used = tl.load(stop + num_queues - 1)

    if tl.program_id(0) == 0:
        for start in range(0, num_experts, BLOCK_E):
            column = start + tl.arange(0, BLOCK_E)
            there = column < num_experts
            last = tl.load(stop + (column + 1).to(tl.int64) * num_groups - 1, mask=there, other=0)
            before = tl.load(stop + column.to(tl.int64) * num_groups - 1, mask=there & (column > 0), other=0)
            count = tl.minimum(last, num_rows) - tl.minimum(before, num_rows)
            tl.store(counts + column, count, mask=there)

    tl.store(row + index, tl.where(is_kept, place, num_rows).to(tl.int32), mask=exists)
    tl.store(assignment + place, index.to(tl.int32), mask=exists & holds)
    tl.store(token + place, (index // CHOICES).to(tl.int32), mask=exists & holds)
    past, nobodys = (index >= used) & (index < num_rows), tl.zeros((BLOCK,), tl.int32)
    tl.store(assignment + index, nobodys + number.to(tl.int32), mask=past)
    tl.store(token + index, nobodys + (number // CHOICES).to(tl.int32), mask=past)


@triton.jit(do_not_specialize=["num_assignments", "num_experts"])
def rank_rows_kernel(
    expert,  # (a,) int64: expert of each assignment
    kept,  # (a,) bool: whether each assignment is computed
    row,  # this argument and the next three are outputs, as in `find_rows_kernel`
    assignment,
    token,
    counts,
    num_assignments,
    num_experts,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,  # assignments and experts per program
    BLOCK_A: tl.constexpr,
):
    """Compute the rows of a small number of assignments by comparing all pairs of assignments.

    An assignment's row is the number of assignments to lower-numbered experts, plus the number of earlier assignments
    to the same expert. Assignments that are not kept are placed after all experts, so that no two assignments share a
    position.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = index < num_assignments
    is_kept = tl.load(kept + index, mask=exists, other=0).to(tl.int1)
    own = tl.where(is_kept, tl.load(expert + index, mask=exists, other=0).to(tl.int32), num_experts)
    place = tl.zeros((BLOCK,), tl.int32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_assignments, BLOCK_A):
        other = start + tl.arange(0, BLOCK_A)
        there = other < num_assignments
        its = tl.load(expert + other, mask=there, other=0).to(tl.int32)
        its = tl.where(tl.load(kept + other, mask=there, other=0).to(tl.int1), its, num_experts)[None, :]
        before = (its < own[:, None]) | ((its == own[:, None]) & (other[None, :] < index[:, None]))
        place += tl.sum((before & there[None, :]).to(tl.int32), 1)
        count += tl.sum((its == index[:, None]).to(tl.int32), 1)
    tl.store(row + index, tl.where(is_kept, place, num_assignments), mask=exists)
    tl.store(assignment + place, tl.where(is_kept, index, num_assignments), mask=exists)
    tl.store(token + place, tl.where(is_kept, index, num_assignments) // CHOICES, mask=exists)
    tl.store(counts + index, count.to(tl.int64), mask=index < num_experts)
