"""A few rows in inference, as in decoding: the chosen experts' products, and hardly an operator more.

Axes: t tokens, a assignments, r rows (sorted by expert), d model dim, h hidden dim.

One token's products take less time than the tables that a `Plan` is made of, so numbers are read to the host and the
rest is lists. Without gradients and in eval mode only: a recomputation in training must take the way of its forward, to
the last bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mixture_of_experts.activations import find_activation
from mixture_of_experts.grouped import product_by_expert
from mixture_of_experts.routing import Routing
from mixture_of_experts.tracing import is_wrapped

FEW_ROWS = 32


def is_few(levels: Sequence[Routing], x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether `few_rows` can take it: one level of token choice, few assignments, no gradients, numbers to be read."""
    routing = levels[0]
    if torch.is_grad_enabled() or len(levels) > 1 or routing.choices is None or routing.weight.numel() > FEW_ROWS:
        return False
    return not any(is_wrapped(tensor) for tensor in (x, routing.expert, routing.weight, *weights))


def few_rows(x: Tensor, routing: Routing, act: nn.Module, first: Sequence[Tensor], last: Tensor) -> Tensor:
    """`combine(act(rows first[0]) [* rows first[1]] last)` of tokens `(t, d)` for which `is_few` holds.

    Args as for `fused_experts`; the sum over a token's choices is taken in float32 at least.
    """
    activation, choices = find_activation(act), routing.choices
    assert activation is not None
    assert choices is not None
    expert, weight, kept = (t.flatten().tolist() for t in (routing.expert, routing.weight, routing.kept))
    order = sorted((a for a, is_kept in enumerate(kept) if is_kept), key=expert.__getitem__)  # assignment of each row
    used = list(Counter(expert[a] for a in order).items())
    token = None  # of each row, unless there is but one
    if x.shape[0] != 1:
        token = torch.tensor([a // choices for a in order], dtype=torch.int64, device=x.device)

    rows = x.expand(len(order), -1) if token is None else x.index_select(0, token)
    hidden = activation.function(product_by_expert(rows, first[0], used))
    for matrix in first[1:]:
        hidden = hidden * product_by_expert(rows, matrix, used)
    y = product_by_expert(hidden, last, used)

    dtype = torch.promote_types(torch.promote_types(y.dtype, torch.float32), routing.weight.dtype)
    y = y * torch.tensor([weight[a] for a in order], dtype=dtype, device=x.device).unsqueeze(-1)
    if token is None:
        return y.sum(dim=0, keepdim=True).to(x.dtype)
    return x.new_zeros(x.shape, dtype=dtype).index_add_(0, token, y).to(x.dtype)
