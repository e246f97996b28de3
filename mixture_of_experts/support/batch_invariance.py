"""Computes rows on a CPU so that each result is bitwise independent of the other rows in the batch.

Libraries choose the order of summation based on the number of rows, so a single row may be rounded differently than the
same row in a batch. Rows are therefore multiplied in blocks. The block size is chosen so that multiplying several
blocks together produces the same bits as multiplying each block alone. At most `MAX_ROWS` rows are multiplied at a
time. The block size is found by sampling the actual function, using operands with the same dtypes, shapes and strides,
and the same number of threads.

Torch vectorizes elementwise functions, such as `sigmoid`. The elements of a partially filled vector are rounded
differently. Tensors with `GRAIN_SIZE` or more elements are split among threads, and each thread's part may end with a
partially filled vector. Elementwise functions are therefore called with whole vectors that have fewer than `GRAIN_SIZE`
elements in total.

`ops.use("batch_invariant")` enables batch-invariant computation. Modules raise an error unless they are listed here or
their class implements `variant_reason`.

Axes: t (tokens), p and q (inner and outer dimensions of a matrix product), r (rows).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixture_of_experts.providers import ask_providers
from mixture_of_experts.support.implementations import requested_implementation
from mixture_of_experts.support.private_torch import (
    disable_dispatch_modes,
    get_original_class,
    is_checkpoint_wrapper,
    is_in_transform,
    unwrap_module,
)
from mixture_of_experts.support.subclassing import is_package_class, list_members

BATCH_INVARIANT = "batch_invariant"
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64)  # candidate numbers of rows per block, in the order in which they are tried
MAX_ROWS = 3 * BLOCK_SIZES[-1]  # maximum number of rows in a product, and number of sampled rows
MIN_COLUMNS = 16  # with fewer columns, a row's bits depend on its position
VECTOR_NUMEL = 64  # a multiple of each dtype's vector length
GRAIN_SIZE = 32768  # minimum number of elements for which torch splits a tensor among threads

#: torch modules that transform each row independently, and containers that only call their submodules
TOKENWISE_MODULES: set[type] = {
    nn.Linear,
    nn.RMSNorm,
    nn.LayerNorm,
    nn.SiLU,
    nn.GELU,
    nn.ReLU,
    nn.Sigmoid,
    nn.Tanh,
    nn.Identity,
    nn.Dropout,
}
TOKENWISE_MODULES |= {nn.Sequential, nn.ModuleDict, nn.ParameterDict}
#: attributes of a class that do not affect outputs or are derived from other attributes
IGNORED_ATTRIBUTES = {"extra_repr", "reset_parameters", "_settings", "reads_assignments", "allocates_outputs"}

#: `compute(x, y, *operands)` multiplies rows x `(..., r, p)` by the operands, and may compute related results, such as
#: gradients for rows y `(..., r, q)`. It returns tensors `(v, ..., r, anything)`, whose v results must be equal
SampledFunction = Callable[..., list[Tensor]]


class OperandLayout(NamedTuple):
    """Properties of an operand, other than its values, that affect the bits of a product."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def reject_batch_invariance(what: str) -> None:
    """Raise a ValueError if batch invariance is requested. This function must be called for products that are not
    computed in blocks."""
    if requested_implementation() == BATCH_INVARIANT:
        raise ValueError(f"{BATCH_INVARIANT!r} is requested, but {what}. Request 'auto' to disable batch invariance")


# Detection of batch-invariant modules


def check_batch_invariant(x: Tensor, **parts: nn.Module | None) -> None:
    """Raise a ValueError if batch invariance is requested but a part of a layer is not known to be batch-invariant.

    Gates and experts must implement `variant_reason`, and a `shared_expert` must consist of known modules.
    """
    if requested_implementation() != BATCH_INVARIANT:
        return
    if torch.compiler.is_compiling() or is_in_transform():
        reject_batch_invariance("values cannot be read while a graph is traced or a transform of torch.func runs")
    if x.device.type != "cpu":
        reject_batch_invariance(f"the inputs are on {x.device}; move the model and the inputs to a CPU")
    for name, part in parts.items():
        why = not_tokenwise_reason if name == "shared_expert" else find_variant_reason
        if part is not None and (reason := why(part)) is not None:
            raise_not_invariant(name, reason)


