"""Views of a module that hold this rank's experts alone; the module's own, unchanged forward runs on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mixture_of_experts.parallel.exchange import scale_gradient
from mixture_of_experts.parallel.sharding import ExpertSharding


class LocalView(NamedTuple):
    """A module's stand-in while this rank's experts compute.

    Attributes:
        original: the module.
        module: the stand-in, which shares everything but holds only this rank's part of stacks over experts.
        given: the attributes of `module` when it was made.
        known: the names of its submodules and parameters when it was made.
        buffers: the buffers, by name, that are a part of the original's buffers.
        parts: the views of submodules.
    """

    original: nn.Module
    module: nn.Module
    given: dict[str, Any]
    known: frozenset[str]
    buffers: dict[str, Tensor]
    parts: Sequence[LocalView]

    def keep_changes(self) -> None:
        """Set on the original what a forward set on its view: attributes, buffers, and new submodules."""
        original, view = self.original, self.module
        for name, value in vars(view).items():
            if name not in REPLACED and value is not self.given.get(name, self):
                original.__dict__[name] = value
        for name in self.given.keys() - vars(view).keys():
            original.__dict__.pop(name, None)
        for name in (view._modules.keys() | view._parameters.keys()) - self.known:
            setattr(original, name, getattr(view, name))
        for name, buffer in view._buffers.items():
            part = self.buffers.get(name)
            if part is None:
                original._buffers[name] = buffer
            elif buffer is not part:  # the forward assigned another tensor
                with torch.no_grad():
                    part.copy_(buffer)  # type: ignore[arg-type]
        for below in self.parts:
            below.keep_changes()


# attributes of a view that differ from those of the original
REPLACED = ("_parameters", "_buffers", "_modules", "num_experts", "expert_dims")


def local_view(module: nn.Module, sharding: ExpertSharding) -> LocalView:
    """A view of a module as if it had this rank's experts only; nothing is copied."""
    view = _view_of_part(module, sharding, "")
    assert view is not None
    return view


def _view_of_part(module: nn.Module, sharding: ExpertSharding, prefix: str) -> LocalView | None:
    """A view of a module of the tree; None if nothing in it depends on the rank."""
    parts = {}
    for name, child in module._modules.items():
        part = None if child is None else _view_of_part(child, sharding, f"{prefix}{name}.")
        if part is not None:
            parts[name] = part
    shards = {
        name: _local_shard(parameter, sharding)
        for name, parameter in module._parameters.items()
        if parameter is not None and prefix + name in sharding.stacked
    }
    buffers = {
        name: _local_buffer(buffer, sharding)
        for name, buffer in module._buffers.items()
        if buffer is not None and prefix + name in sharding.stacked
    }
    sizes = _local_sizes(module, sharding)
    if prefix and not (parts or shards or buffers or sizes):
        return None
    modules = {name: part.module for name, part in parts.items()}
    cls = getattr(module, "local_class", type(module))
    changes = {"_parameters": {**module._parameters, **shards}, "_modules": {**module._modules, **modules}, **sizes}
    return make_view(module, cls, changes, buffers, list(parts.values()))


def make_view(
    module: nn.Module,
    cls: type[nn.Module],
    changes: Mapping[str, Any],
    buffers: dict[str, Tensor] | None = None,
    parts: Sequence[LocalView] = (),
) -> LocalView:
    """A view of `module`: an object of class `cls` with the same attributes, but for `changes` and `buffers`."""
    view = object.__new__(cls)
    # without partial buffers the view shares the dict of buffers, so that a buffer assigned in a graph stays
    changes = {**changes, "_buffers": {**module._buffers, **buffers}} if buffers else changes
    view.__dict__.update({**module.__dict__, **changes})
    known = frozenset((*view._modules, *view._parameters))
    return LocalView(module, view, {**view.__dict__}, known, buffers or {}, parts)


def _local_shard(parameter: Tensor, sharding: ExpertSharding) -> Tensor:
    return scale_gradient(parameter.to_local() if isinstance(parameter, DTensor) else parameter, sharding.factor)


def _local_buffer(buffer: Tensor, sharding: ExpertSharding) -> Tensor:
    """This rank's part of a buffer with an entry for each expert, which itself is whole on every rank."""
    each = sharding.local_dims[0]
    return buffer.narrow(0, sharding.mesh.get_local_rank() * each, each)


def _local_sizes(module: nn.Module, sharding: ExpertSharding) -> Mapping[str, Any]:
    """The attributes that tell the number of experts, with the numbers of one rank."""
    sizes = {}
    for name in ("num_experts", "expert_dims"):
        size = module.__dict__.get(name)
        if size == sharding.dims:
            sizes[name] = sharding.local_dims
        elif isinstance(size, int) and size == math.prod(sharding.dims):
            sizes[name] = math.prod(sharding.local_dims)
    return sizes
