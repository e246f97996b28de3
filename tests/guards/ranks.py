"""The bits of layers over two ranks: experts spread over them, and sharded by FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from support import parallel_checks, parallel_layers
from support.parallel_workers import Workers
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from .bits import digest
from .outcomes import Digests, failed

RANKS = 2


def expert_parallel(layer: str) -> nn.Module:
    mesh = parallel_checks.make_mesh()
    return parallel_checks.parallelize_model(
        parallel_layers.make_layer(layer), mesh, replicated=parallel_layers.replicate_layer(layer)
    )


def fsdp2(layer: str) -> nn.Module:
    sharded: Any = fully_shard(parallel_layers.make_layer(layer))
    return sharded


LAYOUTS: dict[str, Callable[[str], nn.Module]] = {"experts spread": expert_parallel, "FSDP2": fsdp2}


def digests() -> dict[str, Digests]:
    """By layer and layout, those of both ranks."""
    workers, found = Workers(), {}
    try:
        for layer in parallel_layers.LAYERS:
            for layout in LAYOUTS:
                of_ranks = workers.outcomes(digests_of_rank, RANKS, layer, layout)
                found[f"{layer}, {layout}"] = together(of_ranks)
    finally:
        workers.stop()
    return found


def together(of_ranks: list[Any]) -> Digests:
    """The digests of all ranks, or the error of the first that has one."""
    parts = [part if isinstance(part, dict) else failed(part) for part in of_ranks]
    if wrong := [part for part in parts if "error" in part]:
        return wrong[0] | {f"error of rank {rank}": part.get("error", "none") for rank, part in enumerate(parts)}
    return {f"{name} of rank {rank}": value for rank, part in enumerate(parts) for name, value in part.items()}


def digests_of_rank(layer: str, layout: str) -> Digests:
    """What a rank has after two training steps, or its error."""
    try:
        return digests_of_steps(layer, layout)
    except Exception as error:
        return failed(error)


def digests_of_steps(layer: str, layout: str) -> Digests:
    """What a rank has after two training steps' forwards and backwards on its part of a masked batch."""
    model = LAYOUTS[layout](layer)
    x, mask = parallel_layers.make_batch(masked=True)
    assert mask is not None
    x, mask = (parallel_layers.local_part(part) for part in (x, mask))
    torch.manual_seed(dist.get_rank())
    found: Digests = {}
    for step in range(2):
        leaf = x.clone().requires_grad_()
        out, aux_loss = model(leaf, mask)
        (out.square().mean() if out.numel() else out.sum()).add(aux_loss).backward()
        values = {"out": out, "aux_loss": aux_loss, "gradient of x": leaf.grad}
        values |= {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
        values |= {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
        local = {n: v.to_local() if isinstance(v, DTensor) else v for n, v in values.items() if v is not None}
        found |= {f"{name} of step {step}": digest(value) for name, value in local.items()}
    return found
