"""Defines `Segments`, the documents in packed rows. Each document is a separate group of tokens.

Axes: b (rows), n (tokens per row), k (choices per token), e (experts). Documents are numbered from 0 to b n - 1. Unused
numbers represent empty documents, so that no shape depends on the number of documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SEGMENT_IDS = "segment_ids"  # name of the argument of layers and gates
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # operators such as sort do not support all of these dtypes


@dataclass(frozen=True, eq=False)
class Segments:
    """The documents to which the tokens of packed rows belong.

    Attributes:
        document: `(b, n)` int64, the index of each token's document.
        length: `(b n,)` int64, the number of real tokens in each document.
    """

    document: Tensor
    length: Tensor

    @property
    def num_documents(self) -> Tensor:
        """The number of documents that contain real tokens, as a 0-dim int64 tensor."""
        return (self.length > 0).sum()

    def map_to_tokens(self, values: Tensor) -> Tensor:
        """Map per-document values `(b n, ...)` to tokens, and return a tensor of shape `(b, n, ...)`."""
        return values.index_select(0, self.document.flatten()).unflatten(0, self.document.shape)

    def map_to_assignments(self, values: Tensor, k: int) -> Tensor:
        """Map per-document values `(b n,)` to assignments, and return a tensor of shape `(b, n k)`."""
        return self.map_to_tokens(values).repeat_interleave(k, dim=-1)

    def count_experts(self, expert: Tensor, counted: Tensor | None, num_experts: int) -> Tensor:
        """Count how often the `counted` choices `(b, n, k)` in each document select each expert, and return an int64
        tensor of shape `(b n, e)`."""
        cell = (self.document.unsqueeze(-1) * num_experts + expert).flatten()
        ones = torch.ones_like(expert) if counted is None else counted.to(torch.int64).expand_as(expert)
        # `scatter_add` copies the expanded zero, so only one table is allocated
        empty = torch.zeros((), dtype=torch.int64, device=expert.device).expand(self.length.shape[0] * num_experts)
        return empty.scatter_add(0, cell, ones.flatten()).unflatten(0, (-1, num_experts))

    def sum_counts(self, counts: Tensor) -> Tensor:
        """Sum integer counts `(b, n, e)` over the tokens of each document, and return a tensor of shape `(b n, e)`."""
        counts = counts.to(torch.int64).flatten(0, 1)
        return torch.zeros_like(counts).scatter_add(0, self.document.flatten().unsqueeze(-1).expand_as(counts), counts)


torch.export.register_dataclass(Segments, serialized_type_name="mixture_of_experts.Segments")


def find_segments(ids: Tensor, mask: Tensor | None) -> Segments:
    """Return the documents in packed rows. The tokens in a row with equal ids form a document, even if they are not
    contiguous.

    Args:
        ids: `(b, n)` integers.
        mask: `(b, n)` bool mask of the real tokens, or None if there is no padding.
    """
    b, n = ids.shape
    ordered, order = ids.sort(dim=-1)
    # slices of length n - 1 would exclude a dynamic length of 1, so use roll
    starts = (ordered != ordered.roll(1, dims=-1)) & (torch.arange(n, device=ids.device) > 0)
    rank = torch.empty_like(order).scatter(-1, order, starts.cumsum(dim=-1))
    document = rank + torch.arange(b, device=ids.device).unsqueeze(-1) * n
    real = torch.ones_like(document) if mask is None else mask.to(torch.int64)
    length = torch.zeros_like(document).flatten().scatter_add(0, document.flatten(), real.flatten())
    return Segments(document, length)


def check_segment_ids(ids: Tensor, shape: torch.Size) -> Tensor:
    """Check that `ids` contains one integer per token and has the given shape, and return it in a signed dtype."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(
            f"{SEGMENT_IDS} must be an integer tensor, got {ids.dtype}; tokens with equal ids in a row form a document"
        )
    if ids.dtype in UNSIGNED:
        ids = ids.to(torch.int64)
    if ids.shape != shape:
        raise ValueError(
            f"{SEGMENT_IDS} must have shape {tuple(shape)}, with one entry per token, got {tuple(ids.shape)}"
        )
    return ids
