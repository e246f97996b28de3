"""Uses all-to-all collectives to send tokens to the ranks that own their experts, and to send the results back.

Axes: p (ranks in the group), e (experts on all ranks), l (experts per rank, e / p), s (slots per expert on one rank), r
(rows on one rank, sorted by expert), d (model dimension), o (output dimension).

Rank q owns experts `q l` to `(q + 1) l - 1`, so the rows sent to each rank are contiguous. Results are sent back in the
dtype of the tokens, because the experts' output dtype may differ between ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mixture_of_experts.parallel.row_splitting import (
    check_fingerprints,
    count_local_part,
    fingerprint_choices,
    gather_parts,
    take_local_part,
)
from mixture_of_experts.support.collective_errors import collective_error
from mixture_of_experts.support.private_torch import all_to_all, unsafe_view

EXCHANGED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SLOTS, ROWS = 0, 1
LAYOUT_NAMES = ("slots (limited capacity)", "rows (dropless)")
MODE_NAMES = ("in evaluation", "in training")
GRADIENT_NAMES = ("without gradients", "with gradients")

ComputeFunction = Callable[..., Tensor]


class Channel(NamedTuple):
    """The communication channel between the ranks of a group.

    Attributes:
        shared_batch: 1-D mesh of ranks that hold the same tokens and each send a part of them, or None if no tokens are
            shared.
        fingerprint: the result of `fingerprint_choices` for this rank's shared batch, `(2,)` int64, or None if the
            batch is not shared.
    """

    group: dist.ProcessGroup
    shared_batch: DeviceMesh | None = None
    fingerprint: Tensor | None = None

    @property
    def size(self) -> int:
        return self.group.size()

    def transfer(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Send each rank its block of the rows `x` `(sum(send), ...)`, and return the received blocks in rank order."""
        try:
            return all_to_all(x.contiguous(), receive, send, self.group)
        except RuntimeError as error:
            raise collective_error("expert parallelism: a rank could not exchange tokens", error, self.group) from error

    def compute_remotely(
        self, compute: Callable[[Tensor], Tensor], x: Tensor, send: list[int], receive: list[int]
    ) -> Tensor:
        """Send the rows `x`, apply `compute` to the received rows, and send the results back. The backward pass
        exchanges gradients in the same way."""
        result = compute(_AllToAll.apply(x, send, receive, self))
        return _AllToAll.apply(result.to(x.dtype), receive, send, self)


class _AllToAll(torch.autograd.Function):
    """`transfer` with a backward pass that sends gradients back to the ranks that sent the rows."""

    @staticmethod
    def forward(ctx, x: Tensor, send: list[int], receive: list[int], channel: Channel) -> Tensor:
        ctx.send, ctx.receive, ctx.channel = send, receive, channel
        return channel.transfer(x, send, receive)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _AllToAll.apply(grad, ctx.receive, ctx.send, ctx.channel), None, None, None


