"""Which experts are one batched product on the CPU, and those products.

A batched product takes one number of rows for all its experts, so that the shorter ones are padded; and it takes a
slice of the stacked weights, so that its experts stand at equal distances. Any two do.

Axes: r rows of a chunk, e experts, p inner and q outer dimension of a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PRODUCT = 80 << 10  # bytes of hidden layer: to compute more than that as padding costs more than another product
FREE_ROWS = 2  # of padding for each expert: so few take hardly longer than reading its weights
APART = 0.5  # of a product: what each expert of a batch with a step costs more in training, see `takes_steps`
SHARED = 1.1  # times as long takes the product of a single expert, which all threads share


class Batch(NamedTuple):
    """Experts computed as one product, each with as many rows as the fullest of them."""

    experts: slice
    number: int  # of experts
    width: int  # rows of each

    @property
    def num_rows(self) -> int:
        return self.number * self.width

    def of(self, rows: Tensor) -> Tensor:
        """Its rows `(r, d)` as its product takes them: `(number, width, d)`, a single expert's as they are."""
        return rows if self.number == 1 else rows.view(self.number, self.width, -1)

    def pick(self, weight: Tensor) -> Tensor:
        """Its experts' part of a stack `(e, p, q)`, as its product takes it."""
        return weight[self.experts.start if self.number == 1 else self.experts]


class Rows(NamedTuple):
    """Rows of several batches, one after the other: as one matrix, and as the batches' products take them."""

    all: Tensor  # (r, d)
    each: list[Tensor]


# Slices are made before the products, all together: a product leaves the caches to its weights, and what makes a slice,
# some microseconds otherwise, takes several times as long after it.


def split(table: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """`table.split(sizes)`; of a single part that is the table itself, as `split` takes as long as several slices."""
    return table.split(sizes) if len(sizes) > 1 else [table] * len(sizes)


def rows_of(batches: Sequence[Batch], rows: Tensor) -> Rows:
    """`(r, d)` as the batches' rows."""
    parts = split(rows, [batch.num_rows for batch in batches])
    return Rows(rows, [batch.of(part) for batch, part in zip(batches, parts, strict=True)])


def matrices_of(batches: Sequence[Batch], weight: Tensor) -> list[Tensor]:
    """Each batch's part of a stack `(e, p, q)`."""
    return [batch.pick(weight) for batch in batches]


def by_weights(x: Rows, weight: list[Tensor], out: Rows, add: bool = False) -> None:
    """Rows times their expert's weight, written into `out` or added to it."""
    for rows, matrices, results in zip(x.each, weight, out.each, strict=True):
        _product(rows, matrices, results, add)


def by_rows(x: Rows, y: Rows, out: list[Tensor]) -> None:
    """For every expert `x^T y` over its rows, written into its matrix of `out`."""
    for rows, others, results in zip(x.each, y.each, out, strict=True):
        _product(rows.mT, others, results)


def _product(x: Tensor, y: Tensor, out: Tensor, add: bool = False) -> None:
    """Of a batch; a single expert's product is shared by all threads."""
    if x.ndim == 2 and add:
        out.addmm_(x, y)
    elif x.ndim == 2:
        torch.mm(x, y, out=out)
    elif add:
        out.baddbmm_(x, y)
    else:
        torch.bmm(x, y, out=out)


def takes_steps(weight: Tensor) -> bool:
    """Whether products read slices with a step as they are, of the weights and of their transposes: in low precision
    torch would copy the latter. (Into such a slice it writes one expert's product after the other.)"""
    return weight.dtype in (torch.float32, torch.float64)


def batches_of(
    counts: Sequence[int], row_bytes: int, threads: int, enough: float, steps: bool = True, training: bool = False
) -> list[Batch]:
    """Every expert that has rows in one batch: of neighbours, or of experts with similar counts if that costs less.

    Args:
        counts: rows of each expert.
        row_bytes: bytes of the hidden layer for one row.
        threads: a batched product gives whole experts to each of them, so a batch best has a multiple of that number.
        enough: rows of a batch that needs no more.
        steps: whether experts of one batch may stand apart; see `takes_steps`.
        training: whether gradients of weights are to be expected.
    """
    used = [expert for expert, count in enumerate(counts) if count]
    bounds = Bounds(PRODUCT // row_bytes, len(counts) if steps else 1, threads, enough)
    by_index = _in_order(used, counts, bounds)
    pairs_without_padding = sum(counts) * row_bytes + PRODUCT * len(used) / 2
    apart = APART if training else 0.0
    if not steps or threads > 2 or _cost(by_index, row_bytes, threads, apart) <= pairs_without_padding:
        return by_index  # others that are no slice would hardly be better: they come in pairs
    by_count = _in_order(sorted(used, key=counts.__getitem__), counts, bounds)
    return min(by_index, by_count, key=lambda way: _cost(way, row_bytes, threads, apart))


class Bounds(NamedTuple):
    """Up to what a batch grows."""

    padding: int  # rows
    step: int
    threads: int
    enough: float


def _in_order(order: list[int], counts: Sequence[int], bounds: Bounds) -> list[Batch]:
    """Batches of experts that follow each other in `order`, as long as they fit together."""
    batches = []
    threads, enough = bounds.threads, bounds.enough
    start = 0
    while start < len(order):
        stop = start + 1
        width = rows = counts[order[start]]
        step = abs(order[stop] - order[start]) if stop < len(order) else 1
        while stop < len(order) and ((stop - start) % threads or (stop - start) * width < enough):
            count, size = counts[order[stop]], stop + 1 - start
            wider = max(width, count)
            apart = step > bounds.step or (size > 2 and order[stop] - max(order[start], order[stop - 1]) != step)
            if apart or wider * size - rows - count > max(bounds.padding, FREE_ROWS * size):
                stop = max(stop - (stop - start) % threads, start + 1)
                break
            stop, width, rows = stop + 1, wider, rows + count
        batches.append(_batch(sorted(order[start:stop]), counts))
        start = stop
    return batches


def _batch(experts: list[int], counts: Sequence[int]) -> Batch:
    """Of experts at equal distances, in ascending order."""
    step = experts[1] - experts[0] if len(experts) > 1 else 1
    width = max(counts[expert] for expert in experts)
    return Batch(slice(experts[0], experts[-1] + 1, step), len(experts), width)


def _cost(batches: list[Batch], row_bytes: int, threads: int, apart: float) -> float:
    """Time, in bytes of hidden layer that all threads together compute meanwhile."""
    cost = 0.0
    for batch in batches:
        turns = threads * -(-batch.number // threads) if batch.number > 1 or threads == 1 else SHARED
        products = 1 + (apart * batch.number if batch.experts.step > 1 else 0)
        cost += turns * batch.width * row_bytes + PRODUCT * products
    return cost
