"""Which experts the CPU computes as one product, and which of those products follow each other on the same memory.

A batched product takes one number of rows for all its experts, so the shorter ones are padded. What lies between the
products is memory that one chunk of experts uses after another: fresh memory costs as much as arithmetic.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# `python -m experiments.cpu_constants` times steps with other values of these
PADDING = 1 << 18  # multiplications of padding that take as long as the call of another product
SHARING = 32  # times that is what several threads lose on one expert's product, which they share badly
FREE_ROWS = 2  # of padding for each expert: so few take hardly longer than reading its weights
CHUNK = 4 << 20  # bytes of rows, as tokens and behind w_in, up to which a thread's chunk grows, to stay in its caches


class Batch(NamedTuple):
    """Neighbouring experts computed as one product, each with as many rows as the fullest of them."""

    experts: slice
    width: int  # rows of each
    start: int  # its first row

    @property
    def number(self) -> int:
        return self.experts.stop - self.experts.start

    @property
    def stop(self) -> int:
        return self.start + self.number * self.width

    def of(self, rows: Tensor, start: int = 0) -> Tensor:
        """Its own `(number, width, p)` of rows that begin at `start`."""
        return rows[self.start - start : self.stop - start].view(self.number, self.width, -1)


class Chunk(NamedTuple):
    """Batches that follow each other and use the same memory."""

    batches: list[Batch]
    rows: slice

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start


def batches_of(counts: list[int], row_work: int, threads: int, most_rows: int) -> list[Batch]:
    """Every expert that has rows in one batch.

    Args:
        counts: rows of each expert.
        row_work: multiplications of one row with one weight.
        threads: a batched product gives whole experts to each thread, so a batch best has a multiple of that number.
        most_rows: up to which a batch of several experts grows.
    """
    batches: list[Batch] = []
    free = PADDING * (1 if threads == 1 else SHARING) // row_work
    start = row = 0
    while start < len(counts):
        stop, filled = start + 1, counts[start]
        width = filled
        while stop < len(counts) and counts[stop] and filled:
            wider, number = max(width, counts[stop]), stop + 1 - start
            padding = wider * number - filled - counts[stop]
            if padding > max(free, FREE_ROWS * number) or wider * number > most_rows:
                break
            stop, width, filled = stop + 1, wider, filled + counts[stop]
        if stop - start > threads:
            stop -= (stop - start) % threads
            width = max(counts[start:stop])
        if filled:
            batches.append(Batch(slice(start, stop), width, row))
            row = batches[-1].stop
        start = stop
    return batches


def chunks_of(batches: list[Batch], most_rows: int) -> list[Chunk]:
    """Batches in chunks of up to so many rows, but for batches that are larger themselves."""
    chunks: list[Chunk] = []
    for batch in batches:
        if chunks and batch.stop - chunks[-1].rows.start <= most_rows:
            last = chunks.pop()
            chunks.append(Chunk([*last.batches, batch], slice(last.rows.start, batch.stop)))
        else:
            chunks.append(Chunk([batch], slice(batch.start, batch.stop)))
    return chunks


def most_rows_of_chunk(row_bytes: int, threads: int) -> int:
    """Rows up to which a chunk grows; `row_bytes` are those of a row before and behind the products with `w_in`."""
    return max(1, CHUNK * threads // row_bytes)


def rows_given(batches: list[Batch], num_experts: int) -> list[int]:
    """Rows of each expert with the padding of its batch; 0 for an expert without tokens."""
    rows = [0] * num_experts
    for batch in batches:
        rows[batch.experts] = [batch.width] * batch.number
    return rows
