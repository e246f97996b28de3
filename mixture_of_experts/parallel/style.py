"""`ExpertParallel`: how `parallelize_module` spreads the experts of a layer over the ranks of a mesh."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from mixture_of_experts.experts import ExpertList
from mixture_of_experts.gating import Gate
from mixture_of_experts.moe import HeirarchicalMoE, MoE
from mixture_of_experts.parallel.agreement import check_ranks_agree
from mixture_of_experts.parallel.sharding import ExpertSharding, Gradient
from mixture_of_experts.parallel.spread_experts import ExpertParallelExperts, parallel_class
from mixture_of_experts.support.checks import check_choice, check_sizes

PLACE = re.compile(r" at 0x[0-9a-f]+|(?<=cuda):\d+")  # what differs between ranks in what modules print


class ExpertParallel(ParallelStyle):
    """Spread the experts of a `MoE` or `HeirarchicalMoE` over the ranks of a 1-D mesh.

    Stacked expert parameters become DTensors, sharded on the expert dimension (the outer one of two). Their names in
    the state dict stay. Each rank keeps its own modules of an `ExpertList`, so its state dict has a part of the keys.
    Everything else in the layer stays whole on every rank: gates, shared experts, the modules around latent experts. It
    takes the values of the rank `src_data_rank`, by default the first; if that is None, it keeps its own. For latent
    experts (`LatentExperts`) tokens travel in the narrow width.

    Args:
        gradient: every rank calls backward on its own loss; an expert's gradient is that of the "mean" of these losses,
            or of their "sum". "mean" is right if other gradients are averaged, as by DDP and FSDP2.
        static_shapes: whether every rank always brings batches of the same shape. With limited capacity this saves the
            exchange of sizes and its host sync; dropless routing needs both.
        batch_group: the ranks that share the batch, a process group or 1-D mesh. Gates compute losses over it. By
            default gates without a group get that of the mesh. Beside data parallelism give the group of both.
        replicated: names of the experts' parameters and buffers that only look like stacks over experts, such as a bias
            `(d,)` that all experts share if d = e.

    Raises:
        ValueError: the mesh is not 1-D, it does not divide the experts, or the ranks' layers differ. It is raised on
            every rank, before anything is changed.

    Example:
        >>> from torch import nn
        >>> from mixture_of_experts import MoE
        >>> from mixture_of_experts.parallel import ExpertParallel, parallelize_module
        >>> def spread(model, mesh):
        ...     return parallelize_module(model, mesh["ep"], {"layers.*.ffn": ExpertParallel()})
    """

    batch_group: dist.ProcessGroup | None
    replicated: frozenset[str]

    def __init__(
        self,
        *,
        gradient: Gradient = "mean",
        static_shapes: bool = False,
        batch_group: dist.ProcessGroup | DeviceMesh | None = None,
        replicated: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.gradient: Gradient = check_choice("gradient", gradient, ("mean", "sum"))  # type: ignore[assignment]
        self.static_shapes = static_shapes
        self.batch_group = as_process_group("batch_group", batch_group)
        self.replicated = frozenset([replicated] if isinstance(replicated, str) else replicated)

    def sharding(self, module: nn.Module, mesh: DeviceMesh) -> ExpertSharding:
        """How the experts of a layer will be spread; raises if they cannot be, and changes nothing."""
        dims, experts = check_layer(module, mesh)
        stacked: frozenset[str] = frozenset()
        if isinstance(experts, ExpertList):
            check_expert_list(experts, math.prod(dims) // mesh.size())
        else:
            stacked = stacked_names(experts, dims, self.replicated)
        return ExpertSharding(mesh, dims, self.gradient, self.static_shapes, stacked)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Spread one layer; called by `parallelize_module`."""
        check_mesh(device_mesh)
        check_ranks_agree(lambda: describe_layer(module, self.sharding(module, device_mesh)), device_mesh)
        sharding = self.sharding(module, device_mesh)
        self._prepare_gates(module, device_mesh.get_group())

        path, experts = spread_part(module)
        self._replicate(module, {f"{path}.{name}" for name in sharded_parameters(experts, sharding)}, device_mesh)
        spread(experts, sharding, self.src_data_rank)
        return module

    def _prepare_gates(self, module: nn.Module, group: dist.ProcessGroup) -> None:
        for gate in module.modules():
            if isinstance(gate, Gate):
                own = gate.process_group or (group if group.size() > 1 else None)
                gate.process_group = self.batch_group or own

    def _replicate(self, module: nn.Module, but: Collection[str], mesh: DeviceMesh) -> None:
        """Give whole parameters and buffers, all but those named, the values of the rank `src_data_rank`."""
        if self.src_data_rank is None or mesh.size() == 1:
            return
        for name, tensor in named_tensors(module):
            if name not in but and not tensor.is_meta and not isinstance(tensor, DTensor):
                value = tensor.detach().to(mesh.device_type).contiguous()
                dist.broadcast(value, group=mesh.get_group(), group_src=self.src_data_rank)
                tensor.detach().copy_(value)

    def __repr__(self) -> str:
        return f"ExpertParallel(gradient={self.gradient!r}, static_shapes={self.static_shapes})"


