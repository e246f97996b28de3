"""Implements expert calls on CPUs as a single `torch.autograd.Function`. Decoding uses a shorter code path."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixture_of_experts.ops.cpu import chunked, decode
from mixture_of_experts.ops.network import Call
from mixture_of_experts.support.private_torch import is_in_transform


def unsupported_reason(call: Call) -> str | None:
    """Return the reason why this implementation does not support a call, or None if it does. The implementation
    requires plain, readable CPU tensors and a known activation."""
    if call.x.device.type != "cpu":
        return f"the tokens are on {call.x.device.type}"
    if torch.compiler.is_compiling():
        return "row counts cannot be read while a graph is traced"
    if is_in_transform():
        return "row counts cannot be read in a transform of torch.func"
    for tensor in (call.x, *call.network.tensors().values()):
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"it supports only plain tensors, got {type(tensor).__name__}"
    return call.network.unsupported_activation_reason()


def run(call: Call) -> Tensor:
    """Compute the outputs `(t, o)` of a call."""
    few = call.is_inference() and call.assignments.weight.numel() <= decode.MAX_DECODE_ROWS
    return decode.run(call) if few else chunked.run(call)
