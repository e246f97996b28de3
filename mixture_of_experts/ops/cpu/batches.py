"""Groups experts into batches, and batches into chunks. Each batch is computed as one product on a CPU, and chunks
reuse memory.

All experts in a batched product have the same number of rows, so experts with fewer rows are padded.
"""

from __future__ import annotations

from typing import NamedTuple

# `python -m experiments.cpu_constants` times steps with other values of these constants
PADDING_WORK = 1 << 18  # number of padding multiplications that take as long as one additional product
# multiplier of PADDING_WORK for multiple threads, which parallelize the product of a single expert poorly
THREADED_PADDING_FACTOR = 32
# maximum number of padding rows in a batch of small products, because padding is also moved and activated
MAX_PADDING_ROWS = 32
# padding rows per expert whose cost is negligible compared to that of reading the expert's weights
FREE_PADDING_ROWS = 2
# maximum size of a thread's chunk (tokens and pre-activations), so that it fits into the caches
MAX_CHUNK_BYTES = 4 << 20


class ExpertBatch(NamedTuple):
    """Adjacent experts that are computed as one product. Every expert is padded to the row count of the most loaded
    expert in the batch."""

    experts: slice
    num_experts: int
    padded_rows: int  # number of rows per expert, including padding
    start: int  # index of the first row
    stop: int


def make_batches(counts: list[int], row_work: int, threads: int, max_rows: int) -> list[ExpertBatch]:
    """Assign all experts that have rows to batches.

    Args:
        counts: number of rows of each expert.
        row_work: number of multiplications needed to multiply a row by a weight.
        threads: number of threads. A batched product assigns whole experts to threads, so the number of experts in a
            batch should be a multiple of `threads`.
        max_rows: maximum number of rows in a batch that contains several experts.
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
    """Assign consecutive batches to chunks of at most `max_rows` rows. A batch with more rows than this forms its own
    chunk."""
    chunks: list[list[ExpertBatch]] = []
    for batch in batches:
        if chunks and batch.stop - chunks[-1][0].start <= max_rows:
            chunks[-1].append(batch)
        else:
            chunks.append([batch])
    return chunks
