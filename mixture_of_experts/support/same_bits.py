"""The same bits in any batch: products on a CPU whose rows do not depend on the other rows.

Libraries choose how to sum by the number of rows: a row alone rounds differently from the same row among others. So
rows are multiplied in blocks, of a size for which several blocks have the same bits as each one alone, and at most
`MAX_ROWS` at a time. The size is sampled with the function that runs, on operands of the same dtypes, shapes and
strides, on as many threads. Torch computes functions of single numbers, such as `sigmoid`, in vectors, and rounds the
numbers that fill no vector differently. If a tensor has `GRAIN` numbers or more, threads share it, and each part can
end in such numbers. So these functions get whole vectors, and fewer numbers than `GRAIN`.

`ops.use("batch_invariant")` asks for all of this. What is not on a list here, and does not answer
`why_not_invariant`, raises.

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

from mixture_of_experts.support.overriding import is_own
from mixture_of_experts.support.private_torch import in_transform, unwrapped, without_dispatch_modes, wrapped_class
from mixture_of_experts.support.ways import asked_for

BATCH_INVARIANT = "batch_invariant"
SIZES = (1, 2, 4, 8, 16, 32, 64)  # of a block, tried in this order
MAX_ROWS = 3 * SIZES[-1]  # of a product: no more are sampled
COLUMNS = 16  # of fewer, a row's place decides
VECTOR = 64  # numbers, a multiple of those in the vectors of every dtype
GRAIN = 32768  # numbers of a tensor from which on torch's threads share it

#: modules of torch that map each row by itself; containers among them only call the modules inside
KNOWN = {nn.Linear, nn.RMSNorm, nn.LayerNorm, nn.SiLU, nn.GELU, nn.ReLU, nn.Sigmoid, nn.Tanh, nn.Identity, nn.Dropout}
KNOWN |= {nn.Sequential, nn.ModuleDict, nn.ParameterDict}
#: such modules of other libraries, by the beginning of their module's name and the end of their class's
KNOWN_ELSEWHERE = (
    ("transformers.models.", "MLP"),
    ("transformers.models.", "RMSNorm"),
    ("transformers.activations", ""),
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners._buffer_dict", "BufferDict"),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "CheckpointWrapper"),
)
#: attributes of a class that compute no outputs, or follow from others
HARMLESS = {"extra_repr", "reset_parameters", "_settings", "reads_decisions", "makes_outputs"}

#: computes a product of rows x `(..., r, p)` with operands, and what belongs to it, such as its gradient by rows y
#: `(..., r, q)`: `compute(x, y, *operands)` returns tensors `(v, ..., r, anything)`, v results that must be equal
Compute = Callable[..., list[Tensor]]


class Layout(NamedTuple):
    """What the bits of a product depend on besides the numbers of an operand."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def refuse_same_bits(what: str) -> None:
    """Raise ValueError if the same bits are asked for, of products that are not made in blocks."""
    if asked_for() == BATCH_INVARIANT:
        raise ValueError(f"{BATCH_INVARIANT!r} was asked for, and {what}: ask for 'auto'")


# Which modules keep the bits


def refuse_variant(x: Tensor, **parts: nn.Module | None) -> None:
    """Raise ValueError if the same bits are asked for, and a part of a layer is not known to keep them: gates and
    experts answer `why_not_invariant`, a `shared_expert` has to consist of known modules."""
    if asked_for() != BATCH_INVARIANT:
        return
    if torch.compiler.is_compiling() or in_transform():
        refuse_same_bits("a graph is being traced, or a transform of torch.func runs, in which numbers cannot be read")
    if x.device.type != "cpu":
        refuse_same_bits(f"the inputs are on {x.device}: move model and inputs to a CPU")
    for name, part in parts.items():
        why = why_not_by_token if name == "shared_expert" else why_variant
        if part is not None and (reason := why(part)) is not None:
            refuse_unknown(name, reason)


def refuse_unknown(name: str, reason: str) -> None:
    """Raise ValueError for a part of a layer that is not known to keep the bits; the reason ends with a remedy."""
    raise ValueError(
        f"{BATCH_INVARIANT!r} was asked for, and the part {name} is not known to keep a token's bits: {reason}; or ask "
        "for 'auto'"
    )


def why_variant(module: nn.Module) -> str | None:
    """Why a gate or experts, whatever wraps them, may give a token other bits in another batch; None if they do not."""
    inner: Any = unwrapped(module)
    if not callable(getattr(inner, "why_not_invariant", None)):
        return f"{type(inner).__name__} is an unknown module: take one of this package"
    if (name := overridden(inner)) is not None:
        return f"{type(inner).__name__} has {name!r} of its own: take a class of this package"
    return inner.why_not_invariant()


def overridden(module: nn.Module) -> str | None:
    """The attribute by which a class outside of this package changes one of its classes; None if none does."""
    kinds = wrapped_class(module).__mro__
    ours = next(kind for kind in kinds if is_own(kind))
    changes = [name for kind in kinds[: kinds.index(ours)] for name in vars(kind) if not name.startswith("__")]
    return next((name for name in changes if hasattr(ours, name) and name not in HARMLESS), None)


