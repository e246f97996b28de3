"""Experts in chunks: their rows, with padding or without, and the memory that every chunk uses again.

Axes: a assignments, r rows (sorted by expert, without gaps), e experts, d model dim, h hidden dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixture_of_experts.products import all_by_onednn


class Chunk(NamedTuple):
    """Neighbouring experts computed together."""

    start: int  # first expert
    stop: int
    row: int  # first row in the layout
    sizes: list[int]  # rows of each expert, padding included

    @property
    def experts(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + sum(self.sizes))


ENOUGH_BYTES = 4 << 20  # of hidden layer: a larger chunk is slower, its buffers are used less often
ENOUGH_ALONE = 1 << 20  # the same where no product waits for others
MOST_PADDING = 0.05  # of a chunk's rows, or of as many as make ENOUGH_BYTES: more costs more than a smaller chunk


def exact_chunks(counts: list[int], row_bytes: int) -> list[Chunk]:
    """Experts in chunks for products one by one: no padding. Those without rows are in none."""
    chunks: list[Chunk] = []
    row, sizes = 0, []
    for expert, count in enumerate([*counts, 0]):
        if sizes and (count == 0 or sum(sizes) * row_bytes >= ENOUGH_ALONE):
            chunks.append(Chunk(expert - len(sizes), expert, row, sizes))
            row, sizes = row + sum(sizes), []
        if count:
            sizes = [*sizes, count]
    return chunks


def padded_chunks(counts: list[int], row_bytes: int, threads: int) -> list[Chunk]:
    """Experts in chunks for batched products, each expert with as many rows as the fullest of its chunk.

    They keep all threads busy and waste few rows on padding. Experts without rows are in none.

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
        sizes = [max(counts[start:stop])] * (stop - start)
        chunks.append(Chunk(start, stop, row, sizes))
        row += sum(sizes)
        start = stop
    return chunks


class Layout(NamedTuple):
    """The rows of all chunks and their tables; `rows` is also the sentinel of `row`."""

    chunks: list[Chunk]
    rows: int
    row: Tensor  # (a,) row of each assignment, `rows` where it has none
    token: Tensor  # (rows,) token of each row, 0 where it is empty
    empty: Tensor | None  # (rows,) bool; None if no row is
    weight: Tensor  # (rows,) weight of each row, 0 where it is empty


def lay_out(
    num_tokens: int, weight: Tensor, row: Tensor, assignment: Tensor, token: Tensor, counts: Tensor, last: Tensor
) -> Layout:
    """The layout of rows without gaps for experts with the weights `last` `(e, h, d)`; others as in `dispatch.Plan`."""
    numbers = counts.tolist()
    total, hidden_dim = sum(numbers), last.shape[1]
    row_bytes = hidden_dim * last.element_size()
    if all_by_onednn(last.dtype, total / max(1, len(numbers) - numbers.count(0)), *last.shape[1:]):
        chunks = exact_chunks(numbers, row_bytes)
    else:
        chunks = padded_chunks(numbers, row_bytes, torch.get_num_threads())
    token, filled = token[:total], token[:total] < num_tokens
    full = bool(filled.all())
    token = token if full else torch.where(filled, token, 0)
    weight = torch.cat([weight, weight.new_zeros(1)]).index_select(0, assignment[:total])
    rows = sum(sum(chunk.sizes) for chunk in chunks)
    if rows == total:
        return Layout(chunks, rows, row.clamp(max=rows), token, None if full else ~filled, weight)

    first = [0] * len(numbers)  # row of each expert's first in the layout
    for chunk in chunks:
        first[chunk.experts] = range(chunk.row, chunk.rows.stop, chunk.sizes[0])
    device = counts.device  # not whatever `torch.set_default_device` says
    shift = torch.tensor(first, device=device) - (counts.cumsum(0) - counts)
    place = torch.arange(total, device=device) + torch.repeat_interleave(shift, counts, output_size=total)
    table = torch.full((assignment.shape[0] + 1,), rows, device=device)
    table[:total] = place
    return Layout(
        chunks,
        rows,
        row=table.index_select(0, row),
        token=token.new_zeros(rows).index_copy_(0, place, token),
        empty=filled.new_ones(rows).index_copy_(0, place, ~filled),
        weight=weight.new_zeros(rows).index_copy_(0, place, weight),
    )


class Buffers:
    """Memory for one chunk, used again for the next."""

    def __init__(self, like: Tensor, chunks: list[Chunk]) -> None:
        self.like = like
        self.most = max((sum(chunk.sizes) for chunk in chunks), default=0)
        self.held: dict[tuple[str, int], Tensor] = {}

    def get(self, name: str, chunk: Chunk, width: int) -> Tensor:
        """`(rows of the chunk, width)` uninitialised."""
        if (name, width) not in self.held:
            self.held[name, width] = self.like.new_empty(self.most, width)
        return self.held[name, width][: sum(chunk.sizes)]
