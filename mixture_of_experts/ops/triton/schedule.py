"""Block sizes, warps and stages of all kernels. Each family of cards has a table with one entry per tile height.

`tests/support/triton_machine_code.py` compiles all entries ahead of time for their cards. It checks that shared memory
is sufficient, no registers spill, all stages copy operands asynchronously, and products use tensor cores (which do not
support IEEE float32). No entry has been timed on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mixture_of_experts.dispatch.assignments import Assignments
from mixture_of_experts.kernels.launching import find_card_family
from mixture_of_experts.support.private_torch import statically_known_true
from mixture_of_experts.support.tracing import get_device_capability, symbolic_min

MAX_LOW_MEAN_ROWS = 16  # maximum mean number of rows per expert for tiles of 16 or 32 rows
TILES_PER_PROGRAM = 32  # number of tiles that each program writes to the tile table
MAX_COMPARED_ASSIGNMENTS = 2048  # maximum number of assignments that a kernel compares pairwise


class BlockSizes(NamedTuple):
    """Block sizes for a product of rows and weights: `n` weight columns, summed over `c` inputs at a time."""

    n: int
    c: int
    warps: int
    stages: int


class WeightBlockSizes(NamedTuple):
    """Block sizes `(m, n)` for a weight's gradient, which is summed over `c` rows at a time."""

    m: int
    n: int
    c: int
    warps: int
    stages: int


class Schedule(NamedTuple):
    """The number of `rows` per tile, and the block sizes of each kernel.

    `cost` is the estimated time per row of a full tile, relative to tiles with the largest number of rows. If gated
    experts have two weights, each weight provides half of the `n` columns.
    """

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
    """Return a schedule entry for bfloat16 or float16. `down` and `row_grads` are the numbers of columns per block in
    the kernels of the same names."""
    blocks = BlockSizes(128, 64, warps, stages)
    narrow = blocks._replace(n=64)
    return Schedule(rows, cost, blocks, blocks._replace(n=down), narrow, blocks._replace(n=row_grads), weights)


def _make_low_entries(weights: WeightBlockSizes, *costs: float) -> list[Schedule]:
    """Return schedule entries with tiles of 16, 32 and 64 rows.

    Tiles with fewer rows read weights more often. A program with m rows and 128 columns reads `1 / m + 1 / 128`
    elements per multiplication, which matters more on cards with faster products.
    """
    return [_make_half_entry(weights, *entry) for entry in zip((16, 32, 64), costs, (4, 3, 3), strict=True)]


def _make_float32_entry(rows: int, cost: float, c: int, warps: int) -> Schedule:
    """Return a schedule entry for float32. Blocks of `row_grads` are narrow, because two sums with 64 columns each
    spill registers on sm_100."""
    blocks = BlockSizes(64, c, warps, 3)
    return Schedule(rows, cost, blocks, blocks, blocks, blocks._replace(n=32), WeightBlockSizes(64, 64, c, 8, 4))


_MMA, _GROUPS = WeightBlockSizes(128, 128, 32, 8, 4), WeightBlockSizes(128, 128, 64, 8, 3)
*_lower, _highest = _make_low_entries(_MMA, 2.8, 1.6, 1.15)
# with 4 warps, the clamped activation for transposed weights spills registers in Triton 3.6 and 3.7
_LOW_MMA = (*_lower, _highest._replace(up=BlockSizes(128, 64, 8, 3)))
_LOW_GROUPS = _make_low_entries(_GROUPS, 4.2, 2.3, 1.35)
_SMALL = _make_half_entry(_MMA, 128, 1.0, stages=3, warps=8, row_grads=128)

