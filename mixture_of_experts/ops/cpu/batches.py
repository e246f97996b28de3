"""Batches: experts that a CPU computes as one product. Chunks: batches that are computed together; the next chunk uses
the same memory.

A batched product has one number of rows for all its experts, so experts with fewer rows are padded.
"""

from __future__ import annotations

from typing import NamedTuple

# `python -m experiments.cpu_constants` times steps with other values of these
PADDING = 1 << 18  # so many multiplications of padding take as long as one more product
SHARING = 32  # factor of PADDING with several threads, which share one expert's product badly
MOST_PADDING = 32  # most empty rows of a batch of small products: they are moved and activated too
FREE_ROWS = 2  # rows of padding for each expert that cost nothing beside reading its weights
CHUNK = 4 << 20  # most bytes of a thread's chunk (tokens and pre-activations), so that it stays in the caches


class Batch(NamedTuple):
    """Neighbouring experts computed as one product, each with as many rows as the fullest of them."""

    experts: slice
    number: int  # of experts
    width: int  # rows of each expert
    start: int  # the first row
    stop: int


def batches_of(counts: list[int], row_work: int, threads: int, most_rows: int) -> list[Batch]:
    """Put every expert that has rows into a batch.

    Args:
        counts: number of rows of each expert.
        row_work: multiplications of one row by one weight.
        threads: number of threads. A batched product gives whole experts to threads, so multiples of it are best.
        most_rows: most rows of a batch of several experts.
    """
    batches: list[Batch] = []
    free = min(MOST_PADDING, PADDING * (1 if threads == 1 else SHARING) // row_work)
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
            last = row + (stop - start) * width
            batches.append(Batch(slice(start, stop), stop - start, width, row, last))
            row = last
        start = stop
    return batches


def chunks_of(batches: list[Batch], most_rows: int) -> list[list[Batch]]:
    """Put consecutive batches into chunks of at most `most_rows` rows; a larger batch is a chunk of its own."""
    chunks: list[list[Batch]] = []
    for batch in batches:
        if chunks and batch.stop - chunks[-1][0].start <= most_rows:
            chunks[-1].append(batch)
        else:
            chunks.append([batch])
    return chunks
