"""Sizes of blocks, warps and stages of every kernel: one table, by kind of product and rows of an expert.

`tests/support/triton_machine_code.py` compiles every entry ahead of time for every card of `PROVEN`: it fits into the
card's shared memory, no register spills, and products run on tensor cores (but IEEE float32, which has none). No entry
has been timed on a GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple

#: compute capabilities that the table is compiled and checked for
PROVEN = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
#: those with 163 KB of shared memory or more; the others have 99
ROOMY = ((8, 0), (9, 0), (10, 0))


class Blocks(NamedTuple):
    """Of rows by weights: a block has `n` columns, and `c` are summed over at a time."""

    n: int
    c: int
    warps: int
    stages: int


class WeightBlocks(NamedTuple):
    """Of the gradient of a weight `(m, n)`, which sums over `c` rows at a time."""

    m: int
    n: int
    c: int
    warps: int
    stages: int


class Schedule(NamedTuple):
    """What one call uses. `rows` is the height of its tiles; `two` is for pairs of products with one left operand."""

    rows: int
    two: Blocks  # up, of gated experts
    one: Blocks  # up of plain experts, and down
    hidden_grads: Blocks
    row_grads: Blocks
    two_weight_grads: WeightBlocks
    one_weight_grads: WeightBlocks


def _half(rows: int, warps: int, stages: int) -> Schedule:
    narrow, wide = Blocks(64, 64, warps, stages), Blocks(128, 64, warps, stages)
    grads = wide if rows == 128 else narrow
    return Schedule(rows, narrow, wide, grads, grads, WeightBlocks(128, 64, 64, 8, 4), WeightBlocks(128, 128, 64, 8, 4))


def _alike(rows: int, blocks: Blocks, weights: WeightBlocks) -> Schedule:
    return Schedule(rows, blocks, blocks, blocks, blocks, weights, weights)


def _single(rows: int, c: int, warps: int) -> Schedule:
    entry = _alike(rows, Blocks(64, c, warps, 3), WeightBlocks(64, 64, c, 8, 4))
    return entry._replace(row_grads=Blocks(32, c, warps, 3))  # on sm_100 the two sums of 64 columns spill


#: by kind; the first entry is taken whose tiles hold the mean rows of an expert, else the last
TABLE: dict[str, tuple[Schedule, ...]] = {
    "half": (_half(16, 4, 4), _half(32, 4, 3), _half(64, 4, 3), _half(128, 8, 3)),
    "tf32": (_single(16, 32, warps=4), _single(32, 32, warps=4), _single(64, 32, warps=4), _single(128, 32, warps=8)),
    # on sm_90 the compiler wants 64 registers for the hidden layer's gradients with 4 warps, and spills
    "ieee": (_single(16, 16, warps=4)._replace(hidden_grads=Blocks(64, 16, 8, 3)), _single(64, 16, warps=8)),
    # of Triton's interpreter: so small that sizes which it can compute in a second have several of each
    "interpreted": (
        _alike(16, Blocks(16, 16, 1, 1), WeightBlocks(16, 32, 16, 1, 1)),
        _alike(32, Blocks(32, 16, 1, 1), WeightBlocks(32, 16, 32, 1, 1)),
    ),
}


def find_schedule(kind: str, mean_rows: int, capability: tuple[int, int] | None) -> Schedule:
    """The entry for calls whose experts have so many rows on average; a new number of tokens finds one of a few."""
    entries = TABLE[kind]
    entry = next((entry for entry in entries if mean_rows <= entry.rows), entries[-1])
    return deeper(entry) if kind == "half" and entry.rows == 128 and capability in ROOMY else entry


def deeper(entry: Schedule) -> Schedule:
    """The same with one block more under way, where there is room for it."""
    one, row_grads = (blocks._replace(stages=blocks.stages + 1) for blocks in (entry.one, entry.row_grads))
    return entry._replace(one=one, row_grads=row_grads, two=entry.two._replace(stages=entry.two.stages + 1))
