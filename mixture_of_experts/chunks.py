"""Experts in chunks: padded rows, their tables, and the memory that every chunk uses again.

Axes: a assignments, r rows: sorted by expert, without gaps, or padded and in the order of the batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from mixture_of_experts.batches import Batch, Rows, batches_of, matrices_of, rows_of, split


class Chunk(NamedTuple):
    """Experts that use the same buffers, in batches."""

    batches: list[Batch]

    @property
    def num_rows(self) -> int:
        return sum(batch.num_rows for batch in self.batches)


class Setting(NamedTuple):
    """What a layout depends on that is not a tensor: noted in the forward, so that the backward's is the same."""

    num_tokens: int
    dim_bytes: int  # of the model dimension for one row
    hidden_bytes: int  # of the hidden layer for one row
    threads: int
    steps: bool  # whether products take slices of the weights with a step
    training: bool  # of the module: a recomputation, and its forward without gradients, must go the same way


# n chunks with B bytes of rows, d and h wide, cost n times a cold start (a product leaves the caches to its weights,
# and what comes next, Python too, has to come back: 0.1 ms or more each), and B / n times fresh memory for a chunk's
# buffers. The sum is least at n = sqrt(B / BALANCE), and at about four times that where a chunk is several batches,
# as another chunk is then no other product.
BALANCE = 5 << 19


def chunks_of(counts: list[int], setting: Setting) -> list[Chunk]:
    """Experts in chunks; those without rows are in none."""
    number = max(1, round(math.sqrt(sum(counts) * (setting.dim_bytes + setting.hidden_bytes) / BALANCE)))
    enough = sum(counts) / number
    chunks: list[Chunk] = []
    for batch in batches_of(counts, setting.hidden_bytes, setting.threads, enough, setting.steps, setting.training):
        if not chunks or chunks[-1].num_rows >= enough / 4:
            chunks.append(Chunk([]))
        chunks[-1].batches.append(batch)
    return chunks


class Tables(NamedTuple):
    """Where a chunk's rows come from; see `Layout`."""

    token: Tensor  # (r,)
    empty: Tensor | None  # (r, 1) bool


class Layout(NamedTuple):
    """The padded rows of all chunks and their tables; `rows` is also the sentinel of `row`."""

    chunks: list[Chunk]
    rows: int
    row: Tensor  # (a,) row of each assignment, `rows` where it has none
    token: Tensor  # (rows,) token of each row; padding repeats its expert's first, so that it concerns no other expert
    weight: Tensor  # (rows,) weight of each row, 0 where it is padding or no assignment's
    empty: Tensor | None  # (rows,) bool: rows of no assignment, and then padding too; None if there are no such rows

    def split(self, table: Tensor) -> Sequence[Tensor]:
        """Each chunk's part of a table `(rows, ...)`."""
        return split(table, [chunk.num_rows for chunk in self.chunks])

    def tables(self) -> list[Tables]:
        """Each chunk's."""
        empty = [None] * len(self.chunks) if self.empty is None else self.split(self.empty.unsqueeze(-1))
        return [Tables(*parts) for parts in zip(self.split(self.token), empty, strict=True)]

    def parts(self, rows: Tensor) -> list[Rows]:
        """Each chunk's part of `(rows, d)`."""
        return [rows_of(chunk.batches, part) for chunk, part in zip(self.chunks, self.split(rows), strict=True)]

    def buffer(self, like: Tensor, width: int) -> list[Rows]:
        """Each chunk's rows `(r, width)`, uninitialised, in memory that all of them use one after the other."""
        sizes = [chunk.num_rows for chunk in self.chunks]
        rows = like.new_empty(max(sizes, default=0), width)
        return [rows_of(chunk.batches, rows[:size]) for chunk, size in zip(self.chunks, sizes, strict=True)]

    def matrices(self, weight: Tensor) -> list[list[Tensor]]:
        """Each chunk's part of a stack `(e, p, q)`."""
        return [matrices_of(chunk.batches, weight) for chunk in self.chunks]


def lay_out(setting: Setting, weight: Tensor, row: Tensor, assignment: Tensor, token: Tensor, counts: Tensor) -> Layout:
    """The padded layout of rows without gaps; the tensors as in `dispatch.Plan`."""
    numbers = counts.tolist()
    total, chunks = sum(numbers), chunks_of(numbers, setting)
    weight = torch.cat([weight, weight.new_zeros(1)]).index_select(0, assignment[:total])
    token, filled = token[:total], token[:total] < setting.num_tokens
    full = bool(filled.all())
    token = token if full else torch.where(filled, token, 0)

    # experts in the order of the layout, their widths, and their first rows without padding and with it
    batches = [batch for chunk in chunks for batch in chunk.batches]
    order = [expert for batch in batches for expert in range(*batch.experts.indices(len(numbers)))]
    widths = [batch.width for batch in batches for _ in range(batch.number)]
    dense, padded = list(accumulate(numbers, initial=0)), list(accumulate(widths, initial=0))
    rows = padded.pop()
    starts = [dense[expert] for expert in order]
    if rows == total and starts == padded:
        return Layout(chunks, rows, row.clamp(max=rows), token, weight, None if full else ~filled)

    device = counts.device  # not whatever `torch.set_default_device` says
    to = dict(zip(order, padded, strict=True))
    shifts = torch.tensor([to.get(expert, 0) - start for expert, start in enumerate(dense[:-1])], device=device)
    start, size = torch.tensor([starts, widths], device=device)
    place = torch.arange(total, device=device) + torch.repeat_interleave(shifts, counts, output_size=total)
    table = torch.full((assignment.shape[0] + 1,), rows, device=device)
    table[:total] = place
    first = token.index_select(0, start)
    return Layout(
        chunks,
        rows,
        row=table.index_select(0, row),
        token=torch.repeat_interleave(first, size, output_size=rows).index_copy_(0, place, token),
        weight=weight.new_zeros(rows).index_copy_(0, place, weight),
        empty=None if full else filled.new_ones(rows).index_copy_(0, place, ~filled),
    )
