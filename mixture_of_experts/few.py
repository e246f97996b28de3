"""A few rows in inference, as in decoding: the chosen experts' products, and hardly an operator more.

Axes: t tokens, a assignments, r rows (sorted by expert), d model dim, h hidden dim.

One token's products take less time than the tables that a `Plan` is made of, so numbers are read to the host and the
rest is lists. Without gradients and in eval mode only: what a training step recomputes must take the way of its forward
to the last bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mixture_of_experts.grouped import product_by_expert
from mixture_of_experts.routing import Routing

FEW_ROWS = 32


def is_few(levels: Sequence[Routing], x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether `few_rows` can take it: one level of token choice, few assignments, no gradients, numbers to be read."""
    routing = levels[0]
    if torch.is_grad_enabled() or len(levels) > 1 or routing.choices is None or routing.weight.numel() > FEW_ROWS:
        return False
    return not any(is_wrapped(tensor) for tensor in (x, routing.expert, routing.weight, *weights))


def is_wrapped(tensor: Tensor) -> bool:
    """Whether it stands for many tensors, or for one that is differentiated: under vmap and other transforms."""
    return torch.func.debug_unwrap(tensor, recurse=False) is not tensor


def few_rows(
    x: Tensor, routing: Routing, activation: Callable[[Tensor], Tensor], first: Sequence[Tensor], last: Tensor
) -> Tensor:
    """`combine(act(rows first[0]) [* rows first[1]] last)` of tokens `(t, d)`; weights as for `fused_experts`."""
    expert, weight = routing.expert.flatten().tolist(), routing.weight.flatten().tolist()
    kept = [a for a, value in enumerate(weight) if value]
    order = sorted(kept, key=expert.__getitem__)
    if not order:
        return torch.zeros_like(x)
    used = list(Counter(expert[a] for a in order).items())
    assert routing.choices is not None
    token = [a // routing.choices for a in order]
    rows = x.repeat(len(order), 1) if len(x) == 1 else x[token]
    hidden = activation(product_by_expert(rows, first[0], used))
    for matrix in first[1:]:
        hidden = hidden * product_by_expert(rows, matrix, used)
    y = product_by_expert(hidden, last, used).to(routing.weight.dtype)  # the sum is taken in float32
    row_weight = torch.tensor([[weight[a] for a in order]], dtype=y.dtype)
    if len(x) == 1:
        return (row_weight @ y).to(x.dtype)
    out = y.new_zeros(len(x), y.shape[-1])
    return out.index_add_(0, torch.tensor(token), y * row_weight.mT).to(x.dtype)
