"""An adapted network on rows sorted by expert, and the gradients of its low-rank parts, by hand.

Axes: r rows, e experts, p inner and q outer dimension of a weight, k rank.

The functions are those of `ops.rows`. The stored weights are constants and get no gradient. A product with a
low-rank part goes through rows of width k. These alone are saved, and these alone are multiplied by the weights of
rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mixture_of_experts.huggingface.lora.network import AdaptedNetwork, LowRank
from mixture_of_experts.ops.activations import KNOWN
from mixture_of_experts.ops.cpu.fused import ChunkProducts
from mixture_of_experts.ops.network import W_IN
from mixture_of_experts.ops.products import multiply as product
from mixture_of_experts.ops.rows import Products


def saved_widths(network: AdaptedNetwork) -> list[int]:
    """The widths of the tensors that `forward` returns for `backward`."""
    ranks = [w.down.shape[-1] for w in network.adapted().values() if w.down is not None]
    return [w.shape[-1] for w in network.w_in] + ranks


def forward(
    products: Products, x: Tensor, network: AdaptedNetwork, save: bool, out: Sequence[Tensor] = ()
) -> tuple[list[Tensor], Tensor]:
    """Return what `backward` needs (pre-activations, then the rows times each down), and the `total`."""
    tokens, number, weights = products.gather(x), len(network.w_in), network.adapted()
    of_pre, of_thin = iter(out[:number]), iter(out[number:])
    pre, thin = [], []
    for name, b in zip(W_IN, network.b_in, strict=False):
        part, narrow = multiply(products, tokens, weights[name], network.scaling, next(of_pre, None), of_thin)
        if b is not None:
            products.add_bias(part, b)
        pre.append(part)
        thin.append(narrow)
    parts = network.projections(pre)
    hidden = parts[0].new_empty(parts[0].shape) if save or network.halves else parts[0]
    KNOWN[type(network.activation)](network.activation).forward(parts, hidden)
    y, (narrow,) = total(products, [(hidden, weights["w_out"])], network.scaling, of_thin)
    if network.b_out is not None:
        products.add_bias(y, network.b_out)
    return [*pre, *(part for part in (*thin, narrow) if part is not None)], y


def backward(
    products: Products,
    x: Tensor,
    network: AdaptedNetwork,
    saved: Sequence[Tensor],
    grad: Tensor,
    scale: Tensor,
    grad_scale: Tensor,
    wanted: Collection[str],
    out: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Return the gradients of rows of tokens before their weight, as a `total`, and those of the low-rank parts.

    The arguments are those of `ops.rows.backward`; `saved` is what `forward` returned.
    """
    number, weights = len(network.w_in), network.adapted()
    pre, of_thin = saved[:number], iter(saved[number:])
    thin = {name: next(of_thin) for name, w in weights.items() if w.down is not None}
    act = KNOWN[type(network.activation)](network.activation)
    memory: Mapping[str, Tensor] = {} if out is None else out
    factor = (scale * network.scaling).to(x.dtype)
    grads: dict[str, Tensor] = {}

    def of_parts(name: str, x: Tensor, y_grad: Tensor, grad_thin: Tensor | None) -> None:
        """Note the gradients of down and up of a weight, by which x is multiplied."""
        if grad_thin is not None and f"down.{name}" in wanted:
            grads[f"down.{name}"] = products.by_rows(x, grad_thin * factor, memory.get(f"down.{name}"))
        if grad_thin is not None and f"up.{name}" in wanted:
            grads[f"up.{name}"] = products.by_rows(thin[name] * factor, y_grad, memory.get(f"up.{name}"))

    grad_rows = products.gather(grad)
    grad_hidden, grad_thin = multiply(products, grad_rows, weights["w_out"].transposed, network.scaling)
    hidden = torch.empty_like(grad_hidden)
    # the gradient of the gate overwrites that of the hidden layer, unless gate and up share a tensor
    others = [torch.empty_like(part) for part in (pre if network.halves else pre[1:])]
    grad_pre = others if network.halves else [grad_hidden, *others]
    parts, grad_parts = network.projections(pre), network.projections(grad_pre)
    act.recompute(parts, grad_hidden, grad_parts, hidden)
    of_parts("w_out", hidden, grad_rows, grad_thin)
    torch.sum(hidden.mul_(grad_hidden), dim=-1, dtype=grad_scale.dtype, out=grad_scale)
    if network.b_out is not None:
        biases = torch.zeros_like(grad_rows)
        products.add_bias(biases, network.b_out)
        grad_scale += biases.mul_(grad_rows).sum(dim=-1, dtype=grad_scale.dtype)
    act.backward(parts, grad_hidden, grad_parts)
    del hidden, grad_rows

    pairs = [(part, weights[name].transposed) for name, part in zip(W_IN, grad_pre, strict=False)]
    if "x" in wanted:
        rows, grad_thins = total(products, pairs, network.scaling)
    else:
        rows, grad_thins = None, [None if w.down is None else products.by_weights(part, w.down) for part, w in pairs]
    if any(part is not None for part in grad_thins):
        tokens = products.gather(x)
        for name, part, grad_thin in zip(W_IN, grad_pre, grad_thins, strict=False):
            of_parts(name, tokens, part, grad_thin)
    return rows, grads


def multiply(
    products: Products,
    x: Tensor,
    w: LowRank,
    scaling: float,
    out: Tensor | None = None,
    of_thin: Iterator[Tensor] | None = None,
    add: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rows x `(r, p)` times the weights of their experts with their parts `(r, q)`, and x times down `(r, k)`.

    Args:
        out: memory for the result; `add` adds to it.
        of_thin: memory for x times down is the next of these.
    """
    if w.down is None or w.up is None:
        return products.by_weights(x, w.weight, out), None
    thin = None if of_thin is None else next(of_thin, None)
    if not isinstance(products, ChunkProducts):
        result, thin = products.by_weights(x, w.weight, out), products.by_weights(x, w.down, thin)
        return result.add_(products.by_weights(thin, w.up), alpha=scaling), thin
    result = x.new_empty(x.shape[0], w.weight.shape[-1]) if out is None else out
    thin = x.new_empty(x.shape[0], w.down.shape[-1]) if thin is None else thin
    parts = zip(products.parts(x), products.parts(result), products.parts(thin), strict=True)
    for experts, (rows, here, narrow) in zip(products.experts, parts, strict=True):
        product(rows, w.weight[experts], here, add=add)
        product(rows, w.down[experts], narrow)
        product(narrow, w.up[experts], here, add=True, alpha=scaling)
    return result, thin


def total(
    products: Products, pairs: Sequence[tuple[Tensor, LowRank]], scaling: float, of_thin: Iterator[Tensor] | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """`Products.total` over pairs of rows and a weight with its part, and the rows times each down."""
    if isinstance(products, ChunkProducts) and all(w.down is not None for _, w in pairs):
        y = products.y
        return y, [multiply(products, x, w, scaling, y, of_thin, i > 0)[1] for i, (x, w) in enumerate(pairs)]
    thins, terms = [], []
    for x, w in pairs:
        terms.append((x, w.weight))
        thins.append(None)
        if w.down is not None and w.up is not None:
            thins[-1] = products.by_weights(x, w.down, None if of_thin is None else next(of_thin, None))
            terms.append((thins[-1] * scaling, w.up))
    return products.total(terms), thins
