"""Moves tokens to the ranks that own their experts, and results back, by all-to-all.

Axes: p ranks of the group, e experts of all ranks, l = e / p experts of one rank, s slots of an expert on one rank,
r rows of one rank sorted by expert, d model dim.

Rank q owns experts `q l` to `(q + 1) l - 1`, so the rows for a rank are one block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mixture_of_experts.parallel.shared_batch import check_choices, counts_of_part, part_of, sign_choices, whole_of
from mixture_of_experts.support.failures import waited_in_vain
from mixture_of_experts.support.private_torch import all_to_all, own

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SLOTS, ROWS = 0, 1
FORMS = ("slots (limited capacity)", "rows (dropless)")
MODES = ("in evaluation", "in training")
GRADIENTS = ("without gradients", "with gradients")

Compute = Callable[..., Tensor]


class CallHeader(NamedTuple):
    """What every rank tells every other before it sends tokens, to check the calls and to know how much to receive."""

    form: int  # SLOTS or ROWS
    mode: int  # index into MODES
    gradients: int  # index into GRADIENTS
    dtype: int  # index into DTYPES
    dim: int  # d
    returned: int  # index into DTYPES of the widest dtype that this rank's experts may return
    size: int  # s; 0 for rows

    @property
    def agreed(self) -> CallHeader:
        """The header without what may differ between ranks."""
        return self._replace(returned=0, size=0)

    def describe(self) -> str:
        tokens = f"{FORMS[self.form]} of {DTYPES[self.dtype]}, dim={self.dim}"
        return f"{tokens}, {MODES[self.mode]} {GRADIENTS[self.gradients]}"


class Channel(NamedTuple):
    """The connection of the ranks of a group.

    Attributes:
        shared_batch: 1-D, ranks that bring the same tokens, of which each sends a part; None: no ranks share tokens.
        batch: `(2,)` int64, what this rank tells of a shared batch (`sign_choices`); None if it shares none.
    """

    group: dist.ProcessGroup
    shared_batch: DeviceMesh | None = None
    batch: Tensor | None = None

    @property
    def size(self) -> int:
        return self.group.size()

    def transfer(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Send each rank a block of the rows x `(sum(send), ...)`; return the blocks that the ranks sent, in order."""
        if torch.compiler.is_compiling():
            return all_to_all(x.contiguous(), receive, send, self.group)
        try:
            return all_to_all(x.contiguous(), receive, send, self.group)
        except RuntimeError as error:
            raise waited_in_vain("expert parallelism: tokens could not be exchanged", error, self.group) from error

    def move(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """`transfer` with a gradient, which travels back to where the rows came from."""
        return _Move.apply(x, send, receive, self)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, send: list[int], receive: list[int], channel: Channel) -> Tensor:
        return channel.transfer(x, send, receive)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, ctx.send, ctx.receive, ctx.channel = inputs

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Move.apply(grad, ctx.receive, ctx.send, ctx.channel), None, None, None


class _Permute(torch.autograd.Function):
    """Puts rows into another order; its gradient is a gather too."""

    @staticmethod
    def forward(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return x.index_select(0, order)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, order, inverse = inputs
        ctx.save_for_backward(order, inverse)

    @staticmethod
    def backward(ctx, grad: Tensor):
        order, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, order), None, None


