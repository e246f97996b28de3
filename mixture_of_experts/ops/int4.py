"""Implements 4-bit weights with two 16-bit parameters per group of inputs. These weights need two sevenths of the
memory of bfloat16 weights.

Axes: e (experts), r (rows), p and q (inner and outer dimensions of a weight), g (inputs per group), b (outputs per
block).

A weight is `(level - 8) * step + zero`, where the level is an integer from 0 to 15 stored in four bits (a nibble). A
group consists of g adjacent inputs of one output, and has its own step and zero in bfloat16. Two nibbles form a byte.
Bytes are stored in *blocks* of b outputs, `(q / b, p, b / 2)`. The lower nibble of byte j belongs to output j, and the
upper nibble to output `j + b / 2`. The operator supports only one value of b on each CPU: 64 with AVX-512, and 32 with
AVX2. `PORTABLE_BLOCK` is used only in files, and is not supported by any CPU operator.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixture_of_experts.support.private_torch import multiply_int4, pack_int4

GROUP_SIZES = (32, 64, 128, 256)  # group sizes that the operator supports
# maximum number of rows per expert, beyond which a product with the unpacked weight is as fast
MAX_DIRECT_ROWS = 32
# outputs per block; the number of outputs is zero-padded to a multiple of the largest block
PORTABLE_BLOCK, MAX_BLOCK = 2, 64
BLOCKS = (PORTABLE_BLOCK, 32, 64)  # block sizes of the weight layouts in files


def pack_matrix(weight: Tensor, group: int, block: int) -> dict[str, Tensor]:
    """Round float32 weights `(p, q)` to the nearest levels, and pack the levels."""
    levels, step, zero = round_to_nearest(weight.unflatten(0, (-1, group)))
    return pack_levels(levels, step, zero, block)


def pack_levels(levels: Tensor, step: Tensor, zero: Tensor, block: int) -> dict[str, Tensor]:
    """Pack levels `(p / g, g, q)` into nibbles `(q / b, p, b / 2)`. The step and zero of each group, both
    `(p / g, 1, q)`, are stored as bytes `(p / g, q, 4)`, so that casting a model does not change them."""
    levels, step, zero = (F.pad(part, (0, -part.shape[-1] % MAX_BLOCK)) for part in (levels, step, zero))
    groups = torch.cat([step, zero], dim=1).mT.bfloat16().contiguous().view(torch.uint8)
    return {"packed": pack_nibbles(levels.to(torch.uint8).flatten(0, 1), block), "groups": groups}


def round_to_nearest(weight: Tensor) -> Iterator[Tensor]:
    """Return the levels for weights `(p / g, g, q)`, and the step and zero of each group, `(p / g, 1, q)`.

    Levels are either evenly spaced between the smallest and the largest weight, or centered on 0 so that the weight
    farthest from 0 has level 0. Each group uses whichever option has the smaller error.
    """
    low, high = weight.aminmax(dim=1, keepdim=True)
    even, farthest = (high - low) / 15, torch.where(high > -low, high, low)
    *between, error = round_to_levels(weight, even, low + 8 * even)
    *around, other = round_to_levels(weight, farthest / -8, torch.zeros_like(low))
    return (torch.where(other < error, new, old) for new, old in zip(around, between, strict=True))


def round_to_levels(weight: Tensor, step: Tensor, zero: Tensor) -> tuple[Tensor, ...]:
    """Return the levels of the weights and, for each group, the stored step and zero and the sum of squared errors."""
    step, zero = step.bfloat16().float(), zero.bfloat16().float()
    step = torch.where(step == 0, 1, step)
    levels = ((weight - zero) / step).round_().clamp_(-8, 7)
    error = torch.addcmul(zero, levels, step).sub_(weight).square_().sum(dim=1, keepdim=True)
    return levels.add_(8), step, zero, error


def pack_nibbles(levels: Tensor, block: int) -> Tensor:
    """Pack levels `(p, q)` into nibbles `(q / b, p, b / 2)`."""
    lower, upper = levels.unflatten(1, (-1, 2, block // 2)).transpose(0, 1).unbind(2)
    return (lower | (upper << 4)).contiguous()


def unpack_nibbles(packed: Tensor, out: Tensor) -> Tensor:
    """Write the levels to `out` `(p, q)`, which may have any dtype, and return `out`."""
    for i, levels in enumerate((packed & 15, packed >> 4)):
        out.view(-1, packed.shape[0], 2, packed.shape[2])[:, :, i].copy_(levels.transpose(0, 1))
    return out


def repack_nibbles(packed: Tensor, block: int) -> Tensor:
    """Convert nibbles `(..., q / b, p, b / 2)` to another block size b."""
    if 2 * packed.shape[-1] == block:
        return packed
    *dims, blocks, p, half = packed.shape
    levels = packed.new_empty(p, blocks * 2 * half)
    out = packed.new_empty(*dims, blocks * 2 * half // block, p, block // 2)
    for matrix, other in zip(packed.flatten(0, -4), out.flatten(0, -4), strict=True):
        other.copy_(pack_nibbles(unpack_nibbles(matrix, levels), block))
    return out


def unpack_matrix(packed: Tensor, groups: Tensor) -> Tensor:
    """Return the weights `(p, q)` in float32."""
    step, zero = groups.view(torch.bfloat16).float().unbind(-1)
    (count, q), p = step.shape, packed.shape[1]
    weight = unpack_nibbles(packed, torch.empty(p, q, device=packed.device, dtype=torch.float32)).view(count, -1, q)
    return weight.mul_(step.unsqueeze(1)).add_((zero - 8 * step).unsqueeze(1)).view(p, q)


def multiply_rows(x: Tensor, packed: Tensor, groups: Tensor, expert: Tensor | None = None) -> Tensor:
    """Multiply x `(r, p)` by one packed weight, or multiply each row by its expert's weight in a stack. The result `(r,
    q)` is in float32. The operator rounds both operands to bfloat16. The rounding error is one fortieth of the 4-bit
    quantization error."""
    rows, steps_and_zeros = x.bfloat16().contiguous(), groups.view(torch.bfloat16)
    group = x.shape[1] // groups.shape[-3]
    if expert is None:
        return multiply_int4(rows, packed, group, steps_and_zeros).float()
    choices = zip(rows.unsqueeze(1).unbind(), expert.tolist(), strict=True)
    return torch.cat([multiply_int4(row, packed[e], group, steps_and_zeros[e]) for row, e in choices]).float()


def has_direct_matmul(packed: Tensor) -> bool:
    """Return whether torch has an operator that multiplies by these nibbles without unpacking them."""
    if not packed.is_cpu:
        return False
    block = find_cpu_block()
    return block != PORTABLE_BLOCK and block == 2 * packed.shape[-1]


@cache
def find_cpu_block() -> int:
    """Return the value of b that this CPU's operator supports if its results match `unpack_matrix`, and
    `PORTABLE_BLOCK` otherwise. The check runs on the first call."""
    options: Any = {"dtype": torch.float32, "device": "cpu"}  # override defaults that the caller may have set
    weight, x = torch.arange(64 * 64, **options).mul_(0.7).sin_().view(64, 64), torch.eye(3, 64, **options)
    for block in (64, 32):
        packed, groups = pack_matrix(weight, 64, block).values()
        levels = unpack_nibbles(packed, torch.empty(64, 64, dtype=torch.int32, device="cpu"))
        try:
            if pack_int4(levels.mT).view(-1).equal(packed.view(-1)):
                found = multiply_rows(x, packed, groups)
                return (
                    block
                    if torch.allclose(found, unpack_matrix(packed, groups)[:3], rtol=1e-2, atol=1e-2)
                    else PORTABLE_BLOCK
                )
        except (AttributeError, RuntimeError):
            break
    return PORTABLE_BLOCK
