# type: ignore  (a language of its own: type checkers take it for Python)
"""The kernel that says which row belongs to which choice.

Axes: b groups, a assignments of a group (n tokens, k choices), r = b a rows (by expert, without gaps), e experts.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_groups", "group_length"])
def find_rows(
    expert,  # (b, a) int64
    slot,  # (b, a) int64: place in the queue of its expert and group
    chosen,  # (b, a) bool: those that queue
    kept,  # (b, a) bool: those that are computed
    size,  # (b, e) int64: the rows of each group and expert; a slot from there on is none
    row,  # (b a,) int32: out, of each assignment; r where it has none
    assignment,  # (r,) int32: out, of each row; b a past the last expert's
    token,  # (r,) int32: out, of each row; b n past the last expert's
    counts,  # (e,) int64: out, the rows of each expert
    num_groups,
    group_length,
    num_experts,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,  # assignments of a program
    BLOCK_E: tl.constexpr,
):
    """A row stands behind those of the experts before its own, and of its expert's in the groups before its own.

    An assignment that holds a slot and is not computed (its weight is 0) leaves its row to be computed and not read:
    every row up to the last expert's has a token.
    """
    number = num_groups.to(tl.int64) * group_length
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = index < number
    group = index // group_length
    its_expert = tl.load(expert + index, mask=exists, other=0)
    place = tl.load(slot + index, mask=exists, other=0)
    its_size = tl.load(size + group * num_experts + its_expert, mask=exists, other=0)
    holds = tl.load(chosen + index, mask=exists, other=0).to(tl.int1) & (place < its_size)
    is_kept = tl.load(kept + index, mask=exists, other=0).to(tl.int1)

    of_expert = its_expert.to(tl.int32)[:, None]
    num_rows = 0  # there are fewer than 2^31, as everywhere in the kernels
    for start in range(0, num_experts, BLOCK_E):
        other = start + tl.arange(0, BLOCK_E)
        count = tl.zeros((BLOCK_E,), tl.int32)
        of_group = size + other
        for _ in range(num_groups):
            count += tl.load(of_group, mask=other < num_experts, other=0).to(tl.int32)
            of_group += num_experts
        if tl.program_id(0) == 0:
            tl.store(counts + other, count, mask=other < num_experts)
        place += tl.sum(tl.where(other[None, :] < of_expert, count[None, :], 0), 1)
        num_rows += tl.sum(count, 0)
    of_group = size + its_expert
    for earlier in range(num_groups - 1):
        place += tl.load(of_group, mask=exists & (earlier < group), other=0)
        of_group += num_experts

    tl.store(row + index, tl.where(is_kept, place, number).to(tl.int32), mask=exists)
    tl.store(assignment + place, index.to(tl.int32), mask=exists & holds)
    tl.store(token + place, (index // CHOICES).to(tl.int32), mask=exists & holds)
    past, nobodys = exists & (index >= num_rows), tl.zeros((BLOCK,), tl.int32)
    tl.store(assignment + index, nobodys + number.to(tl.int32), mask=past)
    tl.store(token + index, nobodys + (number // CHOICES).to(tl.int32), mask=past)
