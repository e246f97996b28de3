"""Defines `ExpertParallel`, the parallel style that shards a layer's experts over the ranks of a mesh."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from mixture_of_experts.experts import ExpertList
from mixture_of_experts.gating import Gate
from mixture_of_experts.moe import HeirarchicalMoE, MoE
from mixture_of_experts.parallel.agreement import check_ranks_agree
from mixture_of_experts.parallel.sharded_experts import ShardedExperts, make_sharded_class
from mixture_of_experts.parallel.sharding import ExpertSharding, GradientReduction
from mixture_of_experts.support.checks import check_choice, check_sizes
from mixture_of_experts.support.private_torch import get_wrapped_module

# parts of a module's repr that differ between ranks
RANK_SPECIFIC_PATTERN = re.compile(r" at 0x[0-9a-f]+|(?<=cuda):\d+")


class ExpertParallel(ParallelStyle):
    """A parallel style that shards the experts of an `MoE` or `HeirarchicalMoE` layer over the ranks of a 1-D mesh.

    Stacked expert parameters become DTensors that are sharded along the expert dimension. In two-level layers, this is
    the outer expert dimension. Parameter names in the state dict do not change. All other parts of the layer (gates,
    shared experts and the projections of latent experts) are replicated on all ranks with the values of
    `src_data_rank`, which is the first rank by default. If `src_data_rank` is None, each rank keeps its own values.
    With latent experts (`LatentExperts`), tokens are exchanged in the latent dimension.

    Args:
        gradient: "mean" or "sum". Expert gradients are computed for the mean or the sum of the losses on which the
            ranks call `backward`. Use "mean" if other gradients are averaged, as in DDP and FSDP2.
        static_shapes: whether batches always have the same shape on all ranks. With limited capacity, this setting
            avoids a size exchange and its host sync. Dropless routing always requires both.
        batch_group: a process group or 1-D mesh of the ranks that share the batch. Gates compute their losses over
            these ranks. By default, gates without a process group use the mesh's group. With data parallelism, pass a
            group that spans the expert-parallel and data-parallel ranks.
        replicated: names of expert parameters and buffers that are not stacked over experts even though their shape
            suggests it, such as a bias `(d,)` that all experts share, where d happens to equal e.

    Raises:
        ValueError: the mesh is not 1-D, its size does not divide the number of experts, or the ranks have different
            layers. The error is raised on all ranks before anything is modified.

    Example:
        >>> from torch import nn
        >>> from mixture_of_experts import MoE
        >>> from mixture_of_experts.parallel import ExpertParallel, parallelize_module
        >>> def shard(model, mesh):
        ...     return parallelize_module(model, mesh["ep"], {"layers.*.ffn": ExpertParallel()})
    """

    def __init__(
        self,
        *,
        gradient: GradientReduction = "mean",
        static_shapes: bool = False,
        batch_group: dist.ProcessGroup | DeviceMesh | None = None,
        replicated: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.gradient: GradientReduction = check_choice("gradient", gradient, ("mean", "sum"))  # type: ignore[assignment]
        self.static_shapes = static_shapes
        self.batch_group: dist.ProcessGroup | None = as_process_group("batch_group", batch_group)
        self.replicated: frozenset[str] = frozenset([replicated] if isinstance(replicated, str) else replicated)

    def sharding(self, module: nn.Module, mesh: DeviceMesh) -> ExpertSharding:
        """Return the `ExpertSharding` of a layer without modifying the layer. Raise an error if the experts cannot be
        sharded."""
        dims, experts = check_layer(module, mesh)
        stacked = find_sharded_names(experts, dims, self.replicated)
        return ExpertSharding(mesh, dims, self.gradient, self.static_shapes, stacked)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Shard a layer. `parallelize_module` calls this method."""
        check_mesh(device_mesh)
        check_ranks_agree(lambda: describe_sharded_layer(module, self.sharding(module, device_mesh)), device_mesh)
        shard_experts(find_experts_to_shard(module)[1], self.sharding(module, device_mesh), self.src_data_rank)
        for tensor in (*module.parameters(), *module.buffers()):
            if self.src_data_rank is not None and not isinstance(tensor, DTensor) and not tensor.is_meta:
                first = distribute_tensor(tensor.detach(), device_mesh, src_data_rank=self.src_data_rank)
                tensor.detach().copy_(first.to_local())
        group = device_mesh.get_group() if device_mesh.size() > 1 else None
        for gate in module.modules():
            if isinstance(gate, Gate):
                gate.process_group = self.batch_group or gate.process_group or group
        return module

    def __repr__(self) -> str:
        return f"ExpertParallel(gradient={self.gradient!r}, static_shapes={self.static_shapes})"


def as_process_group(name: str, group: object) -> dist.ProcessGroup | None:
    """Convert `group` to a process group. A 1-D mesh is replaced with its process group, and None is returned
    unchanged."""
    if isinstance(group, DeviceMesh):
        check_mesh(group)
        return group.get_group()
    if group is None or isinstance(group, dist.ProcessGroup):
        return group
    raise TypeError(f"{name} must be a process group or a 1-D DeviceMesh, got {group!r}")


def check_mesh(mesh: DeviceMesh) -> None:
    if mesh.ndim != 1:
        raise ValueError(
            f"ExpertParallel requires a 1-D mesh, but got a {mesh.ndim}-D mesh with dimensions {mesh.mesh_dim_names}; "
            "select one dimension, for example with mesh['ep']"
        )


