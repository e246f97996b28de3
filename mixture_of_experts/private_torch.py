"""What this package asks of torch that torch does not promise: every private name, in one place.

Each stands here with the versions of torch on which it is tested: 2.10 to 2.13. `tests/test_private_torch.py` says
which of them a new version breaks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

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
