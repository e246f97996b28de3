# type: ignore  (a language of its own: type checkers take it for Python)
"""The kernels that say which row belongs to which assignment: from queues, and of a few assignments without.

Axes: a assignments of the call (t tokens, k choices), r rows (by expert, without gaps; at most a), e experts, b groups,
q = e b queues (of every expert one for each group).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_assignments", "num_rows", "num_groups", "num_queues"])
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
    num_rows,
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
    used = tl.load(stop + num_queues - 1)

    if tl.program_id(0) == 0:
        for start in range(0, num_experts, BLOCK_E):
            expert = start + tl.arange(0, BLOCK_E)
            there = expert < num_experts
            last = tl.load(stop + (expert + 1).to(tl.int64) * num_groups - 1, mask=there, other=0)
            before = tl.load(stop + expert.to(tl.int64) * num_groups - 1, mask=there & (expert > 0), other=0)
            tl.store(counts + expert, last - before, mask=there)

    tl.store(row + index, tl.where(is_kept, place, num_rows).to(tl.int32), mask=exists)
    tl.store(assignment + place, index.to(tl.int32), mask=exists & holds)
    tl.store(token + place, (index // CHOICES).to(tl.int32), mask=exists & holds)
    past, nobodys = (index >= used) & (index < num_rows), tl.zeros((BLOCK,), tl.int32)
    tl.store(assignment + index, nobodys + number.to(tl.int32), mask=past)
    tl.store(token + index, nobodys + (number // CHOICES).to(tl.int32), mask=past)


@triton.jit(do_not_specialize=["num_assignments"])
def rank_rows(
    expert,  # (a,) int64: the expert of each assignment
    kept,  # (a,) bool: those that are computed
    row,  # (a,), and the others: out, as those of `find_rows`
    assignment,
    token,
    counts,
    num_assignments,
    num_experts,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,  # assignments of a program, and experts
    BLOCK_A: tl.constexpr,
):
    """Every assignment counts those that stand before it: of experts before its own, and earlier ones of its own.

    Those that are not kept stand behind all experts: so each has a place, and none is anybody else's.
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
