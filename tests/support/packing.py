"""Packed rows, and the batch in which each of their documents is a row of its own, padded: the reference of packing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import TorchFunctionMode


class Documents:
    """The documents of packed rows, found by a loop.

    Args:
        ids: `(..., n)` integers.
        mask: `(..., n)` bool, or None.
    """

    def __init__(self, ids: Tensor, mask: Tensor | None = None) -> None:
        rows = ids.reshape(torch.Size(ids.shape[:-1]).numel(), ids.shape[-1])
        real = torch.ones_like(rows, dtype=torch.bool) if mask is None else mask.reshape(rows.shape)
        self.shape = ids.shape
        self.places: list[list[int]] = []  # of each document: its tokens among all of the call
        for row in range(rows.shape[0]):
            found: dict[int, list[int]] = {}
            for i in range(rows.shape[1]):
                if real[row, i]:
                    found.setdefault(int(rows[row, i]), []).append(row * rows.shape[1] + i)
            self.places += found.values()

    @property
    def mask(self) -> Tensor:
        """`(documents, longest)` bool, which positions of the padded batch have a token."""
        return self.pad([torch.ones(len(places), dtype=torch.bool) for places in self.places])

    def pad(self, parts: Sequence[Tensor]) -> Tensor:
        return pad_sequence(list(parts), batch_first=True) if parts else torch.zeros(0, 0, dtype=torch.bool)

    def split(self, values: Tensor) -> list[Tensor]:
        """Values `(..., n, *)` of tokens as one tensor `(length, *)` for each document."""
        flat = values.reshape(-1, *values.shape[len(self.shape) :])
        return [flat[places] for places in self.places]

    def unpack(self, values: Tensor) -> Tensor:
        """Values `(..., n, *)` of packed tokens as a padded batch `(documents, longest, *)`."""
        if not self.places:
            return values.new_zeros(0, 0, *values.shape[len(self.shape) :])
        return self.pad(self.split(values))

    def pack(self, values: Tensor) -> Tensor:
        """Values `(documents, longest, *)` as packed rows `(..., n, *)`, 0 at padding."""
        packed = values.new_zeros(self.shape.numel(), *values.shape[2:])
        for document, places in enumerate(self.places):
            packed = packed.index_copy(0, torch.tensor(places), values[document, : len(places)])
        return packed.view(*self.shape, *values.shape[2:])


class SameDraws(TorchFunctionMode):
    """Gives the padded batch what torch draws for packed rows: with `draws` of a packed call these, token by token."""

    NAMES = ("rand", "rand_like", "randn", "randn_like")
    IN_PLACE = ("uniform_", "normal_", "exponential_")

    def __init__(self, documents: Documents, draws: list[Tensor] | None = None) -> None:
        super().__init__()
        self.documents, self.replayed = documents, None if draws is None else list(draws)
        self.draws: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, result = getattr(func, "__name__", ""), func(*args, **(kwargs or {}))
        if name not in (*self.NAMES, *self.IN_PLACE):
            return result
        if self.replayed is None:
            self.draws.append(result.detach().clone())
            return result
        drawn = self.replayed.pop(0)
        drawn = self.documents.unpack(drawn.view(*self.documents.shape, *drawn.shape[2:]))
        if name in self.IN_PLACE:
            with torch.no_grad():
                return result.copy_(drawn)
        return drawn
