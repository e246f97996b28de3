"""The way for CPUs that gives each token the same bits in any batch: `fused`, with the rows of an expert in blocks.

A few tokens in inference are computed as `decode` does, row by row: a block for each, or sums of bags, if these have
the bits of blocks.

Axes: r rows, e experts, p inner and q outer dimension of a weight.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixture_of_experts.ops import cpu
from mixture_of_experts.ops.activations import InSteps
from mixture_of_experts.ops.cpu import decode, fused
from mixture_of_experts.ops.network import Call
from mixture_of_experts.ops.products import multiply
from mixture_of_experts.support.same_bits import (
    GRAIN,
    MOST_ROWS,
    VECTOR,
    block_of,
    rows_at_once,
    size_of_block,
)

PIECE = 192  # MKL sums a float32 product in pieces of so many rows of the weight; in halves, if they are fewer than two


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
    network, decision, hidden_dim = call.network, call.decision, call.network.w_out.shape[-2]
    # of whole vectors, in one thread, the activation's bits do not depend on the batch
    needs_no_steps = hidden_dim % VECTOR == 0 and decision.weight.numel() * hidden_dim < GRAIN
    if needs_no_steps and call.is_inference() and decode.has_few_tokens(call):
        y = decode.rows_of(call, *[one_by_one(decision.expert, w) for w in (network.w_in[0], network.w_out)])
        row = torch.arange(len(y)).view(len(call.x), -1)
        return fused.sum_of_choices(F.pad(y, (0, 0, 0, 1)), decision.weight, row)
    block = block_of([*network.w_in, network.w_out], hidden_dim)
    activation: Any = InSteps(network.activation, rows_at_once(block, hidden_dim))
    return fused.run(call._replace(network=replace(network, activation=activation)), block=block)


def one_by_one(expert: Tensor, weight: Tensor) -> decode.OneByOne:
    """The fastest products, for rows of these experts `(r,)`, that have the bits of blocks."""
    sizes = weight.dtype, torch.get_num_threads(), *weight.shape[-2:]
    if (piece := piece_of(*sizes)) is not None:
        return decode.Bags.of(expert, weight, piece).sums
    return partial(products_of_blocks, expert.tolist(), size_of_block(*sizes))


def products_of_blocks(experts: list[int], size: int, x: Tensor, weight: Tensor) -> Tensor:
    """`(r, q)`, of rows x `(r, p)` and the weights `(e, p, q)` of their experts, a block for each row."""
    blocks, out = F.pad(x.unsqueeze(1), (0, 0, 0, size - 1)), x.new_empty(len(x), size, weight.shape[-1])
    for expert, rows, result in zip(experts, blocks, out, strict=True):
        multiply(rows, weight[expert], result)
    return out[:, 0].contiguous()


@cache
def piece_of(dtype: torch.dtype, threads: int, p: int, q: int) -> int | None:
    """How many rows of a weight `(p, q)` a bag has whose sums have the bits of products of random numbers; None if no
    number does. As `size_of_block` this samples, and does not prove. In 16 bits a piece's sum would be rounded."""
    if dtype.itemsize < 4:
        return None
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x, weight, expert = draw(MOST_ROWS, p), draw(1, p, q), torch.zeros(8, dtype=torch.int64)
    expected = torch.mm(x, weight[0])[:8]
    for piece in (p, PIECE, -(-p // 2)):
        if torch.equal(decode.Bags.of(expert, weight, piece).sums(x[:8], weight), expected):
            return piece
    return None
