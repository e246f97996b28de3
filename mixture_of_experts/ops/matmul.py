"""Implements batched matrix products on a CPU, including products in dtypes that the CPU does not support natively.

Most CPUs multiply only float32 and float64 natively. On CPUs without native support, torch's half-precision products
take 10x to 200x as long as float32 products. This module therefore casts the operands to float32, and rounds the
result. Sums are accumulated in float32, as in torch's own products.

Axes: n (matrices), m (rows per matrix), p and q (inner and outer dimensions of a product).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixture_of_experts.support import private_torch

#: maximum number of elements of an operand or result that are cast at a time, so that they fit into the caches and the
#: allocator reuses their memory. The allocator may return larger blocks to the system, and then each product causes
#: page faults
MAX_CAST_NUMEL = 1 << 19


def matmul_into(x: Tensor, y: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """Write `x @ y` to `out`, or add it to `out` if `accumulate` is True. The operands are `(n, m, p)` and `(n, p, q)`,
    or single matrices."""
    if private_torch.has_native_matmul(x.dtype):
        if accumulate:
            (out.baddbmm_ if x.ndim == 3 else out.addmm_)(x, y)
        else:
            (torch.bmm if x.ndim == 3 else torch.mm)(x, y, out=out)
        return
    if x.ndim == 2:
        x, y, out = x.unsqueeze(0), y.unsqueeze(0), out.unsqueeze(0)
    (n, m, p), q = x.shape, y.shape[-1]
    largest = max(1, m, p)
    columns = min(q, max(1, MAX_CAST_NUMEL // largest))
    matrices = max(1, MAX_CAST_NUMEL // (largest * columns))
    for i in range(0, n, matrices):
        some = slice(i, i + matrices)
        rows = x[some].float()
        for j in range(0, q, columns):
            block, part = out[some, :, j : j + columns], y[some, :, j : j + columns].float()
            block.copy_(torch.baddbmm(block.float(), rows, part) if accumulate else torch.bmm(rows, part))
