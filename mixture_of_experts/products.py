"""Matrix products on the CPU into memory that is there, by the fastest library that torch has for them.

torch gives float32 products to MKL, which uses AVX2 on every processor that is not Intel's, whatever that has. oneDNN,
to which torch gives linear layers on opaque tensors, makes AVX-512 code for all that have it, and is about twice as
fast there. But it takes products one by one and copies what it reads and writes, so small ones, which gain most from
being a batch, stay with MKL. `torch.backends.mkldnn.flags(enabled=False)` leaves all to MKL.

Axes: c experts, r rows (sorted by expert), p inner and q outer dimension of a weight.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

aten = torch.ops.aten

LEAST_WORK = 1 << 24  # multiplications for which the copies are worth it
LEAST_ROWS = 128  # the same for a gradient of weights, which is large to copy however few rows it is made of


@cache
def _onednn_leads() -> bool:
    """Whether oneDNN uses AVX-512 where MKL does not."""
    has = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch have none
    return bool(has.get("architecture") == "x86_64" and has.get("avx512_f") and "Intel" not in has["cpu_name"])


def onednn_is_used() -> bool:
    """Whether large products go to oneDNN on this machine, at this time."""
    return torch.backends.mkldnn.enabled and _onednn_leads()


def is_large(dtype: torch.dtype, rows: float, p: int, q: int) -> bool:
    """Whether a product of so many rows with a weight would be oneDNN's."""
    return dtype == torch.float32 and rows * p * q >= LEAST_WORK


def all_are_large(dtype: torch.dtype, rows: float, p: int, q: int) -> bool:
    """Whether all of a layer's products would be, those that give gradients of weights too: then none is a batch."""
    return rows >= LEAST_ROWS and is_large(dtype, rows, p, q)


def rows_by_weights_into(x: Tensor, weight: Tensor, sizes: list[int], out: Tensor) -> Tensor:
    """Rows `(r, p)` of experts, of which each has its size, times the experts' weights `(c, p, q)`: `(r, q)`."""
    if _are_equal(sizes) and not (is_large(x.dtype, sizes[0], *weight.shape[1:]) and onednn_is_used()):
        shape = (len(sizes), sizes[0], -1)
        _batch(x.view(shape), weight, out.view(shape))
    else:
        for rows, matrix, result in zip(x.split(sizes), weight.unbind(0), out.split(sizes), strict=True):
            multiply(rows, matrix, result)
    return out


def rows_by_rows_into(x: Tensor, y: Tensor, sizes: list[int], out: Tensor) -> Tensor:
    """For every expert `x^T y` of its rows `(r, p)` and `(r, q)`: `(c, p, q)`."""
    if _are_equal(sizes) and not (all_are_large(x.dtype, sizes[0], *out.shape[1:]) and onednn_is_used()):
        shape = (len(sizes), sizes[0], -1)
        _batch(x.view(shape).mT, y.view(shape), out)
    else:
        for rows, others, result in zip(x.split(sizes), y.split(sizes), out.unbind(0), strict=True):
            multiply_transposed(rows, others, result)
    return out


def _are_equal(sizes: list[int]) -> bool:
    return sizes.count(sizes[0]) == len(sizes)


def _batch(x: Tensor, weight: Tensor, out: Tensor) -> None:
    if x.shape[0] == 1:
        torch.mm(x[0], weight[0], out=out[0])
    else:
        torch.bmm(x, weight, out=out)


def multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """`x (r, p)` times `weight (p, q)`; MKL is at its slowest here, so that half the rows are enough for oneDNN."""
    if is_large(x.dtype, 2 * x.shape[0], *weight.shape) and onednn_is_used():
        torch.ops.mixture_of_experts.multiply_(x, weight, out)
    else:
        torch.mm(x, weight, out=out)


def multiply_transposed(x: Tensor, y: Tensor, out: Tensor) -> None:
    """`x^T y` of `x (r, p)` and `y (r, q)`, likewise."""
    if all_are_large(x.dtype, 2 * x.shape[0], *out.shape) and onednn_is_used():
        torch.ops.mixture_of_experts.multiply_transposed_(x, y, out)
    else:
        torch.mm(x.mT, y, out=out)


# operators of their own, so that torch's FLOP counter, which knows nothing of oneDNN, sees them
torch.library.define("mixture_of_experts::multiply_", "(Tensor x, Tensor weight, Tensor(a!) out) -> ()")
torch.library.define("mixture_of_experts::multiply_transposed_", "(Tensor x, Tensor y, Tensor(a!) out) -> ()")


@torch.library.impl("mixture_of_experts::multiply_", "cpu")
def _(x: Tensor, weight: Tensor, out: Tensor) -> None:
    if weight.is_contiguous():  # a linear layer's weight is transposed; in the gradient of its input it is not
        product = aten.mkldnn_linear_backward_input(out.shape, x.to_mkldnn(), weight)
    else:
        product = aten.mkldnn_linear(x.to_mkldnn(), weight.mT)
    out.copy_(product.to_dense())


@torch.library.impl("mixture_of_experts::multiply_transposed_", "cpu")
def _(x: Tensor, y: Tensor, out: Tensor) -> None:
    out.copy_(aten.mkldnn_linear_backward_weights(x.to_mkldnn(), y.to_mkldnn(), out, False)[0])


def flops(x: tuple[int, ...], y: tuple[int, ...], *_, **__) -> int:
    """2 r p q, of the shapes of `x (r, p)` and of `weight (..., p, q)` or `y (r, q)`."""
    return 2 * x[0] * x[1] * y[-1]


PRODUCTS = [torch.ops.mixture_of_experts.multiply_, torch.ops.mixture_of_experts.multiply_transposed_]
register_flop_formula(PRODUCTS)(flops)
