"""All private modules, classes and functions of torch that this package uses. Torch may change them at any time.

Private attributes of `nn.Module`, such as `_modules`, are used directly elsewhere. All private names are tested with
torch 2.10 to 2.13, and most of them with 2.15. `tests/test_private_torch.py` shows which of them a new version breaks.
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
    """Return whether a condition on sizes is true for all dynamic lengths of a traced graph.

    The function of torch is imported only if a size may be a symbol, because the import takes most of a second.
    """
    if isinstance(condition, bool) and not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental import symbolic_shapes

    return symbolic_shapes.statically_known_true(condition)  # type: ignore[arg-type]


def is_exporting() -> bool:
    """Return whether `torch.export` is tracing. Before torch 2.13, `torch.compiler.is_exporting()` is True in all
    graphs."""
    return torch.compiler._is_exporting_flag  # pyright: ignore[reportAttributeAccessIssue]


def is_in_transform() -> bool:
    """Return whether a transform of `torch.func` (vmap, grad, ...), in which values cannot be read, is running outside
    of a traced graph."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_in_forward_mode() -> bool:
    """Return whether forward-mode derivatives (`torch.func.jvp`, `torch.autograd.forward_ad`) are computed outside of a
    traced graph, where a `torch.autograd.Function` with only a backward raises an error."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def is_functorch_wrapped(tensor: Tensor) -> bool:
    """Return whether a tensor may represent a batch of tensors, in a transform or as gradients with
    `is_grads_batched`."""
    if torch.compiler.is_compiling():
        return False
    many = torch._C._functorch.is_legacy_batchedtensor  # pyright: ignore[reportAttributeAccessIssue]
    return torch._C._are_functorch_transforms_active() or many(tensor)


def assume_constant_result(function: FunctionT) -> FunctionT:
    """Do the same as `torch.compiler.assume_constant_result`, without importing torch's compiler, which takes a
    second."""
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


assume_constant_result(load_bundled_providers)  # traced graphs cannot import modules


def unsafe_view(x: Tensor, shape: Any) -> Tensor:
    """Reshape a tensor that has no other references, so that the result is not a view for autograd.

    Callers may then write `out += x`, which fails on a view after expert choice. FSDP2 warns about modules that return
    views, because its hooks on views are lost. torch's own products of more than two dimensions end with this operator.
    """
    return torch.ops.aten._unsafe_view(x, shape)


def is_fake_tensor(tensor: Tensor) -> bool:
    """Return whether the tensor is a fake tensor without data, as used by tracers and memory estimates."""
    from torch._subclasses import fake_tensor

    return fake_tensor.is_fake(tensor)


def is_wrapper_subclass(tensor: Tensor) -> bool:
    """Return whether the tensor wraps other tensors, like a DTensor."""
    return _python_dispatch.is_traceable_wrapper_subclass(tensor)


def disable_dispatch_modes() -> AbstractContextManager[Any]:
    """Return a context in which modes, such as that of selective activation checkpointing, do not see operators."""
    return _python_dispatch._disable_current_modes()


def register_flop_formula(operator: Any, formula: Callable[..., int]) -> None:
    """Register the FLOP formula of an operator with all active counters of this thread that do not have it.

    torch's `register_flop_formula` would register it for all counters, but importing its module imports Triton, which
    takes a sixth of the time of importing torch.
    """
    if torch.compiler.is_compiling():
        return
    modes: list[Any] = _python_dispatch._get_current_dispatch_mode_stack()
    for mode in modes:
        if type(mode).__name__ == "_FlopCounterMode":
            mode.counter.flop_registry.setdefault(operator, formula)


def register_dataclass(cls: type, name: str, exported_names: Mapping[str, str]) -> None:
    """Register a dataclass as a pytree, like `torch.export.register_dataclass`, but with different names of fields in
    exported programs.

    Args:
        cls: the dataclass.
        name: name of its type in exported programs.
        exported_names: names of fields in exported programs, for fields whose name differs.
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
    """Raise RuntimeError if `condition` (0-dim bool) is False when a traced graph runs. On a GPU, this takes no
    sync."""
    torch._assert_async(condition, message)