def as_process_group(name: str, group: object) -> dist.ProcessGroup | None:
    """The process group, from a process group, a 1-D mesh, or None."""
    if isinstance(group, DeviceMesh):
        check_mesh(group)
        return group.get_group()
    if group is None or isinstance(group, dist.ProcessGroup):
        return group
    raise TypeError(f"{name} must be a process group or a 1-D DeviceMesh, got {group!r}")


def check_mesh(mesh: DeviceMesh) -> None:
    if mesh.ndim != 1:
        raise ValueError(
            f"ExpertParallel needs a 1-D mesh, got {mesh.ndim} dimensions {mesh.mesh_dim_names}: slice it, mesh['ep']"
        )


def check_layer(module: nn.Module, mesh: DeviceMesh) -> tuple[tuple[int, ...], nn.Module]:
    """The layer's number of experts as a tuple, and the experts; raises if they cannot be spread over the mesh."""
    if not isinstance(module, MoE | HeirarchicalMoE):
        raise TypeError(
            f"ExpertParallel spreads a MoE or HeirarchicalMoE, got {type(module).__name__}: let the plan's key name "
            "the layer itself"
        )
    path, experts = spread_part(module)
    if isinstance(experts, ExpertParallelExperts):
        raise ValueError("the experts of this layer are spread over ranks already: apply ExpertParallel once")
    dims = check_sizes("num_experts", module.num_experts)
    check_divides(dims, mesh)
    for name, parameter in experts.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(f"{path}.{name} is a DTensor already: apply ExpertParallel first, then fully_shard")
    return dims, experts


def check_divides(dims: Sequence[int], mesh: DeviceMesh) -> None:
    if dims[0] % mesh.size():
        outer = "outer " if len(dims) > 1 else ""
        raise ValueError(
            f"{dims[0]} {outer}experts cannot be divided among {mesh.size()} ranks: give a multiple of {mesh.size()}, "
            "or a smaller mesh"
        )


def spread_part(layer: nn.Module) -> tuple[str, nn.Module]:
    """The path and the module of the experts to spread: inside latent experts the inner ones, of narrow tokens."""
    path, experts = "experts", layer.get_submodule("experts")
    while getattr(experts, "works_on", None) == "tokens":
        path, experts = f"{path}.experts", experts.get_submodule("experts")
    return path, experts


def describe_layer(module: nn.Module, sharding: ExpertSharding) -> dict[str, Any]:
    """Everything in which the ranks' layers must agree: shapes and dtypes of tensors, and what modules print."""
    path, _ = spread_part(module)
    modules = {
        name or "the layer": f"{type(part).__name__}({part.extra_repr()})" for name, part in module.named_modules()
    }
    return {
        "number of experts": sharding.dims,
        **{name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in named_tensors(module)},
        **{f"{path}.{name}, stacked": True for name in sorted(sharding.stacked)},
        **{name: PLACE.sub("", text) for name, text in modules.items()},
        "gradient": sharding.gradient,
        "static_shapes": sharding.static_shapes,
    }


