"""Prefetches the chosen experts of a memory-mapped model by requesting all of their weights before the experts run.

Without prefetching, the operating system reads a mapped weight page by page when it is first used, and handles one
request at a time. Read-ahead also fetches neighboring pages, including those of experts that were not chosen. If the
disk's `read_ahead_kb` is large, each read-ahead can cover megabytes.
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
#: if tokens choose more than this fraction of a layer's experts, reading the whole layer in order is as fast
MAX_CHOSEN_SHARE = 0.5


@contextmanager
def prefetch_experts(model: nn.Module) -> Iterator[None]:
    """Context manager that prefetches the chosen experts of a memory-mapped model.

    Use this context manager if the experts do not fit into memory and `from_pretrained` mapped them from files. Each
    layer then requests the weights of its chosen experts before running them. Without prefetching, these weights are
    read page by page as they are used, along with neighboring pages. Prefetching does not change any results. Weights
    that are not mapped are not prefetched. If a layer chooses more than half of its experts, as is common for long
    prompts, that layer prefetches nothing.

    Args:
        model: a model with `Experts`, `GatedExperts` or `QuantizedExperts` on the CPU.

    Raises:
        OSError: the operating system is not Linux.
        ValueError: no expert weights are mapped from a file. `from_pretrained` maps the weights if it loads a folder
            written by this package onto the CPU with the dtype stored in its files. In addition, 4-bit weights must be
            stored in the layout for this machine.

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
    """Return the names of the weights that are mapped from a file, keyed by the experts that contain them."""
    files = MappedFiles.read()
    return {
        module: [name for name, weight in get_named_tensors(module, recurse=False).items() if files.contains(weight)]
        for module in model.modules()
        if isinstance(module, StackedExperts | QuantizedExperts)
    }


def prefetch_chosen(names: list[str], advise: Callable[..., int], experts: Any, args: Any, kwargs: Any = None) -> None:
    """A forward pre-hook that asks the operating system to read the weights of the chosen experts."""
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
    """Return the C library's `madvise(address, length, advice)`. Unsupported advice has no effect."""
    found = ctypes.CDLL(None).madvise
    found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return found


class MappedFiles(NamedTuple):
    """The address ranges to which files are mapped, in ascending order."""

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
