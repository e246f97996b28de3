"""Contains all uses of private torch modules, classes and functions in this package. Torch may change these names at
any time.

Private attributes of `nn.Module`, such as `_modules`, are also used directly in other files. All private names are
tested with torch 2.10 to 2.13, and most of them with 2.15. `tests/test_private_torch.py` shows which private names a
new torch version breaks.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn, overrides
from torch.autograd import forward_ad
from torch.nn.modules.module import _WrappedHook
from torch.torch_version import TorchVersion
from torch.utils import _python_dispatch, _pytree

from mixture_of_experts.providers import ask_providers, load_bundled_providers
from mixture_of_experts.support.attachments import HOOK_TABLES

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def statically_known_true(condition: object) -> bool:
    """Return whether a condition on sizes is true for all dynamic lengths in a traced graph.

    The torch function is imported only if a size may be symbolic, because the import takes most of a second.
    """
    if isinstance(condition, bool) and not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental import symbolic_shapes

    return symbolic_shapes.statically_known_true(condition)  # type: ignore[arg-type]


def is_exporting() -> bool:
    """Return whether `torch.export` is tracing. Before torch 2.13, `torch.compiler.is_exporting()` returns True in all
    graphs."""
    return torch.compiler._is_exporting_flag  # pyright: ignore[reportAttributeAccessIssue]


def is_in_transform() -> bool:
    """Return whether a `torch.func` transform (such as vmap or grad) is running outside of a traced graph. Tensor
    values cannot be read inside a transform."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_in_forward_mode() -> bool:
    """Return whether forward-mode AD (`torch.func.jvp` or `torch.autograd.forward_ad`) is active outside of a traced
    graph. In this mode, a `torch.autograd.Function` that defines only a backward formula raises an error."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def is_functorch_wrapped(tensor: Tensor) -> bool:
    """Return whether a tensor may represent a batch of tensors, either in a `torch.func` transform or as a gradient
    with `is_grads_batched`."""
    if torch.compiler.is_compiling():
        return False
    many = torch._C._functorch.is_legacy_batchedtensor  # pyright: ignore[reportAttributeAccessIssue]
    return torch._C._are_functorch_transforms_active() or many(tensor)


def assume_constant_result(function: FunctionT) -> FunctionT:
    """Equivalent to `torch.compiler.assume_constant_result`, but does not import torch's compiler, which takes a
    second."""
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


assume_constant_result(load_bundled_providers)  # traced graphs cannot import modules


def unsafe_view(x: Tensor, shape: Any) -> Tensor:
    """Reshape a tensor that has no other references. For autograd, the result is not a view.

    Callers can therefore use `out += x`, which would fail on a view after expert choice. FSDP2 warns about modules that
    return views, because its hooks on views are lost. Torch's own matrix products with more than two dimensions also
    end with `_unsafe_view`.
    """
    # without gradients, autograd records no views, and using fewer kinds of operators makes decoding faster
    if not torch.is_grad_enabled():
        return x.view(shape)
    return torch.ops.aten._unsafe_view.default(x, shape)


def is_fake_tensor(tensor: Tensor) -> bool:
    """Return whether a tensor is a fake tensor without data, as used in tracing and memory estimation."""
    from torch._subclasses import fake_tensor

    return fake_tensor.is_fake(tensor)


def is_wrapper_subclass(tensor: Tensor) -> bool:
    """Return whether a tensor wraps other tensors, as DTensor does."""
    return _python_dispatch.is_traceable_wrapper_subclass(tensor)


def disable_dispatch_modes() -> AbstractContextManager[Any]:
    """Return a context in which operators bypass all dispatch modes, such as the mode for selective activation
    checkpointing."""
    return _python_dispatch._disable_current_modes()


def register_flop_formula(operator: Any, formula: Callable[..., int]) -> None:
    """Register an operator's FLOP formula with all active counters in this thread that have no formula for it.

    Torch's `register_flop_formula` would register the formula for all counters. However, importing its module imports
    Triton, which takes one sixth as long as importing torch.
    """
    if torch.compiler.is_compiling():
        return
    modes: list[Any] = _python_dispatch._get_current_dispatch_mode_stack()
    for mode in modes:
        if type(mode).__name__ == "_FlopCounterMode":
            mode.counter.flop_registry.setdefault(operator, formula)


def register_dataclass(cls: type, name: str, exported_names: Mapping[str, str]) -> None:
    """Register a dataclass as a pytree, like `torch.export.register_dataclass`, but allow different field names in
    exported programs.

    Args:
        cls: the dataclass to register.
        name: name of the type in exported programs.
        exported_names: a mapping from fields to their names in exported programs, for fields whose names differ.
    """
    fields = [field.name for field in dataclasses.fields(cls)]
    field_names = {exported_names.get(field, field): field for field in fields}

    def flatten(value: Any) -> tuple[list[Any], list[list[str]]]:
        present = [field for field in fields if getattr(value, field) is not None]
        missing = [field for field in fields if getattr(value, field) is None]
        return [getattr(value, field) for field in present], [present, missing]

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], Any]:
        values, context = flatten(value)
        return [(_pytree.GetAttrKey(name), part) for name, part in zip(context[0], values, strict=True)], context

    def unflatten(values: Iterable[Any], context: list[list[str]]) -> Any:
        present, missing = context
        return cls(**dict(zip(present, values, strict=True)), **dict.fromkeys(missing))

    def rename(context: Any, names: Mapping[str, str]) -> list[list[str]]:
        return [[names.get(name, name) for name in part] for part in context]

    _pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=name,
        to_dumpable_context=lambda context: json.dumps(rename(context, exported_names)),
        from_dumpable_context=lambda text: rename(json.loads(text), field_names),
        flatten_with_keys_fn=flatten_with_keys,
    )


def assert_in_graph(condition: Tensor, message: str) -> None:
    """Raise a RuntimeError if `condition` (a 0-dimensional bool tensor) is False when a traced graph runs. On a GPU,
    this check does not synchronize."""
    torch._assert_async(condition, message)


def get_function_modes() -> list[Any]:
    """Return the torch function modes that are active in this thread. The last mode in the list intercepts each call
    first."""
    return overrides._get_current_function_mode_stack()


def all_reduce_sum(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum `value` over the ranks of a process group, using an operator that can be captured in graphs."""
    from torch.distributed._functional_collectives import all_reduce, wait_tensor

    return wait_tensor(all_reduce(value, "sum", group))


