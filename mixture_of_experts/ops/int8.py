"""Implements 8-bit weights, which need half the memory of bfloat16 and a quarter of the memory of float32.

Axes: e (experts), r (rows), p and q (inner and outer dimensions of a weight).

A weight is packed into `(p, q + 8)` bytes in the format of torch's 8-bit embedding tables. Each of the table's p rows
contains q levels from 0 to 255, followed by the step size and the smallest weight in float32. The product of a token
and the weight is a weighted sum of the table's rows. Torch's operator computes this sum without unpacking the table.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from mixture_of_experts.support.private_torch import sum_packed_rows, unpack_rows

ROW_PARAMETER_BYTES = 8  # bytes that follow the levels of a packed row
#: maximum number of rows per expert, beyond which a product with the unpacked weight is faster. If it is 16 instead of
#: 8, a layer of 8 experts with 12 rows each takes 0.64x to 0.86x as long with AVX-512 (EPYC, one thread), but 1.08x to
#: 1.14x as long when limited to AVX2. For one row and a cold weight of 2048 x 768, `torch._weight_int8pack_mm` takes
#: 138 microseconds and this operator takes 106; with AVX2, they take 154 and 250 (290 and 410 on Zen 3). However,
#: `torch._weight_int8pack_mm` reads transposed weights, which would also have to be stored
MAX_DIRECT_ROWS = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8


def pack_matrix(weight: Tensor) -> dict[str, Tensor]:
    """Pack float32 weights `(p, q)` into bytes `(p, q + 8)`."""
    low, high = weight.aminmax(dim=-1, keepdim=True)
    step = (high - low) / 255
    levels = ((weight - low) / torch.where(step == 0, 1, step)).round_().clamp_(0, 255)
    return {"packed": torch.cat([levels.to(torch.uint8), torch.cat([step, low], dim=-1).view(torch.uint8)], dim=-1)}


def unpack_matrix(packed: Tensor) -> Tensor:
    """Unpack bytes `(..., p, q + 8)` into float32 weights `(..., p, q)`."""
    if packed.ndim == 2 and has_direct_matmul(packed):
        return unpack_rows(packed)
    # `view` requires contiguous memory
    extra = packed[..., -ROW_PARAMETER_BYTES:].clone(memory_format=torch.contiguous_format)
    step, low = extra.view(torch.float32).split(1, dim=-1)
    return packed[..., :-ROW_PARAMETER_BYTES].float().mul_(step).add_(low)


def multiply_rows(x: Tensor, packed: Tensor, expert: Tensor | None = None) -> Tensor:
    """Multiply x `(r, p)` by one packed weight, or multiply each row by its expert's weight in a stack. The result `(r,
    q)` is in float32. If there are more threads than rows, each product is split into parts, which are then summed."""
    (r, p), threads = x.shape, torch.get_num_threads()
    parts = -(-threads // r) if threads > r else 1
    parts = parts if p % parts == 0 else 1
    start = torch.arange(0, r * p, p // parts, device=x.device)
    row = torch.arange(p, device=x.device)  # indices of the experts' weight rows in the stack
    row = row.repeat(r) if expert is None else row.add(expert.unsqueeze(1), alpha=p).view(-1)
    x = x.float().contiguous().view(-1)  # the operator ignores strides, so its input must be contiguous
    sums = sum_packed_rows(packed.view(-1, packed.shape[-1]), row, start, x)
    return sums if parts == 1 else sums.view(r, parts, -1).sum(dim=1)


def has_direct_matmul(packed: Tensor) -> bool:
    """Return whether torch has an operator that multiplies by these bytes without unpacking them."""
    return packed.is_cpu and has_packed_row_operators()


@cache
def has_packed_row_operators() -> bool:
    """Return whether torch has CPU operators for packed rows whose results match `unpack_matrix`. The check runs on the
    first call."""
    options: Any = {"dtype": torch.float32, "device": "cpu"}  # override defaults that the caller may have set
    weight, x = torch.arange(-35, 35, **options).view(2, 5, 7) / 4, torch.arange(10, **options).view(2, 5) - 4.5
    packed = torch.stack([pack_matrix(matrix)["packed"] for matrix in weight])
    unpacked = unpack_matrix(packed)
    try:
        found, whole = multiply_rows(x, packed, torch.tensor([1, 0], device="cpu")), unpack_rows(packed[1])
    except (AttributeError, RuntimeError):
        return False
    wanted = torch.stack([row @ unpacked[e] for row, e in zip(x, (1, 0), strict=True)])
    return torch.allclose(found, wanted, rtol=1e-4) and torch.allclose(whole, unpacked[1], rtol=1e-4, atol=1e-5)
