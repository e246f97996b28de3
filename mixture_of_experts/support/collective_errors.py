"""Defines the error for a rank whose collective failed because other ranks did not join it."""

from __future__ import annotations

import torch.distributed as dist


def collective_error(what: str, error: Exception, group: dist.ProcessGroup) -> RuntimeError:
    """Return the error to raise on a rank whose collective failed.

    Args:
        what: description of what this rank failed to do.
        error: the error that the collective raised.
        group: the process group whose ranks should have joined.
    """
    return RuntimeError(
        f"{what}, on rank {group.rank()} of {group.size()}: {error}\nAnother rank has raised an error, is stuck, or "
        "called different layers. To see its error, start the ranks with torchrun, and decorate the main function with "
        "@record of torch.distributed.elastic.multiprocessing.errors. To find a stuck rank, set "
        "TORCH_DISTRIBUTED_DEBUG=DETAIL for gloo, or read the flight recorder for NCCL"
    )