def find_process_group(name: str) -> dist.ProcessGroup | None:
    """Return the process group with the given name, or None if this process has no such group."""
    try:
        return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    except (LookupError, RuntimeError, ValueError):
        return None


def get_backward_id() -> int:
    """Return the id of the backward pass that is running in this thread, or -1 if there is none."""
    return torch._C._current_graph_task_id()


#: attributes in which torch wrappers store the wrapped module
WRAPPER_ATTRIBUTES = ("_orig_mod", "_checkpoint_wrapped_module")


def get_wrapped_module(module: nn.Module) -> nn.Module | None:
    """Return the module that a wrapper contains, or None if the module is not a wrapper. Wrappers from torch and from
    libraries that have a provider are recognized."""
    children: Any = module._modules
    if not children:
        return None
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return children["module"]
    inner = next((child for name in WRAPPER_ATTRIBUTES if (child := children.get(name)) is not None), None)
    return ask_providers(module, lambda provider: provider.get_wrapped_module(module)) if inner is None else inner


def is_checkpoint_wrapper(module: nn.Module) -> bool:
    """Return whether a module is torch's wrapper for activation checkpointing."""
    return (
        get_original_class(module).__name__ == "CheckpointWrapper" and "_checkpoint_wrapped_module" in module._modules
    )


def unwrap_module(module: nn.Module) -> nn.Module:
    """Return the module without its wrappers."""
    while (inner := get_wrapped_module(module)) is not None:
        module = inner
    return module