class _WithBackwardTo(torch.autograd.Function):
    @staticmethod
    def forward(result: Tensor, x: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def with_backward_to(result: Tensor, x: Tensor) -> Tensor:
    """Return `result`. Its backward always reaches x, even if it does not depend on x: other ranks wait there."""
    if torch.is_grad_enabled() and not (result.requires_grad or x.requires_grad):
        result = result.detach().requires_grad_()
    return _WithBackwardTo.apply(result, x)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return x; its gradient is multiplied by `factor`."""
    return x if factor == 1 else _ScaleGradient.apply(x, factor)


def exchange_slots(
    x: Tensor, dims: tuple[int, ...], compute: Compute, channel: Channel, header: CallHeader, equal: bool
) -> Tensor:
    """Compute this rank's slots of all experts on the ranks that own them; return `(*e, s, o)`.

    Args:
        x: `(*e, s, d)`, this rank's slots of every expert.
        dims: `*e`; the first is divided among the ranks.
        compute: maps the slots of this rank's experts from every rank, `(*l, s', d)`, to `(*l, s', o)`.
        channel: the connection to the other ranks.
        header: what this rank tells the others of the call.
        equal: whether header and s are sure to be the same on all ranks. If not, the ranks exchange them, which costs a
            host sync, and results travel in the widest dtype of all.
    """
    ranks = channel.size
    if ranks == 1:
        return compute(x)
    if (shared := channel.shared_batch) is not None:
        filled = x.detach().ne(0).any(dim=-1).sum(dim=-1).flatten()
        signed = channel._replace(shared_batch=None, batch=sign_choices(filled, shared))
        part = part_of(x, len(dims), shared)
        result = exchange_slots(part, dims, compute, signed, header._replace(size=part.shape[-2]), equal=False)
        return whole_of(result, len(dims), x.shape[-2], shared)
    s, d = x.shape[-2:]
    sizes, returned = [s] * ranks, DTYPES[header.returned]
    if not equal:
        exchanged = exchange_sizes(header, x.new_zeros(math.prod(dims), dtype=torch.int64), channel)
        sizes, returned = exchanged.sizes, exchanged.returned
    local_dims = (dims[0] // ranks, *dims[1:])
    send = [math.prod(local_dims) * s] * ranks
    receive = [math.prod(local_dims) * size for size in sizes]
    rows = channel.move(x.reshape(-1, d), send, receive)
    blocks = [block.view(*local_dims, size, d) for block, size in zip(rows.split(receive), sizes, strict=True)]
    result = compute(torch.cat(blocks, dim=-2)).to(returned)
    result = torch.cat([block.reshape(-1, block.shape[-1]) for block in result.split(sizes, dim=-2)])
    return own(channel.move(result, receive, send), (*x.shape[:-1], result.shape[-1]))


def exchange_rows(x: Tensor, counts: Tensor, compute: Compute, channel: Channel, header: CallHeader) -> Tensor:
    """Compute this rank's rows on the ranks that own their experts; return `(r, o)`. One host sync.

    Args:
        x: `(r, d)`, rows sorted by expert; rows past the sum of the counts give 0.
        counts: `(e,)` int64, number of rows of each expert.
        compute: maps rows `(r', d)` sorted by this rank's experts, and their counts `(l,)`, to `(r', o)`.
        channel: the connection to the other ranks.
        header: what this rank tells the others of the call.
    """
    if channel.size == 1:
        return compute(x, counts)
    if (shared := channel.shared_batch) is not None:
        part, own_counts = part_of(x, 0, shared), counts_of_part(counts, x.shape[0], shared)
        signed = channel._replace(shared_batch=None, batch=sign_choices(counts, shared))
        result = exchange_rows(part, own_counts, compute, signed, header)
        return whole_of(result, 0, x.shape[0], shared)
    exchanged = exchange_sizes(header, counts, channel)
    num_rows = sum(exchanged.send)
    rows = channel.move(x[:num_rows], exchanged.send, exchanged.receive)
    order, inverse = by_expert(exchanged.counts, sum(exchanged.receive))
    result = compute(_Permute.apply(rows, order, inverse), exchanged.counts.sum(dim=0)).to(exchanged.returned)
    result = channel.move(_Permute.apply(result, inverse, order), exchanged.receive, exchanged.send)
    return torch.cat([result, result.new_zeros(x.shape[0] - num_rows, result.shape[-1])])


def by_expert(received: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The order that brings rows from rank-major to expert-major, and its inverse, by counts `received` `(p, l)`."""
    expert = torch.arange(received.shape[1], device=received.device).repeat(received.shape[0])
    order = expert.repeat_interleave(received.flatten(), output_size=num_rows).argsort(stable=True)
    index = torch.arange(num_rows, device=order.device)
    return order, torch.empty_like(order).scatter(0, order, index)


class ExchangeSizes(NamedTuple):
    """The sizes that the ranks told each other."""

    sizes: list[int]  # (p), s of every rank
    send: list[int]  # (p), rows that go to each rank
    receive: list[int]  # (p), rows that come from each rank
    counts: Tensor  # (p, l), rows that come from each rank for each expert of this one
    returned: torch.dtype  # in which all results travel


def exchange_sizes(header: CallHeader, counts: Tensor, channel: Channel) -> ExchangeSizes:
    """Exchange headers and counts `(e,)`, with one host sync.

    All ranks see all headers, so if they differ, every rank raises ValueError.
    """
    ranks, width = channel.size, len(header) + 2
    sent = counts.view(ranks, -1)
    batch = sent.new_zeros(2) if channel.batch is None else channel.batch
    own = torch.cat([torch.tensor(header, device=counts.device), batch]).expand(ranks, -1)
    exchanged = channel.transfer(torch.cat([own, sent], dim=1), [1] * ranks, [1] * ranks)
    received = exchanged[:, width:]
    sums = [sent.sum(dim=1, keepdim=True), received.sum(dim=1, keepdim=True)]
    table = torch.cat([exchanged[:, :width], *sums], dim=1).tolist()  # the host sync
    headers = [CallHeader(*row[: width - 2]) for row in table]
    for rank, other in enumerate(headers):
        if other.agreed != header.agreed:
            raise ValueError(
                f"expert parallelism: rank {rank} sends {other.describe()}, rank {channel.group.rank()} "
                f"{header.describe()}: all ranks must call the layer in the same mode, dtype and model dimension, and "
                "all with gradients or all without"
            )
    check_choices([row[width - 2 : width] for row in table])
    send, receive = ([row[column] for row in table] for column in (width, width + 1))
    returned = reduce(torch.promote_types, (DTYPES[other.returned] for other in headers))
    return ExchangeSizes([other.size for other in headers], send, receive, received, returned)
