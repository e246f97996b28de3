"""Functions that compute the network and its gradients on rows sorted by expert, for the implementations `cpu`,
`grouped` and `batched`, and `RowLayout`, the base class of their row layouts.

Axes: t tokens, r rows, e experts, d model dim, h hidden dim, o output dim, p inner and q outer dimension of a weight.

In addition to the input, the forward saves only the pre-activations, which are the products with `w_in`. The backward
gathers rows and recomputes the activation. The weights of rows multiply rows of width d, not of width h. Their gradient
is computed from the hidden layer, so that no outputs of rows are saved (as in SonicMoE, arXiv 2512.14080).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mixture_of_experts.dispatch.permutation import Permutation
from mixture_of_experts.dispatch.rows import sum_rows
from mixture_of_experts.ops.activations import KNOWN_ACTIVATIONS
from mixture_of_experts.ops.autograd import FFNGradients, SavedTensors
from mixture_of_experts.ops.network import B_IN_NAMES, W_IN_NAMES, Network


class RowLayout(ABC):
    """Base class of row layouts, which implement products on the rows of a permutation.

    An object is used for one forward or one backward. Rows are computed chunk by chunk: after `enter_chunk`, all
    methods refer to the rows of that chunk. By default, a single chunk contains all rows.
    """

    row_outputs: Any = None  # `(r + 1, q)`; the last row is zero, for assignments without a row

    def __init__(self, permutation: Permutation, chunks: Sequence[Any] = (None,)) -> None:
        self.permutation: Permutation = permutation
        self.chunks: Sequence[Any] = chunks

    @abstractmethod
    def gather_rows(self, x: Tensor) -> Tensor:
        """Return the rows `(r, p)` of tokens `(t, p)`, with zeros in empty rows."""

    @abstractmethod
    def multiply_rows(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply rows x `(r, p)` by the weights `(e, p, q)` of their experts, and return `(r, q)`."""

    @abstractmethod
    def multiply_and_sum(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the sum of `multiply_rows` over pairs (x, weight), and store it in `row_outputs`."""

    @abstractmethod
    def add_bias(self, rows: Tensor, bias: Tensor) -> None:
        """Add the bias `(e, q)` of each row's expert to `rows` `(r, q)` in place."""

    @abstractmethod
    def outer_products(self, x: Tensor, y: Tensor, out: Tensor | None) -> Tensor:
        """Return `x^T y` `(e, p, q)` over each expert's rows of x `(r, p)` and y `(r, q)`, 0 for experts without rows.
        `out` is memory for the result, if `gradients` returns any."""

    @abstractmethod
    def sum_scaled_rows(self, scale: Tensor, rows: Tensor, out: Tensor | None) -> Tensor:
        """Return the sum `(e, q)` of each expert's rows `(r, q)` times `scale` `(r, 1)`."""

    def combine_rows(self) -> Tensor:
        """Return the weighted sum `(t, o)` of each token's `row_outputs`. The base class implements expert choice."""
        permutation = self.permutation
        return sum_rows(
            self.row_outputs[: permutation.num_rows],
            permutation.row_weight(),
            permutation.token,
            permutation.row,
            None,
            permutation.num_tokens,
        )

    def enter_chunk(self, chunk: Any) -> None:  # noqa: B027
        """Make all methods refer to the rows of a chunk."""

    def select_chunk(self, values: Tensor) -> Tensor:
        """Select the rows of the current chunk from values for all rows."""
        return values

    def pack(self, pre: Tensor) -> Tensor:
        """Return the form in which the forward saves pre-activations `(r, q)`."""
        return pre

    def unpack(self, pre: Tensor) -> Tensor:
        """Restore the pre-activations `(r, q)` from their saved form."""
        return pre

    def gradients(self, network: Network, wanted: Collection[str]) -> dict[str, Tensor]:
        """Return preallocated memory for the requested gradients of the network, by name. There is none by default."""
        return {}

    def activate(self, method: Callable[..., None], *tensors: Any) -> None:
        """Call a method of a known activation on rows `(r, h)` and lists of rows."""
        method(*tensors)


class RowFunctions(Protocol):
    """What computes the network on rows: this module, or another one with these two functions."""

    @property
    def run_network(self) -> Callable[..., list[Tensor]]: ...
    @property
    def backpropagate_network(self) -> Callable[..., dict[str, Tensor]]: ...


def forward_rows(
    make_layout: Callable[[Permutation], RowLayout],
    row_functions: RowFunctions,
    x: Tensor,
    permutation: Permutation,
    network: Network,
    save: bool,
) -> tuple[Tensor, SavedTensors]:
    """Implement the `forward` of `run_differentiable` with the products of a layout."""
    layout, saved = make_layout(permutation), []
    for chunk in layout.chunks:
        layout.enter_chunk(chunk)
        saved += [layout.pack(part) for part in row_functions.run_network(layout, x, network, save)]
    return layout.combine_rows(), saved


def backward_rows(
    make_layout: Callable[[Permutation], RowLayout],
    row_functions: RowFunctions,
    x: Tensor,
    permutation: Permutation,
    network: Network,
    saved: SavedTensors,
    grad: Tensor,
    wanted: Collection[str],
) -> FFNGradients:
    """Implement the `backward` of `run_differentiable` with the products of a layout."""
    layout, scale, grad = make_layout(permutation), permutation.row_weight().unsqueeze(-1), grad.contiguous()
    dtype = torch.promote_types(scale.dtype, torch.float32)
    grad_scale = torch.zeros(permutation.num_rows + 1, dtype=dtype, device=scale.device)  # the last entry is unused
    grads, of_rows = layout.gradients(network, wanted), grad_scale[:-1]
    each = len(saved) // len(layout.chunks)  # number of saved tensors per chunk
    for i, chunk in enumerate(layout.chunks):
        layout.enter_chunk(chunk)
        pre = [layout.unpack(part) for part in saved[i * each : (i + 1) * each] if part is not None]
        scales = layout.select_chunk(scale), layout.select_chunk(of_rows)
        grads |= row_functions.backpropagate_network(layout, x, network, pre, grad, *scales, wanted, grads)
    grad_x = layout.combine_rows() if "x" in wanted else None
    return FFNGradients(grad_x, grad_scale.index_select(0, permutation.row).to(permutation.weight.dtype), grads)


def run_network(layout: RowLayout, x: Tensor, network: Network, save: bool) -> list[Tensor]:
    """Compute the layout's unweighted `row_outputs`, and return the pre-activations, one for each weight of `w_in`.

    Without `save`, return an empty list, so that the hidden layer may overwrite the pre-activations.
    """
    rows = layout.gather_rows(x)
    pre = []
    for w, b in zip(network.w_in, network.b_in, strict=True):
        pre.append(layout.multiply_rows(rows, w))
        if b is not None:
            layout.add_bias(pre[-1], b)
    parts = network.projections(pre)
    hidden = parts[0].new_empty(parts[0].shape) if save or network.gate_up else parts[0]
    act = KNOWN_ACTIVATIONS[type(network.activation)](network.activation)
    layout.activate(act.forward, parts, hidden)
    y = layout.multiply_and_sum([(hidden, network.w_out)])  # the backward pass uses one pair per weight in w_in
    if network.b_out is not None:
        layout.add_bias(y, network.b_out)
    return pre if save else []


def backpropagate_network(
    layout: RowLayout,
    x: Tensor,
    network: Network,
    pre: Sequence[Tensor],
    grad: Tensor,
    scale: Tensor,
    grad_scale: Tensor,
    wanted: Collection[str],
    memory: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Compute the unweighted gradients of token rows as `row_outputs` of the layout, and return the gradients of the
    network by name.

    Args:
        layout, x, network, pre: the arguments of `run_network`, and the pre-activations that it returned.
        grad: `(t, o)`, gradient of the outputs of tokens.
        scale: `(r, 1)`, weight of each row.
        grad_scale: `(r,)`, memory for the gradient of each row's weight.
        wanted: names of the requested gradients, "x" and names of `Network.tensors`.
        memory: memory for the gradients of the network by name; empty if none is preallocated.
    """
    act = KNOWN_ACTIVATIONS[type(network.activation)](network.activation)
    grad_rows = layout.gather_rows(grad)
    grad_hidden = layout.multiply_rows(grad_rows, network.w_out.mT)
    hidden = torch.empty_like(grad_hidden)
    # the gate's gradient overwrites the hidden layer's gradient, unless gate and up share a tensor
    others = [torch.empty_like(part) for part in (pre if network.gate_up else pre[1:])]
    grad_pre = others if network.gate_up else [grad_hidden, *others]
    parts, grad_parts = network.projections(pre), network.projections(grad_pre)
    layout.activate(act.recompute, parts, grad_hidden, grad_parts, hidden)

    grads: dict[str, Tensor] = {}
    if "b_out" in wanted:
        grads["b_out"] = layout.sum_scaled_rows(scale, grad_rows, memory.get("b_out"))
    biases = None
    if network.b_out is not None:
        biases = torch.zeros_like(grad_rows)
        layout.add_bias(biases, network.b_out)
        biases = biases.mul_(grad_rows).sum(dim=-1, dtype=grad_scale.dtype)
    if "w_out" in wanted:
        grads["w_out"] = layout.outer_products(hidden, grad_rows.mul_(scale), memory.get("w_out"))
    torch.sum(hidden.mul_(grad_hidden), dim=-1, dtype=grad_scale.dtype, out=grad_scale)
    if biases is not None:
        grad_scale += biases
    layout.activate(act.backward, parts, grad_hidden, grad_parts)
    del hidden, grad_rows

    for name, part in zip(B_IN_NAMES, grad_pre, strict=False):
        if name in wanted:
            grads[name] = layout.sum_scaled_rows(scale, part, memory.get(name))
    grads |= _compute_input_weight_gradients(layout, x, scale, grad_pre, wanted, memory)
    if "x" in wanted:
        layout.multiply_and_sum([(part, w.mT) for part, w in zip(grad_pre, network.w_in, strict=True)])
    return grads


def _compute_input_weight_gradients(
    layout: RowLayout,
    x: Tensor,
    scale: Tensor,
    grad_pre: Sequence[Tensor],
    wanted: Collection[str],
    memory: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Return the requested gradients of `w_in` by name. The rows of tokens are freed on return."""
    named = {name: part for name, part in zip(W_IN_NAMES, grad_pre, strict=False) if name in wanted}
    if not named:
        return {}
    rows = layout.gather_rows(x).mul_(scale)
    return {name: layout.outer_products(rows, part, memory.get(name)) for name, part in named.items()}
