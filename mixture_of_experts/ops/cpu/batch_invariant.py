"""The way for CPUs that gives each token the same bits in any batch: `fused`, with the rows of an expert in blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from mixture_of_experts.ops import cpu
from mixture_of_experts.ops.cpu import fused
from mixture_of_experts.ops.network import Call
from mixture_of_experts.ops.products import multiply
from mixture_of_experts.support.same_bits import MAX_ROWS, copied_at, rows_at_once, rows_of_block, whole_vectors


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
    weights = [view for weight in (*network.w_in, network.w_out) for view in (weight, weight.mT)]
    size = max(rows_of_block(products, weight.shape[-2:], weight) for weight in weights)
    block = whole_vectors(size, hidden_dim)
    return fused.run(call, blocks=fused.RowLimits(block, rows_at_once(block, hidden_dim), MAX_ROWS))


def products(x: Tensor, y: Tensor, weight: Tensor) -> list[Tensor]:
    """What `fused` computes of rows x `(n, r, p)` and weights `(n, p, q)`: products of several experts and of each, and
    sums of them and y `(n, r, q)`, written to memory with the offset of y."""
    outs = [copied_at(y, int(y.storage_offset())) for _ in range(4)]
    for add, (together, alone) in enumerate((outs[:2], outs[2:])):
        multiply(x, weight, together, add=bool(add))
        for parts in zip(x, weight, alone, strict=True):
            multiply(*parts, add=bool(add))
    return [torch.stack(outs[:2]), torch.stack(outs[2:])]
