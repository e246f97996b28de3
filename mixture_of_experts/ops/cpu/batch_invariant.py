"""Batch-invariant implementation for CPUs. This implementation runs `chunked` with each expert's rows split into
blocks, so that a token's output has the same bits in any batch."""

from __future__ import annotations

import torch
from torch import Tensor

from mixture_of_experts.ops import cpu
from mixture_of_experts.ops.cpu import chunked
from mixture_of_experts.ops.matmul import matmul_into
from mixture_of_experts.ops.network import Call
from mixture_of_experts.support.batch_invariance import (
    MAX_ROWS,
    copy_at_offset,
    find_block_rows,
    find_max_rows,
    round_up_to_vectors,
)


def unsupported_reason(call: Call) -> str | None:
    """Return the reason why the bits of a token's output may depend on the other tokens in a call, or None if they do
    not."""
    if (reason := cpu.unsupported_reason(call)) is not None:
        return reason
    if call.assignments.k is None:
        return "experts choose tokens, so the experts of a token depend on other tokens"
    if not call.assignments.dropless:
        return "a limited capacity may drop choices because of other tokens; set the capacity factors to None"
    if call.assignments.slot_of_outer_choice is not None:
        return "the first of two levels may drop tokens; use a layer with one level"
    return None


def run(call: Call) -> Tensor:
    """Compute the outputs `(t, o)` of a call."""
    network, hidden_dim = call.network, call.network.w_out.shape[-2]
    weights = [view for weight in (*network.w_in, network.w_out) for view in (weight, weight.mT)]
    size = max(find_block_rows(sample_products, weight.shape[-2:], weight) for weight in weights)
    block = round_up_to_vectors(size, hidden_dim)
    return chunked.run(call, blocks=chunked.RowBlocking(block, find_max_rows(block, hidden_dim), MAX_ROWS))


def sample_products(x: Tensor, y: Tensor, weight: Tensor) -> list[Tensor]:
    """Return the products that `chunked` computes for rows x `(n, r, p)` and weights `(n, p, q)`.

    The products are computed for several experts together and for each expert alone, with and without accumulation onto
    y `(n, r, q)`. All results have the same memory offset as y.
    """
    outs = [copy_at_offset(y, int(y.storage_offset())) for _ in range(4)]
    for add, (together, alone) in enumerate((outs[:2], outs[2:])):
        matmul_into(x, weight, together, accumulate=bool(add))
        for parts in zip(x, weight, alone, strict=True):
            matmul_into(*parts, accumulate=bool(add))
    return [torch.stack(outs[:2]), torch.stack(outs[2:])]
