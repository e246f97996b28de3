"""Every access of a kernel to memory, checked while Triton's interpreter runs it.

Within `watched(operators)` each tensor of a launch lies in a buffer of its own, between margins. An `AccessError` is
raised for a place that is none of the tensor's (in a margin, or between the elements of a view), for a place that
nobody has written (fresh memory, which `triton_interpreter` fills), for two programs that write one place, and for a
place that one launch both reads and writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

MARGIN = 4096  # elements before a tensor and behind it
NO_PROGRAM = -1


class AccessError(Exception):
    """A kernel reads or writes where it may not."""


class Buffer:
    """A tensor of a launch, between margins."""

    def __init__(self, name: str, original: Tensor) -> None:
        self.name, self.original = name, original
        sizes, strides = original.shape, original.stride()
        length = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        length = length if original.numel() else 0
        memory = torch.zeros(length + 2 * MARGIN, dtype=original.dtype)
        memory[MARGIN : MARGIN + length] = original.as_strided((length,), (1,))
        self.tensor = memory.as_strided(sizes, strides, MARGIN)
        self.start, self.item = memory.data_ptr(), memory.element_size()
        self.owned = np.zeros(len(memory), bool)
        self.owned[torch.arange(len(memory)).as_strided(sizes, strides, MARGIN).flatten().numpy()] = True
        self.fresh = is_fresh(memory).numpy()
        self.read = np.zeros(len(memory), bool)
        self.writer = np.full(len(memory), NO_PROGRAM)

    def element_indices(self, addresses: np.ndarray) -> np.ndarray | None:
        """The elements at these addresses; None if the first is elsewhere."""
        place, rest = np.divmod(addresses - self.start, self.item)
        if not 0 <= place[0] < len(self.owned):
            return None
        if rest.any() or (place < 0).any() or (place >= len(self.owned)).any() or not self.owned[place].all():
            raise AccessError(f"{self.name} has no such element")
        return place

    def note_read(self, place: np.ndarray) -> None:
        if self.fresh[place].any():
            raise AccessError(f"nobody has written what is read of {self.name}")
        self.read[place] = True

    def note_write(self, place: np.ndarray, program: int) -> None:
        before = self.writer[place]
        if len(np.unique(place)) < len(place) or ((before != NO_PROGRAM) & (before != program)).any():
            raise AccessError(f"a place of {self.name} is written twice")
        self.writer[place] = program

    def original_values(self, places: np.ndarray) -> np.ndarray:
        """Addresses in the tensor's own memory of those elements."""
        return self.original.data_ptr() + (places.nonzero()[0] - MARGIN) * self.item


def check_all_written(buffers: list[Buffer]) -> None:
    """Hand back what was written, if nothing of it was read, and nothing written as another tensor's too."""
    for buffer in buffers:
        written = buffer.original_values(buffer.writer != NO_PROGRAM)
        for other in buffers:
            if len(np.intersect1d(written, other.original_values(other.read))):
                raise AccessError(f"a place of {buffer.name} is written, and read as one of {other.name}")
            if other is not buffer and len(np.intersect1d(written, other.original_values(other.writer != NO_PROGRAM))):
                raise AccessError(f"a place of {buffer.name} is written, and as one of {other.name}")
    for buffer in buffers:
        if (buffer.writer != NO_PROGRAM).any():
            buffer.original.copy_(buffer.tensor)


def is_fresh(memory: Tensor) -> Tensor:
    """What torch fills fresh memory with, where it has to be deterministic; of booleans nobody can tell."""
    if memory.dtype == torch.bool:
        return torch.zeros_like(memory)
    return memory.isnan() if memory.is_floating_point() else memory == torch.iinfo(memory.dtype).max


@contextmanager
def watch_memory(*modules: Any) -> Iterator[None]:
    """Where launches of these modules are checked; there must be no others."""
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    buffers: list[Buffer] = []

    def find(pointers: Any, mask: Any) -> tuple[Buffer, np.ndarray] | None:
        addresses = np.atleast_1d(pointers.data)[np.atleast_1d(mask.data)].astype(np.int64)
        if not len(addresses):
            return None
        for buffer in buffers:
            if (place := buffer.element_indices(addresses)) is not None:
                return buffer, place
        raise AccessError("this is no tensor of the launch")

    def checked_load(self, pointers, mask, *rest):
        if found := find(pointers, mask):
            found[0].note_read(found[1])
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        if found := find(pointers, mask):
            index, size = self.grid_idx, self.grid_dim
            found[0].note_write(found[1], (index[0] * size[1] + index[1]) * size[2] + index[2])
        return store(self, pointers, value, mask, *rest)

    def checked(launch):
        def checked_launch(kernel, grid, **arguments):
            buffers[:] = [Buffer(name, value) for name, value in arguments.items() if isinstance(value, Tensor)]
            launch(kernel, grid, **arguments | {buffer.name: buffer.tensor for buffer in buffers})
            check_all_written(buffers)

        return checked_launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", checked_load)
        patch.setattr(builder, "create_masked_store", checked_store)
        for module in modules:
            patch.setattr(module, "launch_kernel", checked(module.launch_kernel))
        yield
