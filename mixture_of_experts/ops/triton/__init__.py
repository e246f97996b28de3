"""The way of Triton kernels, for NVIDIA GPUs: proven without one, timed on none yet, and taken only when asked for."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from mixture_of_experts.ops.activations import why_hooked
from mixture_of_experts.ops.call import Call
from mixture_of_experts.ops.network import Network
from mixture_of_experts.ops.triton.form import form_of
from mixture_of_experts.ops.triton.schedule import PROVEN
from mixture_of_experts.tracing import capability, exporting, in_transform

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MULTIPLE = 16  # other sizes would be right too, but loads that are not aligned are slow and take more registers
WIDEST = 1 << 24  # int32 holds the places of 128 rows, the most that a tile has, up to this width


def why_not(call: Call) -> str | None:
    """Networks that kernels are written for, on cards that they were compiled for."""
    x, network = call.x, call.network
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if in_transform():
        return "kernels do not run under transforms of torch.func"
    if exporting():
        return "an exported graph has torch's own operators only"
    return _why_not_on(x.device) or _why_not_of(x.dtype, network)


def run(call: Call) -> Tensor:
    """Tokens `(t, d)` to `(t, o)`."""
    from mixture_of_experts.ops.triton import network  # it imports triton, which takes a second

    return network.run(call)


def _why_not_on(device: torch.device) -> str | None:
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return "kernels are for NVIDIA GPUs (on the CPU for Triton's interpreter, by TRITON_INTERPRET=1)"
    if capability(device) not in PROVEN:
        return "compute capability {}.{} is none that the kernels were compiled for".format(*capability(device))
    return None


def _why_not_of(dtype: torch.dtype, network: Network) -> str | None:
    if dtype not in DTYPES:
        return f"kernels compute bfloat16, float16 and float32, not {dtype}"
    if form_of(network) is None:
        return f"no kernel knows the activation {network.activation!r} of these experts"
    if len({bias is None for bias in network.b_in}) > 1:
        return "kernels take a bias for every input weight or for none"
    for weight in (*network.w_in, network.w_out):
        sizes, strides = weight.shape[-2:], weight.stride()[-2:]
        if any(size % MULTIPLE for size in sizes):
            return f"kernels want sizes that are multiples of {MULTIPLE}, not {tuple(sizes)}"
        if max(sizes) > WIDEST or max(math.prod(sizes), _span(sizes, strides)) >= 1 << 31:
            return f"an expert's matrix {tuple(sizes)} is too large: kernels find places in it by numbers of int32"
    return why_hooked(network.activation)


def _span(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to one past the last, or a few more."""
    return sum(size * stride for size, stride in zip(sizes, strides, strict=True))
