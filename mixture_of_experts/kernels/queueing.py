# type: ignore  (Triton's language, which type checkers take for Python)
"""Kernels that queue assignments for their experts, and the torch operator that launches them.

Axes: r (groups of all routers), n (tokens per group), k (choices per token), a (assignments per group, n k), e
(experts).

Each group's assignments form a line, in queueing order. The line is split into blocks, one per program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixture_of_experts.kernels.launching import launch_kernel, make_contiguous

QUEUE_BLOCK = 64  # assignments per program


@triton.jit
def load_queue_block(
    expert,  # (r, a) int64: expert of each assignment, ordered by token
    chosen,  # (r, a) bool: whether each assignment is queued; None if all are
    order,  # (r, n) int64: tokens in queueing order; None for their original order
    length,
    num_experts,
    num_blocks,
    CHOICES: tl.constexpr,
    BY_CHOICE: tl.constexpr,  # whether all first choices precede all second choices
    BLOCK: tl.constexpr,
):
    """Return a program's row and block, followed by three values for each assignment in the block: its location,
    whether it exists, and its expert, which is e if the assignment is not queued."""
    row, block = (tl.program_id(0) // num_blocks).to(tl.int64), tl.program_id(0) % num_blocks
    index = block * BLOCK + tl.arange(0, BLOCK)
    exists = index < length * CHOICES
    stored = index
    if BY_CHOICE:
        token = index % length
        if order is not None:
            token = tl.load(order + row * length + token, mask=exists, other=0).to(tl.int32)
        stored = token * CHOICES + index // length
    stored = row * length * CHOICES + stored
    queues = exists
    if chosen is not None:
        queues = queues & tl.load(chosen + stored, mask=exists, other=0).to(tl.int1)
    its = tl.load(expert + stored, mask=queues, other=0).to(tl.int32)
    return row, block, stored, exists, tl.where(queues, its, num_experts)


@triton.jit(do_not_specialize=["length", "num_experts", "num_blocks"])
def count_queue_kernel(
    expert,
    chosen,
    order,
    counts,  # (r, e, blocks) int32, output: number of each expert's assignments in each block
    length,
    num_experts,
    num_blocks,
    CHOICES: tl.constexpr,
    BY_CHOICE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Count each expert's assignments in a block of the line."""
    row, block, _, _, its = load_queue_block(
        expert, chosen, order, length, num_experts, num_blocks, CHOICES, BY_CHOICE, BLOCK
    )
    for start in range(0, num_experts, BLOCK_E):
        column = start + tl.arange(0, BLOCK_E)
        count = tl.sum((its[:, None] == column[None, :]).to(tl.int32), 0)
        tl.store(counts + (row * num_experts + column) * num_blocks + block, count, mask=column < num_experts)


@triton.jit(do_not_specialize=["length", "num_experts", "num_blocks"])
def rank_queue_kernel(
    expert,
    chosen,
    order,
    total,  # (r, e, blocks) int64: number of each expert's assignments up to the end of each block
    position,  # (r, a) int64, output: position of each assignment in its queue
    queued,  # (r, e) int64, output: length of each queue
    length,
    num_experts,
    num_blocks,
    CHOICES: tl.constexpr,
    BY_CHOICE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Write the position of each assignment in a block. The program of the last block also writes the queue lengths."""
    row, block, stored, exists, its = load_queue_block(
        expert, chosen, order, length, num_experts, num_blocks, CHOICES, BY_CHOICE, BLOCK
    )
    place = tl.arange(0, BLOCK)
    before = (its[None, :] == its[:, None]) & (place[None, :] < place[:, None])
    earlier = tl.where(block > 0, its, num_experts)  # the first block has no earlier block to load from
    first = tl.load(total + (row * num_experts + its) * num_blocks + block - 1, mask=earlier < num_experts, other=0)
    tl.store(position + stored, first + tl.sum(before.to(tl.int32), 1), mask=exists)
    if block == num_blocks - 1:
        for start in range(0, num_experts, BLOCK_E):
            column = row * num_experts + start + tl.arange(0, BLOCK_E)
            there = start + tl.arange(0, BLOCK_E) < num_experts
            tl.store(queued + column, tl.load(total + column * num_blocks + block, mask=there, other=0), mask=there)


@torch.library.custom_op("mixture_of_experts::queue_in_line", mutates_args=())
def queue_assignments(
    expert: Tensor, chosen: Tensor | None, order: Tensor | None, num_experts: int, k: int, by_choice: bool
) -> tuple[Tensor, Tensor]:
    """Return positions `(r, a)` and queue lengths `(r, e)`, both int64.

    Args:
        expert: `(r, a)` int64, not empty.
        chosen: `(r, a)` bool; None if all assignments are queued.
        order: `(r, n)` int64, tokens in queueing order; None for their original order.
        num_experts, k: number of experts, and number of choices per token.
        by_choice: whether all first choices precede all second choices. Otherwise, all choices of a token precede those
            of the next token.
    """
    position, queued = allocate_queues(expert, num_experts)
    counts = queued.new_empty(*queued.shape, triton.cdiv(expert.shape[1], QUEUE_BLOCK), dtype=torch.int32)
    given = dict(
        **make_contiguous(expert=expert, chosen=chosen, order=order),
        length=expert.shape[1] // k,
        num_experts=num_experts,
        num_blocks=counts.shape[-1],
        CHOICES=k,
        BY_CHOICE=by_choice,
        BLOCK=QUEUE_BLOCK,
        BLOCK_E=32,
    )
    grid = (expert.shape[0] * counts.shape[-1],)
    launch_kernel(count_queue_kernel, grid, counts=counts, **given)
    launch_kernel(rank_queue_kernel, grid, total=counts.cumsum(dim=-1), position=position, queued=queued, **given)
    return position, queued


@queue_assignments.register_fake
def _(expert, chosen, order, num_experts, k, by_choice):
    return allocate_queues(expert, num_experts)


def allocate_queues(expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Allocate contiguous tensors for positions `(r, a)` and queue lengths `(r, e)`."""
    return expert.new_empty(expert.shape), expert.new_empty(expert.shape[0], num_experts)
