"""`Segments`: the documents of packed rows, each of which is a group of tokens of its own.

Axes: b rows, n tokens of a row, k choices of a token, e experts. Documents are numbered from 0 to b n - 1; a number
that is not used stands for an empty document, so no size depends on the number of documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SEGMENT_IDS = "segment_ids"  # the argument of layers and gates
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # many operators, such as sort, lack kernels for some of these


@dataclass(frozen=True, eq=False)
class Segments:
    """Which document each token of packed rows belongs to.

    Attributes:
        document: `(b, n)` int64, number of each token's document.
        length: `(b n,)` int64, number of real tokens of each document.
    """

    document: Tensor
    length: Tensor

    @property
    def num_documents(self) -> Tensor:
        """0-dim int64, the number of documents that have a real token."""
        return (self.length > 0).sum()

    def of_tokens(self, values: Tensor) -> Tensor:
        """`(b, n, ...)`, the values of each token's document, from those of documents `(b n, ...)`."""
        return values.index_select(0, self.document.flatten()).unflatten(0, self.document.shape)

    def of_assignments(self, values: Tensor, k: int) -> Tensor:
        """`(b, n k)`, the values of the document of each assignment, from those of documents `(b n,)`."""
        return self.of_tokens(values).repeat_interleave(k, dim=-1)

    def count_experts(self, expert: Tensor, counted: Tensor | None, num_experts: int) -> Tensor:
        """`(b n, e)` int64, how often each expert is among the choices `(b, n, k)` of a document that are `counted`."""
        cell = (self.document.unsqueeze(-1) * num_experts + expert).flatten()
        ones = torch.ones_like(expert) if counted is None else counted.to(torch.int64).expand_as(expert)
        # an expanded zero, which `scatter_add` copies: only one table is allocated
        empty = torch.zeros((), dtype=torch.int64, device=expert.device).expand(self.length.shape[0] * num_experts)
        return empty.scatter_add(0, cell, ones.flatten()).unflatten(0, (-1, num_experts))

    def sum_counts(self, counts: Tensor) -> Tensor:
        """`(b n, e)`, the sums of whole numbers `(b, n, e)` over the tokens of each document."""
        counts = counts.to(torch.int64).flatten(0, 1)
        return torch.zeros_like(counts).scatter_add(0, self.document.flatten().unsqueeze(-1).expand_as(counts), counts)


torch.export.register_dataclass(Segments, serialized_type_name="mixture_of_experts.Segments")


def find_segments(ids: Tensor, mask: Tensor | None) -> Segments:
    """Return the documents of packed rows: the tokens of a row with equal ids, which need not be contiguous.

    Args:
        ids: `(b, n)` integers.
        mask: `(b, n)` bool, the tokens that are not padding; None if all are.
    """
    b, n = ids.shape
    ordered, order = ids.sort(dim=-1)
    # compared with a roll: slices of length n - 1 would exclude a dynamic length of 1
    starts = (ordered != ordered.roll(1, dims=-1)) & (torch.arange(n, device=ids.device) > 0)
    rank = torch.empty_like(order).scatter(-1, order, starts.cumsum(dim=-1))
    document = rank + torch.arange(b, device=ids.device).unsqueeze(-1) * n
    real = torch.ones_like(document) if mask is None else mask.to(torch.int64)
    length = torch.zeros_like(document).flatten().scatter_add(0, document.flatten(), real.flatten())
    return Segments(document, length)


def check_segment_ids(ids: Tensor, shape: torch.Size) -> Tensor:
    """Return `ids` if they are integers of `shape`, an entry for each token."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(
            f"{SEGMENT_IDS} must be integers, got {ids.dtype}: tokens of a row with equal ids are a document"
        )
    if ids.dtype in UNSIGNED:
        ids = ids.to(torch.int64)
    if ids.shape != shape:
        raise ValueError(
            f"{SEGMENT_IDS} must have shape {tuple(shape)}, an entry for each token, got {tuple(ids.shape)}"
        )
    return ids
