"""What this package asks of torch that torch does not promise: every private name, in one place.

Each stands here with the versions of torch on which it is tested: 2.10 to 2.13, and most on 2.15.
`tests/test_private_torch.py` says which of them a new version breaks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _python_dispatch

Function = TypeVar("Function", bound=Callable[..., Any])


def statically_known_true(condition: object) -> bool:
    """Whether a condition on sizes is true whatever the lengths are that a graph leaves open.

    Importing torch's own function takes most of a second, so it is asked only where a size may be a symbol.
    """
    if isinstance(condition, bool) and not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental import symbolic_shapes

    return symbolic_shapes.statically_known_true(condition)  # type: ignore[arg-type]


def exporting_flag() -> bool:
    """Whether `torch.export` traces. Before torch 2.13 `is_exporting()` of torch is True in every graph."""
    return torch.compiler._is_exporting_flag  # pyright: ignore[reportAttributeAccessIssue]


def functorch_active() -> bool:
    """Whether a transform of `torch.func` runs."""
    return torch._C._are_functorch_transforms_active()


def is_legacy_batched(tensor: Tensor) -> bool:
    """Whether it stands for many gradients at once, those of `is_grads_batched`."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor)  # pyright: ignore[reportAttributeAccessIssue]


def constant_in_graphs(function: Function) -> Function:
    """`torch.compiler.assume_constant_result` without the import of torch's compiler, which takes a second."""
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def own(x: Tensor, shape: Any) -> Tensor:
    """A tensor nobody else holds in another shape, not as a view for autograd.

    The caller may write `out += x`, which on a view fails after expert choice; and FSDP2 warns of modules that return
    views, because its hooks on them are lost then. torch's own products of more than two dimensions end so.
    """
    return torch.ops.aten._unsafe_view(x, shape)


def is_fake(tensor: Tensor) -> bool:
    """Whether it is a stand-in without numbers, as tracers and memory estimates use them."""
    from torch._subclasses import fake_tensor

    return fake_tensor.is_fake(tensor)


def is_wrapper_subclass(tensor: Tensor) -> bool:
    """Whether it is a tensor around other tensors, such as a DTensor."""
    return _python_dispatch.is_traceable_wrapper_subclass(tensor)


def without_dispatch_modes() -> AbstractContextManager[Any]:
    """Where no mode sees operators, such as that of selective activation checkpointing."""
    return _python_dispatch._disable_current_modes()


def all_reduce_sum(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of `value` over the ranks of a process group, as an operator that graphs can hold."""
    from torch.distributed._functional_collectives import all_reduce, wait_tensor

    return wait_tensor(all_reduce(value, "sum", group))


def find_process_group(name: str) -> dist.ProcessGroup | None:
    """The process group of that name in this process; None if there is none."""
    try:
        return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    except (LookupError, RuntimeError, ValueError):
        return None


def number_of_backward() -> int:
    """Of the backward that runs in this thread; -1 if none does."""
    return torch._C._current_graph_task_id()


#: where wrappers of torch and of PEFT keep the module that they are around
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "base_layer")


def wrapped_module(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper is around; None if it is no wrapper."""
    inner = (module._modules.get(name) for name in WRAPPED)
    return next((child for child in inner if child is not None), None)


def has_hooks(module: object) -> bool:
    """Whether hooks wait for a call of the module."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind, None) for kind in kinds)


def default_timeout(group: dist.ProcessGroup) -> timedelta:
    """What was given to `init_process_group`; groups that a mesh makes do not have it."""
    backend = dist.group.WORLD._get_backend(group._device_types[0])  # type: ignore[union-attr]
    return backend.options._timeout


def set_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """How long the ranks of a process group wait for each other. torch 2.15 has a public function for it."""
    public = getattr(dist.distributed_c10d, "set_timeout", None)
    if public is not None:
        public(timeout, group)
    else:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def store_of_job() -> dist.Store:
    """Through which the processes of the default process group found each other."""
    return dist.distributed_c10d._get_default_store()


def all_to_all(x: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows to the ranks of a process group and from them, differentiable, and an operator that graphs can hold."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_to_all_single

    result = all_to_all_single(x, receive, send, group)
    return result.wait() if isinstance(result, AsyncCollectiveTensor) else result


def local_part(tensor: Any) -> Tensor:
    """This rank's part of a DTensor, which shares memory with it."""
    return tensor._local_tensor


def ignore_in_ddp(model: nn.Module, names: Iterable[str]) -> None:
    """Have `DistributedDataParallel(model)` leave parameters and buffers of these names alone, beside those before."""
    ignored = {*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *names}
    model._ddp_params_and_buffers_to_ignore = sorted(ignored)  # type: ignore[assignment]
