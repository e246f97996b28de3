"""What is moved once after each step of an optimizer: the expert bias, the coefficient of ReLU routers."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from mixture_of_experts.support.checks import check_process_group

if TYPE_CHECKING:
    from typing_extensions import Self


class EachStep:
    """Does something after each step of an optimizer, until `close()` or the end of a `with` block.

    A subclass writes `after_step`, and calls `start` when all arguments are checked.

    Args:
        optimizer: bare or wrapped by accelerate.
        group: the ranks that hold the gates; None: all, if there are several.
    """

    group: dist.ProcessGroup | None

    def __init__(self, optimizer: Optimizer, group: dist.ProcessGroup | None) -> None:
        self.group = check_process_group("group", group)
        self._optimizer = bare(optimizer)
        self._hooks = ExitStack()

    def start(self) -> None:
        self._hooks.callback(self._optimizer.register_step_post_hook(self._stepped).remove)

    def after_step(self, done: Tensor | int) -> None:
        """Move what is to move. `done` is 1, or 0 after a step that a fused optimizer skipped inside."""
        raise NotImplementedError

    @torch.no_grad()
    def _stepped(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        skipped = getattr(optimizer, "found_inf", None)
        self.after_step(1 if skipped is None else skipped == 0)

    def close(self) -> None:
        """End it."""
        self._hooks.close()

    remove = close

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def bare(optimizer: Optimizer) -> Optimizer:
    """The optimizer that is wrapped: accelerate's wrapper has no hooks."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not hasattr(optimizer, "register_step_post_hook"):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}: the model is first"
        )
    return optimizer


def as_factor(done: Tensor | int, like: Tensor) -> Tensor | int:
    """`done` as a factor of the tensor `like`."""
    return done if isinstance(done, int) else done.to(device=like.device, dtype=like.dtype)
