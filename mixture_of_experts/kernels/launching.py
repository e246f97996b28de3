"""Utilities of all Triton kernels: on which devices they run, how they are launched, and their self-checks."""

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

from mixture_of_experts.support.implementations import requested_implementation
from mixture_of_experts.support.private_torch import (
    are_saved_tensor_hooks_enabled,
    disable_dispatch_modes,
    is_in_transform,
)
from mixture_of_experts.support.tracing import get_device_capability

OUT_OF_MEMORY = "there is no memory to check them"
_SELF_CHECKS: list[SelfCheck] = []  # all instances


def find_card_family(capability: tuple[int, int]) -> tuple[int, int] | None:
    """Return the compute capability for which kernels on a card are scheduled: one with the same instructions and no
    more shared memory. None for a card that the kernels do not support."""
    if capability[0] == 8:
        return (8, 0) if capability[1] in (0, 7) else (8, 6)
    return {9: (9, 0), 10: (10, 0), 11: (10, 0), 12: (12, 0)}.get(capability[0])


def device_unsupported_reason(device: torch.device) -> str | None:
    """Return why kernels cannot run on a device; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return "kernels are for NVIDIA GPUs (on the CPU for Triton's interpreter, by TRITON_INTERPRET=1)"
    if find_card_family(get_device_capability(device)) is None:
        return "no kernel is written for compute capability {}.{}".format(*get_device_capability(device))
    return None


def can_launch_kernels(device: torch.device) -> bool:
    """Return whether routers may launch kernels on a device.

    They may where kernels run: on a GPU, unless another implementation is requested; on a CPU, if "triton" is
    requested. A traced graph uses torch's operators, which compilers fuse.
    """
    way = requested_implementation()
    if way not in ("auto", "triton") or is_in_transform() or torch.compiler.is_compiling():
        return False
    return (device.type == "cuda" or way == "triton") and device_unsupported_reason(device) is None


def make_contiguous(**tensors: Tensor | None) -> dict[str, Tensor | None]:
    """Return the tensors by their names, each made contiguous; None stays None."""
    return {name: None if tensor is None else tensor.contiguous() for name, tensor in tensors.items()}


def launch_kernel(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch a kernel. All kernels are launched here."""
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else torch.device(device):
        kernel[grid](**arguments, enable_fp_fusion=True)


@contextmanager
def isolate_from_modes(device: torch.device) -> Iterator[None]:
    """A context for checks: gradients are computed and values can be read, whatever modes the caller has set.

    It is invisible to activation checkpointing, because a recomputation does not check again.
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
    """Checks, before the first call of each kind, that kernels compute what they should on a device.

    A kernel whose results differ from those of torch's operators, or that raises, disables all kinds of this check that
    have not passed yet, with a warning: a compiler that was wrong once is not trusted again. Kinds that have passed
    stay enabled, because a recomputation must use the same implementation as its forward. For the same reason, running
    out of memory is stored as a verdict too, but for one kind only.

    Args:
        kernels: name of the kernels in the warning.
    """

    def __init__(self, kernels: str) -> None:
        self.kernels = kernels
        self.verdicts: dict[Hashable, str | None] = {}
        _SELF_CHECKS.append(self)

    def failure_reason(self, device: torch.device, kind: Hashable, find_fault: Callable[[], str | None]) -> str | None:
        """Check the kernels for a kind of calls. Returns what is wrong with them, or None if they are correct.

        Args:
            device: the device of the call.
            kind: what programs depend on; each kind is checked once.
            find_fault: a function that computes such a call and returns what is wrong, or None.
        """
        verdicts = self.verdicts
        if kind in verdicts:
            return verdicts[kind]
        # iterate over a list: other threads may add verdicts meanwhile
        if wrong := next((said for said in list(verdicts.values()) if said not in (None, OUT_OF_MEMORY)), None):
            return wrong
        if device.type == "cuda" and is_capturing_graph(device):
            warnings.warn(
                f"a CUDA graph is captured before {self.kernels} were checked, and is captured without them: run the "
                "layer once before, or ops.prepare",
                stacklevel=2,
            )
            return "they were not checked before this stream was captured"
        try:
            with isolate_from_modes(device):
                verdict = find_fault()
        except torch.OutOfMemoryError:
            verdict = OUT_OF_MEMORY
        except Exception as reason:  # whatever a compiler or a driver raises
            verdict = f"they raise {type(reason).__name__}: {str(reason).partition(chr(10))[0]}"
        self.verdicts[kind] = verdict
        off = f"in this process: {verdict}"
        if verdict == OUT_OF_MEMORY:
            off = (
                f"for calls of one kind in this process, because {OUT_OF_MEMORY}: call ops.prepare before memory "
                f"is full"
            )
        if verdict:
            warnings.warn(f"{self.kernels} are off {off}", stacklevel=2)
        return verdict


def clear_out_of_memory_verdicts() -> None:
    """Forget the verdicts of kinds that could not be checked for lack of memory, so that they are checked again."""
    for check in _SELF_CHECKS:
        check.verdicts = {kind: verdict for kind, verdict in list(check.verdicts.items()) if verdict != OUT_OF_MEMORY}


def is_capturing_graph(device: torch.device) -> bool:
    """Return whether the current stream of a CUDA device is being captured into a graph."""
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
