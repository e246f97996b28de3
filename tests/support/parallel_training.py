"""A dozen steps of AdamW with clipping, in one process and in every layout of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from mixture_of_experts import TopKGating
from mixture_of_experts.parallel import (
    average_gradients,
    clip_grad_norm_,
    expert_parameters,
    fully_shard_experts,
    ignore_experts_in_ddp,
    replicated_parameters,
)
from support.checkpoint_recipe import load_checkpoint
from support.parallel_checks import make_mesh, parallelize_model
from support.parallel_layers import BATCH, DIM, LAYERS_OF_MODEL, LENGTH, Model, local_part, make_model
from support.parallel_workers import gather_tensor, get_rank

STEPS, MAX_NORM = 12, 0.3
KEY = "layers.*.ffn"
AFTER_STEP = dict(rtol=0, atol=1e-9)


def make_batches(step: int, pieces: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets (b, n, d) of a step, `pieces` times."""
    generator = torch.Generator().manual_seed(100 + step)
    for _ in range(pieces):
        yield tuple(torch.randn(2, BATCH, LENGTH, DIM, generator=generator))  # type: ignore[misc]


def make_optimizer(model: nn.Module, **options) -> torch.optim.AdamW:
    by_mesh: dict[Any, list[Tensor]] = {}
    for parameter in model.parameters():
        by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    groups = [{"params": parameters} for parameters in by_mesh.values()]
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, **options)


def update_biases(model: nn.Module, group: dist.ProcessGroup | None) -> None:
    for module in model.modules():
        if isinstance(module, TopKGating) and module.expert_bias is not None:
            module.update_bias(1e-2, group)


@cache
def train_single_process(pieces: int = 1, steps: int = STEPS) -> tuple[Model, torch.optim.AdamW, list[float]]:
    """The run that all others must equal: model, optimizer, norms of the gradients."""
    model, norms = make_model(), []
    optimizer, alone = make_optimizer(model), get_rank()
    for step in range(steps):
        for x, target in make_batches(step, pieces):
            out, aux_loss = model(x)
            (((out - target).square().mean() + aux_loss) / pieces).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
        update_biases(model, alone)
    return model, optimizer, norms


# ---- layouts: each prepares a model, and says what is left to do before clipping ----

Layout = Callable[[Model], tuple[nn.Module, Callable[[], None]]]


def no_wrapper() -> None:
    return None


def expert_parallel_only(model: Model) -> tuple[nn.Module, Callable[[], None]]:
    mesh = make_mesh()
    parallelize_model(model, mesh, KEY)
    return model, lambda: average_gradients(replicated_parameters(model).values(), mesh["ep"])


def ddp(model: Model) -> tuple[nn.Module, Callable[[], None]]:
    parallelize_model(model, make_mesh(), KEY)
    return DistributedDataParallel(ignore_experts_in_ddp(model)), no_wrapper


def ddp_replicas(model: Model) -> tuple[nn.Module, Callable[[], None]]:
    mesh = make_mesh(data_parallel=2)
    parallelize_model(model, mesh, KEY)
    parallel = DistributedDataParallel(ignore_experts_in_ddp(model))
    return parallel, lambda: average_gradients(expert_parameters(model).values(), mesh["dp"])


def fsdp(model: Model) -> tuple[Any, Callable[[], None]]:
    mesh = make_mesh()
    parallelize_model(model, mesh, KEY)
    experts = set(expert_parameters(model).values())
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["ep"], ignored_params=experts)
    return fully_shard(model, mesh=mesh["ep"], ignored_params=experts), no_wrapper


def fsdp_replicas(model: Model, **options) -> tuple[Any, Callable[[], None]]:
    mesh = make_mesh(data_parallel=2)
    everyone = flatten_mesh(mesh)
    parallelize_model(model, mesh, KEY)
    for layer in model.layers:
        fully_shard_experts(layer.ffn, mesh=mesh["dp"], **options)
        fully_shard(layer, mesh=everyone)
    return fully_shard(model, mesh=everyone), no_wrapper


def fsdp_replicas_by_row(model: Model) -> tuple[nn.Module, Callable[[], None]]:
    """Experts divided among data-parallel ranks on their second dimension: there may be fewer of them than ranks."""
    return fsdp_replicas(model, shard_placement_fn=lambda parameter: Shard(1))


def flatten_mesh(mesh: DeviceMesh) -> DeviceMesh:
    return mesh["dp", "ep"]._flatten("batch")


LAYOUTS: dict[str, Layout] = {
    f.__name__: f for f in (expert_parallel_only, ddp, ddp_replicas, fsdp, fsdp_replicas, fsdp_replicas_by_row)
}


def train_distributed(
    layout: str,
    pieces: int = 1,
    recompute: bool = False,
    steps: int = STEPS,
    layers: Sequence[str] = LAYERS_OF_MODEL,
    resume: Path | None = None,
    **optimizer_options,
) -> tuple[Model, torch.optim.AdamW, list[float]]:
    """The same run on this rank's part of every batch; `resume` is a folder of checkpoints to go on from."""
    model, norms = make_model(layers=layers, recompute=recompute), []
    parallel, before_clipping = LAYOUTS[layout](model)
    optimizer = make_optimizer(model, **optimizer_options)
    start = 0 if resume is None else load_checkpoint(resume, model, optimizer)["step"]
    for step in range(start, steps):
        for piece, (x, target) in enumerate(make_batches(step, pieces)):
            last = piece == pieces - 1
            wait = isinstance(parallel, DistributedDataParallel) and not last
            with parallel.no_sync() if wait else nullcontext():
                out, aux_loss = parallel(local_part(x))
                own_sum = (out - local_part(target)).square().sum()
                ((own_sum * dist.get_world_size() / x.numel() + aux_loss) / pieces).backward()
        before_clipping()
        norms.append(clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
        update_biases(model, dist.group.WORLD)
    return model, optimizer, norms


def check_training(layout: str, pieces: int = 1, recompute: bool = False, **optimizer_options) -> None:
    alone, _, norms_alone = train_single_process(pieces)
    together, _, norms = train_distributed(layout, pieces, recompute, **optimizer_options)
    assert max(norms_alone) > MAX_NORM  # clipping does something
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(norms_alone), **AFTER_STEP)
    reference, start = dict(alone.named_parameters()), dict(make_model().named_parameters())
    for name, parameter in together.named_parameters():
        torch.testing.assert_close(
            gather_tensor(parameter), reference[name], **AFTER_STEP, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert (reference[name] - start[name]).abs().max() > 1e-3  # and so does training
    for name, buffer in together.named_buffers():
        assert torch.equal(buffer, dict(alone.named_buffers())[name]), name
