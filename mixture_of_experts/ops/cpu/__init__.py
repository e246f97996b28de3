"""The CPU's own ways: a whole call in one autograd.Function, and a few rows in decoding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixture_of_experts.ops.activations import why_unknown
from mixture_of_experts.ops.call import Call
from mixture_of_experts.ops.cpu import decode, fused
from mixture_of_experts.tracing import in_transform


def why_not(call: Call) -> str | None:
    """Plain tensors on a CPU, whose numbers can be read, and an activation that is known here."""
    if call.x.device.type != "cpu":
        return f"the tokens are on {call.x.device.type}"
    if torch.compiler.is_compiling():
        return "a graph is being traced, in which the numbers of rows cannot be read"
    if in_transform():
        return "numbers of rows cannot be read under a transform of torch.func"
    for tensor in (call.x, *call.network.tensors().values()):
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"it reads plain tensors, and there is a {type(tensor).__name__}"
    return why_unknown(call.network.activation)


def run(call: Call) -> Tensor:
    """Tokens `(t, d)` to `(t, o)`."""
    return decode.run(call) if decode.why_not(call) is None else fused.run(call)
