"""Experts in chunks: padded rows, their tables, and the memory that every chunk uses again.

Axes: a assignments, r rows (sorted by expert, without gaps), e experts, w rows of an expert in its chunk.
"""

from __future__ import annotations

import math
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
    def experts(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def num_rows(self) -> int:
        return (self.stop - self.start) * self.width

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.num_rows)


# n chunks of B bytes of hidden layer cost n times a cold start (a product leaves the caches to its weights, and what
# comes next, Python too, has to come back: 0.1 ms or more each), and B / n times fresh memory for a chunk's
# buffers. The sum is least at n = sqrt(B / BALANCE).
BALANCE = 2 << 20
MOST_PADDING = 80 << 10  # bytes of hidden layer in a chunk: to compute more costs more than another chunk
FREE_ROWS = 2  # of padding for each expert: so few take hardly longer than reading its weights


def chunks_of(counts: list[int], row_bytes: int, threads: int) -> list[Chunk]:
    """Experts in chunks that keep all threads busy and waste few rows on padding; those without rows are in none.

    Args:
        counts: rows of each expert.
        row_bytes: bytes of the widest buffer for one row.
        threads: a batched product gives whole experts to each of them, so a chunk has a multiple of that number.
    """
    chunks: list[Chunk] = []
    number = max(1, round(math.sqrt(sum(counts) * row_bytes / BALANCE)))
    enough, most_padding = sum(counts) / number, MOST_PADDING // row_bytes
    row = start = 0
    while start < len(counts):
        if counts[start] == 0:
            start += 1
            continue
        stop, width, used = start + 1, counts[start], counts[start]
        while stop < len(counts) and ((stop - start) % threads or (stop - start) * width < enough):
            wider, more = max(width, counts[stop]), used + counts[stop]
            padding = wider * (stop + 1 - start) - more
            most = max(most_padding, FREE_ROWS * (stop + 1 - start))
            if counts[stop] == 0 or padding > most:  # reading unused weights costs most
                stop = max(stop - (stop - start) % threads, start + 1)
                break
            stop, width, used = stop + 1, wider, more
        chunks.append(Chunk(start, stop, max(counts[start:stop]), row))
        row += chunks[-1].num_rows
        start = stop
    return chunks


class Layout(NamedTuple):
    """The padded rows of all chunks and their tables; `rows` is also the sentinel of `row`."""

    chunks: list[Chunk]
    rows: int
    row: Tensor  # (a,) row of each assignment, `rows` where it has none
    token: Tensor  # (rows,) token of each row; padding repeats its expert's first, so that it concerns no other expert
    weight: Tensor  # (rows,) weight of each row, 0 where it is padding or no assignment's
    empty: Tensor | None  # (rows,) bool: rows of no assignment, and then padding too; None if there are no such rows


class Setting(NamedTuple):
    """What a layout depends on that is not a tensor: noted in the forward, so that the backward's is the same."""

    num_tokens: int
    row_bytes: int  # of the widest buffer for one row
    threads: int


def lay_out(setting: Setting, weight: Tensor, row: Tensor, assignment: Tensor, token: Tensor, counts: Tensor) -> Layout:
    """The padded layout of rows without gaps; the tensors as in `dispatch.Plan`."""
    numbers = counts.tolist()
    used = [count for count in numbers if count]
    total, chunks = sum(used), chunks_of(numbers, setting.row_bytes, setting.threads)
    weight = torch.cat([weight, weight.new_zeros(1)]).index_select(0, assignment[:total])
    token, filled = token[:total], token[:total] < setting.num_tokens
    full = bool(filled.all())
    token = token if full else torch.where(filled, token, 0)
    sizes = [chunk.width for chunk in chunks for _ in range(chunk.start, chunk.stop)]
    rows = sum(sizes)
    if rows == total:
        return Layout(chunks, rows, row.clamp(max=rows), token, weight, None if full else ~filled)

    # each expert's first row here and there, for those that have rows
    device = counts.device  # not whatever `torch.set_default_device` says
    filling, padded = torch.tensor([used, sizes], device=device)
    start, more = filling.cumsum(0) - filling, padded - filling
    place = torch.arange(total, device=device)
    place = place + torch.repeat_interleave(more.cumsum(0) - more, filling, output_size=total)
    table = torch.full((assignment.shape[0] + 1,), rows, device=device)
    table[:total] = place
    first = token.index_select(0, start)
    return Layout(
        chunks,
        rows,
        row=table.index_select(0, row),
        token=torch.repeat_interleave(first, padded, output_size=rows).index_copy_(0, place, token),
        weight=weight.new_zeros(rows).index_copy_(0, place, weight),
        empty=None if full else filled.new_ones(rows).index_copy_(0, place, ~filled),
    )


class Buffers:
    """Memory for one chunk, used again for the next."""

    def __init__(self, like: Tensor, chunks: list[Chunk]) -> None:
        self.like = like
        self.most = max((chunk.num_rows for chunk in chunks), default=0)
        self.held: dict[tuple[str, int], Tensor] = {}

    def get(self, name: str, chunk: Chunk, width: int) -> Tensor:
        """`(experts, w, width)` uninitialised."""
        if (name, width) not in self.held:
            self.held[name, width] = self.like.new_empty(self.most, width)
        return self.held[name, width][: chunk.num_rows].view(-1, chunk.width, width)
