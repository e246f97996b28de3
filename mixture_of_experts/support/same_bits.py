"""The same bits in any batch: products on a CPU whose rows do not depend on the rows beside them.

Libraries choose how to sum by the number of rows: a row alone rounds differently from the same row among others. So
rows stand in blocks, of a size for which a product of many blocks has the same bits as a product of each. Torch
computes functions of single numbers, such as `sigmoid`, in vectors, and rounds the numbers that fill no vector
differently. If a tensor has `GRAIN` numbers or more, threads share it, and each part can end in such numbers. So these
functions get whole vectors, and fewer numbers than `GRAIN`. `ops.use("batch_invariant")` asks for all of this.

Axes: t tokens, p inner and q outer dimension of a weight, r rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixture_of_experts.support.ways import asked_for

BATCH_INVARIANT = "batch_invariant"
SIZES = (1, 2, 4, 8, 16, 32, 64)  # of a block, tried in this order
MOST_ROWS = 3 * SIZES[-1]
COLUMNS = 16  # of fewer, a row's place decides
VECTOR = 64  # numbers, a multiple of those in the vectors of every dtype
GRAIN = 32768  # numbers of a tensor from which on torch's threads share it


def refuse_same_bits(what: str) -> None:
    """Raise ValueError if the same bits are asked for, of products that are not made in blocks."""
    if asked_for() == BATCH_INVARIANT:
        raise ValueError(f"{BATCH_INVARIANT!r} was asked for, and {what}: ask for 'auto'")


def block_of(weights: Iterable[Tensor], width: int) -> int:
    """The number of rows of a block, for products with these weights `(..., p, q)`, also transposed, and for functions
    of single numbers of rows `(r, width)`."""
    threads = torch.get_num_threads()
    size = max([size_of_block(weight.dtype, threads, *weight.shape[-2:]) for weight in weights], default=1)
    return size * VECTOR // math.gcd(VECTOR, size * width)


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


@cache
def size_of_block(dtype: torch.dtype, threads: int, p: int, q: int) -> int:
    """The least number of rows in `SIZES` for which products of random numbers have equal bits: of one block and of
    several, at different places, by one matrix and by two. This samples, it does not prove. RuntimeError if there is
    none."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)

    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        pairs = [(draw(2, MOST_ROWS, p), draw(2, p, q)), (draw(2, MOST_ROWS, q), draw(2, p, q).mT)]
        wholes = [torch.bmm(*pair) for pair in pairs]
        for size in SIZES:
            if all(has_equal_bits(*pair, whole, size) for pair, whole in zip(pairs, wholes, strict=True)):
                return size
    raise RuntimeError(
        f"{BATCH_INVARIANT!r} was asked for, and this CPU's products of {dtype}, {p} x {q}, on {threads} threads "
        f"differ for every number of rows up to {SIZES[-1]}: take another number of threads, or 'auto'"
    )


def has_equal_bits(x: Tensor, weight: Tensor, whole: Tensor, size: int) -> bool:
    """Whether products of a few blocks of x `(2, r, p)` have the bits of `whole`, that of all rows."""
    for number in (size, 3 * size, MOST_ROWS // 2):
        for start in (0, 1, 3, MOST_ROWS - number):
            here = slice(start, start + number)
            rows, expected = x[:, here].clone(), whole[:, here]
            several, alone = torch.bmm(rows, weight), torch.mm(rows[0], weight[0])
            if not (torch.equal(several, expected) and torch.equal(alone, expected[0])):
                return False
    return True


def product_in_blocks(product: Callable[..., Tensor], x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`product(x, weight, dtype)` `(..., t, q)`, a product in `dtype` of tokens `(..., t, p)`; with zeros for tokens
    that a block lacks, and for columns that a vector lacks."""
    t, q = x.shape[-2], weight.shape[-1]
    weight = F.pad(weight, (0, -q % COLUMNS))
    x = F.pad(x, (0, 0, 0, -t % size_of_block(dtype, torch.get_num_threads(), *weight.shape[-2:])))
    return product(x, weight, dtype)[..., :t, :q].contiguous()


def module_in_blocks(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, of a module that maps tokens `(..., p)` to `(..., q)` each by itself; in blocks if they are asked
    for."""
    if asked_for() != BATCH_INVARIANT:
        return module(x)
    weights = [weight for weight in module.parameters() if weight.ndim == 2]
    block = max([block_of(weights, width) for weight in weights for width in weight.shape], default=VECTOR)
    widest = max([max(weight.shape) for weight in weights], default=x.shape[-1])
    rows = x.flatten(0, -2)
    padded = F.pad(rows, (0, 0, 0, -len(rows) % block))
    out = torch.cat([module(part) for part in padded.split(rows_at_once(block, widest))])
    return out[: len(rows)].unflatten(0, x.shape[:-1])


def elementwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)`, of every number by itself; of whole vectors if the same bits are asked for."""
    if asked_for() != BATCH_INVARIANT:
        return function(x)
    padded = F.pad(x.flatten(), (0, -x.numel() % VECTOR))
    return torch.cat([function(part) for part in padded.split(GRAIN // 2)])[: x.numel()].view(x.shape)
