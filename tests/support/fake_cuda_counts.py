"""What a call costs on a GPU, read off its operators: launches, bytes into and out of them, bytes kept.

A launch is an operator that reads or writes memory: neither a view nor an allocation. (Some of torch's operators, a
sort for one, launch several kernels: the count is of operators.) The bytes of a launch are those of its arguments and
results, each element once. Kept is every storage alive, but those named as known.
"""

from __future__ import annotations

import gc
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FREE_OPERATORS = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "alias",
}

#: where kernels start
LAUNCHES = (
    "mixture_of_experts.ops.triton.operators.launch_kernel",
    "mixture_of_experts.kernels.top_k.launch_kernel",
    "mixture_of_experts.kernels.queueing.launch_kernel",
    "mixture_of_experts.kernels.top_2.launch_kernel",
)


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
        if (inside := find_operator_name(func)) is not None:
            with self:
                return inside(*args, **kwargs)
        result = func(*args, **kwargs)
        self.remember(result)
        if not is_free(func, args, result):
            self.add(str(func), (args, kwargs, result))
        return result

    def launch(self, kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        """A Triton kernel, in the place of `operators.launch`. Of what it gathers, as many rows as it reads."""
        self.add(kernel.fn.__name__, ())
        gathered = {"hidden_grads": "grad", "weight_grads": "x" if arguments.get("GATHER_X") else "y"}
        gathered |= {"bias_grads_kernel": "y"} if arguments.get("token") is not None else {}
        for name, tensor in arguments.items():
            if isinstance(tensor, Tensor):
                size = num_bytes(tensor)
                if gathered.get(kernel.fn.__name__) == name:
                    size = arguments["token"].shape[0] * tensor.shape[-1] * tensor.element_size()
                self.moved[kernel.fn.__name__] += size

    @contextmanager
    def count_kernels(self) -> Iterator[None]:
        """Where launches of kernels are counted, and none starts."""
        with pytest.MonkeyPatch.context() as patch:
            for where in LAUNCHES if importlib.util.find_spec("triton") else ():
                patch.setattr(where, self.launch)
            yield

    def add(self, name: str, tensors: Any) -> None:
        self.launches[name] += 1
        self.moved[name] += sum(map(num_bytes, unique_tensors(tensors)))

    def remember(self, tensors: Any) -> None:
        for tensor in unique_tensors(tensors):
            storage = tensor.untyped_storage()
            self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def get_kept(self, known: Iterable[Tensor]) -> int:
        """Bytes alive of what was made under the ledger, `known` aside."""
        gc.collect()
        aside = {tensor.untyped_storage()._cdata for tensor in known}
        alive = ((key, size) for key, (ref, size) in self.storages.items() if not ref.expired())
        return sum(size for key, size in alive if key not in aside)


def find_operator_name(func) -> Callable[..., Any] | None:
    """What an operator of this package does, which is what is counted."""
    if func.namespace != "mixture_of_experts":
        return None
    from torch._library.custom_ops import OPDEFS

    operator = OPDEFS[func._schema.name]
    return operator._backend_fns.get("cuda") or operator._backend_fns.get(None)


def unique_tensors(tensors: Any) -> list[Tensor]:
    return list({id(leaf): leaf for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor)}.values())


def num_bytes(tensor: Tensor) -> int:
    """Of the elements there are: an expanded tensor has fewer than its shape says."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * tensor.element_size()


def is_free(func, args, result) -> bool:
    name = func._schema.name.split("::")[-1]
    if name in FREE_OPERATORS or func.is_view or not tree_leaves(result):
        return True
    made = unique_tensors(result)
    if not made or all(tensor.numel() == 0 for tensor in made):
        return True
    if name in ("_to_copy", "clone", "contiguous"):
        return False
    inputs = {t.untyped_storage()._cdata for t in unique_tensors(args)}
    mutates = func._schema.is_mutable
    return not mutates and all(t.untyped_storage()._cdata in inputs for t in made)


def count_call(call: Callable[[], Sequence[Tensor]], known: Iterable[Tensor]) -> Counts:
    """Counts of `call`, which returns what is differentiated, and of the backward."""
    with Ledger() as ledger, ledger.count_kernels():
        results = call()
        forward = ledger.launches.total()
        kept = ledger.get_kept(known)
        torch.autograd.backward(results, [torch.empty_like(result) for result in results])
    return Counts(forward, ledger.launches.total(), ledger.moved.total(), kept)
