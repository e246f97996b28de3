"""Runs an adapted network on rows sorted by expert, and computes the gradients of its low-rank factors. This module
reuses the functions in `ops.row_network`, with matrix products that support low-rank updates.

Axes: r (rows), e (experts), p and q (input and output features of a weight), k (rank).

The stored weights are constant, so no gradient is computed for them. For each low-rank update, the forward pass
computes `x @ down`, which has shape `(r, k)`, and saves it along with the pre-activations.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from mixture_of_experts.huggingface.lora.adapted_network import AdaptedNetwork, LowRankWeight
from mixture_of_experts.ops import row_network
from mixture_of_experts.ops.cpu.chunked import ChunkLayout


def run_network(layout: row_network.RowLayout, x: Tensor, network: AdaptedNetwork, save: bool) -> list[Tensor]:
    """Run `ops.row_network.run_network`, and append the products `x @ down` to the pre-activations that it returns."""
    adapted: Any = AdaptedLayout(layout)
    pre = row_network.run_network(adapted, x, network, save)
    return [*pre, *adapted.low_rank_activations.values()] if save else []


def backpropagate_network(
    layout: row_network.RowLayout,
    x: Tensor,
    network: AdaptedNetwork,
    saved: Sequence[Tensor],
    grad: Tensor,
    scale: Tensor,
    grad_scale: Tensor,
    wanted: Collection[str],
    memory: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Run `ops.row_network.backpropagate_network`, but return the gradients of the low-rank factors instead of those of
    the weights. `saved` is the result of `run_network`."""
    number, names = len(network.w_in), [weight.name for weight in network.get_low_rank_weights()]
    adapted: Any = GradientLayout(layout)
    adapted.x, adapted.scale, adapted.grads = x, scale.to(x.dtype), {}
    adapted.saved = dict(zip(names, saved[number:], strict=True))
    adapted.requested, adapted.out = wanted, memory
    asked = ["x", *(name for name in names if name == "w_out")]
    row_network.backpropagate_network(adapted, x, network, saved[:number], grad, scale, grad_scale, asked, {})
    return adapted.grads


class AdaptedLayout:
    """A `row_network.RowLayout` for weights that may have low-rank updates."""

    def __init__(self, layout: Any) -> None:
        self.layout = layout
        self.gather_rows: Any = layout.gather_rows
        self.add_bias: Any = layout.add_bias
        self.activate: Any = layout.activate
        self.low_rank_activations: dict[str, Tensor] = {}  # `x @ down` for each adapted weight, keyed by weight name

    def project_down(self, x: Tensor, weight: LowRankWeight) -> Tensor:
        """Return `x @ down`, which has shape `(r, k)`. The product is computed only once for each weight."""
        if weight.name not in self.low_rank_activations:
            self.low_rank_activations[weight.name] = self.layout.multiply_rows(x, weight.down)
        return self.low_rank_activations[weight.name]

    def multiply_rows(self, x: Tensor, weight: Tensor | LowRankWeight) -> Tensor:
        layout = self.layout
        if isinstance(weight, Tensor):
            return layout.multiply_rows(x, weight)
        low_rank_activation, out = self.project_down(x, weight), layout.multiply_rows(x, weight.weight)
        if isinstance(layout, ChunkLayout):
            return layout.multiply_rows(low_rank_activation, weight.up, out, add=True)
        return out.add_(layout.multiply_rows(low_rank_activation, weight.up))

    def multiply_and_sum(self, pairs: Sequence[tuple[Tensor, Any]]) -> Tensor:
        terms = []
        for x, weight in pairs:
            adapted = isinstance(weight, LowRankWeight)
            terms += [(x, weight.weight), (self.project_down(x, weight), weight.up)] if adapted else [(x, weight)]
        return self.layout.multiply_and_sum(terms)


class GradientLayout(AdaptedLayout):
    """An `AdaptedLayout` for the backward pass that stores the gradients of the low-rank factors."""

    x: Tensor  # (t, d), tokens
    scale: Tensor  # (r, 1), router weight of each row
    saved: dict[str, Tensor]  # `x @ down` for each adapted weight, from the forward pass
    requested: Collection[str]
    out: Mapping[str, Tensor]
    grads: dict[str, Tensor]

    def outer_products(self, x: Tensor, y: Tensor, out: object) -> None:
        """Store the gradients of `w_out`'s low-rank factors, not the gradient of `w_out` itself. The rows `y` are
        already multiplied by the router weights."""
        self.store_gradients("w_out", x, y, self.saved["w_out"])

    def multiply_and_sum(self, pairs: Sequence[tuple[Tensor, Any]]) -> Tensor:
        """Compute the tokens' gradients, and store the gradients of `w_in`'s low-rank factors."""
        total = super().multiply_and_sum(pairs)
        adapted = {weight.name: y for y, weight in pairs if isinstance(weight, LowRankWeight)}
        tokens = self.gather_rows(self.x) if adapted else self.x
        for name, y in adapted.items():
            self.store_gradients(name, tokens, y, self.saved[name] * self.scale)
        return total

    def store_gradients(self, name: str, x: Tensor, y: Tensor, low_rank_activation: Tensor) -> None:
        """Store the gradients of a weight's low-rank factors. `x` is the weight's input, `y` is the gradient of its
        output, and `low_rank_activation` is `x @ down`."""
        for part, left, right in (
            (f"down.{name}", x, self.low_rank_activations[name] * self.scale),
            (f"up.{name}", low_rank_activation, y),
        ):
            if part in self.requested:
                self.grads[part] = self.layout.outer_products(left, right, self.out.get(part))