def get_function_modes() -> list[Any]:
    """Return the active torch function modes of this thread. The last one sees a call first."""
    return overrides._get_current_function_mode_stack()


def all_reduce_sum(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum `value` over the ranks of a process group with an operator that graphs can contain."""
    from torch.distributed._functional_collectives import all_reduce, wait_tensor

    return wait_tensor(all_reduce(value, "sum", group))


def find_process_group(name: str) -> dist.ProcessGroup | None:
    """Return the process group with this name in this process, or None if there is none."""
    try:
        return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    except (LookupError, RuntimeError, ValueError):
        return None


def get_backward_id() -> int:
    """Return the id of the backward that is running in this thread, or -1 if there is none."""
    return torch._C._current_graph_task_id()


#: attributes in which wrappers of torch store the wrapped module
WRAPPER_ATTRIBUTES = ("_orig_mod", "_checkpoint_wrapped_module")


def get_wrapped_module(module: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper of torch or of a library with a provider, or None if the module is not a
    wrapper."""
    children: Any = module._modules
    if not children:
        return None
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return children["module"]
    inner = next((child for name in WRAPPER_ATTRIBUTES if (child := children.get(name)) is not None), None)
    return ask_providers(module, lambda provider: provider.get_wrapped_module(module)) if inner is None else inner


def unwrap_module(module: nn.Module) -> nn.Module:
    """Return the module without its wrappers."""
    while (inner := get_wrapped_module(module)) is not None:
        module = inner
    return module


def get_original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before FSDP2 or parametrizations replaced it by a generated class."""
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
    """Context manager in which the modules of a model run without `torch.compile`, so that hooks are called.

    Other models are not affected, unlike with `torch.compiler.set_stance`, which applies to the whole process.
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
    """Set a forward pre-hook `(module, args, kwargs)`, and a forward hook that is also called after an error, with a
    fixed name.

    Torch numbers hooks from 0 in each process, so that a new hook would replace a hook with the same number in an
    unpickled module.
    """
    hooks: Any = module
    hooks._forward_pre_hooks[name], hooks._forward_hooks[name] = before, after
    hooks._forward_pre_hooks_with_kwargs[name] = hooks._forward_hooks_always_called[name] = True


def set_load_hook(module: nn.Module, name: str, before: Callable[..., Any]) -> None:
    """Set a pre-hook `(module, state_dict, prefix, ...)` of `load_state_dict` with a fixed name.

    It holds a weak reference to the module, because a reference cycle would keep a deleted model in memory until the
    next garbage collection.
    """
    module._load_state_dict_pre_hooks[name] = _WrappedHook(before, module)  # pyright: ignore[reportArgumentType]


#: attributes in which a module stores its forward and backward hooks, and the flags of these hooks
CALL_HOOKS = (*HOOK_TABLES, "_backward_hooks", "_backward_pre_hooks")
#: attributes in which a module stores its state-dict hooks, which depend on the names and shapes of its tensors
STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Move the forward and backward hooks of a module to the module that replaces it. Both modules share the same
    tables, so that handles of hooks remove them from the new module."""
    for table in CALL_HOOKS:
        hooks = getattr(old, table)
        hooks.update(getattr(new, table))
        setattr(new, table, hooks)
    new._is_full_backward_hook = old._is_full_backward_hook


def replacement_problem(module: nn.Module) -> str | None:
    """Return a description of what would be lost if another module replaced this one, or None. Forward and backward
    hooks are not lost, because `move_hooks` moves them."""
    if any(getattr(module, table) for table in STATE_HOOKS):
        return "has state-dict hooks, which depend on the names and shapes of its weights; remove them first"
    if vars(module).get("_compiled_call_impl") is not None:
        return "is compiled by its method compile(); compile experts afterwards"
    return None


def set_first_hook(module: nn.Module, name: str, after: Callable[..., Any]) -> None:
    """Set a forward hook with a fixed name unless it is already set. It runs before all other hooks, and before FSDP2
    reshards the parameters of the module."""
    hooks: Any = module._forward_hooks
    if name not in hooks:
        hooks[name] = after
        hooks.move_to_end(name, last=False)


def has_hooks(module: object) -> bool:
    """Return whether the module has forward or backward hooks."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind, None) for kind in kinds)


def all_to_all(x: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup) -> Tensor:
    """Exchange rows between the ranks of a process group with a differentiable operator that graphs can contain."""
    from torch.distributed._functional_collectives import all_to_all_single, wait_tensor

    return wait_tensor(all_to_all_single(x, receive, send, group))


def sum_packed_rows(packed: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Return weighted sums `(s, q)` of rows of an 8-bit table `(n, q + 8)` on a CPU, in float32.

    Args:
        indices: `(m,)` int64, indices of rows in the order of the sums.
        offsets: `(s,)` int64, start of each sum in `indices`.
        weights: `(m,)` float32, which must be contiguous, because the operator ignores strides.
    """
    assert weights.is_contiguous()
    rows = torch.ops.quantized.embedding_bag_byte_rowwise_offsets
    return rows(packed, indices, offsets, False, 0, False, weights, None, False)


def unpack_rows(packed: Tensor) -> Tensor:
    """Return the values `(n, q)` of an 8-bit table `(n, q + 8)` on a CPU, in float32."""
    return torch.ops.quantized.embedding_bag_byte_unpack(packed)


def pack_int4(levels: Tensor) -> Tensor:
    """Pack levels `(q, p)` int32 from 0 to 15 into bytes `(q, p / 2)`, in an order that depends on the CPU."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.contiguous(), 1)


def multiply_int4(x: Tensor, packed: Tensor, group: int, scales_and_zeros: Tensor) -> Tensor:
    """Multiply x `(r, p)` by `(level - 8) * step + zero` `(p, q)` on a CPU in bfloat16, and return `(r, q)`.

    Args:
        packed: the result of `pack_int4`, in any shape.
        group: number of adjacent inputs that share step and zero.
        scales_and_zeros: step and zero `(p / group, q, 2)`.
    """
    packed = packed.view(scales_and_zeros.shape[1], -1)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scales_and_zeros)


@assume_constant_result
def has_native_matmul(dtype: torch.dtype) -> bool:
    """Return whether the CPU has native products of this dtype, so that torch computes them as fast as float32
    products. CPUs other than x86 are assumed to support all dtypes."""
    if dtype not in (torch.bfloat16, torch.float16) or platform.machine() not in ("x86_64", "AMD64"):
        return True
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cpu._is_amx_fp16_supported()


def ignore_in_ddp(model: nn.Module, names: Iterable[str]) -> None:
    """Make `DistributedDataParallel(model)` ignore these parameters and buffers in addition to those that it already
    ignores."""
    ignored = {*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *names}
    model._ddp_params_and_buffers_to_ignore = sorted(ignored)  # type: ignore[assignment]


def is_in_ddp() -> bool:
    """Return whether the forward of a `DistributedDataParallel` is running. Graphs that call this function are retraced
    in another DDP, because of the guard that `id` installs."""
    ddp = nn.parallel.DistributedDataParallel._active_ddp_module
    return ddp is not None and id(ddp) != 0


def exclude_from_ddp_broadcast(endings: Collection[str], traced: bool) -> list[str]:
    """Exclude buffers whose last name is one of `endings` from the broadcasts of a running `DistributedDataParallel`,
    so that it no longer copies them from the first rank before its next forwards.

    Returns:
        The names of buffers that cannot be excluded, because all ranks must exclude the same buffers, and a rank may
        not reach the call of this function. This happens if parameters may be unused, or if ranks have different
        numbers of inputs. Before torch 2.13 it also happens if a graph is `traced`, because a graph that was traced
        outside of DDP is not retraced on all ranks.
    """
    ddp: Any = nn.parallel.DistributedDataParallel._active_ddp_module
    if ddp is None or not ddp.broadcast_buffers or ddp.process_group.size() == 1:
        return []
    names = [name for name in ddp.named_module_buffers if name.rpartition(".")[2] in endings]
    if ddp.find_unused_parameters or ddp._join_config.enable or (traced and TorchVersion(torch.__version__) < "2.13"):
        return names
    ddp.parameters_to_ignore = {*ddp.parameters_to_ignore, *names}
    ddp._assign_modules_buffers()  # without this, DDP would fail if no buffers are left to copy
    return []
