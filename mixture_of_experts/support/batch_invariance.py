"""Batch invariance: products on a CPU whose rows do not depend on the other rows, bit by bit.

Libraries choose the order of summation by the number of rows: a row alone rounds differently from the same row among
others. So rows are multiplied in blocks, with a size for which several blocks have the same bits as each one alone, and
at most `MAX_ROWS` at a time. The size is found by sampling the function that runs, with operands of the same dtypes,
shapes and strides, on the same number of threads. Torch computes elementwise functions, such as `sigmoid`, in vectors,
and rounds the elements that do not fill a vector differently. A tensor with `GRAIN_SIZE` elements or more is split
among threads, and each part can end in such elements. So these functions get whole vectors, and fewer elements than
`GRAIN_SIZE`.

`ops.use("batch_invariant")` enables all of this. A module raises unless it is listed here or its class implements
`variant_reason`.

Axes: t tokens, p inner and q outer dimension of a product, r rows.
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
    is_in_transform,
    unwrap_module,
)
from mixture_of_experts.support.subclassing import is_package_class, list_members

BATCH_INVARIANT = "batch_invariant"
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64)  # rows of a block, tried in this order
MAX_ROWS = 3 * BLOCK_SIZES[-1]  # of a product: no more are sampled
MIN_COLUMNS = 16  # with fewer, the bits depend on a row's position
VECTOR_NUMEL = 64  # a multiple of the vector length of every dtype
GRAIN_SIZE = 32768  # number of elements from which on torch splits a tensor among threads

#: modules of torch that map each row independently; containers among them only call the modules inside
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
CHECKPOINT_WRAPPER = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper"
#: attributes of a class that do not compute outputs, or follow from others
IGNORED_ATTRIBUTES = {"extra_repr", "reset_parameters", "_settings", "reads_assignments", "allocates_outputs"}

#: computes a product of rows x `(..., r, p)` with operands, and what belongs to it, such as its gradient from rows y
#: `(..., r, q)`: `compute(x, y, *operands)` returns tensors `(v, ..., r, anything)`, v results that must be equal
SampledFunction = Callable[..., list[Tensor]]


class OperandLayout(NamedTuple):
    """What the bits of a product depend on in addition to the values of an operand."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def reject_batch_invariance(what: str) -> None:
    """Raise ValueError if batch invariance is requested, for products that are not computed in blocks."""
    if requested_implementation() == BATCH_INVARIANT:
        raise ValueError(f"{BATCH_INVARIANT!r} was asked for, and {what}: ask for 'auto'")


# Which modules are batch-invariant


def check_batch_invariant(x: Tensor, **parts: nn.Module | None) -> None:
    """Raise ValueError if batch invariance is requested and a part of a layer is not known to be invariant: gates and
    experts implement `variant_reason`, a `shared_expert` must consist of known modules."""
    if requested_implementation() != BATCH_INVARIANT:
        return
    if torch.compiler.is_compiling() or is_in_transform():
        reject_batch_invariance(
            "a graph is being traced, or a transform of torch.func runs, in which numbers cannot be read"
        )
    if x.device.type != "cpu":
        reject_batch_invariance(f"the inputs are on {x.device}: move model and inputs to a CPU")
    for name, part in parts.items():
        why = not_tokenwise_reason if name == "shared_expert" else variant_reason
        if part is not None and (reason := why(part)) is not None:
            raise_not_invariant(name, reason)


def raise_not_invariant(name: str, reason: str) -> None:
    """Raise ValueError for a part of a layer that is not known to be invariant; the reason ends with a remedy."""
    raise ValueError(
        f"{BATCH_INVARIANT!r} was asked for, and the part {name} is not known to keep a token's bits: {reason}; or ask "
        "for 'auto'"
    )


def variant_reason(module: nn.Module) -> str | None:
    """Return why the bits of a gate's or experts' results, wrapped or not, may depend on the batch; None if they do
    not."""
    inner: Any = unwrap_module(module)
    if not callable(getattr(inner, "variant_reason", None)):
        return f"{type(inner).__name__} is an unknown module: take one of this package"
    if (name := find_overridden_attribute(inner)) is not None:
        return f"{type(inner).__name__} has {name!r} of its own: take a class of this package"
    return inner.variant_reason()


