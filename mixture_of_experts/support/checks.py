"""Checks arguments. Each check returns a valid value, or raises an error that states what is allowed and what to do."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Word = TypeVar("Word")
ModelT = TypeVar("ModelT", bound=nn.Module)


def check_size(name: str, value: object) -> int:
    """Check that a value is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}; pass a positive int")
    return int(value)  # the value may be a numpy integer


def check_optional_size(name: str, value: object) -> int | None:
    """Check that a value is a positive integer or None."""
    return None if value is None else check_size(name, value)


def check_sizes(name: str, value: object) -> tuple[int, ...]:
    """Check that a value is a positive integer or a tuple of positive integers, and return a tuple."""
    sizes = value if isinstance(value, tuple | list) else (value,)
    return tuple(check_size(name, size) for size in sizes)


def check_choice(name: str, value: Word, allowed: Collection[Any]) -> Word:
    """Check that a value is one of the allowed strings."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def check_number(
    name: str, value: Any, *, above: float | None = None, at_least: float | None = None, below: float | None = None
) -> float:
    """Check that a value is a finite number within optional bounds."""
    bound = f" above {above}" if above is not None else f" of at least {at_least}" if at_least is not None else ""
    bound += "" if below is None else f" and below {below}"
    good = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    value = float(value) if good and not isinstance(value, int) else value  # the value may be a numpy number
    if good:
        good = (above is None or value > above) and (at_least is None or value >= at_least)
        good = good and (below is None or value < below)
    if not good:
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")
    return value


def check_flag(name: str, value: Any) -> bool:
    """Check that a value is True or False."""
    if type(value).__name__ not in ("bool", "bool_"):  # the numpy type is named bool_
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_dtype(name: str, value: Any) -> torch.dtype | None:
    """Check that a value is a floating-point dtype or None."""
    if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
        raise TypeError(f"{name} must be a floating-point torch.dtype such as torch.float32, or None, got {value!r}")
    return value


def check_model(name: str, value: Any) -> nn.Module:
    """Check that a value is an `nn.Module`."""
    if not isinstance(value, nn.Module):
        got = " ".join(repr(value).split())
        raise TypeError(f"{name} must be a model (an nn.Module), got {got:.99}; construct or load it first")
    return value


def check_process_group(name: str, value: Any) -> Any:
    """Check that a value is a process group or None."""
    if value is not None and not (dist.is_available() and isinstance(value, dist.ProcessGroup)):
        raise TypeError(
            f"{name} must be a torch.distributed.ProcessGroup that contains this rank, or None, got {value!r}; for a "
            "DeviceMesh, pass mesh.get_group()"
        )
    return value


def check_coefs(name: str, value: Any, dedicated: Mapping[str, str]) -> dict[str, float]:
    """Check that a value is a dict of coefficients, keyed by name. Names in `dedicated` are rejected, because their
    coefficients have separate arguments."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(
            f'{name} must be a dict that maps names to coefficients, such as {{"entropy": 0.01}}, got {value!r}'
        )
    for key in value:
        if key in dedicated:
            raise ValueError(f"{name} must not contain {key!r}; set {dedicated[key]} instead")
    return {key: check_number(f"{name}[{key!r}]", coef, at_least=0.0) for key, coef in value.items()}


def check_tokens(name: str, x: Tensor, dim: int, min_ndim: int) -> None:
    """Check that a value is a dense floating-point tensor `(..., n, dim)`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of shape (..., n, {dim}), got {type(x).__name__}")
    if x.is_nested or x.layout is not torch.strided:
        remedy = "to_padded_tensor(0.0), and a mask= that is True for real tokens" if x.is_nested else "to_dense()"
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}; pass {name}.{remedy}")
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace is not supported, because it would fix the capacity and length to those of the example "
            "input; use torch.export.export, or torch.onnx.export with dynamo=True"
        )
    if x.ndim < min_ndim or x.shape[-1] != dim:
        wanted = ", ".join(["..."] if min_ndim == 2 else ["..."] + ["b"] * (min_ndim > 2))
        raise ValueError(
            f"{name} must have shape ({wanted}, n, {dim}), got {tuple(x.shape)}; "
            f"the last dimension is the model dimension dim={dim}"
        )
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}; embed or cast the tokens first")


def check_tensors(**values: Any) -> None:
    """Check that all named arguments are tensors."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {value!r}; convert numbers with torch.as_tensor")


def check_devices(owner: str, tokens: Tensor, weights: Iterable[Tensor]) -> None:
    """Check that the tokens and the weights of `owner` are on devices of the same type. Torch does not immediately
    reject operations that mix the meta device with other devices, and raises an error later or not at all."""
    for weight in weights:
        if tokens.device.type != weight.device.type:
            raise ValueError(
                f"{owner} must be on the same device as the tokens ({tokens.device}), got {weight.device}; move one of "
                "them"
            )


def check_mask(mask: Tensor, shape: torch.Size, name: str = "mask") -> None:
    """Check that a mask is a boolean tensor with one entry per token."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{name} must be a boolean tensor that is True for real tokens, got {kind}; "
            "pass mask.bool(), or its inverse if your mask is True at padding"
        )
    if mask.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, with one entry per token, got {tuple(mask.shape)}")


def check_importance(importance: Tensor, shape: torch.Size) -> None:
    """Check that `importance` is a floating-point tensor with one entry per token."""
    if not isinstance(importance, Tensor) or not importance.is_floating_point():
        kind = importance.dtype if isinstance(importance, Tensor) else type(importance).__name__
        raise TypeError(f"importance must be a floating-point tensor whose elements are 0, 0.5 or 1, got {kind}")
    if importance.shape != shape:
        raise ValueError(
            f"importance must have shape {tuple(shape)}, with one entry per token, got {tuple(importance.shape)}"
        )


def check_lengths(lengths: Tensor, shape: torch.Size) -> Tensor:
    """Check that `lengths` is an integer tensor that contains the number of tokens in each group."""
    if lengths.is_floating_point() or lengths.shape != shape:
        raise ValueError(
            f"length must be an integer tensor of shape {tuple(shape)} with the number of tokens in each group, got "
            f"{lengths.dtype} of shape {tuple(lengths.shape)}; for fractional lengths, pass a "
            "mixture_of_experts.dispatch.capacity.Length"
        )
    return lengths


def check_result(name: str, result: Any, shape: tuple[int, ...], remedy: str = "") -> Tensor:
    """Check that a module returned a tensor of the given shape."""
    if isinstance(result, Tensor) and result.shape == shape:
        return result
    raise ValueError(f"{name} must return a tensor of shape {tuple(shape)}, got {describe_shape(result)}{remedy}")


def describe_shape(result: Any) -> str:
    """Return a tensor's shape, or the type of any other value, for use in an error message."""
    if isinstance(result, Tensor):
        return str(tuple(result.shape))
    remedy = " (wrap an MoE, which also returns its loss, in OutputOnly)"
    return f"a {type(result).__name__}{remedy if isinstance(result, tuple) else ''}"
