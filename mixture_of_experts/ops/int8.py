"""8-bit weights: half of bfloat16's bytes, a quarter of float32's.

Axes: e experts, r rows, p inner and q outer dimension of a weight.

A weight is packed as torch packs 8-bit embedding tables, in `(p, q + 8)` bytes. Each of its p rows has q levels, 0 to
255, then the size of a step and the smallest number, both in float32. The weighted sum of the rows of such a table is
the product of one token with the weight, and torch's operator reads the bytes without unpacking them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from mixture_of_experts.support.private_torch import sum_packed_rows, unpack_rows

ROW_PARAMETER_BYTES = 8  # bytes of a packed row after its levels
#: of an expert; with more, a product with the unpacked weight is faster. With a limit of 16, a layer of 8 experts with
#: 12 rows each takes 0.64x to 0.86x as long with AVX-512 (EPYC, one thread), but 1.08x to 1.14x when held to AVX2.
#: `torch._weight_int8pack_mm` takes 138 microseconds for one row and a cold weight of 2048 x 768 where this takes 106;
#: with AVX2 154 and 250 (Zen 3: 290 and 410). But it reads transposed weights, which would have to be stored as well
MAX_DIRECT_ROWS = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8


def pack_matrix(weight: Tensor) -> dict[str, Tensor]:
    """Weights `(p, q)`, in float32, packed into bytes `(p, q + 8)`."""
    low, high = weight.aminmax(dim=-1, keepdim=True)
    step = (high - low) / 255
    levels = ((weight - low) / torch.where(step == 0, 1, step)).round_().clamp_(0, 255)
    return {"packed": torch.cat([levels.to(torch.uint8), torch.cat([step, low], dim=-1).view(torch.uint8)], dim=-1)}


def unpack_matrix(packed: Tensor) -> Tensor:
    """Return the weights `(..., p, q)` in float32 that are packed in `(..., p, q + 8)`."""
    if packed.ndim == 2 and has_direct_matmul(packed):
        return unpack_rows(packed)
    extra = packed[..., -ROW_PARAMETER_BYTES:].clone(
        memory_format=torch.contiguous_format
    )  # contiguous, as required by `view`
    step, low = extra.view(torch.float32).split(1, dim=-1)
    return packed[..., :-ROW_PARAMETER_BYTES].float().mul_(step).add_(low)


def multiply_rows(x: Tensor, packed: Tensor, expert: Tensor | None = None) -> Tensor:
    """x `(r, p)` times one packed weight, or each row times the weight of its own expert in a stack, in float32:
    `(r, q)`. If there are more threads than rows, a product is split into parts that are summed."""
    (r, p), threads = x.shape, torch.get_num_threads()
    parts = -(-threads // r) if threads > r else 1
    parts = parts if p % parts == 0 else 1
    start = torch.arange(0, r * p, p // parts, device=x.device)
    row = torch.arange(p, device=x.device)  # indices of the rows of the experts' weights in the whole stack
    row = row.repeat(r) if expert is None else row.add(expert.unsqueeze(1), alpha=p).view(-1)
    x = x.float().contiguous().view(-1)  # `reshape` may keep strides, which the operator ignores
    sums = sum_packed_rows(packed.view(-1, packed.shape[-1]), row, start, x)
    return sums if parts == 1 else sums.view(r, parts, -1).sum(dim=1)


def has_direct_matmul(packed: Tensor) -> bool:
    """Return whether an operator of torch multiplies with these bytes without unpacking."""
    return packed.is_cpu and has_packed_row_operators()


@cache
def has_packed_row_operators() -> bool:
    """Return whether torch has the operators for packed rows on a CPU and their results match `unpack_matrix`. It is
    determined at the first call."""
    here: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the caller's defaults are
    weight, x = torch.arange(-35, 35, **here).view(2, 5, 7) / 4, torch.arange(10, **here).view(2, 5) - 4.5
    packed = torch.stack([pack_matrix(matrix)["packed"] for matrix in weight])
    unpacked = unpack_matrix(packed)
    try:
        found, whole = multiply_rows(x, packed, torch.tensor([1, 0], device="cpu")), unpack_rows(packed[1])
    except (AttributeError, RuntimeError):
        return False
    wanted = torch.stack([row @ unpacked[e] for row, e in zip(x, (1, 0), strict=True)])
    return torch.allclose(found, wanted, rtol=1e-4) and torch.allclose(whole, unpacked[1], rtol=1e-4, atol=1e-5)
