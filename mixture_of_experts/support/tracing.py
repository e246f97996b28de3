"""Helpers for tracing and recomputation: symbolic sizes, exporters, transforms and checkpointing."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint

from mixture_of_experts.support.private_torch import is_exporting, is_functorch_wrapped, is_in_transform


def symbolic_min(first: int, second: int) -> int:
    """Return the minimum, as a symbolic expression if a length is dynamic in an exported or compiled graph."""
    # lengths are ints under dynamo and symbols under exporters
    if isinstance(first, int) and isinstance(second, int):
        return min(first, second)
    return torch.sym_min(first, second)  # pyright: ignore[reportReturnType]


def symbolic_max(first: int, second: int) -> int:
    """Return the larger of two lengths. If a length is dynamic in an exported or compiled graph, the result is a
    symbolic expression."""
    if isinstance(first, int) and isinstance(second, int):
        return max(first, second)
    return torch.sym_max(first, second)  # pyright: ignore[reportReturnType]


def is_exporting_to_onnx() -> bool:
    """Return whether `torch.onnx.export` is tracing. ONNX supports neither stable sorting nor searchsorted."""
    return is_exporting() and torch.onnx.is_in_onnx_export()


def add_scaled(values: Tensor, others: Tensor, times: int) -> Tensor:
    """Return `values + times * others`. The sum requires one operator, or two in exported graphs, because ONNX does not
    support a dynamic `alpha`."""
    return values + others * times if is_exporting() else torch.add(values, others, alpha=times)


def is_host_readable(tensor: Tensor) -> bool:
    """Return whether a tensor's values can be read without a sync. The tensor must be on a CPU, and outside of traced
    graphs and transforms."""
    if torch.compiler.is_compiling():
        return False
    return type(tensor) is Tensor and tensor.device.type == "cpu" and not is_functorch_wrapped(tensor)


def has_data(tensor: Tensor) -> bool:
    """Return whether a tensor's values can be read at all, possibly after waiting for a GPU."""
    return not (torch.compiler.is_compiling() or is_in_transform() or tensor.is_meta)


def is_in_activation_checkpoint(within: FrameType | None = None) -> bool:
    """Return whether a function of torch's activation checkpointing is on the call stack above the frame `within`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not within:
        if frame.f_code.co_filename == checkpoint.__file__:
            return True
        frame = frame.f_back
    return False


def get_device_capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA device. The result is a constant in traced graphs."""
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


def disable_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context that disables autocast, so that operators preserve the dtype of their operands."""
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()
