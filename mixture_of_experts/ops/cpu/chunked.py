"""Computes a whole call (dispatch, experts and combine) in a single `torch.autograd.Function` on a CPU.

Axes: t (tokens), r (rows, sorted by expert, some of them padding), d (model dimension), o (output dimension).

On a CPU, allocating memory takes as much time as the arithmetic: about a microsecond for each new page. Rows are
therefore computed in chunks of experts. The chunks are small enough that intermediate results stay in the caches, and
the next chunk reuses the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixture_of_experts.dispatch.assignments import Assignments
from mixture_of_experts.dispatch.permutation import Permutation, permute_with_padding
from mixture_of_experts.dispatch.rows import sum_rows
from mixture_of_experts.ops import row_network
from mixture_of_experts.ops.batched import SlotLayout
from mixture_of_experts.ops.cpu.batches import MAX_CHUNK_BYTES, ExpertBatch, make_batches, make_chunks
from mixture_of_experts.ops.matmul import matmul_into
from mixture_of_experts.ops.network import Call, Network


class RowBlocking(NamedTuple):
    """Block sizes with which the bits of a row do not depend on other rows (see `batch_invariant`).

    Attributes:
        size: number of rows per block, which divides each expert's row count.
        activated: maximum number of rows that an activation computes at a time, which is a multiple of `size`.
        multiplied: maximum number of rows per expert in a matrix product, which is a multiple of `size`.
    """

    size: int
    activated: int
    multiplied: int


def run(call: Call, row_functions: row_network.RowFunctions = row_network, blocks: RowBlocking | None = None) -> Tensor:
    """Compute the outputs `(t, o)` of a call."""
    x, network = call.x, call.network
    h, o = network.w_out.shape[-2:]
    dim = max(x.shape[-1], o)
    row_bytes = (dim + sum(w.shape[-1] for w in network.w_in)) * x.element_size()
    permutation, chunks = permute_to_chunks(call.assignments, max(1, dim * h), row_bytes, blocks.size if blocks else 1)
    # use SlotLayout if there are no rows
    make_layout: Any = partial(ChunkLayout, chunks, blocks) if chunks else SlotLayout
    return row_network.run_layout(make_layout, row_functions, x, permutation, network)


def permute_to_chunks(
    assignments: Assignments, row_work: int, row_bytes: int, row_multiple: int = 1
) -> tuple[Permutation, list[list[ExpertBatch]]]:
    """Return the permutation for a call, including padding rows, and the chunks into which the rows are split.

    Args:
        assignments: the assignments of the call.
        row_work: number of multiplications needed to multiply a row by a weight.
        row_bytes: number of bytes in a token's row and its pre-activations.
        row_multiple: a divisor of each expert's row count, including padding.
    """
    threads, chunks = torch.get_num_threads(), []
    max_rows = max(1, MAX_CHUNK_BYTES * threads // row_bytes)

    def pad(needed: Tensor) -> tuple[Tensor, int]:
        """Pad each expert's rows to the size of its batch, and append the chunks to `chunks`."""
        counts = [-(-count // row_multiple) * row_multiple for count in needed.tolist()]
        batches = make_batches(counts, row_work, threads, max_rows)
        padded = [0] * len(counts)
        for batch in batches:
            padded[batch.experts] = [batch.padded_rows] * batch.num_experts
        chunks.extend(make_chunks(batches, max_rows))
        return torch.tensor(padded, device=needed.device), sum(padded)

    permutation = permute_with_padding(assignments, pad)
    return permutation, chunks


class ChunkLayout(row_network.RowLayout):
    """Arranges rows in chunks of batches, with one product per batch. Outputs are stored for the rows of all chunks.

    Attributes:
        blocks: limits on the number of rows that are computed at a time, or None for no limit.
        token_of_row: the token of each row, `(r,)`. The token of an empty row is arbitrary.
        empty: bool mask of the empty rows, `(r,)`.
        chunk_rows, token, padding: the rows of the current chunk, their tokens, and the empty rows among them.
        chunk, sizes: the batches of the current chunk, and the number of rows in each batch.
    """

    blocks: RowBlocking | None
    token_of_row: Tensor
    empty: Tensor
    chunk_rows: slice
    token: Tensor
    padding: Tensor
    chunk: list[ExpertBatch]
    sizes: list[int]

    def __init__(self, chunks: list[list[ExpertBatch]], blocks: RowBlocking | None, permutation: Permutation) -> None:
        super().__init__(permutation, chunks)
        self.blocks = blocks
        self.token_of_row = permutation.token.clamp(max=permutation.num_tokens - 1)
        self.empty = permutation.token == permutation.num_tokens

    def enter_chunk(self, chunk: list[ExpertBatch]) -> None:
        self.chunk_rows = slice(chunk[0].start, chunk[-1].stop)
        self.token, self.padding = self.token_of_row[self.chunk_rows], self.empty[self.chunk_rows].nonzero().squeeze(-1)
        self.chunk, self.sizes = chunk, [batch.stop - batch.start for batch in chunk]

    def select_chunk(self, values: Tensor) -> Tensor:
        return values[self.chunk_rows]

    def allocate_gradients(self, network: Network, wanted: Collection[str]) -> dict[str, Tensor]:
        grads = {name: torch.empty_like(weight) for name, weight in network.tensors().items() if name in wanted}
        assert self.permutation.rows_per_expert is not None
        if unused := [expert for expert, number in enumerate(self.permutation.rows_per_expert.tolist()) if not number]:
            for gradient in grads.values():
                gradient[unused] = 0
        return grads

    def split_batches(self, rows: Tensor) -> list[Tensor]:
        """Split rows by batch. Each part has the shape `(m, p)` for one expert, or `(num_experts, m, p)` for
        several."""
        split = zip(self.chunk, rows.split(self.sizes), strict=True)
        return [
            part if one.num_experts == 1 else part.view(one.num_experts, one.padded_rows, -1) for one, part in split
        ]

    def select_experts(self, stack: Tensor) -> list[Tensor]:
        """Select each batch's part of a stack `(e, ...)`. Each part has the shape `(...)` for one expert, or
        `(num_experts, ...)` for several."""
        return [
            stack.select(0, one.experts.start) if one.num_experts == 1 else stack[one.experts] for one in self.chunk
        ]

    def gather_rows(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.token).index_fill_(0, self.padding, 0)

    def multiply_rows(self, x: Tensor, weight: Tensor, out: Tensor | None = None, *, add: bool = False) -> Tensor:
        """Multiply rows x by their experts' weights. The result `(r, q)` is written to `out`, or added to it if `add`
        is True."""
        out = x.new_empty(x.shape[0], weight.shape[-1]) if out is None else out
        for operands in zip(self.split_batches(x), self.select_experts(weight), self.split_batches(out), strict=True):
            for part, matrix, result in self.split_blocks(*operands):
                matmul_into(part, matrix, result, accumulate=add)
        return out

    def split_blocks(self, rows: Tensor, weight: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the operands of a batch's product. If the batch has too many rows, yield the operands of several
        single-expert products."""
        if self.blocks is None or rows.shape[-2] <= self.blocks.multiplied:
            yield rows, weight, out
            return
        experts = [(rows, weight, out)] if rows.ndim == 2 else zip(rows, weight, out, strict=True)
        for of_rows, matrix, results in experts:
            parts = (each.split(self.blocks.multiplied) for each in (of_rows, results))
            yield from ((part, matrix, result) for part, result in zip(*parts, strict=True))

    def multiply_and_sum(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        if self.row_outputs is None:
            x, weight = pairs[0]
            self.row_outputs: Any = x.new_empty(self.permutation.num_rows + 1, weight.shape[-1])
            self.row_outputs[-1:].zero_()
        y = self.row_outputs[self.chunk_rows]
        for i, (x, weight) in enumerate(pairs):
            self.multiply_rows(x, weight, y, add=i > 0)
        return y

    def add_bias(self, rows: Tensor, bias: Tensor) -> None:
        for part, own in zip(self.split_batches(rows), self.select_experts(bias), strict=True):
            part.add_(own.unsqueeze(-2))

    def outer_products(self, x: Tensor, y: Tensor, out: Tensor | None) -> Tensor:
        assert out is not None
        for part, other, result in zip(
            self.split_batches(x), self.split_batches(y), self.select_experts(out), strict=True
        ):
            matmul_into(part.mT, other, result)
        return out

    def sum_scaled_rows(self, scale: Tensor, rows: Tensor, out: Tensor | None) -> Tensor:
        assert out is not None
        self.outer_products(scale.to(rows.dtype), rows, out.unsqueeze(1))
        return out

    def activate(self, method: Callable[..., None], *tensors: Any) -> None:
        if self.blocks is None:
            method(*tensors)
            return
        step = self.blocks.activated
        for start in range(0, len(tensors[0][0]), step):
            some = slice(start, start + step)
            method(*[each[some] if isinstance(each, Tensor) else [part[some] for part in each] for each in tensors])

    def combine_rows(self) -> Tensor:
        permutation = self.permutation
        if permutation.k is None:
            return super().combine_rows()
        # detached, because `embedding_bag` would otherwise prepare a backward pass
        weight = permutation.weight.detach().view(permutation.num_tokens, permutation.k)
        row = permutation.row.view(weight.shape)
        if self.row_outputs.dtype != weight.dtype:
            return sum_rows(
                self.row_outputs[:-1], weight, permutation.token, row, permutation.k, permutation.num_tokens
            )
        return F.embedding_bag(row, self.row_outputs, per_sample_weights=weight, mode="sum")
