"""The way for CPUs that gives each token the same bits in any batch: `fused`, with the rows of an expert in blocks."""

from __future__ import annotations

from torch import Tensor

from mixture_of_experts.ops import cpu
from mixture_of_experts.ops.cpu import fused
from mixture_of_experts.ops.network import Call
from mixture_of_experts.support.same_bits import block_of, rows_at_once


def why_not(call: Call) -> str | None:
    """Why the bits of a token depend on the other tokens of a call, or are not known not to; None if they do not."""
    if (reason := cpu.why_not(call)) is not None:
        return reason
    if call.decision.k is None:
        return "experts choose tokens, so a token's experts depend on the other tokens"
    if not call.decision.dropless:
        return "a limited capacity drops a token's choice because of other tokens: set the capacity factors to None"
    if call.decision.slot is not None:
        return "of two levels the first may drop tokens: take one level"
    return None


def run(call: Call) -> Tensor:
    """Compute a call; return `(t, o)`."""
    network, hidden_dim = call.network, call.network.w_out.shape[-2]
    block = block_of([*network.w_in, network.w_out], hidden_dim)
    return fused.run(call, block=block, step=rows_at_once(block, hidden_dim))