def raise_not_invariant(name: str, reason: str) -> None:
    """Raise a ValueError for a part of a layer that is not known to be batch-invariant. `reason` must include a
    remedy."""
    raise ValueError(
        f"{BATCH_INVARIANT!r} is requested, but batch invariance of the layer's {name} is not guaranteed: {reason}. "
        "Alternatively, request 'auto'"
    )


def find_variant_reason(module: nn.Module) -> str | None:
    """Return the reason why the bits of a gate's or experts' results may depend on the batch, or None if they do not.
    The module may be wrapped."""
    inner: Any = unwrap_module(module)
    if not callable(getattr(inner, "variant_reason", None)):
        return f"{type(inner).__name__} is an unknown module; use one of this package"
    if (name := find_overridden_attribute(inner)) is not None:
        return f"{type(inner).__name__} overrides {name!r}; use a class of this package"
    return inner.variant_reason()


def find_overridden_attribute(module: nn.Module) -> str | None:
    """Return the name of a package-class attribute that is overridden by the module itself or by a class outside the
    package, or None if no attribute is overridden."""
    kinds = get_original_class(module).__mro__
    ours = next(kind for kind in kinds if is_package_class(kind))
    changes = [name for kind in kinds[: kinds.index(ours)] for name in vars(kind) if not name.startswith("__")]
    changes += list_members(ours).intersection(vars(module))
    return next((name for name in changes if hasattr(ours, name) and name not in IGNORED_ATTRIBUTES), None)


def not_tokenwise_reason(module: nn.Module) -> str | None:
    """Return the reason why computing a module in blocks may change its result for a token, or None if it cannot."""
    for part in module.modules():
        kind = get_original_class(part)
        known = kind in TOKENWISE_MODULES or vars(kind).get("is_tokenwise")
        known = known or ask_providers(part, lambda provider, part=part: provider.is_tokenwise(part))
        if not known and not is_checkpoint_wrapper(part):
            return (
                f"{kind.__name__} is not known to process tokens independently; use recipes.SharedExpert, or an "
                "nn.Sequential of nn.Linear and activations"
            )
        if isinstance(part, nn.Dropout) and part.training and part.p:
            return f"{part} draws random numbers in training; set its p to 0"
    return None


# Block sizes


def get_layout(tensor: Tensor) -> OperandLayout:
    """Return the layout of a matrix or vector. For a stack of matrices, return the layout of the first two."""
    stack = [min(2, n) for n in tensor.shape[:-2]]
    return OperandLayout(tensor.dtype, (*stack, *tensor.shape[len(stack) :]), tensor.stride())


def find_block_rows(
    compute: SampledFunction, sizes: Sequence[int], *operands: Tensor | None, dtype: torch.dtype | None = None
) -> int:
    """Return the smallest size in `BLOCK_SIZES` with which `compute` returns the same bits for a row in any batch.

    The rows `(..., p)` have the given `dtype`, which defaults to the first operand's dtype. `sizes` contains p and q.
    Raise a RuntimeError if the bits depend on the batch for all block sizes.
    """
    p, q = sizes
    layouts = tuple([None if operand is None else get_layout(operand) for operand in operands])
    narrow = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    assert layouts[0] is not None
    return _sample_block_rows(compute, torch.get_num_threads(), narrow, dtype or layouts[0].dtype, p, q, layouts)


