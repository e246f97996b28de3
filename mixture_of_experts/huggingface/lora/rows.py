"""An adapted network on rows sorted by expert, and the gradients of its low-rank parts: the functions of `ops.rows`, by
products that know such parts.

Axes: r rows, e experts, p inner and q outer dimension of a weight, k rank.

The stored weights are constants and get no gradient. A product with a low-rank part goes through rows of width k, x
times down. These are saved beside the pre-activations.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from mixture_of_experts.huggingface.lora.network import AdaptedNetwork, LowRank
from mixture_of_experts.ops import rows
from mixture_of_experts.ops.cpu.fused import ChunkProducts


def run_network(products: rows.Products, x: Tensor, network: AdaptedNetwork, save: bool) -> list[Tensor]:
    """`ops.rows.run_network`; the rows times each down stand behind the pre-activations."""
    adapted = AdaptedProducts(products)
    pre = rows.run_network(adapted, x, network, save)
    return [*pre, *adapted.thin.values()] if save else []


def gradients_of_network(
    products: rows.Products,
    x: Tensor,
    network: AdaptedNetwork,
    saved: Sequence[Tensor],
    grad: Tensor,
    scale: Tensor,
    grad_scale: Tensor,
    wanted: Collection[str],
    memory: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """`ops.rows.gradients_of_network`, with the gradients of low-rank parts; `saved` is what `run_network` returned."""
    number, names = len(network.w_in), [weight.name for weight in network.adapted()]
    adapted: Any = GradientProducts(products)
    adapted.x, adapted.scale, adapted.grads = x, scale.to(x.dtype), {}
    adapted.saved = dict(zip(names, saved[number:], strict=True))
    adapted.wanted, adapted.out = wanted, memory
    asked = ["x", *(name for name in names if name == "w_out")]
    rows.gradients_of_network(adapted, x, network, saved[:number], grad, scale, grad_scale, asked, {})
    return adapted.grads


class AdaptedProducts:
    """`rows.Products` by weights of which some have low-rank parts."""

    def __init__(self, products: Any) -> None:
        self.products = products
        self.gather: Any = products.gather
        self.add_bias: Any = products.add_bias
        self.activate: Any = products.activate
        self.thin: dict[str, Tensor] = {}  # rows times each down, by the name of the weight

    def narrow(self, x: Tensor, weight: LowRank) -> Tensor:
        """x times down `(r, k)`, once for each weight."""
        if weight.name not in self.thin:
            self.thin[weight.name] = self.products.by_weights(x, weight.down)
        return self.thin[weight.name]

    def by_weights(self, x: Tensor, weight: Tensor | LowRank) -> Tensor:
        products = self.products
        if isinstance(weight, Tensor):
            return products.by_weights(x, weight)
        thin, out = self.narrow(x, weight), products.by_weights(x, weight.weight)
        if isinstance(products, ChunkProducts):
            return products.by_weights(thin, weight.up, out, add=True)
        return out.add_(products.by_weights(thin, weight.up))

    def total(self, pairs: Sequence[tuple[Tensor, Any]]) -> Tensor:
        terms = []
        for x, weight in pairs:
            adapted = isinstance(weight, LowRank)
            terms += [(x, weight.weight), (self.narrow(x, weight), weight.up)] if adapted else [(x, weight)]
        return self.products.total(terms)


class GradientProducts(AdaptedProducts):
    """The same in a backward, where it notes the gradients of the parts."""

    x: Tensor  # (t, d), tokens
    scale: Tensor  # (r, 1), weight of each row
    saved: dict[str, Tensor]  # rows times each down, of the forward
    wanted: Collection[str]
    out: Mapping[str, Tensor]
    grads: dict[str, Tensor]

    def by_rows(self, x: Tensor, y: Tensor, out: object) -> None:
        """In the place of the gradient of `w_out`; the rows y are weighed."""
        self.note("w_out", x, y, self.saved["w_out"])

    def total(self, pairs: Sequence[tuple[Tensor, Any]]) -> Tensor:
        """Beside the gradients of tokens, those of the parts of `w_in`."""
        total = super().total(pairs)
        adapted = {weight.name: y for y, weight in pairs if isinstance(weight, LowRank)}
        tokens = self.gather(self.x) if adapted else self.x
        for name, y in adapted.items():
            self.note(name, tokens, y, self.saved[name] * self.scale)
        return total

    def note(self, name: str, x: Tensor, y: Tensor, thin: Tensor) -> None:
        """Note the gradients of the part of a weight: x is what it multiplies, y the gradient of the product, and thin
        is x times down."""
        for part, left, right in ((f"down.{name}", x, self.thin[name] * self.scale), (f"up.{name}", thin, y)):
            if part in self.wanted:
                self.grads[part] = self.products.by_rows(left, right, self.out.get(part))
