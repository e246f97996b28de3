"""Experts in chunks: padded rows, their tables, and the memory that every chunk uses again.

Axes: a assignments, r rows (sorted by expert, without gaps), e experts, w rows of an expert in its chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Chunk(NamedTuple):
    """Neighbouring experts computed together, each with as many rows as the fullest of them."""

    start: int  # first expert
    stop: int
    width: int
    row: int  # first row in the padded layout

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + (self.stop - self.start) * self.width)


ENOUGH_BYTES = 4 << 20  # of hidden layer: a larger chunk is slower, its buffers are used less often
MOST_PADDING = 0.05  # of a chunk's rows, or of as many as make ENOUGH_BYTES: more costs more than a smaller chunk


def chunks_of(counts: list[int], row_bytes: int, threads: int) -> list[Chunk]:
    """Experts in chunks that keep all threads busy and waste few rows on padding; those without rows are in none.

    Args:
        counts: rows of each expert.
        row_bytes: bytes of the widest buffer for one row.
        threads: a batched product gives whole experts to each of them, so a chunk has a multiple of that number.
    """
    chunks: list[Chunk] = []
    enough = ENOUGH_BYTES // row_bytes
    row = start = 0
    while start < len(counts):
        if counts[start] == 0:
            start += 1
            continue
        stop, width, used = start + 1, counts[start], counts[start]
        while stop < len(counts) and ((stop - start) % threads or (stop - start) * width < enough):
            wider, more = max(width, counts[stop]), used + counts[stop]
            padding = wider * (stop + 1 - start) - more
            if counts[stop] == 0 or padding > MOST_PADDING * max(more, enough):  # to read unused weights costs most
                stop = max(stop - (stop - start) % threads, start + 1)
                break
            stop, width, used = stop + 1, wider, more
        width = max(counts[start:stop])
        chunks.append(Chunk(start, stop, width, row))
        row += (stop - start) * width
        start = stop
    return chunks


class Layout(NamedTuple):
    """The padded rows of all chunks and their tables; `rows` is also the sentinel of `row`."""

    chunks: list[Chunk]
    rows: int
    row: Tensor  # (a,) padded row of each assignment, `rows` where it has none
    token: Tensor  # (rows,) token of each padded row, 0 where it is empty
    empty: Tensor  # (rows,) bool
    weight: Tensor  # (rows,) weight of each padded row, 0 where it is empty


def lay_out(
    num_tokens: int, weight: Tensor, row: Tensor, assignment: Tensor, token: Tensor, counts: Tensor, hidden_dim: int
) -> Layout:
    """The padded layout of rows without gaps; arguments as in `dispatch.Plan`."""
    numbers = counts.tolist()
    chunks = chunks_of(numbers, hidden_dim * weight.element_size(), torch.get_num_threads())
    device = counts.device  # not whatever `torch.set_default_device` says
    total, rows = sum(numbers), sum((chunk.stop - chunk.start) * chunk.width for chunk in chunks)
    padded = torch.arange(total, device=device)
    if rows != total:
        first = [0] * len(numbers)  # padded row of each expert's first row
        for chunk in chunks:
            first[chunk.start : chunk.stop] = range(chunk.row, chunk.rows.stop, chunk.width)
        shift = torch.tensor(first, device=device) - (counts.cumsum(0) - counts)
        padded = padded + torch.repeat_interleave(shift, counts, output_size=total)

    table = torch.full((assignment.shape[0] + 1,), rows, device=device)
    table[:total] = padded
    filled = token[:total] < num_tokens
    return Layout(
        chunks,
        rows,
        row=table.index_select(0, row),
        token=token.new_zeros(rows).index_copy_(0, padded, torch.where(filled, token[:total], 0)),
        empty=filled.new_ones(rows).index_copy_(0, padded, ~filled),
        weight=weight.new_zeros(rows).index_copy_(
            0, padded, torch.cat([weight, weight.new_zeros(1)]).index_select(0, assignment[:total])
        ),
    )


class Buffers:
    """Memory for one chunk, used again for the next."""

    def __init__(self, like: Tensor, chunks: list[Chunk]) -> None:
        self.like = like
        self.most = max(((chunk.stop - chunk.start) * chunk.width for chunk in chunks), default=0)
        self.held: dict[tuple[str, int], Tensor] = {}

    def get(self, name: str, chunk: Chunk, width: int) -> Tensor:
        """`(experts, w, width)` uninitialised."""
        if (name, width) not in self.held:
            self.held[name, width] = self.like.new_empty(self.most, width)
        count = chunk.stop - chunk.start
        return self.held[name, width][: count * chunk.width].view(count, chunk.width, width)
