"""The layers that are compared on a GPU.

Axes: t tokens, d model dim, h hidden dim, e experts, k choices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """The sizes of a layer, and the number of tokens of a call."""

    name: str
    t: int
    d: int
    h: int
    e: int
    k: int

    @property
    def mean_rows(self) -> int:
        return self.t * self.k // self.e

    def with_rows(self, rows: int) -> Shape:
        """Return the shape with as many tokens as give an expert this number of rows on average."""
        return replace(self, t=max(rows * self.e // self.k, 1))


#: 512 to 2,048 rows per expert
SHAPES = (
    Shape("qwen3-30b-a3b", 32768, 2048, 768, 128, 8),
    Shape("readme", 8192, 512, 2048, 16, 2),
    Shape("deepseek-v3", 16384, 7168, 2048, 256, 8),
    Shape("mixtral", 8192, 4096, 14336, 8, 2),
    Shape("512-experts", 32768, 2048, 512, 512, 10),
)
MAIN_SHAPES = ("qwen3-30b-a3b", "readme")  # compared in more cases than the others


def shrink_to_fit(shape: Shape, memory: int) -> Shape:
    """Return the shape, made smaller until `memory` bytes are enough for the weights of a contestant and of the
    reference in float32, their gradients, and what a call computes of its rows.

    The number of experts is reduced first, with as many rows each, as if they were sharded over several GPUs.
    """
    while 3 * shape.e * shape.d * shape.h * 2 * 16 > memory:
        fewer = shape.e >= 4 * shape.k
        shape = replace(shape, t=shape.t // 2, e=shape.e // 2) if fewer else replace(shape, h=shape.h // 2)
    while shape.t * shape.k * (2 * shape.d + 4 * shape.h) * 2 * 4 > memory:
        shape = replace(shape, t=shape.t // 2)
    return shape