@cache
def _sample_block_rows(
    compute: SampledFunction,
    threads: int,
    narrow: torch.dtype | None,
    dtype: torch.dtype,
    p: int,
    q: int,
    layouts: tuple[OperandLayout | None, ...],
) -> int:
    """Implement `find_block_rows` by sampling random operands. Sampling does not prove that the bits never differ.

    The random numbers are chosen so that sums cancel out and only rounding errors remain. Otherwise, rounding to half
    precision would usually hide the order of summation.
    """
    assert layouts[0] is not None
    generator, stack = torch.Generator().manual_seed(0), layouts[0].shape[:-2]

    def draw(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    def draw_as(layout: OperandLayout) -> Tensor:
        extent = 1 + sum((n - 1) * step for n, step in zip(layout.shape, layout.stride, strict=True))
        return draw(layout.dtype, extent).as_strided(layout.shape, layout.stride)

    with isolate_sampling(narrow):
        x, y = draw(dtype, *stack, MAX_ROWS, p), draw(dtype, *stack, MAX_ROWS, q)
        operands = [None if layout is None else draw_as(layout) for layout in layouts]
        make_sums_cancel(x, y, *operands, order=generator)
        whole = compute(x, y, *operands)
        for size in BLOCK_SIZES:
            if all(is_bitwise_equal(compute, x, y, operands, whole, *piece) for piece in iter_pieces(size)):
                return size
    raise RuntimeError(
        f"{BATCH_INVARIANT!r} is requested, but with {threads} threads on this CPU, {p} x {q} products in {dtype} "
        f"depend on the batch for all block sizes up to {BLOCK_SIZES[-1]}; use another number of threads, or 'auto'"
    )


def make_sums_cancel(
    x: Tensor, y: Tensor, weight: Tensor | None, *others: Tensor | None, order: torch.Generator
) -> None:
    """Modify the operands in place so that the terms of each sum cancel out in pairs.

    The sums are the products of x `(..., r, p)` with the weight `(..., p, q)` or `(..., q, p)`, and of y `(..., r, q)`
    with the transposed weight. Values in y and in the other operands are added to these sums, and would hide the small
    remainders. Half of these values are therefore set to 0.
    """
    assert weight is not None
    matrix = weight if weight.shape[-2:] == (x.shape[-1], y.shape[-1]) else weight.mT
    for rows, dim in ((x, -2), (y, -1)):
        half, places = rows.shape[-1] // 2, torch.randperm(rows.shape[-1], generator=order, device="cpu")
        first, second = places[:half], places[half : 2 * half]
        rows.mul_(8)  # scaled so that float16 can represent the small remainders
        rows[..., second] = -rows[..., first]
        rows[..., places[2 * half :]] = 0
        for each in matrix.flatten(0, -3) if matrix.ndim > 2 else [matrix]:  # the matrices of a stack may share memory
            each.index_copy_(dim, second, each.index_select(dim, first))
        if rows is y:
            rows[..., first[::2]] = rows[..., second[::2]] = 0
    for other in others:
        if other is not None:
            other[..., ::2] = 0


@contextmanager
def isolate_sampling(narrow: torch.dtype | None) -> Iterator[None]:
    """Context manager in which functions are sampled. Autocast uses the dtype `narrow`, or is disabled if `narrow` is
    None.

    Dispatch modes and saved-tensor hooks are disabled inside the context. Otherwise, activation checkpointing would
    count the tensors that sampling saves in a forward pass, although a recomputation does not sample again.
    """
    same: Any = lambda tensor: tensor  # noqa: E731
    autocast = torch.autocast("cpu", narrow or torch.bfloat16, enabled=narrow is not None, cache_enabled=False)
    hooks = torch.autograd.graph.saved_tensors_hooks(same, same)
    with torch.inference_mode(False), disable_dispatch_modes(), hooks, autocast, torch.no_grad():
        yield


def iter_pieces(size: int) -> Iterator[tuple[int, int, int]]:
    """Yield tuples that contain a row count, the index of the first row, and the number of rows that precede it in
    memory. The row counts and the numbers of preceding rows are multiples of `size`. The smallest row counts come
    first, because they differ the most."""
    numbers = {*(size * many for many in (1, 2, 3, 4, 5, 7)), MAX_ROWS // 2 // size * size, MAX_ROWS}
    for number in sorted(number for number in numbers if number <= MAX_ROWS):
        starts = {0, MAX_ROWS - number} if number > 3 * size else {0, 1, 3, MAX_ROWS - number}
        for start in sorted(start for start in starts if start + number <= MAX_ROWS):
            yield number, start, start * size if start in (1, 3) else 0


def is_bitwise_equal(
    compute: SampledFunction,
    x: Tensor,
    y: Tensor,
    operands: list[Tensor | None],
    whole: list[Tensor],
    number: int,
    start: int,
    before: int,
) -> bool:
    """Return whether the results for a range of rows have the same bits as in `whole`, even if other rows precede the
    range in memory."""
    some = slice(start, start + number)
    rows, grads = (copy_at_offset(part[..., some, :], before * part.shape[-1]) for part in (x, y))
    results = zip(compute(rows, grads, *operands), whole, strict=True)
    return all(torch.equal(found, wanted[:1, ..., some, :].expand_as(found)) for found, wanted in results)


def copy_at_offset(tensor: Tensor, offset: int) -> Tensor:
    """Return a contiguous copy that starts at the given offset in its memory, so that vectors may be unaligned."""
    memory = tensor.new_empty(offset + tensor.numel())
    return memory[offset:].view(tensor.shape).copy_(tensor)


def compute_with_gradient(function: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    """Implement a `SampledFunction` for a differentiable function. The function returns a stack of two results,
    computed without and with grad mode, and the gradient of x."""
    alone = function(x)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        out = function(leaf)
        (gradient,) = torch.autograd.grad(out, leaf, y.to(out.dtype))
    return [torch.stack([alone, out.detach()]), gradient.unsqueeze(0)]


def compute_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Implement the `SampledFunction` for `nn.Linear`."""
    return compute_with_gradient(lambda x: F.linear(x, weight, bias), x, y)


def round_up_to_vectors(size: int, *widths: int) -> int:
    """Return the smallest multiple of `size` such that this many rows fill whole SIMD vectors for all given widths.
    `size` must be a power of two up to 64. The result divides `MAX_ROWS`."""
    return max([size * VECTOR_NUMEL // math.gcd(VECTOR_NUMEL, size * width) for width in widths], default=size)


def find_max_rows(block: int, width: int) -> int:
    """Return the maximum number of rows `(r, width)` that may be passed to an elementwise function at once. The result
    is a multiple of `block`. Raise a ValueError if a single block is too large."""
    if torch.get_num_threads() == 1:
        return block << 40
    if block * width >= GRAIN_SIZE:
        raise ValueError(
            f"{BATCH_INVARIANT!r} is requested, but a width of {width} requires blocks of {block} rows, which would be "
            f"split among threads; call torch.set_num_threads(1), or use a width that is a multiple of {VECTOR_NUMEL}"
        )
    return (GRAIN_SIZE - 1) // (block * width) * block


# Blockwise computation


def multiply_batch_invariant(
    product: Callable[..., Tensor], compute: SampledFunction, x: Tensor, weight: Tensor, dtype: torch.dtype
) -> Tensor:
    """Compute `product(x, weight, dtype)` in blocks. The product maps tokens `(..., t, p)` to `(..., t, q)`.

    The block size is found by sampling `compute`. Tokens are zero-padded to whole blocks, and columns to whole vectors.
    """
    t, q = x.shape[-2], weight.shape[-1]
    weight = F.pad(weight, (0, -q % MIN_COLUMNS))
    size = find_block_rows(compute, weight.shape[-2:], weight, dtype=x.dtype)
    parts = F.pad(x, (0, 0, 0, -t % size)).split(MAX_ROWS, dim=-2)
    return torch.cat([product(part.contiguous(), weight, dtype) for part in parts], dim=-2)[..., :t, :q].contiguous()


def call_module_batch_invariant(module: nn.Module, x: Tensor) -> Tensor:
    """Call a module that maps tokens `(..., p)` to `(..., q)` independently. If batch invariance is requested, the call
    is split into blocks."""
    if requested_implementation() != BATCH_INVARIANT:
        return module(x)
    if (reason := not_tokenwise_reason(module)) is not None:
        raise_not_invariant(type(module).__name__, reason)
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    sizes = [find_block_rows(compute_linear, layer.weight.T.shape, layer.weight, layer.bias) for layer in layers]
    widths = [x.shape[-1], *(width for layer in layers for width in layer.weight.shape)]
    block = round_up_to_vectors(max(sizes, default=1), *widths)
    most = min(MAX_ROWS, find_max_rows(block, max(widths)))
    rows = x.flatten(0, -2)
    parts = F.pad(rows, (0, 0, 0, -len(rows) % block)).contiguous().split(most // block * block)
    return torch.cat([module(part) for part in parts])[: len(rows)].unflatten(0, x.shape[:-1])


def apply_elementwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply an elementwise function to `x`. If batch invariance is requested, the function is computed on whole
    vectors."""
    if requested_implementation() != BATCH_INVARIANT:
        return function(x)
    padded = F.pad(x.flatten(), (0, -x.numel() % VECTOR_NUMEL))
    return torch.cat([function(part) for part in padded.split(GRAIN_SIZE // 2)])[: x.numel()].view(x.shape)