def why_not_by_token(module: nn.Module) -> str | None:
    """Why a module may not map each token by itself, in bits that blocks keep; None if all that it consists of does."""
    for part in module.modules():
        kind = wrapped_class(part)
        where, name = kind.__module__, kind.__name__
        elsewhere = any(where.startswith(start) and name.endswith(end) for start, end in KNOWN_ELSEWHERE)
        if not (kind in KNOWN or vars(kind).get("by_token") or elsewhere):
            return f"{name} is an unknown module: take SharedExpert, or nn.Sequential of nn.Linear and others"
        if isinstance(part, nn.Dropout) and part.training and part.p:
            return f"{part} draws random numbers in training: set its p to 0"
    return None


# Sizes of blocks


def layout_of(tensor: Tensor) -> Layout:
    """The layout of a matrix or a vector; of a stack of matrices that of the first two."""
    stack = [min(2, n) for n in tensor.shape[:-2]]
    return Layout(tensor.dtype, (*stack, *tensor.shape[len(stack) :]), tensor.stride())


def rows_of_block(
    compute: Compute, sizes: Sequence[int], *operands: Tensor | None, dtype: torch.dtype | None = None
) -> int:
    """The least number of rows in `SIZES` for which `compute` keeps the bits of a row x `(..., p)` in `dtype`, by
    default that of the first operand, with these operands; `sizes` are p and q. RuntimeError if there is none."""
    p, q = sizes
    layouts = tuple([None if operand is None else layout_of(operand) for operand in operands])
    narrow = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    assert layouts[0] is not None
    return _rows_of_block(compute, torch.get_num_threads(), narrow, dtype or layouts[0].dtype, p, q, layouts)


