"""Computes inference calls with few rows on a CPU, such as decoding steps, with as few operators as possible.

Axes: t (tokens), k (choices), a (assignments), r (rows), e (experts), p and q (inner and outer dimensions of a weight),
d (model dimension), o (output dimension).

No `Permutation` is constructed, because constructing one would take longer than computing the products for one token.
For up to `MAX_ROW_SUM_TOKENS` tokens, each row may be computed separately. With more tokens, rows are computed expert
by expert, using Python lists as lookup tables. Products are passed as functions, so that this module also supports
quantized and adapted weights. This code is used only in eval mode without gradients, because a recomputation during
training must produce the same bits as its forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import compress, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixture_of_experts.ops.grouped import multiply_by_expert
from mixture_of_experts.ops.network import Call, Network

RowProduct = Callable[[Tensor, Any], Tensor]  # multiplies each row of `(r, p)` by its expert's weight in `(e, p, q)`
MAX_DECODE_ROWS = 32  # maximum number of rows per call
MAX_ROW_SUM_TOKENS = 4  # above this number, tokens share experts, and a product is faster than row sums
MIN_ROW_SUM_NUMEL = 1 << 16  # with smaller expert weights, a product is faster than row sums
ROW_SUM_DTYPES = (torch.bfloat16, torch.float16)  # see `prefers_row_sums`


def run(call: Call) -> Tensor:
    """Compute the outputs `(t, o)` of a call with plain weights. The sum over each token's choices is computed in
    float32 or higher precision.

    If there are few tokens and all choices are kept, each row may be computed separately.
    """
    if not (prefers_row_sums(call.network) and has_few_kept_tokens(call)):
        return compute_expert_by_expert(call)
    network, expert = call.network, call.assignments.expert
    into, out_of = (GatherIndices.from_experts(expert, w).multiply_rows for w in (network.w_in[0], network.w_out))
    return compute_row_by_row(call, into, out_of)


def prefers_row_sums(network: Network) -> bool:
    """Return whether to compute each row's product as a weighted sum of the weight's rows. Weighted sums are used only
    for half-precision weights.

    The choice depends only on the dtype, shape and strides, so that all machines compute the same bits. It minimizes
    the worst case on the measured CPUs. On five CPUs, with one thread and weights that are not in the caches, a
    weighted sum takes 0.7x to 1.7x as long as a product in float32, and 0.05x to 1.0x as long in bfloat16 (`python -m
    experiments.cpu_constants --rows`).
    """
    weights = (*network.w_in, network.w_out)
    return (
        network.w_out.dtype in ROW_SUM_DTYPES
        and network.w_out.shape[-2:].numel() >= MIN_ROW_SUM_NUMEL
        and all(weight.is_contiguous() for weight in weights)
    )


def has_few_kept_tokens(call: Call) -> bool:
    """Return whether a call is small enough to compute its rows separately and keeps all of its choices."""
    return 0 < call.x.shape[0] <= MAX_ROW_SUM_TOKENS and False not in call.assignments.kept.tolist()


def compute_row_by_row(call: Call, multiply_in: RowProduct, multiply_out: RowProduct) -> Tensor:
    """Compute the outputs `(t, o)` of a call with few tokens. There is one row per choice, ordered by token."""
    x, network, assignments = call.x, call.network, call.assignments
    assert assignments.k is not None
    (t, d), k, expert = x.shape, assignments.k, assignments.expert
    rows = x if k == 1 else x.unsqueeze(1).expand(t, k, d).reshape(t * k, d)
    y = compute_row_outputs(rows, network, expert, multiply_in, multiply_out)
    y = y * assignments.weight.to(torch.promote_types(assignments.weight.dtype, torch.float32)).unsqueeze(-1)
    return (y if k == 1 else y.view(t, k, -1).sum(dim=1)).to(x.dtype)


def compute_row_outputs(
    rows: Tensor, network: Network, expert: Any, multiply_in: RowProduct, multiply_out: RowProduct
) -> Tensor:
    """Return the outputs `(r, o)` for rows `(r, d)`. `multiply_in` and `multiply_out` compute the products into and out
    of the hidden layer. `expert` `(r,)` contains the expert of each row, and is used only for biases."""
    pre = [multiply_in(rows, weight) for weight in network.w_in]
    for part, bias in zip(pre, network.b_in, strict=True):
        if bias is not None:
            part.add_(bias.index_select(0, expert))
    out = multiply_out(network.hidden(pre), network.w_out)
    return out if network.b_out is None else out.add_(network.b_out.index_select(0, expert))


class GatherIndices(NamedTuple):
    """Indices that gather the weight rows for r products. Each product is a weighted sum of the p rows of one expert's
    weight.

    Each sum reads the weight once from start to end. If there are more threads than rows, each of the weight's rows is
    split into parts.

    Attributes:
        indices: `(r parts p,)`, indices into the rows of all experts' weights.
        offsets: `(r parts,)`, start of each sum in `indices`.
        parts: number of parts into which each weight row is split.
    """

    indices: Tensor
    offsets: Tensor
    parts: int

    @staticmethod
    def from_experts(expert: Tensor, weight: Tensor) -> GatherIndices:
        """Return the indices into a weight `(e, p, q)` for r rows, given the expert of each row."""
        (_, p, q), r, device = weight.shape, expert.shape[0], expert.device
        parts = -(-torch.get_num_threads() // r)
        parts = parts if q % parts == 0 else 1
        place = torch.arange(0, p * parts, parts, device=device)
        place = place.add(expert if r == 1 else expert.view(r, 1, 1), alpha=p * parts)
        if parts > 1:
            place = place + torch.arange(parts, device=device).unsqueeze(-1)
        return GatherIndices(place.view(-1), torch.arange(0, r * parts * p, p, device=device), parts)

    def multiply_rows(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply each row of x `(r, p)` by its expert's weight, and accumulate in float32 or higher precision."""
        rows = weight.view(-1, weight.shape[-1] // self.parts)
        scale = (x if self.parts == 1 else x.repeat_interleave(self.parts, dim=0)).contiguous().view(-1)
        sums = torch.embedding_bag(rows, self.indices, self.offsets, False, 0, False, scale)[0]
        return sums if self.parts == 1 else sums.view(len(x), -1)


def compute_expert_by_expert(call: Call, multiply: Callable[..., Tensor] = multiply_by_expert) -> Tensor:
    """Compute the outputs `(t, o)` of a call with rows sorted by expert. `multiply` takes the same arguments as
    `multiply_by_expert`."""
    x, network, assignments = call.x, call.network, call.assignments
    assert assignments.k is not None
    expert_ids, k, device = assignments.expert.tolist(), assignments.k, x.device
    kept = compress(range(len(expert_ids)), assignments.kept.tolist())
    order = sorted(kept, key=expert_ids.__getitem__)  # assignment of each row
    expert_counts = [(e, len(list(rows))) for e, rows in groupby([expert_ids[a] for a in order])]
    token = None  # token of each row; None for a single token
    if x.shape[0] != 1:
        token = torch.tensor([a // k for a in order], dtype=torch.int64, device=device)
    of_row = None
    if any(bias is not None for bias in (*network.b_in, network.b_out)):
        of_row = torch.tensor([expert_ids[a] for a in order], dtype=torch.int64, device=device)

    product = partial(multiply, expert_counts=expert_counts)
    rows = x
    if token is not None:
        rows = x.index_select(0, token)
    elif len(order) != 1:
        rows = x.expand(len(order), -1)
    y = compute_row_outputs(rows, network, of_row, product, product)
    dtype = torch.promote_types(torch.promote_types(y.dtype, torch.float32), assignments.weight.dtype)
    weight = assignments.weight
    if order != list(range(len(weight))):
        weight = weight.index_select(0, torch.tensor(order, dtype=torch.int64, device=device))
    y = y * weight.to(dtype).view(-1, 1)
    if token is None:
        return (y if len(order) == 1 else y.sum(dim=0, keepdim=True)).to(x.dtype)
    return y.new_zeros(x.shape[0], y.shape[-1]).index_add_(0, token, y).to(x.dtype)
