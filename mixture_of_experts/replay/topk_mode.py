"""Records or replaces the choices of external blocks by intercepting their calls to `torch.topk`.

The block's own code continues to compute the weights from live scores.

Axes: t (tokens), e (experts), g (expert groups), k (choices per token).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mixture_of_experts.gating.overrides import KEEP_ROUTER_CHOICE
from mixture_of_experts.replay.sequences import RoutingPoint
from mixture_of_experts.support.private_torch import get_function_modes


class TopkMode(TorchFunctionMode):
    """A function mode that intercepts calls to `torch.topk` in a block's forward pass.

    Args:
        point: the routing point of the block.
        choices: the choices that the block must make, as an int64 tensor `(t, k)`. If None, the block makes its own
            choices.

    Attributes:
        expert: the experts that the block chose, or None before it has chosen.
    """

    point: RoutingPoint
    choices: Tensor | None
    expert: Tensor | None = None

    def __init__(self, point: RoutingPoint, choices: Tensor | None) -> None:
        super().__init__()
        self.point, self.choices = point, choices
        external: Any = point.router.external
        self.group_sizes: Any = external.group_sizes

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        called = self.intercept_topk if func in (torch.topk, Tensor.topk) else func
        return called(*args, **(kwargs or {}))

    def intercept_topk(self, input: Tensor, k: int, dim: int = -1, *rest: Any, **kwargs: Any) -> Any:
        size, given, is_last_dim = input.shape[-1], self.choices, dim in (-1, input.ndim - 1)
        if is_last_dim and given is not None and (size, k) == self.group_sizes and input.numel() == len(given) * size:
            input = input.masked_fill(self.mark_open_groups(given, size).view_as(input), torch.inf)
        found = torch.topk(input, k, dim, *rest, **kwargs)
        if not is_last_dim or (size, k) != (self.point.num_experts, self.point.k):
            return found
        if given is not None:
            given = given.view_as(found.indices)
            expert = torch.where(given == KEEP_ROUTER_CHOICE, found.indices, given)
            found = torch.return_types.topk((input.gather(-1, expert), expert))
        for mode in (self, *get_function_modes()):  # enclosing recordings saw the block's original choices
            if isinstance(mode, TopkMode):
                mode.expert = found.indices
        return found

    def mark_open_groups(self, choices: Tensor, groups: int) -> Tensor:
        """Return a bool mask `(t, g)` of the groups that contain the given experts. These groups are selected
        regardless of their scores."""
        group = torch.where(choices == KEEP_ROUTER_CHOICE, groups, choices // (self.point.num_experts // groups))
        return nn.functional.one_hot(group, groups + 1).any(dim=1)[:, :groups]
