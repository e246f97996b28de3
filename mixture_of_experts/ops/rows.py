"""The network on rows sorted by expert, and its gradients, for the ways `cpu` and `batched`.

Axes: r rows, e experts, d model dim, h hidden dim, o dim of the outputs, p inner and q outer dimension of a weight.

Beside the input the forward saves only the pre-activations: the products with `w_in`. The backward gathers rows and
computes the activation again. A row's weight multiplies rows of width d, not of width h. The weight's gradient is
computed from the hidden layer, so no row of outputs is saved (as in SonicMoE, arXiv 2512.14080).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mixture_of_experts.dispatch.plan import Plan
from mixture_of_experts.ops.activations import KNOWN
from mixture_of_experts.ops.network import B_IN, W_IN, Network


class Products(Protocol):
    """Products on rows, each expert's by its own weight. `out`, if it is given, is memory for the result."""

    def gather(self, x: Tensor) -> Tensor:
        """Rows `(r, p)` of tokens `(t, p)`."""
        ...

    def by_weights(self, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """Rows x `(r, p)` times the weights `(e, p, q)` of their experts: `(r, q)`."""
        ...

    def total(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The sum of `by_weights` over pairs (x, weight), in the memory from which tokens collect their rows."""
        ...

    def add_bias(self, rows: Tensor, bias: Tensor) -> None:
        """Add the bias `(e, q)` of each row's expert to `rows` `(r, q)`, in place."""
        ...

    def by_rows(self, x: Tensor, y: Tensor, out: Tensor | None) -> Tensor:
        """`x^T y` over each expert's rows of x `(r, p)` and y `(r, q)`: `(e, p, q)`; 0 for an expert without rows."""
        ...

    def sums(self, scale: Tensor, rows: Tensor, out: Tensor | None) -> Tensor:
        """The sum of each expert's rows `(r, q)` times `scale` `(r, 1)`: `(e, q)`."""
        ...


def scales(plan: Plan) -> tuple[Tensor, Tensor]:
    """The weight of each row, `(r, 1)`, and zeros `(r + 1,)` for its gradient. An assignment without a row reads the
    last zero."""
    dtype = torch.promote_types(plan.weight.dtype, torch.float32)
    grad_scale = torch.zeros(plan.num_rows + 1, dtype=dtype, device=plan.weight.device)
    return plan.row_weight().unsqueeze(-1), grad_scale


def saved_widths(network: Network) -> list[int]:
    """The widths of the tensors that `run_network` returns for `gradients_of_network`."""
    return [w.shape[-1] for w in network.w_in]


def run_network(
    products: Products, x: Tensor, network: Network, save: bool, out: Sequence[Tensor] = ()
) -> tuple[list[Tensor], Tensor]:
    """Return the pre-activations, a tensor for each weight of `w_in`, and the `total` of outputs.

    Args:
        save: whether the pre-activations are needed again; if not, the hidden layer may overwrite them.
        out: memory for the pre-activations.
    """
    tokens = products.gather(x)
    pre = []
    for w, b, memory in zip(network.w_in, network.b_in, out or [None] * len(network.w_in), strict=True):
        pre.append(products.by_weights(tokens, w, memory))
        if b is not None:
            products.add_bias(pre[-1], b)
    parts = network.projections(pre)
    hidden = parts[0].new_empty(parts[0].shape) if save or network.gate_up else parts[0]
    KNOWN[type(network.activation)](network.activation).forward(parts, hidden)
    y = products.total([(hidden, network.w_out)])
    if network.b_out is not None:
        products.add_bias(y, network.b_out)
    return pre, y


def gradients_of_network(
    products: Products,
    x: Tensor,
    network: Network,
    pre: Sequence[Tensor],
    grad: Tensor,
    scale: Tensor,
    grad_scale: Tensor,
    wanted: Collection[str],
    out: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Return the gradients of rows of tokens before their weight, as a `total`, and those of the network, by name.

    Args:
        products, x, network, pre: those of `run_network`, and the pre-activations that it returned.
        grad: `(t, o)`, gradient of the tokens' outputs.
        scale: `(r, 1)`, weight of each row.
        grad_scale: `(r,)`, memory for the gradient of each row's weight.
        wanted: which gradients are wanted: "x", and names of `Network.tensors`.
        out: memory for the gradients of the network, by name.
    """
    act = KNOWN[type(network.activation)](network.activation)
    grad_rows = products.gather(grad)
    grad_hidden = products.by_weights(grad_rows, network.w_out.mT)
    hidden = torch.empty_like(grad_hidden)
    # the gradient of the gate overwrites that of the hidden layer, unless gate and up share a tensor
    others = [torch.empty_like(part) for part in (pre if network.gate_up else pre[1:])]
    grad_pre = others if network.gate_up else [grad_hidden, *others]
    parts, grad_parts = network.projections(pre), network.projections(grad_pre)
    act.recompute(parts, grad_hidden, grad_parts, hidden)

    grads: dict[str, Tensor] = {}
    memory: Mapping[str, Tensor] = {} if out is None else out
    if "b_out" in wanted:
        grads["b_out"] = products.sums(scale, grad_rows, memory.get("b_out"))
    biases = None
    if network.b_out is not None:
        biases = torch.zeros_like(grad_rows)
        products.add_bias(biases, network.b_out)
        biases = biases.mul_(grad_rows).sum(dim=-1, dtype=grad_scale.dtype)
    if "w_out" in wanted:
        grads["w_out"] = products.by_rows(hidden, grad_rows.mul_(scale), memory.get("w_out"))
    torch.sum(hidden.mul_(grad_hidden), dim=-1, dtype=grad_scale.dtype, out=grad_scale)
    if biases is not None:
        grad_scale += biases
    act.backward(parts, grad_hidden, grad_parts)
    del hidden, grad_rows

    for name, part in zip(B_IN, grad_pre, strict=False):
        if name in wanted:
            grads[name] = products.sums(scale, part, memory.get(name))
    grads |= _of_input_weights(products, x, scale, grad_pre, wanted, memory)
    total = None
    if "x" in wanted:
        total = products.total([(part, w.mT) for part, w in zip(grad_pre, network.w_in, strict=True)])
    return total, grads


def _of_input_weights(
    products: Products,
    x: Tensor,
    scale: Tensor,
    grad_pre: Sequence[Tensor],
    wanted: Collection[str],
    memory: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The wanted gradients of `w_in`, by name. It frees the rows of tokens when it returns."""
    named = {name: part for name, part in zip(W_IN, grad_pre, strict=False) if name in wanted}
    if not named:
        return {}
    tokens = products.gather(x).mul_(scale)
    return {name: products.by_rows(tokens, part, memory.get(name)) for name, part in named.items()}
