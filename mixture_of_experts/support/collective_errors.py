"""The error of a rank whose collective failed because other ranks did not join."""

from __future__ import annotations

import torch.distributed as dist


def collective_error(what: str, error: Exception, group: dist.ProcessGroup) -> RuntimeError:
    """Return the error to raise on a rank whose collective failed.

    Args:
        what: what this rank could not do.
        error: the error of the collective.
        group: the ranks that should have joined.
    """
    return RuntimeError(
        f"{what}, on rank {group.rank()} of {group.size()}: {error}\nAnother rank has raised, is stuck or ran other "
        "layers. To see its error start the ranks by torchrun, with @record of "
        "torch.distributed.elastic.multiprocessing.errors on the main function; to see which rank is stuck, set "
        "TORCH_DISTRIBUTED_DEBUG=DETAIL on gloo, and read the flight recorder on NCCL"
    )
