"""What is done with the rows of a chunk: gathered, and multiplied batch by batch.

Axes: r rows of the chunk, e experts, p inner and q outer dimension of a weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixture_of_experts.ops.cpu.schedule import Batch, Chunk


def gather(x: Tensor, index: Tensor, empty: Tensor, out: Tensor) -> None:
    """Rows of x by index; those of `out` that `empty` names are zeros."""
    torch.index_select(x, 0, index, out=out)
    if empty.numel():
        out.index_fill_(0, empty, 0)


def rows_by_weights(
    chunk: Chunk, x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None = None, add: bool = False
) -> None:
    """Rows `(r, p)` times their expert's weight `(e, p, q)`, plus its bias `(e, q)`: written to `out`, or added."""
    for batch in chunk.batches:
        rows, results = _of(chunk, batch, x), _of(chunk, batch, out)
        _product(rows, _matrices(batch, weight), results, add)
        if bias is not None:
            results.add_(_matrices(batch, bias.unsqueeze(1)))


def rows_by_rows(chunk: Chunk, x: Tensor, y: Tensor, out: Tensor | None) -> None:
    """For every expert `x^T y` over its rows, written to its matrix of `out` `(e, p, q)`, or `(e, q)` for p = 1."""
    if out is None:
        return
    out = out.unsqueeze(1) if out.ndim == 2 else out
    for batch in chunk.batches:
        _product(_of(chunk, batch, x).mT, _of(chunk, batch, y), _matrices(batch, out))


def _of(chunk: Chunk, batch: Batch, rows: Tensor) -> Tensor:
    """A batch's rows as its product takes them: `(number, width, p)`, a single expert's `(width, p)`."""
    rows = rows[batch.start - chunk.rows.start : batch.stop - chunk.rows.start]
    return rows if batch.number == 1 else rows.view(batch.number, batch.width, -1)


def _matrices(batch: Batch, weight: Tensor) -> Tensor:
    """Its experts' part of a stack."""
    return weight[batch.experts.start if batch.number == 1 else batch.experts]


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
