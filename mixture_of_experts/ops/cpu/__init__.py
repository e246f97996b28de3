"""The implementation for CPUs: a whole call in one autograd.Function, and a shorter computation for decoding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixture_of_experts.ops.cpu import chunked, decode
from mixture_of_experts.ops.network import Call
from mixture_of_experts.support.private_torch import is_in_transform


def unsupported_reason(call: Call) -> str | None:
    """Why this implementation cannot compute a call; None for plain readable CPU tensors and a known activation."""
    if call.x.device.type != "cpu":
        return f"the tokens are on {call.x.device.type}"
    if torch.compiler.is_compiling():
        return "a graph is being traced, in which the numbers of rows cannot be read"
    if is_in_transform():
        return "a transform of torch.func runs, in which the numbers of rows cannot be read"
    for tensor in (call.x, *call.network.tensors().values()):
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"it reads plain tensors, and there is a {type(tensor).__name__}"
    return call.network.unsupported_activation_reason()


def run(call: Call) -> Tensor:
    """Compute a call; return `(t, o)`."""
    few = call.is_inference() and call.assignments.weight.numel() <= decode.MAX_DECODE_ROWS
    return decode.run(call) if few else chunked.run(call)
