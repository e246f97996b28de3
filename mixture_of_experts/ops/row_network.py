"""Computes the network and its gradients on rows sorted by expert, for the implementations `cpu`, `grouped` and
`batched`. This module also defines `RowLayout`, the base class of their row layouts.

Axes: t (tokens), r (rows), e (experts), d (model dimension), h (hidden dimension), o (output dimension), p and q (inner
and outer dimensions of a weight).

In addition to the input, the forward pass saves only the pre-activations, which are the products with `w_in`. The
backward pass gathers the rows again and recomputes the activation. Row weights are applied to rows of width d rather
than to rows of width h. The gradient of the row weights is computed from the hidden layer, so that no row outputs need
to be saved (as in SonicMoE, arXiv 2512.14080).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from mixture_of_experts.dispatch.permutation import Permutation
from mixture_of_experts.dispatch.rows import sum_rows
from mixture_of_experts.ops.activations import KNOWN_ACTIVATIONS
from mixture_of_experts.ops.autograd import FFNGradients, SavedTensors, run_differentiable
from mixture_of_experts.ops.network import B_IN_NAMES, W_IN_NAMES, Network


class RowLayout(ABC):
    """Base class for row layouts, which implement products on the rows of a permutation.

    Each instance is used for a single forward or backward pass. Rows are computed in chunks. After `enter_chunk`, all
    methods refer to the rows of that chunk. By default, a single chunk contains all rows.
    """

    row_outputs: Any = None  # `(r + 1, q)`; the last row contains zeros, for assignments without a row

    def __init__(self, permutation: Permutation, chunks: Sequence[Any] = (None,)) -> None:
        self.permutation: Permutation = permutation
        self.chunks: Sequence[Any] = chunks

    @abstractmethod
    def gather_rows(self, x: Tensor) -> Tensor:
        """Gather rows `(r, p)` from tokens `(t, p)`. Empty rows contain zeros."""

    @abstractmethod
    def multiply_rows(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply rows x `(r, p)` by their experts' weights `(e, p, q)`, and return the products `(r, q)`."""

    @abstractmethod
    def multiply_and_sum(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Sum the results of `multiply_rows` over pairs (x, weight), store the sum in `row_outputs`, and return it."""

    @abstractmethod
    def add_bias(self, rows: Tensor, bias: Tensor) -> None:
        """Add the experts' biases `(e, q)` to their rows `(r, q)` in place."""

    @abstractmethod
    def outer_products(self, x: Tensor, y: Tensor, out: Tensor | None) -> Tensor:
        """Return `x^T y` for each expert's rows of x `(r, p)` and y `(r, q)`, as `(e, p, q)`. The result is 0 for
        experts without rows. The result is written to `out` if `allocate_gradients` provides preallocated memory."""

    @abstractmethod
    def sum_scaled_rows(self, scale: Tensor, rows: Tensor, out: Tensor | None) -> Tensor:
        """Multiply rows `(r, q)` by `scale` `(r, 1)`, and return the sum `(e, q)` over each expert's rows."""

    def combine_rows(self) -> Tensor:
        """Return the weighted sum `(t, o)` of each token's `row_outputs`. The base class implements this method for
        expert choice."""
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
        """Select the current chunk's rows from `values`, which contains values for all rows."""
        return values

    def pack(self, pre: Tensor) -> Tensor:
        """Convert pre-activations `(r, q)` to the form in which the forward pass saves them."""
        return pre

    def unpack(self, pre: Tensor) -> Tensor:
        """Restore the pre-activations `(r, q)` from their saved form."""
        return pre

    def allocate_gradients(self, network: Network, wanted: Collection[str]) -> dict[str, Tensor]:
        """Return preallocated memory for the requested gradients of the network, keyed by name. By default, no memory
        is preallocated."""
        return {}

    def activate(self, method: Callable[..., None], *tensors: Any) -> None:
        """Call a method of a known activation. The arguments are rows `(r, h)` or lists of rows."""
        method(*tensors)


class RowFunctions(Protocol):
    """Protocol for modules, such as this one, that compute the network and its gradients on rows."""

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
    """Implement the `forward` argument of `run_differentiable` with a layout's products."""
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
    """Implement the `backward` argument of `run_differentiable` with a layout's products."""
    layout, scale, grad = make_layout(permutation), permutation.row_weight().unsqueeze(-1), grad.contiguous()
    dtype = torch.promote_types(scale.dtype, torch.float32)
    grad_scale = torch.zeros(permutation.num_rows + 1, dtype=dtype, device=scale.device)  # the last entry is unused
    grads, row_grad_scale = layout.allocate_gradients(network, wanted), grad_scale[:-1]
    saved_per_chunk = len(saved) // len(layout.chunks)
    for i, chunk in enumerate(layout.chunks):
        layout.enter_chunk(chunk)
        pre = [
            layout.unpack(part) for part in saved[i * saved_per_chunk : (i + 1) * saved_per_chunk] if part is not None
        ]
        scales = layout.select_chunk(scale), layout.select_chunk(row_grad_scale)
        grads |= row_functions.backpropagate_network(layout, x, network, pre, grad, *scales, wanted, grads)
    grad_x = layout.combine_rows() if "x" in wanted else None
    return FFNGradients(grad_x, grad_scale.index_select(0, permutation.row).to(permutation.weight.dtype), grads)


def run_layout(
    make_layout: Callable[[Permutation], RowLayout],
    row_functions: RowFunctions,
    x: Tensor,
    permutation: Permutation,
    network: Network,
) -> Tensor:
    """Compute the outputs `(t, o)` with a layout's products. The outputs are differentiable."""
    forward = partial(forward_rows, make_layout, row_functions)
    backward = partial(backward_rows, make_layout, row_functions)
    return run_differentiable(forward, backward, x, permutation, network)


def run_network(layout: RowLayout, x: Tensor, network: Network, save: bool) -> list[Tensor]:
    """Compute the layout's unweighted `row_outputs`, and return one pre-activation for each weight in `w_in`.

    If `save` is False, return an empty list, so that the hidden layer may overwrite the pre-activations.
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
    y = layout.multiply_and_sum([(hidden, network.w_out)])  # the backward pass has one pair for each weight in w_in
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
    """Compute the unweighted gradients of the token rows, and store them in `layout.row_outputs`. Return the gradients
    of the network, keyed by name.

    Args:
        layout, x, network, pre: the arguments of `run_network`, and the pre-activations that it returned.
        grad: gradient of the token outputs, `(t, o)`.
        scale: weight of each row, `(r, 1)`.
        grad_scale: memory for the gradients of the row weights, `(r,)`.
        wanted: names of the requested gradients: "x" or names from `Network.tensors`.
        memory: preallocated memory for the gradients of the network, keyed by name, or an empty mapping.
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
    """Return the requested gradients of `w_in`, keyed by name. The memory of the token rows is freed on return."""
    named = {name: part for name, part in zip(W_IN_NAMES, grad_pre, strict=False) if name in wanted}
    if not named:
        return {}
    rows = layout.gather_rows(x).mul_(scale)
    return {name: layout.outer_products(rows, part, memory.get(name)) for name, part in named.items()}