def get_original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before FSDP2 or parametrizations replaced it with a generated class."""
    kind = type(module)
    while True:
        first, *rest = kind.__bases__
        if rest and first.__name__ in ("FSDPModule", "ReplicateModule"):
            kind = rest[0]
        elif "parametrizations" in module._modules and kind.__name__ == f"Parametrized{first.__name__}":
            kind = first
        else:
            return kind


@contextmanager
def disable_compilation(model: nn.Module) -> Iterator[None]:
    """Context manager that runs a model's modules without `torch.compile`, so that their hooks are called.

    This context manager does not affect other models, whereas `torch.compiler.set_stance` applies to the whole process.
    """
    compiled: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = []
    for module in model.modules():
        own, forward = vars(module), module.forward
        while (plain := getattr(forward, "_torchdynamo_orig_callable", None)) is not None:
            forward = MethodType(plain, module) if isinstance(forward, MethodType) else plain
        changes = {} if forward == module.forward else {"forward": forward}
        changes |= {} if own.get("_compiled_call_impl") is None else {"_compiled_call_impl": None}
        if changes:
            compiled.append((own, changes, {name: own[name] for name in changes if name in own}))
            own |= changes
    try:
        yield
    finally:
        for own, changes, before in compiled:
            for name in changes:
                del own[name]
            own |= before


def register_named_hooks(module: nn.Module, name: str, before: Callable[..., Any], after: Callable[..., Any]) -> None:
    """Register a forward pre-hook `(module, args, kwargs)` and a forward hook under a fixed name. The forward hook is
    also called after an error.

    Torch numbers hooks from 0 in each process, so a newly registered hook would replace a hook with the same number in
    an unpickled module.
    """
    hooks: Any = module
    hooks._forward_pre_hooks[name], hooks._forward_hooks[name] = before, after
    hooks._forward_pre_hooks_with_kwargs[name] = hooks._forward_hooks_always_called[name] = True


def set_load_hook(module: nn.Module, name: str, before: Callable[..., Any]) -> None:
    """Register a `load_state_dict` pre-hook `(module, state_dict, prefix, ...)` under a fixed name.

    The hook holds a weak reference to the module, because a reference cycle would keep a deleted model in memory until
    the next garbage collection.
    """
    module._load_state_dict_pre_hooks[name] = _WrappedHook(before, module)  # pyright: ignore[reportArgumentType]


#: attributes that store a module's forward and backward hooks, and hook flags
CALL_HOOKS = (*HOOK_TABLES, "_backward_hooks", "_backward_pre_hooks")
#: attributes that store a module's state-dict hooks, which depend on the names and shapes of its tensors
STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Move a module's forward and backward hooks to the module that replaces it. Both modules share the same hook
    tables, so existing handles remove hooks from the new module."""
    for table in CALL_HOOKS:
        hooks = getattr(old, table)
        hooks.update(getattr(new, table))
        setattr(new, table, hooks)
    new._is_full_backward_hook = old._is_full_backward_hook


def replacement_problem(module: nn.Module) -> str | None:
    """Return what would be lost if a module were replaced by another one, or None if nothing would be lost. Forward and
    backward hooks are not lost, because `move_hooks` moves them."""
    if any(getattr(module, table) for table in STATE_HOOKS):
        return "has state-dict hooks, which depend on the names and shapes of its weights; remove them first"
    if vars(module).get("_compiled_call_impl") is not None:
        return "is compiled by its method compile(); compile experts afterwards"
    return None


def set_first_hook(module: nn.Module, name: str, after: Callable[..., Any]) -> None:
    """Register a forward hook under a fixed name, unless it is already registered. The hook runs before all other
    hooks, and before FSDP2 reshards the module's parameters."""
    hooks: Any = module._forward_hooks
    if name not in hooks:
        hooks[name] = after
        hooks.move_to_end(name, last=False)


