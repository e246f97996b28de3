"""The network on rows that lie expert by expert, and its gradients: what the CPU's way and the lean one share.

Axes: r rows, e experts, d model dim, h hidden dim, o dim of the outputs, p inner and q outer dimension of a weight.

For the backward only the products with `w_in` are kept (the input is there anyway); it gathers anew and computes the
activation anew. The weight of an assignment is applied where a row is d wide, not h wide, and its gradient is read off
the hidden layer, so that no row of outputs is kept (as SonicMoE, arXiv 2512.14080).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mixture_of_experts.dispatch import Plan
from mixture_of_experts.ops.activations import KNOWN
from mixture_of_experts.ops.call import Network


class Products(Protocol):
    """Every expert's rows by its own weights. `out` is memory of the result, for products that are given it."""

    def gather(self, x: Tensor) -> Tensor:
        """Tokens `(t, p)` to rows `(r, p)`."""
        ...

    def by_weights(self, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """`(r, p)` by `(e, p, q)`: `(r, q)`."""
        ...

    def total(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The sum of such products, as it is to be read by each token."""
        ...

    def add_bias(self, rows: Tensor, bias: Tensor) -> None:
        """`rows` plus each one's expert's of `(e, q)`."""
        ...

    def by_rows(self, x: Tensor, y: Tensor, out: Any) -> Tensor:
        """`x^T y` of `(r, p)` and `(r, q)`: `(e, p, q)`, zeros for experts without rows."""
        ...

    def sums(self, scale: Tensor, rows: Tensor, out: Any) -> Tensor:
        """The sum of each expert's rows `(r, q)` times `scale` `(r, 1)`: `(e, q)`."""
        ...


def scales(plan: Plan) -> tuple[Tensor, Tensor]:
    """`(r, 1)` the weight of each row, and zeros `(r + 1,)` for its gradient; assignments without one read the last."""
    dtype = torch.promote_types(plan.weight.dtype, torch.float32)
    grad_scale = torch.zeros(plan.num_rows + 1, dtype=dtype, device=plan.weight.device)
    return plan.row_weight().unsqueeze(-1), grad_scale


def forward(
    products: Products, x: Tensor, network: Network, keep: bool, out: Sequence[Tensor] = ()
) -> tuple[list[Tensor], Tensor]:
    """What is computed with each of `w_in`, and the `total` of outputs.

    Args:
        keep: whether the former is read again; else the hidden layer is written over it, where that is no half of
            a tensor.
        out: memory for the former.
    """
    tokens = products.gather(x)
    pre = []
    for w, b, memory in zip(network.w_in, network.b_in, out or [None] * len(network.w_in), strict=True):
        pre.append(products.by_weights(tokens, w, memory))
        if b is not None:
            products.add_bias(pre[-1], b)
    parts = network.parts(pre)
    hidden = parts[0].new_empty(parts[0].shape) if keep or network.halves else parts[0]
    KNOWN[type(network.activation)](network.activation).forward(parts, hidden)
    y = products.total([(hidden, network.w_out)])
    if network.b_out is not None:
        products.add_bias(y, network.b_out)
    return pre, y


def gradients(
    products: Products,
    x: Tensor,
    network: Network,
    pre: Sequence[Tensor],
    grad: Tensor,
    scale: Tensor,
    grad_scale: Tensor,
    into: Network,
    need_x: bool,
) -> tuple[Tensor | None, Network]:
    """Gradients of the tokens, as a `total` of rows of weight 1, and of the experts' weights.

    Args:
        products, x, network, pre: those of `forward`, and what it computed with `w_in`.
        grad: `(t, o)`, the gradient of each token's output.
        scale: `(r, 1)`, the weight of each row.
        grad_scale: `(r,)`, where the gradient of that is written.
        into: of each weight and bias whose gradient is wanted, the memory for it, or anything if `products` need none.
        need_x: whether the gradients of the tokens are wanted.
    """
    act = KNOWN[type(network.activation)](network.activation)
    grad_rows = products.gather(grad)
    grad_hidden = products.by_weights(grad_rows, network.w_out.mT)
    hidden = torch.empty_like(grad_hidden)
    # the gradient of the gate is written over that of the hidden layer, if it is a tensor of its own
    others = [torch.empty_like(part) for part in (pre if network.halves else pre[1:])]
    grad_pre = others if network.halves else [grad_hidden, *others]
    parts, grad_parts = network.parts(pre), network.parts(grad_pre)
    act.recompute(parts, grad_hidden, grad_parts, hidden)

    grad_b_out, biases = _sums(products, scale, grad_rows, into.b_out), None
    if network.b_out is not None:
        biases = torch.zeros_like(grad_rows)
        products.add_bias(biases, network.b_out)
        biases = biases.mul_(grad_rows).sum(dim=-1, dtype=grad_scale.dtype)
    grad_w_out = _by_rows(products, hidden, grad_rows.mul_(scale), into.w_out)
    torch.sum(hidden.mul_(grad_hidden), dim=-1, dtype=grad_scale.dtype, out=grad_scale)
    if biases is not None:
        grad_scale += biases
    act.backward(parts, grad_hidden, grad_parts)
    del hidden, grad_rows

    grads_b_in = [_sums(products, scale, part, out) for part, out in zip(grad_pre, into.b_in, strict=True)]
    grads_w_in = _of_input_weights(products, x, scale, grad_pre, into.w_in)
    total = None
    if need_x:
        total = products.total([(part, w.mT) for part, w in zip(grad_pre, network.w_in, strict=True)])
    return total, network._replace(w_in=grads_w_in, w_out=grad_w_out, b_in=grads_b_in, b_out=grad_b_out)


def _of_input_weights(
    products: Products, x: Tensor, scale: Tensor, grad_pre: Sequence[Tensor], into: Sequence[Any]
) -> Sequence[Tensor | None]:
    """The tokens' rows are gone when it returns."""
    if all(out is None for out in into):
        return into
    tokens = products.gather(x).mul_(scale)
    return [_by_rows(products, tokens, part, out) for part, out in zip(grad_pre, into, strict=True)]


def _by_rows(products: Products, x: Tensor, y: Tensor, out: Any) -> Tensor | None:
    return None if out is None else products.by_rows(x, y, out)


def _sums(products: Products, scale: Tensor, rows: Tensor, out: Any) -> Tensor | None:
    return None if out is None else products.sums(scale, rows, out)