class _PermuteRows(torch.autograd.Function):
    """A row permutation whose backward pass is also a gather."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor):
        order, inverse = ctx.saved_tensors
        return _PermuteRows.apply(grad, inverse, order), None, None


def exchange_slots(
    x: Tensor, dims: tuple[int, ...], compute: ComputeFunction, channel: Channel, training: bool, static_shapes: bool
) -> Tensor:
    """Compute this rank's slots on the ranks that own the experts, and return the results `(*e, s, o)`.

    Args:
        x: this rank's slots for all experts, `(*e, s, d)`.
        dims: the expert dimensions `*e`. The first dimension is divided among the ranks.
        compute: a function that runs this rank's experts. It maps slots `(*l, s', d)` from all ranks to outputs
            `(*l, s', o)`.
        channel: the communication channel to the other ranks.
        training: whether the layer is in training mode.
        static_shapes: whether all ranks are guaranteed to make identical calls with the same number of slots s.
            Otherwise, the ranks exchange this information, which requires a host sync.
    """
    if channel.size == 1:
        return compute(x)
    if (shared := channel.shared_batch) is not None:
        filled = x.detach().ne(0).any(dim=-1).sum(dim=-1).flatten()
        fingerprinted = channel._replace(shared_batch=None, fingerprint=fingerprint_choices(filled, shared))
        result = exchange_slots(take_local_part(x, shared), dims, compute, fingerprinted, training, static_shapes=False)
        return gather_parts(result, x.shape[-2], shared)
    s, d = x.shape[-2:]
    local_dims = (dims[0] // channel.size, *dims[1:])
    each = math.prod(local_dims)
    send = receive = [each * s] * channel.size
    if not static_shapes:
        counts = torch.full((math.prod(dims),), s, device=x.device)
        send, receive, _ = exchange_counts(SLOTS, x, training, counts, channel)
    sizes = [num_rows // each for num_rows in receive]

    def compute_blocks(rows: Tensor) -> Tensor:
        blocks = [block.view(*local_dims, size, d) for block, size in zip(rows.split(receive), sizes, strict=True)]
        result = compute(torch.cat(blocks, dim=-2))
        return torch.cat([block.reshape(-1, block.shape[-1]) for block in result.split(sizes, dim=-2)])

    result = channel.compute_remotely(compute_blocks, x.reshape(-1, d), send, receive)
    return unsafe_view(result, (*x.shape[:-1], result.shape[-1]))


def exchange_rows(x: Tensor, counts: Tensor, compute: ComputeFunction, channel: Channel, training: bool) -> Tensor:
    """Compute this rank's rows on the ranks that own their experts, and return the results `(r, o)`. This function
    requires one host sync.

    Args:
        x: rows sorted by expert, `(r, d)`. The result is 0 for rows beyond the total count.
        counts: number of rows for each expert, `(e,)` int64.
        compute: a function that runs this rank's experts. It maps rows `(r', d)`, sorted by expert, and the row counts
            `(l,)` to outputs `(r', o)`.
        channel: the communication channel to the other ranks.
        training: whether the layer is in training mode.
    """
    if channel.size == 1:
        return compute(x, counts)
    if (shared := channel.shared_batch) is not None:
        part = take_local_part(x, shared)
        fingerprinted = channel._replace(shared_batch=None, fingerprint=fingerprint_choices(counts, shared))
        counts = count_local_part(counts, part.shape[0], shared)
        return gather_parts(exchange_rows(part, counts, compute, fingerprinted, training), x.shape[0], shared)
    send, receive, received = exchange_counts(ROWS, x, training, counts, channel)
    order, inverse = find_expert_order(received, sum(receive))

    def compute_sorted(rows: Tensor) -> Tensor:
        result = compute(_PermuteRows.apply(rows, order, inverse), received.sum(dim=0))
        return _PermuteRows.apply(result, inverse, order)

    result = channel.compute_remotely(compute_sorted, x[: sum(send)], send, receive)
    return torch.cat([result, result.new_zeros(x.shape[0] - sum(send), result.shape[-1])])


def find_expert_order(received: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return the permutation that reorders rows from rank-major to expert-major, and its inverse. `received` contains
    the row counts `(p, l)`."""
    expert = torch.arange(received.shape[1], device=received.device).repeat(received.shape[0])
    order = expert.repeat_interleave(received.flatten(), output_size=num_rows).argsort(stable=True)
    index = torch.arange(num_rows, device=order.device)
    return order, torch.empty_like(order).scatter(0, order, index)


def exchange_counts(
    layout: int, x: Tensor, training: bool, counts: Tensor, channel: Channel
) -> tuple[list[int], list[int], Tensor]:
    """Send each rank a description of the call and the row counts of its experts, taken from `counts` `(e,)`, and
    receive the same from all ranks. This function requires one host sync.

    Every rank receives all descriptions, so every rank raises a ValueError if they differ.

    Returns:
        The number of rows to send to each rank and the number to receive from it, as lists of length p, and a tensor
        `(p, l)` with the number of rows that each rank sends to each of this rank's experts.
    """
    ranks = channel.size
    sent = counts.view(ranks, -1)
    call = [layout, int(training), int(torch.is_grad_enabled()), EXCHANGED_DTYPES.index(x.dtype), x.shape[-1]]
    batch = sent.new_zeros(2) if channel.fingerprint is None else channel.fingerprint
    header = torch.cat([torch.tensor(call, device=counts.device), batch]).expand(ranks, -1)
    exchanged = channel.transfer(torch.cat([header, sent], dim=1), [1] * ranks, [1] * ranks)
    header, received = exchanged[:, : header.shape[1]], exchanged[:, header.shape[1] :]
    sums = [sent.sum(dim=1, keepdim=True), received.sum(dim=1, keepdim=True)]
    table = torch.cat([header, *sums], dim=1).tolist()  # this is the only host synchronization
    for rank, row in enumerate(table):
        if (other := row[: len(call)]) != call:
            raise ValueError(
                f"expert parallelism: rank {rank} sends {describe_call(other)}, but rank {channel.group.rank()} sends "
                f"{describe_call(call)}. All ranks must call the layer with the same mode, dtype and model dimension, "
                "and gradients must be enabled on all ranks or on none"
            )
    *_, batches, choices, num_sent, num_received = map(list, zip(*table, strict=True))
    check_fingerprints(zip(batches, choices, strict=True))
    return num_sent, num_received, received


def describe_call(call: Sequence[int]) -> str:
    layout, mode, gradients, dtype, dim = call
    rows = f"{LAYOUT_NAMES[layout]} of {EXCHANGED_DTYPES[dtype]}, dim={dim}"
    return f"{rows}, {MODE_NAMES[mode]} {GRADIENT_NAMES[gradients]}"
