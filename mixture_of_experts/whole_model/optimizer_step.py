"""Implements updates that run after each optimizer step, for the expert bias and the coefficient of ReLU routers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from mixture_of_experts.gating.ranks import ranks_of_batch
from mixture_of_experts.losses import global_sum, world_size
from mixture_of_experts.providers import find_providers
from mixture_of_experts.support.checks import check_process_group
from mixture_of_experts.whole_model.router_discovery import GateSelection, RouterHandle, check_supported, find_routers


class OptimizerStepHook(ExitStack):
    """Base class that runs an update after each optimizer step, until `close()` is called or a `with` block ends.

    Subclasses implement `after_step`, and call `start` after all arguments have been checked.

    Args:
        optimizer: the optimizer, which may be wrapped by accelerate.
        group: the ranks that hold the gates. If None, all ranks are used.
    """

    gates: tuple[str, ...]

    def __init__(self, optimizer: Optimizer, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.group: dist.ProcessGroup | None = check_process_group("group", group)
        self._optimizer = unwrap_optimizer(optimizer)

    def start(self, model: nn.Module, buffers: Mapping[str, Any]) -> None:
        """Start updating. `buffers` contains the updated tensors, keyed by gate name."""
        for provider in dict.fromkeys(each for module in model.modules() for each in find_providers(module)):
            if (reason := provider.unsaved_reason(model, buffers)) is not None:
                warnings.warn(reason, stacklevel=3)
        self.gates = tuple(buffers)
        self._model: nn.Module | None = model
        self.callback(self._optimizer.register_step_post_hook(self._post_step_hook).remove)

    def remove(self) -> None:
        """Stop updating."""
        self.close()

    def pop_all(self) -> ExitStack:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Transfer the responsibility for stopping the updates to a new stack, so that they continue after a `with`
        block."""
        ending, handed = copy.copy(self), ExitStack()
        super().__init__()  # this object has nothing left to undo
        handed.callback(ending.close)
        return handed

    def after_step(self, step_taken: Tensor | int) -> None:
        """Apply the update for one step. `step_taken` is 1, or 0 if a fused optimizer skipped the step internally."""
        raise NotImplementedError

    def sum_over_ranks(self, counts: Sequence[Tensor]) -> Sequence[Tensor]:
        """Sum the counts of all gates over the ranks, using one collective."""
        group = ranks_of_batch(self.group)
        if not counts or world_size(group) == 1:
            return counts
        total = global_sum(torch.cat([part.flatten().to(counts[0].device) for part in counts]), group)
        parts = zip(total.split([part.numel() for part in counts]), counts, strict=True)
        return [part.view_as(own).to(own) for part, own in parts]

    @torch.no_grad()
    def _post_step_hook(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if self._model is not None:  # this is the first step
            warn_stale_optimizer(optimizer, self._model)
            self._model = None
        skipped = getattr(optimizer, "found_inf", None)
        self.after_step(1 if skipped is None else skipped == 0)


def find_updatable_routers(
    model: nn.Module,
    feature: str,
    gates: GateSelection | None,
    unsupported_reason: Callable[[RouterHandle], str | None],
    empty_message: str,
) -> list[RouterHandle]:
    """Return the routers that `gates` selects. If `gates` is None, return all routers that support the feature, or
    raise a ValueError with `empty_message` if there are none."""
    routers = find_routers(model, feature, gates)
    if gates is None:
        routers = [router for router in routers if unsupported_reason(router) is None]
    if not routers:
        raise ValueError(empty_message)
    return check_supported(routers, feature, unsupported_reason)


def unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer without accelerate's wrapper, because the wrapper has no hooks."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not hasattr(optimizer, "register_step_post_hook"):
        raise TypeError(
            f"expected optimizer to be a torch.optim.Optimizer, but got {type(optimizer).__name__}; pass the model "
            "first, then the optimizer"
        )
    return optimizer


def warn_stale_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """Warn if an optimizer is missing model weights that have gradients, but contains weights from outside the model
    that have none."""
    optimizer_weights = {weight for group in optimizer.param_groups for weight in group["params"]}
    missing = [
        name for name, weight in model.named_parameters() if weight.grad is not None and weight not in optimizer_weights
    ]
    if missing and any(weight.grad is None for weight in optimizer_weights.difference(model.parameters())):
        warnings.warn(
            f"the optimizer trains tensors that are no longer in the model, but not {missing[0]}; construct it after "
            "all changes to the model, such as upcycle(), prune() or unstack()",
            stacklevel=4,
        )


def step_factor(step_taken: Tensor | int, like: Tensor) -> Tensor | int:
    """Convert `step_taken` to a factor with the device and dtype of `like`."""
    return step_taken if isinstance(step_taken, int) else step_taken.to(device=like.device, dtype=like.dtype)
