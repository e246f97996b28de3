"""Block sizes, warps and stages of every kernel: a table for each class of cards, by the height of tiles.

`tests/support/triton_machine_code.py` compiles every entry ahead of time for the cards of its class. It checks that
shared memory suffices, no registers spill, operands are copied asynchronously in all stages, and products use tensor
cores (IEEE float32 has none). No entry has been timed on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mixture_of_experts.dispatch.assignments import Assignments
from mixture_of_experts.kernels.launching import find_card_family
from mixture_of_experts.support.private_torch import statically_known_true
from mixture_of_experts.support.tracing import get_device_capability, symbolic_min

MAX_LOW_MEAN_ROWS = 16  # mean rows of an expert up to which tiles have 16 or 32 rows
MAX_COMPARED_ASSIGNMENTS = 2048  # up to this many assignments, a kernel compares them with each other


class BlockSizes(NamedTuple):
    """Blocks of a product of rows and weights: `n` columns of the weight; sums run over `c` at a time."""

    n: int
    c: int
    warps: int
    stages: int


class WeightBlockSizes(NamedTuple):
    """Blocks `(m, n)` of the gradient of a weight; sums run over `c` rows at a time."""

    m: int
    n: int
    c: int
    warps: int
    stages: int


class Schedule(NamedTuple):
    """Sizes for one call: `rows` of a tile, and the blocks of each kernel. `cost` is the estimated time of a row in a
    full tile, relative to the highest tiles. For gated experts with two weights, half of `n` are columns of each."""

    rows: int
    cost: float
    up: BlockSizes
    down: BlockSizes
    hidden_grads: BlockSizes
    row_grads: BlockSizes
    weight_grads: WeightBlockSizes


def _make_half_entry(
    weights: WeightBlockSizes, rows: int, cost: float, stages: int, warps: int = 4, down: int = 128, row_grads: int = 64
) -> Schedule:
    """Return an entry for bfloat16 or float16; `down` and `row_grads` are the columns of these kernels."""
    blocks = BlockSizes(128, 64, warps, stages)
    narrow = blocks._replace(n=64)
    return Schedule(rows, cost, blocks, blocks._replace(n=down), narrow, blocks._replace(n=row_grads), weights)


def _make_low_entries(weights: WeightBlockSizes, *costs: float) -> list[Schedule]:
    """Tiles of 16, 32 and 64 rows. They read weights more often: a program of m rows and 128 columns reads
    `1 / m + 1 / 128` elements for each multiplication, which costs more where products are faster."""
    return [_make_half_entry(weights, *entry) for entry in zip((16, 32, 64), costs, (4, 3, 3), strict=True)]


def _make_float32_entry(rows: int, cost: float, c: int, warps: int) -> Schedule:
    """Return an entry for float32. Its row_grads are narrow: on sm_100 two sums of 64 columns spill registers."""
    blocks = BlockSizes(64, c, warps, 3)
    return Schedule(rows, cost, blocks, blocks, blocks, blocks._replace(n=32), WeightBlockSizes(64, 64, c, 8, 4))


_MMA, _GROUPS = WeightBlockSizes(128, 128, 32, 8, 4), WeightBlockSizes(128, 128, 64, 8, 3)
*_lower, _highest = _make_low_entries(_MMA, 2.8, 1.6, 1.15)
# with 4 warps the clamped activation of weights that are stored transposed spills registers, with Triton 3.6 and 3.7
_LOW_MMA = (*_lower, _highest._replace(up=BlockSizes(128, 64, 8, 3)))
_LOW_GROUPS = _make_low_entries(_GROUPS, 4.2, 2.3, 1.35)
_SMALL = _make_half_entry(_MMA, 128, 1.0, stages=3, warps=8, row_grads=128)

#: entries for bfloat16 and float16, by the compute capability that represents a family of cards
HALF_SCHEDULES: dict[tuple[int, int], tuple[Schedule, ...]] = {
    (8, 0): (*_LOW_MMA, _make_half_entry(_MMA, 128, 1.0, stages=4, warps=8, row_grads=128)),  # 163 KB of shared memory
    (8, 6): (*_LOW_MMA, _SMALL),  # 99 KB
    # 227 KB, groups of warps multiply
    (9, 0): (*_LOW_GROUPS, _make_half_entry(_GROUPS, 128, 1.0, stages=3, warps=8, down=256, row_grads=256)),
    (10, 0): (*_LOW_GROUPS, _make_half_entry(_GROUPS, 128, 1.0, stages=3, warps=8, row_grads=128)),
    (12, 0): (*_LOW_MMA, _SMALL),
}
#: entries for float32, the same for all cards
FLOAT32_SCHEDULES: dict[str, tuple[Schedule, ...]] = {
    "tf32": (
        _make_float32_entry(16, 4, 32, 4),
        _make_float32_entry(32, 2, 32, 4)._replace(
            up=BlockSizes(64, 32, 8, 3)
        ),  # with 4 warps it spills registers on sm_100
        _make_float32_entry(64, 1.2, 32, 4),
        _make_float32_entry(128, 1.0, 32, 8),
    ),
    # on sm_90 the hidden layer's gradients with 4 warps spill registers
    "ieee": (
        _make_float32_entry(16, 2.0, 16, 4)._replace(hidden_grads=BlockSizes(64, 16, 8, 3)),
        _make_float32_entry(64, 1.0, 16, 8),
    ),
}


def _make_uniform_entry(rows: int, cost: float, blocks: BlockSizes, weights: WeightBlockSizes) -> Schedule:
    return Schedule(rows, cost, blocks, blocks, blocks, blocks, weights)


#: entries for Triton's interpreter: small, so that a call that takes a second has several tiles and blocks
INTERPRETER_SCHEDULES: tuple[Schedule, ...] = (
    _make_uniform_entry(16, 1.5, BlockSizes(32, 16, 1, 1), WeightBlockSizes(16, 32, 16, 1, 1)),
    _make_uniform_entry(32, 1.0, BlockSizes(64, 16, 1, 1), WeightBlockSizes(32, 32, 32, 1, 1)),
)


def get_input_precision(dtype: torch.dtype) -> str:
    """Return the precision of float32 products, "tf32" or "ieee", according to torch's own setting."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def find_entries(device: torch.device, dtype: torch.dtype) -> tuple[Schedule, ...]:
    """Return the entries for operands of this dtype on a card; on a CPU those of the interpreter."""
    if device.type == "cpu":
        return INTERPRETER_SCHEDULES
    family = find_card_family(get_device_capability(device))
    assert family is not None
    return HALF_SCHEDULES[family] if dtype.itemsize == 2 else FLOAT32_SCHEDULES[get_input_precision(dtype)]


def uses_comparison(assignments: Assignments, max_compared: int = MAX_COMPARED_ASSIGNMENTS) -> bool:
    """Return whether the permutation compares assignments, at most `max_compared`, with each other, without queues."""
    number = assignments.weight.shape[0]
    return statically_known_true(number <= max_compared) and statically_known_true(number == assignments.max_rows)


def count_permuted_rows(assignments: Assignments, max_compared: int = MAX_COMPARED_ASSIGNMENTS) -> int:
    """Return the number of rows of a call's permutation, from which the self-check and the launch find the same
    entry."""
    if assignments.routing is None or uses_comparison(assignments, max_compared):
        return assignments.max_rows
    return symbolic_min(assignments.max_rows, assignments.num_slots)


def find_schedule(entries: tuple[Schedule, ...], mean_rows: int) -> Schedule:
    """Return the entry with the least estimated time for experts with `mean_rows` rows on average."""
    return min(entries, key=lambda entry: entry.cost * estimate_computed_rows(mean_rows, entry.rows))


def estimate_computed_rows(mean_rows: int, height: int) -> float:
    """Return the rows computed for an expert: whole tiles, the last of which is half empty on average."""
    return max(height, mean_rows + height / 2)
