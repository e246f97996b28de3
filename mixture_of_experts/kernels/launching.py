"""Utilities for all Triton kernels: supported devices, launches, and self-checks."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mixture_of_experts.support.batch_invariance import BATCH_INVARIANT
from mixture_of_experts.support.implementations import requested_implementation, requested_router_kernels
from mixture_of_experts.support.private_torch import (
    are_saved_tensor_hooks_enabled,
    disable_dispatch_modes,
    is_in_transform,
)
from mixture_of_experts.support.tracing import get_device_capability

# Families of cards, as in `find_card_family`, on which kernels are the default. A family is added after
# `benchmarks.first_hour` has run on one of its cards, found no fault, and measured that the kernels are the fastest.
DEFAULT_FAMILIES: tuple[tuple[int, int], ...] = ()  # for experts
DECODING_FAMILIES: tuple[tuple[int, int], ...] = ()  # for experts, only for few tokens
ROUTER_FAMILIES: tuple[tuple[int, int], ...] = ()  # for routers and queues

OUT_OF_MEMORY = "there is not enough memory to check them"
_SELF_CHECKS: list[SelfCheck] = []  # all instances


def find_card_family(capability: tuple[int, int]) -> tuple[int, int] | None:
    """Return the compute capability whose schedule a card uses, which has the same instructions and no more shared
    memory, or None for a card that the kernels do not support."""
    if capability[0] == 8:
        return (8, 0) if capability[1] in (0, 7) else (8, 6)
    return {9: (9, 0), 10: (10, 0), 11: (10, 0), 12: (12, 0)}.get(capability[0])


def device_unsupported_reason(device: torch.device) -> str | None:
    """Return why kernels cannot run on a device, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return "the kernels support only NVIDIA GPUs (or CPUs with Triton's interpreter, TRITON_INTERPRET=1)"
    if find_card_family(get_device_capability(device)) is None:
        return "the kernels do not support compute capability {}.{}".format(*get_device_capability(device))
    return None


def can_launch_kernels(device: torch.device) -> bool:
    """Return whether routers and queues launch kernels on a device.

    Without a request, they do on the cards of `ROUTER_FAMILIES`. Traced graphs use torch's operators instead, which
    compilers fuse.
    """
    if requested_implementation() == BATCH_INVARIANT or is_in_transform() or torch.compiler.is_compiling():
        return False
    requested = requested_router_kernels()
    if requested is False or device_unsupported_reason(device) is not None:
        return False
    if requested is None:
        return device.type == "cuda" and find_card_family(get_device_capability(device)) in ROUTER_FAMILIES
    return True


def make_contiguous(**tensors: Tensor | None) -> dict[str, Tensor | None]:
    """Return the named tensors made contiguous. None stays None."""
    return {name: None if tensor is None else tensor.contiguous() for name, tensor in tensors.items()}


def launch_kernel(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch a kernel. All kernels are launched here."""
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else torch.device(device):
        kernel[grid](**arguments, enable_fp_fusion=True)


@contextmanager
def isolate_from_modes(device: torch.device) -> Iterator[None]:
    """Context manager for self-checks, in which gradients are computed and values can be read, independent of the
    caller's modes.

    Activation checkpointing does not see operators inside, because a recomputation does not repeat the check.
    """
    mode = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else None
    try:
        if mode is not None:
            torch.cuda.set_sync_debug_mode("default")
        with (
            disable_dispatch_modes(),
            saved_tensors_hooks(*2 * [lambda saved: saved]) if are_saved_tensor_hooks_enabled() else nullcontext(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        if mode is not None:
            torch.cuda.set_sync_debug_mode(mode)


class SelfCheck:
    """Checks the results of kernels on a device before the first call of each kind.

    If a kernel raises or differs from torch's operators, all kinds of this check that have not passed yet are disabled
    with a warning, because a compiler that failed once is not trusted. Kinds that have passed stay enabled, because a
    recomputation must use the same implementation as its forward. For the same reason, running out of memory is stored
    as a verdict too, but only for one kind.

    Args:
        kernels: name of the kernels in the warning.
    """

    def __init__(self, kernels: str) -> None:
        self.kernels = kernels
        self.verdicts: dict[Hashable, str | None] = {}
        _SELF_CHECKS.append(self)

    def failure_reason(self, device: torch.device, kind: Hashable, find_fault: Callable[[], str | None]) -> str | None:
        """Check the kernels for a kind of calls, and return why they failed, or None if they are correct.

        Args:
            device: the device of the call.
            kind: the properties that compiled programs depend on; each kind is checked once.
            find_fault: a function that computes such a call, and returns a description of the fault or None.
        """
        verdicts = self.verdicts
        if kind in verdicts:
            return verdicts[kind]
        # iterate over a copy, because other threads may add verdicts
        if wrong := next((said for said in list(verdicts.values()) if said not in (None, OUT_OF_MEMORY)), None):
            return wrong
        if device.type == "cuda" and is_capturing_graph(device):
            warnings.warn(
                f"a CUDA graph is captured without {self.kernels}, because they have not been checked yet. Call the "
                "layer or ops.prepare once before the capture",
                stacklevel=2,
            )
            return "they were not checked before this stream was captured"
        try:
            with isolate_from_modes(device):
                verdict = find_fault()
        except torch.OutOfMemoryError:
            verdict = OUT_OF_MEMORY
        except Exception as reason:  # compilers and drivers may raise anything
            verdict = f"they raise {type(reason).__name__}: {str(reason).partition(chr(10))[0]}"
        self.verdicts[kind] = verdict
        off = f"in this process: {verdict}"
        if verdict == OUT_OF_MEMORY:
            off = f"for calls of one kind in this process, because {OUT_OF_MEMORY}; call ops.prepare earlier"
        if verdict:
            warnings.warn(f"{self.kernels} are disabled {off}", stacklevel=2)
        return verdict


def clear_out_of_memory_verdicts() -> None:
    """Remove the verdicts of kinds that could not be checked for lack of memory, so that they are checked again."""
    for check in _SELF_CHECKS:
        check.verdicts = {kind: verdict for kind, verdict in list(check.verdicts.items()) if verdict != OUT_OF_MEMORY}


def is_capturing_graph(device: torch.device) -> bool:
    """Return whether the current stream of a CUDA device is being captured into a graph."""
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
