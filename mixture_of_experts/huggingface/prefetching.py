"""Prefetches the chosen experts of a memory-mapped model by requesting them together before they are computed.

By default, a mapped weight is read when it is first used. The system then reads ahead beyond each page, including pages
of experts that were not chosen (megabytes if the disk's `read_ahead_kb` is large), and handles one request after
another.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from mixture_of_experts.dispatch.assignments import Assignments
from mixture_of_experts.experts import StackedExperts
from mixture_of_experts.huggingface.feed_forward import get_named_tensors
from mixture_of_experts.quantize import QuantizedExperts
from mixture_of_experts.support.attachments import Attachments
from mixture_of_experts.support.checks import check_model
from mixture_of_experts.support.tracing import is_host_readable

MEMORY_MAP = Path("/proc/self/maps")
#: above this fraction of a layer's experts, reading the whole layer in order is as fast
MAX_CHOSEN_SHARE = 0.5


@contextmanager
def prefetch_experts(model: nn.Module) -> Iterator[None]:
    """Context manager that prefetches the chosen experts of a memory-mapped model.

    Use it for models whose experts are larger than memory and were mapped by `from_pretrained`. Each layer requests the
    weights of its chosen experts before computing them; without prefetching, they are read page by page as they are
    used, along with neighboring pages. Results are the same. Nothing is prefetched for weights that are not mapped, or
    if a layer chooses more than half of its experts, as for long prompts.

    Args:
        model: a model with `Experts`, `GatedExperts` or `QuantizedExperts` on the CPU.

    Raises:
        OSError: the system is not Linux.
        ValueError: no weights of experts are mapped from a file. `from_pretrained` maps them if it loads a folder
            written by this package on the CPU in the dtype of its files and, for 4-bit weights, in the layout of this
            machine.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from mixture_of_experts.huggingface import from_pretrained, prefetch_experts, upcycle
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...     num_hidden_layers=1, num_attention_heads=4))
        >>> names = upcycle(model, num_experts=8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     loaded = from_pretrained(folder)
        >>> with prefetch_experts(loaded):
        ...     loaded(torch.tensor([[1, 2]])).logits.shape
        torch.Size([1, 2, 64])
    """
    stacks = find_mapped_stacks(check_model("model", model))
    if not any(stacks.values()):
        raise ValueError(
            f"{type(model).__name__} has no memory-mapped expert weights; load a folder written by this package with "
            "dtype='auto' on the CPU. For 4-bit weights, first run `python -m mixture_of_experts.huggingface convert` "
            "on the folder to write the layout for this machine"
        )
    advise = load_madvise()
    with Attachments() as attached:
        for experts, names in stacks.items():
            if names:
                attached.add_forward_pre_hook(experts, partial(prefetch_chosen, names, advise))
        yield


def find_mapped_stacks(model: nn.Module) -> dict[Any, list[str]]:
    """Return the names of the weights that are mapped from a file, for each stack of experts."""
    files = MappedFiles.read()
    return {
        module: [name for name, weight in get_named_tensors(module, recurse=False).items() if files.contains(weight)]
        for module in model.modules()
        if isinstance(module, StackedExperts | QuantizedExperts)
    }


def prefetch_chosen(names: list[str], advise: Callable[..., int], experts: Any, args: Any, kwargs: Any = None) -> None:
    """Forward pre-hook of experts that asks the system to read the weights of the chosen ones."""
    found = (given for given in (*args, *(kwargs or {}).values()) if isinstance(given, Assignments))
    assignments = next(found, None)
    if assignments is None or not is_host_readable(assignments.weight):
        return
    chosen = assignments.expert[assignments.kept].unique().tolist()
    if len(chosen) > MAX_CHOSEN_SHARE * math.prod(experts.expert_dims):
        return
    for name in names:
        weight = getattr(experts, name).flatten(0, len(experts.expert_dims) - 1)
        size = weight.stride(0) * weight.element_size()
        for expert in chosen:
            start = weight.data_ptr() + expert * size
            page = start - start % mmap.PAGESIZE
            advise(page, start + size - page, mmap.MADV_WILLNEED)


def load_madvise() -> Callable[..., int]:
    """Return the system's `madvise(address, length, advice)`. Unsupported advice has no effect."""
    found = ctypes.CDLL(None).madvise
    found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return found


class MappedFiles(NamedTuple):
    """The addresses at which files are mapped, in ascending order."""

    starts: list[int]
    stops: list[int]

    @staticmethod
    def read() -> MappedFiles:
        if not MEMORY_MAP.exists():
            raise OSError(f"{MEMORY_MAP} does not exist; finding memory-mapped weights requires Linux")
        lines = [line.split() for line in MEMORY_MAP.read_bytes().splitlines()]
        spans = sorted([int(edge, 16) for edge in line[0].split(b"-")] for line in lines if line[4] != b"0")  # inode
        return MappedFiles([start for start, _ in spans], [stop for _, stop in spans])

    def contains(self, weight: Tensor) -> bool:
        if weight.device.type != "cpu" or not weight.is_contiguous():
            return False
        index = bisect_right(self.starts, weight.data_ptr()) - 1
        return index >= 0 and weight.data_ptr() < self.stops[index]