def named_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Parameters and buffers by name."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def stacked_names(experts: nn.Module, dims: tuple[int, ...], replicated: Collection[str]) -> frozenset[str]:
    """The names of parameters and buffers that are stacks over experts: their first sizes are `dims`."""
    parameters = dict(experts.named_parameters(remove_duplicate=False))
    tensors = {**parameters, **dict(experts.named_buffers(remove_duplicate=False))}
    if unknown := set(replicated) - tensors.keys():
        raise ValueError(f"replicated names {sorted(unknown)}, but the experts' tensors are {sorted(tensors)}")
    names = {name for name, tensor in tensors.items() if tuple(tensor.shape[: len(dims)]) == dims} - set(replicated)
    if not names & parameters.keys():
        shapes = ", ".join(f"{name} {tuple(parameter.shape)}" for name, parameter in parameters.items())
        raise ValueError(
            f"{type(experts).__name__} has no parameter stacked over {dims} experts, only {shapes or 'none at all'}: "
            "the first dimensions of an expert parameter must be the experts'. Experts in few bits have no parameters "
            "to spread: take the model that is not quantised"
        )
    return frozenset(names)


def spread(experts: nn.Module, sharding: ExpertSharding, src_data_rank: int | None) -> None:
    """Keep this rank's part of the experts, and give them the class that exchanges tokens with the other ranks."""
    if isinstance(experts, ExpertList):  # the others keep their keys
        for index in set(range(len(experts))).difference(sharding.experts):
            del experts._modules[str(index)]
    else:
        shard(experts, sharded_parameters(experts, sharding), sharding.mesh, src_data_rank)
    experts.__dict__["expert_parallel"] = sharding
    experts.__class__ = parallel_class(type(experts))  # type: ignore[assignment]
    assert isinstance(experts, ExpertParallelExperts)
    experts.mark_parameters()


def sharded_parameters(experts: nn.Module, sharding: ExpertSharding) -> list[str]:
    """The names of the stacked parameters, in the same order on all ranks."""
    return sorted(sharding.stacked & dict(experts.named_parameters(remove_duplicate=False)).keys())


def shard(experts: nn.Module, names: Iterable[str], mesh: DeviceMesh, src_data_rank: int | None) -> None:
    """Replace stacked parameters by this rank's parts; a parameter with two names stays one parameter."""
    made: dict[Tensor, nn.Parameter] = {}
    for name in names:
        path, _, own_name = name.rpartition(".")
        owner = experts.get_submodule(path)
        parameter = owner._parameters[own_name]
        assert parameter is not None
        if parameter not in made:
            made[parameter] = nn.Parameter(own_shard(parameter, mesh, src_data_rank), parameter.requires_grad)
        owner._parameters[own_name] = made[parameter]


def own_shard(parameter: Tensor, mesh: DeviceMesh, src_data_rank: int | None) -> DTensor:
    """This rank's part of a stack, as a DTensor with memory of its own."""
    sharded = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=src_data_rank)
    local = sharded.to_local()
    if not local.is_meta and local.untyped_storage().nbytes() > local.nbytes:  # a view keeps the whole stack alive
        sharded = DTensor.from_local(local.clone(), mesh, [Shard(0)], run_check=False)
    return sharded


def check_expert_list(experts: ExpertList, each: int) -> None:
    """Check a list of which every rank keeps `each` modules.

    Ranks must share no parameter: a gradient would not reach the other rank's copy. Every rank must have a parameter,
    as one without would not know that the others sum a norm over the ranks.
    """
    owner: dict[Tensor, int] = {}
    for index, expert in enumerate(experts):
        for name, parameter in expert.named_parameters():
            if owner.setdefault(parameter, index // each) != index // each:
                raise ValueError(f"parameter {name} of expert {index} belongs to an expert of another rank too")
    without = sorted(set(range(len(experts) // each)) - set(owner.values()))
    if owner and without:
        raise ValueError(
            f"no expert of rank {without[0]} ({without[0] * each} to {without[0] * each + each - 1}) has a parameter: "
            "order the list so that every rank has an expert with parameters"
        )
