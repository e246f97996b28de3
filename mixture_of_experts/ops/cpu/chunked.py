"""Computes a whole call (dispatch, experts and combine) in a single `torch.autograd.Function` on a CPU.

Axes: t tokens, r rows (sorted by expert, some of them padding), d model dim, o output dim.

On a CPU, allocating memory costs as much time as arithmetic, about a microsecond for a new page. Therefore rows are
computed in chunks of experts that are small enough for intermediate results to stay in the caches, and for the next
chunk to reuse the same memory.
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
from mixture_of_experts.ops import autograd, row_network
from mixture_of_experts.ops.batched import SlotLayout
from mixture_of_experts.ops.cpu.batches import MAX_CHUNK_BYTES, ExpertBatch, make_batches, make_chunks
from mixture_of_experts.ops.matmul import matmul_into
from mixture_of_experts.ops.network import Call, Network


class RowBlocking(NamedTuple):
    """Block sizes for which the bits of a row do not depend on other rows; see `batch_invariant`.

    Attributes:
        size: divisor of the number of rows of each expert.
        activated: maximum number of rows that are passed to an activation at a time, a multiple of `size`.
        multiplied: maximum number of rows per expert in a product, a multiple of `size`.
    """

    size: int
    activated: int
    multiplied: int


def run(call: Call, row_functions: row_network.RowFunctions = row_network, blocks: RowBlocking | None = None) -> Tensor:
    """Compute a call, and return `(t, o)`."""
    x, network = call.x, call.network
    h, o = network.w_out.shape[-2:]
    dim = max(x.shape[-1], o)
    row_bytes = (dim + sum(w.shape[-1] for w in network.w_in)) * x.element_size()
    permutation, chunks = permute_to_chunks(call.assignments, max(1, dim * h), row_bytes, blocks.size if blocks else 1)
    make_layout: Any = partial(ChunkLayout, chunks, blocks) if chunks else SlotLayout  # use SlotLayout for 0 rows
    pair = (
        partial(row_network.forward_rows, make_layout, row_functions),
        partial(row_network.backward_rows, make_layout, row_functions),
    )
    return autograd.run_differentiable(*pair, x, permutation, network)


def permute_to_chunks(
    assignments: Assignments, row_work: int, row_bytes: int, row_multiple: int = 1
) -> tuple[Permutation, list[list[ExpertBatch]]]:
    """Return the permutation of a call, with padding rows, and the chunks of these rows.

    Args:
        assignments: the assignments of the call.
        row_work: number of multiplications of a row by a weight.
        row_bytes: number of bytes of a row of tokens and of its pre-activations.
        row_multiple: divisor of the padded number of rows of each expert.
    """
    threads, chunks = torch.get_num_threads(), []
    max_rows = max(1, MAX_CHUNK_BYTES * threads // row_bytes)

    def pad(needed: Tensor) -> tuple[Tensor, int]:
        """Pad the rows of each expert to those of its batch, and add the chunks to `chunks`."""
        counts = [-(-count // row_multiple) * row_multiple for count in needed.tolist()]
        batches = make_batches(counts, row_work, threads, max_rows)
        padded = [0] * len(counts)
        for batch in batches:
            padded[batch.experts] = [batch.rows_per_expert] * batch.num_experts
        chunks.extend(make_chunks(batches, max_rows))
        return torch.tensor(padded, device=needed.device), sum(padded)

    permutation = permute_with_padding(assignments, pad)
    return permutation, chunks


class ChunkLayout(row_network.RowLayout):
    """A layout of rows in chunks of batches, with one product per batch. Outputs are stored for the rows of all chunks.

    Attributes:
        blocks: number of rows that are computed at a time; None for all.
        token_of_row: `(r,)`, token of each row, arbitrary for empty rows.
        empty: `(r,)`, whether each row is empty.
        here, token, padding: rows of the current chunk, their tokens, and the empty rows among them.
        chunk, sizes: batches of the current chunk, and the number of rows of each batch.
    """

    blocks: RowBlocking | None
    token_of_row: Tensor
    empty: Tensor
    here: slice
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
        self.here = slice(chunk[0].start, chunk[-1].stop)
        self.token, self.padding = self.token_of_row[self.here], self.empty[self.here].nonzero().squeeze(-1)
        self.chunk, self.sizes = chunk, [batch.stop - batch.start for batch in chunk]

    def select_chunk(self, values: Tensor) -> Tensor:
        return values[self.here]

    def gradients(self, network: Network, wanted: Collection[str]) -> dict[str, Tensor]:
        grads = {name: torch.empty_like(weight) for name, weight in network.tensors().items() if name in wanted}
        assert self.permutation.rows_per_expert is not None
        if unused := [expert for expert, number in enumerate(self.permutation.rows_per_expert.tolist()) if not number]:
            for gradient in grads.values():
                gradient[unused] = 0
        return grads

    def split_batches(self, rows: Tensor) -> list[Tensor]:
        """Return the rows of each batch, `(m, p)` for one expert, or `(num_experts, m, p)` for several."""
        split = zip(self.chunk, rows.split(self.sizes), strict=True)
        return [
            part if one.num_experts == 1 else part.view(one.num_experts, one.rows_per_expert, -1) for one, part in split
        ]

    def select_experts(self, stack: Tensor) -> list[Tensor]:
        """Return the part of each batch in a stack `(e, ...)`, `(...)` for one expert, or `(num_experts, ...)` for
        several."""
        return [
            stack.select(0, one.experts.start) if one.num_experts == 1 else stack[one.experts] for one in self.chunk
        ]

    def gather_rows(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.token).index_fill_(0, self.padding, 0)

    def multiply_rows(self, x: Tensor, weight: Tensor, out: Tensor | None = None, *, add: bool = False) -> Tensor:
        """Multiply rows x by the weights of their experts, and write the result `(r, q)` to `out`, or add it if
        `add`."""
        out = x.new_empty(x.shape[0], weight.shape[-1]) if out is None else out
        for operands in zip(self.split_batches(x), self.select_experts(weight), self.split_batches(out), strict=True):
            for part, matrix, result in self.split_blocks(*operands):
                matmul_into(part, matrix, result, accumulate=add)
        return out

    def split_blocks(self, rows: Tensor, weight: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the operands of the product of a batch, or of several products of one expert each if a batch has too
        many rows."""
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
        y = self.row_outputs[self.here]
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
        weight = permutation.weight.detach().view(
            permutation.num_tokens, permutation.k
        )  # otherwise, `embedding_bag` prepares a backward pass
        row = permutation.row.view(weight.shape)
        if self.row_outputs.dtype != weight.dtype:
            return sum_rows(
                self.row_outputs[:-1], weight, permutation.token, row, permutation.k, permutation.num_tokens
            )
        return F.embedding_bag(row, self.row_outputs, per_sample_weights=weight, mode="sum")
