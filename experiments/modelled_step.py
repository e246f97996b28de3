"""What a mixture's layer would cost beside its dense twin on an A100 and an H100: a model, nothing here is timed.

    python -m experiments.modelled_step

A kernel takes its multiplications at a share of the card's peak in bfloat16, or its bytes at the card's bandwidth: what
is longer. A layer takes its kernels, or the launching of them at 4 microseconds each: what is longer. Dense products
reach 0.65 of the peak. Grouped ones reach that at best; "as published" is 0.42, what the best one that says so reaches
on an H100, forward and backward (Liger-Kernel's pull request 1294: 413 TFLOP/s; torch's grouped products, forward, 242:
VeOmni's pull request 460). Experts are computed in tiles of 128 rows, of which the last is partly empty: 60 rows an
expert more, as simulated with balanced loads. Gated experts; router and losses count as launches only.

Axes: t tokens, a assignments (t k), d model dim, h hidden dim of an expert, e experts; the dense twin has k h.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

from .language_model.report import format_rows

DENSE, PUBLISHED = 0.65, 0.42  # of the peak
LAUNCH, ELEMENT = 4e-6, 2  # seconds; bytes
TILE_WASTE = 60  # rows an expert


class Card(NamedTuple):
    """Operations a second in bfloat16, and bytes a second."""

    peak: float
    bandwidth: float


class Shape(NamedTuple):
    """A layer, and the tokens of a step on one card."""

    label: str
    t: int
    d: int
    h: int
    e: int
    k: int


class Kernel(NamedTuple):
    """Multiplications with an addition each, and elements read and written."""

    products: float
    elements: float

    def seconds(self, card: Card, efficiency: float) -> float:
        return max(2 * self.products / (efficiency * card.peak), ELEMENT * self.elements / card.bandwidth)


CARDS = {"A100": Card(312e12, 2.0e12), "H100": Card(989e12, 3.35e12)}
SHAPES = (
    Shape("0.07 million active", 2_048, 32, 64, 32, 2),
    Shape("0.3 million active", 2_048, 64, 128, 32, 2),
    Shape("1 million active", 2_048, 128, 256, 32, 2),
    Shape("GPT-2's width, 8 experts", 32_768, 768, 1_024, 8, 2),
    Shape("GPT-2's width, 32 experts", 32_768, 768, 1_024, 32, 2),
    Shape("Mixtral's", 32_768, 4_096, 14_336, 8, 2),
    Shape("Qwen3-30B-A3B's", 32_768, 2_048, 768, 128, 8),
    Shape("gpt-oss-120b's", 32_768, 2_880, 2_880, 128, 4),
    Shape("DeepSeek-V3's", 32_768, 7_168, 2_048, 256, 8),
)


def dense(s: Shape) -> tuple[list[Kernel], int]:
    """Kernels and launches of the dense twin."""
    t, d, h = s.t, s.d, s.k * s.h
    weight, product = d * h, float(s.t * s.d * s.k * s.h)
    kernels = [
        *2 * [Kernel(product, t * d + weight + t * h)],  # up: gate and value
        Kernel(0, 3 * t * h),  # activation
        Kernel(product, t * h + weight + t * d),  # down
        Kernel(product, t * d + weight + t * h),  # gradient of the hidden layer
        Kernel(0, 5 * t * h),  # of the activation
        *2 * [Kernel(product, t * h + weight + t * d)],  # of the input
        Kernel(0, 3 * t * d),
        *3 * [Kernel(product, t * d + t * h + weight)],  # of the weights
    ]
    return kernels, len(kernels)


def grouped(s: Shape) -> tuple[list[Kernel], int]:
    """Grouped products between gathers of rows; the launches are those that docs/kernels.md counts."""
    a, d, h = s.t * s.k, s.d, s.h
    weight, product = s.e * d * h, _tiles(s) * d * h
    kernels = [
        Kernel(0, 2 * a * d),  # gather
        *2 * [Kernel(product, a * d + weight + a * h)],
        Kernel(0, 3 * a * h),
        Kernel(product, a * h + weight + a * d),
        Kernel(0, a * d + s.t * d),  # a token's rows summed
        Kernel(0, 2 * a * d),  # gather of the gradient
        Kernel(product, a * d + weight + a * h),
        Kernel(0, 6 * a * h),
        *2 * [Kernel(product, a * h + weight + a * d)],
        Kernel(0, 3 * a * d),
        Kernel(0, a * d + s.t * d),
        Kernel(0, 2 * a * d),  # gather again
        *3 * [Kernel(product, a * d + a * h + weight)],
    ]
    return kernels, 110


def _tiles(s: Shape) -> float:
    """Rows that are computed: the last tile of an expert is not full."""
    return float(s.t * s.k + min(TILE_WASTE, s.t * s.k / s.e) * s.e)


def milliseconds(kernels: Sequence[Kernel], launches: int, card: Card, efficiency: float = DENSE) -> float:
    return 1000 * max(sum(kernel.seconds(card, efficiency) for kernel in kernels), launches * LAUNCH)


def table() -> str:
    """Of each shape and card: milliseconds of the dense layer, and the mixture's over them."""
    rows: list[tuple[str, ...]] = [("layer", "card", "dense, ms", "mixture ÷ dense, at best", "as published")]
    for shape in SHAPES:
        for name, card in CARDS.items():
            base = milliseconds(*dense(shape), card)
            ratios = (milliseconds(*grouped(shape), card, efficiency) / base for efficiency in (DENSE, PUBLISHED))
            rows.append((shape.label, name, f"{base:.2f}", *(f"{ratio:.2f}" for ratio in ratios)))
    return format_rows(rows)


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    ).parse_args(argv)
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