@cache
def _rows_of_block(
    compute: Compute,
    threads: int,
    narrow: torch.dtype | None,
    dtype: torch.dtype,
    p: int,
    q: int,
    layouts: tuple[Layout | None, ...],
) -> int:
    """`rows_of_block`, of random numbers whose sums cancel out, so that only rounding is left: after rounding to
    16 bits the order of other sums is seldom seen. This samples, it does not prove."""
    assert layouts[0] is not None
    generator, stack = torch.Generator().manual_seed(0), layouts[0].shape[:-2]

    def draw(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    def draw_as(layout: Layout) -> Tensor:
        extent = 1 + sum((n - 1) * step for n, step in zip(layout.shape, layout.stride, strict=True))
        return draw(layout.dtype, extent).as_strided(layout.shape, layout.stride)

    with isolated(narrow):
        x, y = draw(dtype, *stack, MAX_ROWS, p), draw(dtype, *stack, MAX_ROWS, q)
        operands = [None if layout is None else draw_as(layout) for layout in layouts]
        cancel(x, y, *operands, order=generator)
        whole = compute(x, y, *operands)
        for size in SIZES:
            if all(has_equal_bits(compute, x, y, operands, whole, *piece) for piece in pieces_of(size)):
                return size
    raise RuntimeError(
        f"{BATCH_INVARIANT!r} was asked for, and this CPU's products of {dtype}, {p} x {q}, on {threads} threads "
        f"differ for every number of rows up to {SIZES[-1]}: take another number of threads, or 'auto'"
    )


def cancel(x: Tensor, y: Tensor, weight: Tensor | None, *others: Tensor | None, order: torch.Generator) -> None:
    """Change numbers so that the sums of x `(..., r, p)` times the weight `(..., p, q)`, or `(..., q, p)`, and of y
    `(..., r, q)` times its transpose, have pairs of terms that cancel out. Half of y, and of other operands, is 0, as
    they are added to such sums and would hide them."""
    assert weight is not None
    matrix = weight if weight.shape[-2:] == (x.shape[-1], y.shape[-1]) else weight.mT
    for rows, dim in ((x, -2), (y, -1)):
        half, places = rows.shape[-1] // 2, torch.randperm(rows.shape[-1], generator=order, device="cpu")
        first, second = places[:half], places[half : 2 * half]
        rows.mul_(8)  # so that float16 has numbers as small as what is left
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
def isolated(narrow: torch.dtype | None) -> Iterator[None]:
    """A context for the sampling, with autocast to `narrow` or without. Modes do not see it, nor do hooks on saved
    tensors: those of activation checkpointing count what a forward saves, and a recomputation samples nothing."""
    same: Any = lambda tensor: tensor  # noqa: E731
    autocast = torch.autocast("cpu", narrow or torch.bfloat16, enabled=narrow is not None, cache_enabled=False)
    hooks = torch.autograd.graph.saved_tensors_hooks(same, same)
    with torch.inference_mode(False), without_dispatch_modes(), hooks, autocast, torch.no_grad():
        yield


def pieces_of(size: int) -> Iterator[tuple[int, int, int]]:
    """Numbers of rows, multiples of `size`, the rows where they start, and how many rows come before them in memory, a
    multiple of `size` too; the fewest rows, which differ most, first."""
    numbers = {*(size * many for many in (1, 2, 3, 4, 5, 7)), MAX_ROWS // 2 // size * size, MAX_ROWS}
    for number in sorted(number for number in numbers if number <= MAX_ROWS):
        starts = {0, MAX_ROWS - number} if number > 3 * size else {0, 1, 3, MAX_ROWS - number}
        for start in sorted(start for start in starts if start + number <= MAX_ROWS):
            yield number, start, start * size if start in (1, 3) else 0


def has_equal_bits(
    compute: Compute,
    x: Tensor,
    y: Tensor,
    operands: list[Tensor | None],
    whole: list[Tensor],
    number: int,
    start: int,
    before: int,
) -> bool:
    """Whether rows have the bits that they have in `whole`, in memory with other rows before them."""
    some = slice(start, start + number)
    rows, grads = (copied_at(part[..., some, :], before * part.shape[-1]) for part in (x, y))
    results = zip(compute(rows, grads, *operands), whole, strict=True)
    return all(torch.equal(found, wanted[:1, ..., some, :].expand_as(found)) for found, wanted in results)


def copied_at(tensor: Tensor, offset: int) -> Tensor:
    """A contiguous copy that starts at an offset in its memory, where vectors may not be aligned."""
    memory = tensor.new_empty(offset + tensor.numel())
    return memory[offset:].view(tensor.shape).copy_(tensor)


def with_gradient(function: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    """A `Compute` of a differentiable function: its result, without gradients and with them, and the gradient of x."""
    alone = function(x)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        out = function(leaf)
        (gradient,) = torch.autograd.grad(out, leaf, y.to(out.dtype))
    return [torch.stack([alone, out.detach()]), gradient.unsqueeze(0)]


def linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """The `Compute` of `nn.Linear`."""
    return with_gradient(lambda x: F.linear(x, weight, bias), x, y)


def whole_vectors(size: int, *widths: int) -> int:
    """The least multiple of `size`, a power of two up to 64, for which so many rows of any of these widths fill whole
    vectors. It divides `MAX_ROWS`."""
    return max([size * VECTOR // math.gcd(VECTOR, size * width) for width in widths], default=size)


def rows_at_once(block: int, width: int) -> int:
    """The most rows `(r, width)` that a function of single numbers may get at a time, a multiple of `block`. ValueError
    if one block is too many."""
    if torch.get_num_threads() == 1:
        return block << 40
    if block * width >= GRAIN:
        raise ValueError(
            f"{BATCH_INVARIANT!r} was asked for, and a width of {width} needs blocks of {block} rows, which threads "
            f"would share: call torch.set_num_threads(1), or take a multiple of {VECTOR} as width"
        )
    return (GRAIN - 1) // (block * width) * block


# What runs in blocks


def product_in_blocks(
    product: Callable[..., Tensor], compute: Compute, x: Tensor, weight: Tensor, dtype: torch.dtype
) -> Tensor:
    """`product(x, weight, dtype)` `(..., t, q)`, a product in `dtype` of tokens `(..., t, p)`, as `compute` samples it;
    with zeros for tokens that a block lacks, and for columns that a vector lacks."""
    t, q = x.shape[-2], weight.shape[-1]
    weight = F.pad(weight, (0, -q % COLUMNS))
    size = rows_of_block(compute, weight.shape[-2:], weight, dtype=x.dtype)
    parts = F.pad(x, (0, 0, 0, -t % size)).split(MAX_ROWS, dim=-2)
    return torch.cat([product(part.contiguous(), weight, dtype) for part in parts], dim=-2)[..., :t, :q].contiguous()


def module_in_blocks(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, of a module that maps tokens `(..., p)` to `(..., q)` each by itself; in blocks if they are asked
    for."""
    if asked_for() != BATCH_INVARIANT:
        return module(x)
    if (reason := why_not_by_token(module)) is not None:
        refuse_unknown(type(module).__name__, reason)
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    sizes = [rows_of_block(linear, layer.weight.T.shape, layer.weight, layer.bias) for layer in layers]
    widths = [x.shape[-1], *(width for layer in layers for width in layer.weight.shape)]
    block = whole_vectors(max(sizes, default=1), *widths)
    most = min(MAX_ROWS, rows_at_once(block, max(widths)))
    rows = x.flatten(0, -2)
    parts = F.pad(rows, (0, 0, 0, -len(rows) % block)).contiguous().split(most // block * block)
    return torch.cat([module(part) for part in parts])[: len(rows)].unflatten(0, x.shape[:-1])


def elementwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)`, of every number by itself; of whole vectors if the same bits are asked for."""
    if asked_for() != BATCH_INVARIANT:
        return function(x)
    padded = F.pad(x.flatten(), (0, -x.numel() % VECTOR))
    return torch.cat([function(part) for part in padded.split(GRAIN // 2)])[: x.numel()].view(x.shape)
