"""Splits the inputs of a layer into groups of tokens, and joins the results.

Axes: b (groups), n (tokens per group), m (groups after a split), d (model dimension).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_experts.dispatch.segments import UNSIGNED
from mixture_of_experts.support.batch_invariance import call_module_batch_invariant
from mixture_of_experts.support.checks import check_mask, check_result, check_tokens, describe_shape
from mixture_of_experts.support.private_torch import unsafe_view

MAX_GROUP_SHRINKAGE = 16  # maximum ratio of the requested to the actual group size; larger ratios raise a ValueError


def mask_and_group(
    inputs: Tensor, mask: Tensor | None, dim: int, group_size: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check the arguments, set masked tokens to 0, and split the inputs into groups.

    Returns:
        The inputs with masked tokens set to zero, their groups `(b, n, d)`, and the grouped mask `(b, n)`, or None if
        there is no mask.
    """
    check_tokens("inputs", inputs, dim, min_ndim=2)
    x = inputs
    if mask is not None:
        check_mask(mask, inputs.shape[:-1])
        x = torch.where(mask.unsqueeze(-1), inputs, 0)  # multiplying by 0 would not remove NaN
    shape = (math.prod(inputs.shape[:-2]), inputs.shape[-2])  # `Size.numel` would make a dynamic length static
    if group_size is not None:
        shape = group_shape(shape[0] * shape[1], group_size)
        if 0 < MAX_GROUP_SHRINKAGE * shape[1] < group_size and shape[0] > 1:
            raise ValueError(
                f"group_size={group_size} would split {shape[0] * shape[1]} positions into groups of {shape[1]}, "
                f"because no closer size divides {shape[0] * shape[1]}; pad the input, or set group_size to a divisor"
            )
    return x, x.reshape(*shape, dim), None if mask is None else mask.reshape(shape)


def group_side_inputs(
    side: Mapping[str, Tensor | None], names: Collection[str], mask: Tensor | None, shape: Sequence[int], groups: Tensor
) -> dict[str, Tensor]:
    """Split side inputs into the same groups as the inputs, and set the entries of masked tokens to 0.

    Args:
        side: tensors `(..., n)` or `(..., n, anything)`, keyed by name, with one entry per token. None values are
            ignored.
        names: the names of the side inputs that the gates read.
        mask: `(..., n)` bool mask of the real tokens, or None.
        shape: the shape `(..., n)` of the inputs without the last dimension.
        groups: `(b, n, d)`, the grouped inputs.
    """
    if unknown := [repr(name) for name in side if name not in names]:
        known = f"it reads {', '.join(sorted(names))}" if names else "it reads none"
        raise TypeError(
            f"the gate does not support the side input {', '.join(unknown)}; {known}. To pass a mask, use mask="
        )
    grouped = {}
    for name, value in side.items():
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.shape[: len(shape)] != tuple(shape):
            wanted = ", ".join(map(str, shape))
            raise ValueError(
                f"{name} must have shape ({wanted}, ...), with one entry per token, got {describe_shape(value)}"
            )
        rest = value.shape[len(shape) :]
        if mask is not None:
            value = value.to(torch.int64) if value.dtype in UNSIGNED else value
            value = value.masked_fill(~mask.view(*mask.shape, *[1] * len(rest)), 0)
        grouped[name] = value.reshape(*groups.shape[:2], *rest)
    return grouped


def group_shape(num_positions: int, group_size: int) -> tuple[int, int]:
    """Return the number of groups m and their length n. m starts at `max(1, positions // group_size)` and is increased
    until it divides the number of positions. Warn if n is less than half of `group_size`.
    """
    groups = max(1, num_positions // group_size)
    length = num_positions // groups  # this is below 2 * group_size, so the search is short
    while length and num_positions % length:
        length -= 1
    groups = num_positions // length if length else groups
    if 0 < length < group_size / 2 and groups > 1 and not torch.compiler.is_compiling():
        warnings.warn(
            f"group_size={group_size} splits {num_positions} positions into {groups} groups of {length}, because no "
            f"closer size divides {num_positions}. Pad the input, or set group_size to a divisor",
            stacklevel=3,
        )
    return groups, length


def ungroup_and_add_shared(out: Tensor, x: Tensor, mask: Tensor | None, shared_expert: nn.Module | None) -> Tensor:
    """Convert the experts' outputs to the shape and dtype of the inputs `x`, and add the shared expert's output. Masked
    tokens are set to zero."""
    out = unsafe_view(out, (*x.shape[:-1], out.shape[-1])).to(x.dtype)
    if shared_expert is None:
        return out
    shared = check_result("shared_expert", call_module_batch_invariant(shared_expert, x), out.shape)
    out = (out + shared).to(x.dtype)
    return out if mask is None else torch.where(mask.unsqueeze(-1), out, 0)


def ungroup_state(state: Any, x: Tensor) -> Any:
    """Reshape a router's state `(b, n, ...)` to `(..., n, ...)` to match the leading dimensions of the inputs `x`.
    Return None if the state is None."""
    return None if state is None else state.reshape(*x.shape[:-1], *state.shape[2:])
