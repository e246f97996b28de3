"""Helpers for training a model on several processes: mesh, parameter groups, random states, loads."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .settings import Settings


def start(ranks: int, settings: Settings) -> None:
    """Join the other processes. A single rank does not need torchrun."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update({name: os.environ.get(name, value) for name, value in place.items()})
    world = int(os.environ["WORLD_SIZE"])
    if world != ranks:
        raise SystemExit(
            f"--expert-parallel {ranks} requires torchrun --nproc-per-node {ranks}, but there are {world} processes"
        )
    for name in ("batch_size", "eval_windows"):
        if getattr(settings, name) % ranks:
            raise SystemExit(f"{name} is {getattr(settings, name)}: use a multiple of the {ranks} ranks")
    if settings.device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(timeout=timedelta(minutes=10))


def make_mesh(settings: Settings) -> DeviceMesh:
    """Create a mesh of all ranks, over which the experts are sharded."""
    return init_device_mesh(torch.device(settings.device).type, (dist.get_world_size(),), mesh_dim_names=("ep",))


def by_mesh(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split optimizer groups by mesh, because fused steps cannot mix DTensors with other tensors."""
    divided = []
    for group in groups:
        of_mesh: dict[Any, list[Tensor]] = {}
        for parameter in group["params"]:
            of_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
        divided += [{**group, "params": parameters} for parameters in of_mesh.values()]
    return divided


def rng_of_ranks(settings: Settings) -> list[dict[str, Any]]:
    """Return the random number generator states of all ranks."""
    cuda = torch.cuda.get_rng_state(settings.device) if settings.device.startswith("cuda") else None
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, {"cpu": torch.get_rng_state(), "cuda": cuda})
    return told


def set_rng(saved: list[dict[str, Any]], settings: Settings, step: int) -> None:
    """Restore each rank's random state. If the number of ranks has changed, seed each rank differently instead."""
    if len(saved) != dist.get_world_size():
        torch.manual_seed(hash((settings.seed, step, dist.get_rank())) % 2**63)
        return
    own = saved[dist.get_rank()]
    torch.set_rng_state(own["cpu"])
    if own["cuda"] is not None and settings.device.startswith("cuda"):
        torch.cuda.set_rng_state(own["cuda"], settings.device)


def loads_of_ranks(loads: list[Tensor], ranks: int) -> list[str]:
    """Describe each rank's share of the computed choices, over the run and in the layer with the largest share."""
    total = torch.stack(loads).sum(dim=0).double() if loads else torch.empty(0, 0)  # (layers, experts)
    if not total.numel():
        return []
    by_rank = total.unflatten(1, (ranks, -1)).sum(dim=-1)  # (layers, ranks)
    share, most = by_rank.sum(dim=0) / by_rank.sum(), (by_rank / by_rank.sum(dim=1, keepdim=True)).amax(dim=0)
    each = total.shape[1] // ranks
    return [
        f"rank {rank} (experts {rank * each} to {(rank + 1) * each - 1}) computed {share[rank]:.1%} of the choices, "
        f"at most {most[rank]:.1%} of a layer's"
        for rank in range(ranks)
    ]
