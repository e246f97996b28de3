"""What a call costs on a GPU, read off its operators: launches, bytes into and out of them, bytes kept.

A launch is an operator that reads or writes memory: neither a view nor an allocation. (Some of torch's operators, a
sort for one, launch several kernels: the count is of operators.) The bytes of a launch are those of its arguments and
results, each element once. Kept is every storage alive, but those named as known.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh", "alias"}


class Counts(NamedTuple):
    """Of a forward, and of the forward with its backward."""

    launches: int
    launches_both: int
    moved_both: int  # bytes
    kept: int  # bytes


class Ledger(TorchDispatchMode):
    """Counts the operators that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.remember(result)
        if not is_free(func, args, result):
            self.add(str(func), (args, kwargs, result))
        return result

    def add(self, name: str, tensors: Any) -> None:
        self.launches[name] += 1
        self.moved[name] += sum(map(num_bytes, distinct(tensors)))

    def remember(self, tensors: Any) -> None:
        for tensor in distinct(tensors):
            storage = tensor.untyped_storage()
            self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def kept(self, known: Iterable[Tensor]) -> int:
        """Bytes alive of what was made under the ledger, `known` aside."""
        gc.collect()
        aside = {tensor.untyped_storage()._cdata for tensor in known}
        alive = ((key, size) for key, (ref, size) in self.storages.items() if not ref.expired())
        return sum(size for key, size in alive if key not in aside)


def distinct(tensors: Any) -> list[Tensor]:
    return list({id(leaf): leaf for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor)}.values())


def num_bytes(tensor: Tensor) -> int:
    """Of the elements there are: an expanded tensor has fewer than its shape says."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * tensor.element_size()


def is_free(func, args, result) -> bool:
    name = func._schema.name.split("::")[-1]
    if name in FREE or func.is_view or not tree_leaves(result):
        return True
    made = distinct(result)
    if not made or all(tensor.numel() == 0 for tensor in made):
        return True
    if name in ("_to_copy", "clone", "contiguous"):
        return False
    inputs = {t.untyped_storage()._cdata for t in distinct(args)}
    mutates = func._schema.is_mutable
    return not mutates and all(t.untyped_storage()._cdata in inputs for t in made)


def count(call: Callable[[], tuple[Tensor, ...]], known: Iterable[Tensor]) -> tuple[Counts, Ledger]:
    """Counts of `call`, which returns what is differentiated, and of the backward of their sums' total."""
    with Ledger() as ledger:
        results = call()
        forward = ledger.launches.total()
        kept = ledger.kept(known)
        torch.autograd.backward(results, [torch.empty_like(result) for result in results])
    return Counts(forward, ledger.launches.total(), ledger.moved.total(), kept), ledger
