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
    pre = rows.run_network(adapted, x, network.spelled(), save)
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
    number, (*_, w_out) = len(network.w_in), network.adapted()
    adapted: Any = GradientProducts(products)
    adapted.x, adapted.scale, adapted.grads = x, scale.to(x.dtype), {}
    adapted.saved = dict(zip((w.name for w in network.adapted() if w.down is not None), saved[number:], strict=True))
    adapted.wanted, adapted.out = wanted, memory
    names = {"x"} if w_out.down is None else {"x", "w_out"}
    of_weight = {"w_out": w_out}  # which tells `by_rows` of its weight
    rows.gradients_of_network(adapted, x, network.spelled(), saved[:number], grad, scale, grad_scale, names, of_weight)
    return adapted.grads


class AdaptedProducts:
    """`rows.Products` by weights with low-rank parts."""

    def __init__(self, products: Any) -> None:
        self.products = products
        self.gather: Any = products.gather
        self.add_bias: Any = products.add_bias
        self.sums: Any = products.sums
        self.activate: Any = products.activate
        self.thin: dict[str, Tensor] = {}  # rows times each down, by the name of the weight

    def narrow(self, x: Tensor, w: LowRank) -> Tensor | None:
        """x times down `(r, k)`, once for each weight; None if it has no part."""
        if w.down is not None and w.name not in self.thin:
            self.thin[w.name] = self.products.by_weights(x, w.down)
        return self.thin.get(w.name)

    def by_weights(self, x: Tensor, weight: LowRank) -> Tensor:
        products, thin = self.products, self.narrow(x, weight)
        out = products.by_weights(x, weight.weight)
        if thin is None:
            return out
        if isinstance(products, ChunkProducts):
            return products.by_weights(thin, weight.up, out, add=True)
        return out.add_(products.by_weights(thin, weight.up))

    def total(self, pairs: Sequence[tuple[Tensor, LowRank]]) -> Tensor:
        terms = []
        for x, weight in pairs:
            thin = self.narrow(x, weight)
            terms += [(x, weight.weight)] if thin is None else [(x, weight.weight), (thin, weight.up)]
        return self.products.total(terms)


class GradientProducts(AdaptedProducts):
    """The same in a backward, where it notes the gradients of the parts."""

    x: Tensor  # (t, d), tokens
    scale: Tensor  # (r, 1), weight of each row
    saved: dict[str, Tensor]  # rows times each down, of the forward
    wanted: Collection[str]
    out: Mapping[str, Tensor]
    grads: dict[str, Tensor]

    def by_rows(self, x: Tensor, y: Tensor, out: LowRank) -> None:
        """In the place of the gradient of `w_out`; the rows y are weighed."""
        self.note(out, x, y, self.saved[out.name])

    def total(self, pairs: Sequence[tuple[Tensor, LowRank]]) -> Tensor:
        """Beside the gradients of tokens, those of the parts of `w_in`; pairs have their weights transposed."""
        total = super().total(pairs)
        tokens = self.gather(self.x) if self.thin.keys() - {"w_out"} else None
        for y, w in pairs:
            if tokens is not None and w.down is not None:
                self.note(w.mT, tokens, y, self.saved[w.name] * self.scale)
        return total

    def note(self, w: LowRank, x: Tensor, y: Tensor, thin: Tensor) -> None:
        """Note the gradients of down and up of a weight, by which x is multiplied, from those of the products."""
        for name, left, right in (
            (f"down.{w.name}", x, self.thin[w.name] * self.scale),
            (f"up.{w.name}", thin, y),
        ):
            if name in self.wanted:
                self.grads[name] = self.products.by_rows(left, right, self.out.get(name))
