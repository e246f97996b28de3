"""Utilities for all Triton kernels: supported devices, launches, and self-checks."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from mixture_of_experts.kernels import check_process
from mixture_of_experts.kernels.check_process import OUT_OF_MEMORY
from mixture_of_experts.kernels.verdict_file import VerdictFile
from mixture_of_experts.support.batch_invariance import BATCH_INVARIANT
from mixture_of_experts.support.implementations import requested_implementation, requested_router_kernels
from mixture_of_experts.support.private_torch import is_in_transform
from mixture_of_experts.support.tracing import get_device_capability

# Card families (see `find_card_family`) on which kernels are used by default. A family is added once
# `benchmarks.first_hour` has run on one of its cards, found no faults, and shown that the kernels are the fastest
# implementation.
DEFAULT_FAMILIES: tuple[tuple[int, int], ...] = ()  # for experts
DECODING_FAMILIES: tuple[tuple[int, int], ...] = ()  # for experts during decoding only
ROUTER_FAMILIES: tuple[tuple[int, int], ...] = ()  # for routers and queues

_SELF_CHECKS: list[SelfCheck] = []  # all instances


def find_card_family(capability: tuple[int, int]) -> tuple[int, int] | None:
    """Return the family of a card, or None if the kernels do not support it.

    A family is represented by a compute capability. All cards in a family support the instructions of this capability
    and have at least as much shared memory, so they share a schedule.
    """
    if capability[0] == 8:
        return (8, 0) if capability[1] in (0, 7) else (8, 6)
    return {9: (9, 0), 10: (10, 0), 11: (10, 0), 12: (12, 0)}.get(capability[0])


def device_unsupported_reason(device: torch.device) -> str | None:
    """Return the reason why kernels cannot run on a device, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return "the kernels support only NVIDIA GPUs, and CPUs if TRITON_INTERPRET=1 is set"
    if find_card_family(get_device_capability(device)) is None:
        return "the kernels do not support compute capability {}.{}".format(*get_device_capability(device))
    return None


def can_launch_kernels(device: torch.device) -> bool:
    """Return whether routers and queues launch kernels on a device.

    By default, kernels are launched only on cards in `ROUTER_FAMILIES`. Traced graphs use torch's operators instead,
    which compilers can fuse.
    """
    if requested_implementation() == BATCH_INVARIANT or is_in_transform() or torch.compiler.is_compiling():
        return False
    requested = requested_router_kernels()
    if requested is None:
        requested = device.type == "cuda" and find_card_family(get_device_capability(device)) in ROUTER_FAMILIES
    return requested and device_unsupported_reason(device) is None


def make_contiguous(**tensors: Tensor | None) -> dict[str, Tensor | None]:
    """Return the arguments with all tensors made contiguous."""
    return {name: None if tensor is None else tensor.contiguous() for name, tensor in tensors.items()}


def launch_kernel(kernel: Any, grid: tuple[Any, ...], **arguments: Any) -> None:
    """Launch a kernel. All kernels are launched by this function."""
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else torch.device(device):
        kernel[grid](**arguments, enable_fp_fusion=True)


class SelfCheck:
    """Checks the kernels' results in a separate process before the first call of each kind.

    If a kernel raises an error, hangs, crashes, or disagrees with torch's operators, all kinds of calls that have not
    yet passed the check are disabled with a warning, because the compiler is no longer trusted. Kinds that have passed
    remain enabled, because a recomputation must use the same implementation as its forward pass. For the same reason,
    an out-of-memory error is also stored as a verdict, but it disables only one kind. A verdict is also saved to disk
    if repeating the check would produce the same verdict.

    Args:
        kernels: name of the kernels, for use in warnings.
    """

    def __init__(self, kernels: str) -> None:
        self.kernels = kernels
        self.verdicts: dict[Hashable, str | None] = {}
        _SELF_CHECKS.append(self)

    def failure_reason(self, device: torch.device, kind: Hashable, find_fault: Callable[[], str | None]) -> str | None:
        """Check the kernels for one kind of call. Return the reason for a failure, or None if the kernels are correct.

        Args:
            device: device of the call.
            kind: the call's properties, other than the device, that determine which programs are compiled. Each kind is
                checked once.
            find_fault: a picklable function that runs a call of this kind and returns a description of the fault, or
                None.
        """
        verdicts, key = self.verdicts, (device, kind)
        if key in verdicts:
            return verdicts[key]
        # iterate over a copy, because other threads may add verdicts
        if wrong := next((said for said in list(verdicts.values()) if said not in (None, OUT_OF_MEMORY)), None):
            return wrong
        if device.type == "cuda" and is_capturing_graph(device):
            warnings.warn(
                f"{self.kernels} are not used in this CUDA graph, because they have not been checked yet; call the "
                "layer or ops.prepare once before the capture",
                stacklevel=2,
            )
            return "they were not checked before the capture of the CUDA graph"
        file = VerdictFile(device, self.kernels, kind)
        if stored := file.read():
            fault, where = stored[0], f" (stored in {file.path}; delete it to check again)"
        else:
            (fault, is_final), where = check_process.run_in_process(device, find_fault), ""
            if is_final:
                file.write(fault)
        self.verdicts[key] = fault
        off = f"in this process: {fault}{where}"
        if fault == OUT_OF_MEMORY:
            off = f"for calls of one kind in this process, because {OUT_OF_MEMORY}; call ops.prepare earlier"
        if fault:
            warnings.warn(f"{self.kernels} are disabled {off}", stacklevel=2)
        return fault


def clear_out_of_memory_verdicts() -> None:
    """Remove the verdicts of self-checks that ran out of memory, so that these checks are repeated."""
    for check in _SELF_CHECKS:
        check.verdicts = {kind: verdict for kind, verdict in list(check.verdicts.items()) if verdict != OUT_OF_MEMORY}


def is_capturing_graph(device: torch.device) -> bool:
    """Return whether a CUDA device's current stream is being captured into a graph."""
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
