"""Few rows in inference on a CPU, as in decoding: the chosen experts' products, with few other operators.

Axes: t tokens, a assignments, r rows (sorted by expert), d model dim, o dim of the outputs.

The products of one token take less time than making the tables of a `Plan`, so there is no plan: the tables are Python
lists. It is for eval mode without gradients only: in training a recomputation must give the same bits as its forward.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from mixture_of_experts.ops.grouped import product_by_expert
from mixture_of_experts.ops.network import Call

MOST_ROWS = 32


def serves(call: Call) -> bool:
    """Whether a call is one of token choice with few assignments, in eval and without gradients."""
    return call.is_inference() and call.decision.weight.numel() <= MOST_ROWS


def run(call: Call) -> Tensor:
    """Compute a call; return `(t, o)`. The sum over a token's choices is taken in float32 at least."""
    x, network, decision = call.x, call.network, call.decision
    assert decision.k is not None
    expert, weight, kept = decision.expert.tolist(), decision.weight.tolist(), decision.kept.tolist()
    order = sorted((a for a, is_kept in enumerate(kept) if is_kept), key=expert.__getitem__)  # assignment of each row
    used, k, device = list(Counter(expert[a] for a in order).items()), decision.k, x.device
    token = None  # token of each row; None for a single token
    if x.shape[0] != 1:
        token = torch.tensor([a // k for a in order], dtype=torch.int64, device=device)
    of_row = None
    if any(bias is not None for bias in (*network.b_in, network.b_out)):
        of_row = torch.tensor([expert[a] for a in order], dtype=torch.int64, device=device)

    def product(rows: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        out = product_by_expert(rows, w, used)
        return out if b is None or of_row is None else out.add_(b.index_select(0, of_row))

    rows = x.expand(len(order), -1) if token is None else x.index_select(0, token)
    hidden = network.hidden([product(rows, w, b) for w, b in zip(network.w_in, network.b_in, strict=True)])
    y = product(hidden, network.w_out, network.b_out)
    dtype = torch.promote_types(torch.promote_types(y.dtype, torch.float32), decision.weight.dtype)
    y = y * torch.tensor([weight[a] for a in order], dtype=dtype, device=device).unsqueeze(-1)
    if token is None:
        return y.sum(dim=0, keepdim=True).to(x.dtype)
    return y.new_zeros(x.shape[0], y.shape[-1]).index_add_(0, token, y).to(x.dtype)
