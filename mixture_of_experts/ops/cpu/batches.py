"""Batches: experts that a CPU computes as one product. Chunks: batches that are computed together; the next chunk uses
the same memory.

A batched product has one number of rows for all its experts, so experts with fewer rows are padded.
"""

from __future__ import annotations

from typing import NamedTuple

# `python -m experiments.cpu_constants` times steps with other values of these
PADDING_WORK = 1 << 18  # so many multiplications of padding take as long as one more product
THREADED_PADDING_FACTOR = 32  # factor of PADDING with several threads, which share one expert's product badly
MAX_PADDING_ROWS = 32  # most empty rows of a batch of small products: they are moved and activated too
FREE_PADDING_ROWS = 2  # rows of padding for each expert that cost nothing beside reading its weights
MAX_CHUNK_BYTES = 4 << 20  # most bytes of a thread's chunk (tokens and pre-activations), so that it stays in the caches


class ExpertBatch(NamedTuple):
    """Neighbouring experts computed as one product, each with as many rows as the fullest of them."""

    experts: slice
    num_experts: int  # of experts
    rows_per_expert: int  # rows of each expert
    start: int  # the first row
    stop: int


def make_batches(counts: list[int], row_work: int, threads: int, max_rows: int) -> list[ExpertBatch]:
    """Put every expert that has rows into a batch.

    Args:
        counts: number of rows of each expert.
        row_work: multiplications of one row by one weight.
        threads: number of threads. A batched product gives whole experts to threads, so multiples of it are best.
        most_rows: most rows of a batch of several experts.
    """
    batches: list[ExpertBatch] = []
    free = min(MAX_PADDING_ROWS, PADDING_WORK * (1 if threads == 1 else THREADED_PADDING_FACTOR) // row_work)
    start = row = 0
    while start < len(counts):
        stop, filled = start + 1, counts[start]
        width = filled
        while stop < len(counts) and counts[stop] and filled:
            wider, number = max(width, counts[stop]), stop + 1 - start
            padding = wider * number - filled - counts[stop]
            if padding > max(free, FREE_PADDING_ROWS * number) or wider * number > max_rows:
                break
            stop, width, filled = stop + 1, wider, filled + counts[stop]
        if stop - start > threads:
            stop -= (stop - start) % threads
            width = max(counts[start:stop])
        if filled:
            last = row + (stop - start) * width
            batches.append(ExpertBatch(slice(start, stop), stop - start, width, row, last))
            row = last
        start = stop
    return batches


def make_chunks(batches: list[ExpertBatch], max_rows: int) -> list[list[ExpertBatch]]:
    """Put consecutive batches into chunks of at most `most_rows` rows; a larger batch is a chunk of its own."""
    chunks: list[list[ExpertBatch]] = []
    for batch in batches:
        if chunks and batch.stop - chunks[-1][0].start <= max_rows:
            chunks[-1].append(batch)
        else:
            chunks.append([batch])
    return chunks