def check_layer(module: nn.Module, mesh: DeviceMesh) -> tuple[tuple[int, ...], nn.Module]:
    """Return a layer's expert dimensions and its experts. Raise an error if the experts cannot be sharded over the
    mesh."""
    if not isinstance(module, MoE | HeirarchicalMoE):
        raise TypeError(
            f"ExpertParallel must be applied to an MoE or HeirarchicalMoE, got {type(module).__name__}; use a plan key "
            "that matches the layer itself"
        )
    path, experts = find_experts_to_shard(module)
    if isinstance(experts, ShardedExperts):
        raise ValueError("the experts of this layer are already sharded; apply ExpertParallel only once")
    if isinstance(experts, ExpertList):
        raise TypeError(
            "a list of modules cannot be sharded across ranks; stack its weights in Experts, or in a custom module "
            "whose parameters have the experts as their first dimension"
        )
    if get_wrapped_module(experts) is not None:
        raise ValueError(
            f"{path} is wrapped in a {type(experts).__name__}; apply ExpertParallel before wrapping the experts. "
            "Adapters on sharded experts are not supported; merge them, or adapt only other modules"
        )
    dims = check_sizes("num_experts", module.num_experts)
    check_divisible(dims, mesh)
    for name, parameter in experts.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(f"{path}.{name} is already a DTensor; apply ExpertParallel before fully_shard")
    return dims, experts


def check_divisible(dims: Sequence[int], mesh: DeviceMesh) -> None:
    if dims[0] % mesh.size():
        outer = "outer " if len(dims) > 1 else ""
        raise ValueError(
            f"{dims[0]} {outer}experts cannot be divided evenly among {mesh.size()} ranks; use a multiple of "
            f"{mesh.size()} experts, or a smaller mesh"
        )


def find_experts_to_shard(layer: nn.Module) -> tuple[str, nn.Module]:
    """Return the path and the module of the experts to shard. For latent experts, these are the inner experts, which
    receive tokens in the latent dimension."""
    path, experts = "experts", layer.get_submodule("experts")
    while getattr(experts, "works_on", None) == "tokens":
        path, experts = f"{path}.experts", experts.get_submodule("experts")
    return path, experts


def describe_sharded_layer(module: nn.Module, sharding: ExpertSharding) -> dict[str, Any]:
    """Return all layer properties that must be the same on every rank: the shapes and dtypes of tensors, and the repr
    of modules."""
    description: dict[str, Any] = {"number of experts": sharding.expert_dims}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        description[name] = f"{tuple(tensor.shape)} {tensor.dtype}"
    for name, part in module.named_modules():
        description[name or "the layer"] = RANK_SPECIFIC_PATTERN.sub("", f"{type(part).__name__}({part.extra_repr()})")
    settings = {"gradient": sharding.gradient, "static_shapes": sharding.static_shapes}
    return {**description, "stacked": sorted(sharding.sharded_names), **settings}


def find_sharded_names(experts: nn.Module, dims: tuple[int, ...], replicated: Collection[str]) -> frozenset[str]:
    """Return the names of parameters and buffers that are stacked over experts, that is, whose leading dimensions are
    `dims`."""
    parameters = dict(experts.named_parameters(remove_duplicate=False))
    tensors = {**parameters, **dict(experts.named_buffers(remove_duplicate=False))}
    if unknown := set(replicated) - tensors.keys():
        raise ValueError(f"replicated contains {sorted(unknown)}, but the experts' only tensors are {sorted(tensors)}")
    names = {name for name, tensor in tensors.items() if tuple(tensor.shape[: len(dims)]) == dims} - set(replicated)
    if not names & parameters.keys():
        shapes = ", ".join(f"{name} {tuple(parameter.shape)}" for name, parameter in parameters.items())
        raise ValueError(
            f"{type(experts).__name__} must have parameters whose first dimensions are the expert dimensions {dims}, "
            f"got {shapes or 'no parameters'}. Quantized experts have no parameters to shard; use the unquantized model"
        )
    return frozenset(names)


def shard_experts(experts: nn.Module, sharding: ExpertSharding, src_data_rank: int | None) -> None:
    """Reduce stacked tensors to this rank's part, and change the class of the experts to one that exchanges tokens with
    other ranks."""
    mesh, made = sharding.mesh, dict[Any, nn.Parameter]()
    for name in sorted(sharding.sharded_names):  # sorted, so that all ranks use the same order
        path, _, own_name = name.rpartition(".")
        parameters = experts.get_submodule(path)._parameters
        whole = parameters.get(own_name)
        if whole is None:  # buffers are not sharded
            continue
        if whole not in made:  # a tensor that is registered under two names must remain a single tensor
            part = distribute_tensor(whole.detach(), mesh, [Shard(0)], src_data_rank=src_data_rank).to_local()
            # clone the part, because a view would keep the whole stack alive
            sharded = DTensor.from_local(part.clone(), mesh, [Shard(0)], run_check=False)
            made[whole] = nn.Parameter(sharded, whole.requires_grad)
        parameters[own_name] = made[whole]
    experts.__dict__["sharding"] = sharding
    experts.__class__ = make_sharded_class(type(experts))  # type: ignore[assignment]
