"""Computes small numbers of rows in inference on a CPU, as in decoding, with a minimum of operators besides products.

Axes: t tokens, k choices, a assignments, r rows, e experts, p inner and q outer dimension of a weight, d model dim,
o output dim.

The products of one token take less time than constructing a `Permutation`, so none is used. For up to
`MAX_ROW_SUM_TOKENS` tokens, each row may be computed separately. More tokens are computed expert by expert, with tables
that are Python lists. Products are parameters, so that this module also supports quantized and adapted weights. It is
used only in eval mode without gradients, because in training a recomputation must produce the same bits as its forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixture_of_experts.ops.grouped import multiply_by_expert
from mixture_of_experts.ops.network import Call, Network

RowProduct = Callable[[Tensor, Any], Tensor]  # multiplies each row `(r, p)` by its expert's weight in `(e, p, q)`
MAX_DECODE_ROWS = 32  # maximum number of rows per call
MAX_ROW_SUM_TOKENS = 4  # with more tokens, which share experts, a product is faster than row sums
MIN_ROW_SUM_NUMEL = 1 << 16  # for smaller expert weights, a product is faster than row sums
ROW_SUM_DTYPES = (torch.bfloat16, torch.float16)  # see `prefers_row_sums`


def run(call: Call) -> Tensor:
    """Compute a call with plain weights, and return `(t, o)`. The sum over the choices of a token is computed at least
    in float32.

    For small numbers of tokens, each row may be computed separately if all choices are kept.
    """
    if not (prefers_row_sums(call.network) and has_few_kept_tokens(call)):
        return compute_expert_by_expert(call)
    network, expert = call.network, call.assignments.expert
    into, out_of = (GatherIndices.from_experts(expert, w).multiply_rows for w in (network.w_in[0], network.w_out))
    return compute_row_by_row(call, into, out_of)


def prefers_row_sums(network: Network) -> bool:
    """Return whether the product of a row is computed as a weighted sum of the weight's rows, which is the case for
    half-precision weights.

    This depends only on dtype and shape, so that all machines compute the same bits, and minimizes the worst case over
    the CPUs that were measured. On five of them, with one thread and weights outside of the caches, a sum takes 0.7x to
    1.7x as long as a product in float32, and 0.05x to 1.0x in bfloat16 (`python -m experiments.cpu_constants --rows`).
    """
    weights = (*network.w_in, network.w_out)
    return (
        network.w_out.dtype in ROW_SUM_DTYPES
        and network.w_out.shape[-2:].numel() >= MIN_ROW_SUM_NUMEL
        and all(weight.is_contiguous() for weight in weights)
    )


def has_few_kept_tokens(call: Call) -> bool:
    """Return whether a call is small enough for rows to be computed separately, and all of its choices are kept."""
    return 0 < call.x.shape[0] <= MAX_ROW_SUM_TOKENS and False not in call.assignments.kept.tolist()


def compute_row_by_row(call: Call, multiply_in: RowProduct, multiply_out: RowProduct) -> Tensor:
    """Compute a call with a small number of tokens, whose rows are their choices in order, and return `(t, o)`."""
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
    """Return the outputs `(r, o)` of rows `(r, d)`. `multiply_in` and `multiply_out` compute the products into and out
    of the hidden layer. Biases need the `expert` of each row, `(r,)`."""
    pre = [multiply_in(rows, weight) for weight in network.w_in]
    for part, bias in zip(pre, network.b_in, strict=True):
        if bias is not None:
            part.add_(bias.index_select(0, expert))
    out = multiply_out(network.hidden(pre), network.w_out)
    return out if network.b_out is None else out.add_(network.b_out.index_select(0, expert))


class GatherIndices(NamedTuple):
    """The indices, for each of r rows, of the p rows of its expert's weight, whose weighted sum is the product.

    Such a sum reads the weight once from start to end. If there are more threads than rows, the rows of a weight are
    split into parts.

    Attributes:
        indices: `(r parts p,)`, indices of rows among the rows of all weights.
        offsets: `(r parts,)`, start of each sum in `indices`.
    """

    indices: Tensor
    offsets: Tensor
    parts: int

    @staticmethod
    def from_experts(expert: Tensor, weight: Tensor) -> GatherIndices:
        """Return the indices for rows of these experts `(r,)` in a `weight` `(e, p, q)`."""
        (_, p, q), r, device = weight.shape, expert.shape[0], expert.device
        parts = -(-torch.get_num_threads() // r)
        parts = parts if q % parts == 0 else 1
        place = torch.arange(0, p * parts, parts, device=device)
        place = place.add(expert if r == 1 else expert.view(r, 1, 1), alpha=p * parts)
        if parts > 1:
            place = place + torch.arange(parts, device=device).unsqueeze(-1)
        return GatherIndices(place.view(-1), torch.arange(0, r * parts * p, p, device=device), parts)

    def multiply_rows(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply each row of x `(r, p)` by the weight of its expert, accumulating at least in float32."""
        rows = weight.view(-1, weight.shape[-1] // self.parts)
        scale = (x if self.parts == 1 else x.repeat_interleave(self.parts, dim=0)).contiguous().view(-1)
        sums = torch.embedding_bag(rows, self.indices, self.offsets, False, 0, False, scale)[0]
        return sums if self.parts == 1 else sums.view(len(x), -1)


def compute_expert_by_expert(call: Call, multiply: Callable[..., Tensor] = multiply_by_expert) -> Tensor:
    """Compute a call with rows sorted by expert, and return `(t, o)`. `multiply` has the arguments of
    `multiply_by_expert`."""
    x, network, assignments = call.x, call.network, call.assignments
    assert assignments.k is not None
    expert, weight, kept = assignments.expert.tolist(), assignments.weight.tolist(), assignments.kept.tolist()
    # maps each row to its assignment
    order = sorted((a for a, is_kept in enumerate(kept) if is_kept), key=expert.__getitem__)
    used, k, device = list(Counter(expert[a] for a in order).items()), assignments.k, x.device
    token = None  # token of each row; None for a single token
    if x.shape[0] != 1:
        token = torch.tensor([a // k for a in order], dtype=torch.int64, device=device)
    of_row = None
    if any(bias is not None for bias in (*network.b_in, network.b_out)):
        of_row = torch.tensor([expert[a] for a in order], dtype=torch.int64, device=device)

    product = partial(multiply, rows_per_expert=used)
    rows = x.expand(len(order), -1) if token is None else x.index_select(0, token)
    y = compute_row_outputs(rows, network, of_row, product, product)
    dtype = torch.promote_types(torch.promote_types(y.dtype, torch.float32), assignments.weight.dtype)
    y = y * torch.tensor([weight[a] for a in order], dtype=dtype, device=device).unsqueeze(-1)
    if token is None:
        return y.sum(dim=0, keepdim=True).to(x.dtype)
    return y.new_zeros(x.shape[0], y.shape[-1]).index_add_(0, token, y).to(x.dtype)