def has_hooks(module: object) -> bool:
    """Return whether the module has forward or backward hooks."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind, None) for kind in kinds)


def all_to_all(x: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup) -> Tensor:
    """Exchange rows between the ranks of a process group, using a differentiable operator that can be captured in
    graphs."""
    from torch.distributed._functional_collectives import all_to_all_single, wait_tensor

    return wait_tensor(all_to_all_single(x, receive, send, group))


def sum_packed_rows(packed: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Return weighted sums `(s, q)` of rows from an 8-bit table `(n, q + 8)` on a CPU. The sums are in float32.

    Args:
        indices: `(m,)` int64, the concatenated row indices of all sums.
        offsets: `(s,)` int64, the start of each sum in `indices`.
        weights: `(m,)` float32. The weights must be contiguous, because the operator ignores strides.
    """
    assert weights.is_contiguous()
    rows = torch.ops.quantized.embedding_bag_byte_rowwise_offsets
    return rows(packed, indices, offsets, False, 0, False, weights, None, False)


def unpack_rows(packed: Tensor) -> Tensor:
    """Return the float32 values `(n, q)` of an 8-bit table `(n, q + 8)` on a CPU."""
    return torch.ops.quantized.embedding_bag_byte_unpack(packed)


def pack_int4(levels: Tensor) -> Tensor:
    """Pack int32 levels `(q, p)` from 0 to 15 into bytes `(q, p / 2)`. The packing order depends on the CPU."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.contiguous(), 1)


def multiply_int4(x: Tensor, packed: Tensor, group: int, scales_and_zeros: Tensor) -> Tensor:
    """Multiply x `(r, p)` by a packed weight in bfloat16 on a CPU, and return `(r, q)`. The weight `(p, q)` is `(level
    - 8) * step + zero`.

    Args:
        packed: the result of `pack_int4`, in any shape.
        group: number of adjacent inputs that share a step and a zero.
        scales_and_zeros: the steps and zeros, `(p / group, q, 2)`.
    """
    packed = packed.view(scales_and_zeros.shape[1], -1)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scales_and_zeros)


@assume_constant_result
def has_native_matmul(dtype: torch.dtype) -> bool:
    """Return whether the CPU natively supports matrix products in the given dtype, so that torch computes them as fast
    as in float32. Non-x86 CPUs are assumed to support all dtypes."""
    if dtype not in (torch.bfloat16, torch.float16) or platform.machine() not in ("x86_64", "AMD64"):
        return True
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cpu._is_amx_fp16_supported()


def ignore_in_ddp(model: nn.Module, names: Iterable[str]) -> None:
    """Make `DistributedDataParallel(model)` ignore the given parameters and buffers, in addition to any that it already
    ignores."""
    ignored = {*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *names}
    model._ddp_params_and_buffers_to_ignore = sorted(ignored)  # type: ignore[assignment]


def is_in_ddp() -> bool:
    """Return whether the forward pass of a `DistributedDataParallel` module is running. Graphs that call this function
    are retraced when they run in another DDP module, because `id` installs a guard."""
    ddp = nn.parallel.DistributedDataParallel._active_ddp_module
    return ddp is not None and id(ddp) != 0


def exclude_from_ddp_broadcast(endings: Collection[str], traced: bool) -> list[str]:
    """Exclude buffers whose last name component is in `endings` from the broadcasts of the running
    `DistributedDataParallel` module. DDP then no longer copies these buffers from the first rank before a forward pass.

    Returns:
        The names of the buffers that cannot be excluded. A buffer can only be excluded if all ranks exclude it, but
        some ranks may not call this function. Buffers cannot be excluded if parameters may be unused, or if ranks have
        different numbers of inputs. Before torch 2.13, buffers also cannot be excluded while a graph is being traced,
        because a graph traced outside of DDP is not retraced on all ranks.
    """
    ddp: Any = nn.parallel.DistributedDataParallel._active_ddp_module
    if ddp is None or not ddp.broadcast_buffers or ddp.process_group.size() == 1:
        return []
    names = [name for name in ddp.named_module_buffers if name.rpartition(".")[2] in endings]
    if ddp.find_unused_parameters or ddp._join_config.enable or (traced and TorchVersion(torch.__version__) < "2.13"):
        return names
    ddp.parameters_to_ignore = {*ddp.parameters_to_ignore, *names}
    ddp._assign_modules_buffers()  # without this call, DDP would fail if no buffers are left to copy
    return []
