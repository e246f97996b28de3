"""What takes long: `torch.compile`, and two processes that train one module with DDP and FSDP2."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mixture_of_experts.verify.properties import ONE, TRAINING, keeps
from mixture_of_experts.verify.subject import OF_TOKENS, DoesNotApplyError, Gap, Run, Trial, gap

RANKS = 2


@keeps("compiled it computes the same", cases=ONE, thorough=True)
def compile(trial: Trial) -> Iterator[Gap]:
    torch.compiler.reset()
    found = trial.step(run=lambda function, x: torch.compile(function, backend="aot_eager")(x))
    yield gap(found, trial.step())


@keeps("two ranks with DDP are one process", cases=ONE, modes=TRAINING, thorough=True)
def ddp(trial: Trial) -> Iterator[Gap]:
    yield from on_ranks(trial, DistributedDataParallel)


@keeps("two ranks with FSDP2 are one process", cases=ONE, modes=TRAINING, thorough=True)
def fsdp2(trial: Trial) -> Iterator[Gap]:
    yield from on_ranks(trial, fully_shard)


def on_ranks(trial: Trial, wrap: Run) -> Iterator[Gap]:
    """The mean gradient of two ranks, a batch each, is that of one process which runs both batches."""
    alone = [trial.step(trial.sample(rank)) for rank in range(RANKS)]
    try:
        ForkingPickler.dumps(trial)
    except Exception as error:
        raise DoesNotApplyError(f"it cannot be sent to another process: {error}") from None
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (trial, wrap, folder), nprocs=RANKS)  # pyright: ignore[reportPrivateImportUsage]
        found = [torch.load(Path(folder, str(rank)), weights_only=True) for rank in range(RANKS)]
    for rank in range(RANKS):
        mine = {name: alone[rank][name] for name in OF_TOKENS}
        means = {name: (alone[0][name] + alone[1][name]) / RANKS for name in found[rank] if name not in mine}
        yield gap(found[rank], means | mine, how=f", rank {rank}")


def run_rank(rank: int, trial: Trial, wrap: Run, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    try:
        more = {"mesh": init_device_mesh("cpu", (RANKS,))} if wrap is fully_shard else {}
        outcome = trial.step(trial.sample(rank), module=wrap(trial.fresh(), **more), of="sum")
        whole = {
            name.replace("of module.", "of "): getattr(tensor, "full_tensor", tensor.clone)()
            for name, tensor in outcome.items()
            if name != "loss"
        }
        torch.save(whole, f"{folder}/{rank}")
    finally:
        dist.destroy_process_group()
    os._exit(0)  # threads of the group outlive it, and torch may abort where Python ends the process