def find_overridden_attribute(module: nn.Module) -> str | None:
    """Return the attribute with which a class outside of this package, or the module itself, changes a class of the
    package; None if there is none."""
    kinds = get_original_class(module).__mro__
    ours = next(kind for kind in kinds if is_package_class(kind))
    changes = [name for kind in kinds[: kinds.index(ours)] for name in vars(kind) if not name.startswith("__")]
    changes += list_members(ours).intersection(vars(module))
    return next((name for name in changes if hasattr(ours, name) and name not in IGNORED_ATTRIBUTES), None)


def not_tokenwise_reason(module: nn.Module) -> str | None:
    """Return why a module may not map each token independently, with bits that blocks preserve; None if all its parts
    do."""
    for part in module.modules():
        kind = get_original_class(part)
        known = kind in TOKENWISE_MODULES or vars(kind).get("by_token")
        known = known or ask_providers(part, lambda provider, part=part: provider.is_tokenwise(part))
        if not known and f"{kind.__module__}.{kind.__qualname__}" != CHECKPOINT_WRAPPER:
            return f"{kind.__name__} is an unknown module: take SharedExpert, or nn.Sequential of nn.Linear and others"
        if isinstance(part, nn.Dropout) and part.training and part.p:
            return f"{part} draws random numbers in training: set its p to 0"
    return None


# Block sizes


def get_layout(tensor: Tensor) -> OperandLayout:
    """Return the layout of a matrix or a vector; for a stack of matrices that of the first two."""
    stack = [min(2, n) for n in tensor.shape[:-2]]
    return OperandLayout(tensor.dtype, (*stack, *tensor.shape[len(stack) :]), tensor.stride())


def find_block_rows(
    compute: SampledFunction, sizes: Sequence[int], *operands: Tensor | None, dtype: torch.dtype | None = None
) -> int:
    """Return the smallest of `BLOCK_SIZES` for which `compute` preserves the bits of a row x `(..., p)` in `dtype`, by
    default that of the first operand, with these operands; `sizes` are p and q. Raises RuntimeError if there is
    none."""
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
    """`find_block_rows`, with random numbers whose sums cancel out, so that only rounding is left: with other numbers,
    rounding to 16 bits usually hides the order of summation. This samples, it does not prove."""
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
        f"{BATCH_INVARIANT!r} was asked for, and this CPU's products of {dtype}, {p} x {q}, on {threads} threads "
        f"differ for every number of rows up to {BLOCK_SIZES[-1]}: take another number of threads, or 'auto'"
    )


def make_sums_cancel(
    x: Tensor, y: Tensor, weight: Tensor | None, *others: Tensor | None, order: torch.Generator
) -> None:
    """Change the values so that the sums of x `(..., r, p)` times the weight `(..., p, q)`, or `(..., q, p)`, and of y
    `(..., r, q)` times its transpose, have pairs of terms that cancel out. Half of y, and of other operands, is set to
    0, because they are added to such sums and would hide them."""
    assert weight is not None
    matrix = weight if weight.shape[-2:] == (x.shape[-1], y.shape[-1]) else weight.mT
    for rows, dim in ((x, -2), (y, -1)):
        half, places = rows.shape[-1] // 2, torch.randperm(rows.shape[-1], generator=order, device="cpu")
        first, second = places[:half], places[half : 2 * half]
        rows.mul_(8)  # so that float16 can represent the small remainders
        rows[..., second] = -rows[..., first]
        rows[..., places[2 * half :]] = 0
        for each in matrix.flatten(0, -3) if matrix.ndim > 2 else [matrix]:  # a stack may repeat one in memory
            each.index_copy_(dim, second, each.index_select(dim, first))
        if rows is y:
            rows[..., first[::2]] = rows[..., second[::2]] = 0
    for other in others:
        if other is not None:
            other[..., ::2] = 0


@contextmanager
def isolate_sampling(narrow: torch.dtype | None) -> Iterator[None]:
    """A context for sampling, with autocast to `narrow` or without autocast. It is invisible to modes and saved-tensor
    hooks: those of activation checkpointing count what a forward saves, and a recomputation does not sample again."""
    same: Any = lambda tensor: tensor  # noqa: E731
    autocast = torch.autocast("cpu", narrow or torch.bfloat16, enabled=narrow is not None, cache_enabled=False)
    hooks = torch.autograd.graph.saved_tensors_hooks(same, same)
    with torch.inference_mode(False), disable_dispatch_modes(), hooks, autocast, torch.no_grad():
        yield


