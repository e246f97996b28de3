# type: ignore  (a language of its own: type checkers take it for Python)
"""The kernel that says which row belongs to which assignment.

Axes: a assignments of the call (t tokens, k choices), r = a rows (by expert, without gaps), e experts, b groups,
q = e b queues (of every expert one for each group).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_assignments", "num_groups", "num_queues"])
def find_rows(
    queue,  # (a,) int64: the queue of each assignment
    position,  # (a,) int64: its position in it
    chosen,  # (a,) bool: the assignments that queue
    kept,  # (a,) bool: those that are computed
    length,  # (q,) int64: the rows of each queue; a position from there on has none
    stop,  # (q,) int64: the row behind each queue's last
    row,  # (a,) int32: out, of each assignment; r where it has none
    assignment,  # (r,) int32: out, of each row; a past the last expert's
    token,  # (r,) int32: out, of each row; t past the last expert's
    counts,  # (e,) int64: out, the rows of each expert
    num_assignments,
    num_groups,
    num_queues,
    num_experts,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,  # assignments of a program
    BLOCK_E: tl.constexpr,
):
    """A row stands behind those of the queues before its own.

    An assignment that holds a slot and is not computed (its weight is 0) leaves its row to be computed and not read:
    every row up to the last expert's has a token.
    """
    number = num_assignments.to(tl.int64)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = index < number
    its_queue = tl.load(queue + index, mask=exists, other=0)
    its_length = tl.load(length + its_queue, mask=exists, other=0)
    place = tl.load(position + index, mask=exists, other=0)
    holds = tl.load(chosen + index, mask=exists, other=0).to(tl.int1) & (place < its_length)
    is_kept = tl.load(kept + index, mask=exists, other=0).to(tl.int1)
    place += tl.load(stop + its_queue, mask=exists, other=0) - its_length
    num_rows = tl.load(stop + num_queues - 1)

    if tl.program_id(0) == 0:
        for start in range(0, num_experts, BLOCK_E):
            expert = start + tl.arange(0, BLOCK_E)
            there = expert < num_experts
            last = tl.load(stop + (expert + 1).to(tl.int64) * num_groups - 1, mask=there, other=0)
            before = tl.load(stop + expert.to(tl.int64) * num_groups - 1, mask=there & (expert > 0), other=0)
            tl.store(counts + expert, last - before, mask=there)

    tl.store(row + index, tl.where(is_kept, place, number).to(tl.int32), mask=exists)
    tl.store(assignment + place, index.to(tl.int32), mask=exists & holds)
    tl.store(token + place, (index // CHOICES).to(tl.int32), mask=exists & holds)
    past, nobodys = exists & (index >= num_rows), tl.zeros((BLOCK,), tl.int32)
    tl.store(assignment + index, nobodys + number.to(tl.int32), mask=past)
    tl.store(token + index, nobodys + (number // CHOICES).to(tl.int32), mask=past)