#: schedule entries for bfloat16 and float16, keyed by card family
HALF_SCHEDULES: dict[tuple[int, int], tuple[Schedule, ...]] = {
    (8, 0): (*_LOW_MMA, _make_half_entry(_MMA, 128, 1.0, stages=4, warps=8, row_grads=128)),  # 163 KB of shared memory
    (8, 6): (*_LOW_MMA, _SMALL),  # 99 KB
    # 227 KB of shared memory; products use warp groups
    (9, 0): (*_LOW_GROUPS, _make_half_entry(_GROUPS, 128, 1.0, stages=3, warps=8, down=256, row_grads=256)),
    (10, 0): (*_LOW_GROUPS, _make_half_entry(_GROUPS, 128, 1.0, stages=3, warps=8, row_grads=128)),
    (12, 0): (*_LOW_MMA, _SMALL),
}
#: schedule entries for float32 on all cards
FLOAT32_SCHEDULES: dict[str, tuple[Schedule, ...]] = {
    "tf32": (
        _make_float32_entry(16, 4, 32, 4),
        _make_float32_entry(32, 2, 32, 4)._replace(up=BlockSizes(64, 32, 8, 3)),  # 4 warps spill registers on sm_100
        _make_float32_entry(64, 1.2, 32, 4),
        _make_float32_entry(128, 1.0, 32, 8),
    ),
    # `hidden_grads` spills registers with 4 warps on sm_90
    "ieee": (
        _make_float32_entry(16, 2.0, 16, 4)._replace(hidden_grads=BlockSizes(64, 16, 8, 3)),
        _make_float32_entry(64, 1.0, 16, 8),
    ),
}


def _make_uniform_entry(rows: int, cost: float, blocks: BlockSizes, weights: WeightBlockSizes) -> Schedule:
    return Schedule(rows, cost, blocks, blocks, blocks, blocks, weights)


#: entries for Triton's interpreter; their blocks are small, so that a one-second call has several tiles and blocks
INTERPRETER_SCHEDULES: tuple[Schedule, ...] = (
    _make_uniform_entry(16, 1.5, BlockSizes(32, 16, 1, 1), WeightBlockSizes(16, 32, 16, 1, 1)),
    _make_uniform_entry(32, 1.0, BlockSizes(64, 16, 1, 1), WeightBlockSizes(32, 32, 32, 1, 1)),
)


def get_input_precision(dtype: torch.dtype) -> str:
    """Return torch's precision setting for float32 products, "tf32" or "ieee"."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def find_entries(device: torch.device, dtype: torch.dtype) -> tuple[Schedule, ...]:
    """Return the schedule entries for a card and dtype, or the interpreter's entries for a CPU."""
    if device.type == "cpu":
        return INTERPRETER_SCHEDULES
    family = find_card_family(get_device_capability(device))
    assert family is not None
    return HALF_SCHEDULES[family] if dtype.itemsize == 2 else FLOAT32_SCHEDULES[get_input_precision(dtype)]


def uses_comparison(assignments: Assignments, max_compared: int = MAX_COMPARED_ASSIGNMENTS) -> bool:
    """Return whether the permutation is computed without queues, by comparing up to `max_compared` assignments
    pairwise."""
    number = assignments.weight.shape[0]
    return statically_known_true(number <= max_compared) and statically_known_true(number == assignments.max_rows)


def count_permuted_rows(assignments: Assignments, max_compared: int = MAX_COMPARED_ASSIGNMENTS) -> int:
    """Return the number of rows in a call's permutation. The self-check and the launch use this number to select a
    schedule entry."""
    if assignments.routing is None or uses_comparison(assignments, max_compared):
        return assignments.max_rows
    return symbolic_min(assignments.max_rows, assignments.num_slots)


def find_schedule(entries: tuple[Schedule, ...], mean_rows: int) -> Schedule:
    """Return the schedule entry with the lowest estimated time, given the mean number of rows per expert."""
    return min(entries, key=lambda entry: entry.cost * estimate_computed_rows(mean_rows, entry.rows))


def estimate_computed_rows(mean_rows: int, height: int) -> float:
    """Estimate the number of rows computed per expert. Only whole tiles are computed, and the last one is half empty on
    average."""
    return max(height, mean_rows + height / 2)