def iter_pieces(size: int) -> Iterator[tuple[int, int, int]]:
    """Row counts (multiples of `size`), the rows where they start, and how many rows come before them in memory (also a
    multiple of `size`); the smallest counts, which differ most, come first."""
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
    """Return whether rows have the same bits as in `whole`, when stored in memory with other rows before them."""
    some = slice(start, start + number)
    rows, grads = (copy_at_offset(part[..., some, :], before * part.shape[-1]) for part in (x, y))
    results = zip(compute(rows, grads, *operands), whole, strict=True)
    return all(torch.equal(found, wanted[:1, ..., some, :].expand_as(found)) for found, wanted in results)


def copy_at_offset(tensor: Tensor, offset: int) -> Tensor:
    """Return a contiguous copy that starts at an offset in its memory, where vectors may not be aligned."""
    memory = tensor.new_empty(offset + tensor.numel())
    return memory[offset:].view(tensor.shape).copy_(tensor)


def compute_with_gradient(function: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    """Return a `SampledFunction` for a differentiable function: its result without and with grad, and the gradient of
    x."""
    alone = function(x)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        out = function(leaf)
        (gradient,) = torch.autograd.grad(out, leaf, y.to(out.dtype))
    return [torch.stack([alone, out.detach()]), gradient.unsqueeze(0)]


def compute_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Return the `SampledFunction` of `nn.Linear`."""
    return compute_with_gradient(lambda x: F.linear(x, weight, bias), x, y)


def round_up_to_vectors(size: int, *widths: int) -> int:
    """Return the smallest multiple of `size`, a power of two up to 64, for which this many rows of any of these widths
    fill whole vectors. It divides `MAX_ROWS`."""
    return max([size * VECTOR_NUMEL // math.gcd(VECTOR_NUMEL, size * width) for width in widths], default=size)


def find_max_rows(block: int, width: int) -> int:
    """Return the maximum number of rows `(r, width)` that an elementwise function may get at a time, a multiple of
    `block`. Raises ValueError if one block is too large."""
    if torch.get_num_threads() == 1:
        return block << 40
    if block * width >= GRAIN_SIZE:
        raise ValueError(
            f"{BATCH_INVARIANT!r} was asked for, and a width of {width} needs blocks of {block} rows, which threads "
            f"would share: call torch.set_num_threads(1), or take a multiple of {VECTOR_NUMEL} as width"
        )
    return (GRAIN_SIZE - 1) // (block * width) * block


# Computations in blocks


def multiply_batch_invariant(
    product: Callable[..., Tensor], compute: SampledFunction, x: Tensor, weight: Tensor, dtype: torch.dtype
) -> Tensor:
    """`product(x, weight, dtype)` `(..., t, q)`, a product in `dtype` of tokens `(..., t, p)`, in blocks that are
    sampled with `compute`; padded with zeros to whole blocks of tokens and whole vectors of columns."""
    t, q = x.shape[-2], weight.shape[-1]
    weight = F.pad(weight, (0, -q % MIN_COLUMNS))
    size = find_block_rows(compute, weight.shape[-2:], weight, dtype=x.dtype)
    parts = F.pad(x, (0, 0, 0, -t % size)).split(MAX_ROWS, dim=-2)
    return torch.cat([product(part.contiguous(), weight, dtype) for part in parts], dim=-2)[..., :t, :q].contiguous()


def call_module_batch_invariant(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, for a module that maps tokens `(..., p)` to `(..., q)` independently; in blocks if batch invariance
    is requested."""
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
    """`function(x)`, for an elementwise function; in whole vectors if batch invariance is requested."""
    if requested_implementation() != BATCH_INVARIANT:
        return function(x)
    padded = F.pad(x.flatten(), (0, -x.numel() % VECTOR_NUMEL))
    return torch.cat([function(part) for part in padded.split(GRAIN_SIZE // 2)])[: x.numel()].view(x.shape)
