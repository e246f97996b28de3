"""Updates the coefficient that keeps ReLU routers sparse, once per optimizer step."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from mixture_of_experts.gating.relu import MAX_L1_COEF, ReLUGating
from mixture_of_experts.support.checks import check_number
from mixture_of_experts.support.private_torch import is_fake_tensor
from mixture_of_experts.whole_model.balancing import ignore_counts_in_ddp
from mixture_of_experts.whole_model.optimizer_step import OptimizerStepHook, find_updatable_routers, step_factor
from mixture_of_experts.whole_model.router_discovery import GateSelection, RouterHandle

CHECK_INTERVAL = 100  # number of steps between reads of values from the device


def control_sparsity(
    model: nn.Module,
    optimizer: Optimizer,
    rate: float = 1.2,
    *,
    group: dist.ProcessGroup | None = None,
    gates: GateSelection | None = None,
) -> SparsityControl:
    """Update `l1_coef` of every `ReLUGating` in `model` after each step of `optimizer`.

    All gates are updated together, as in ReMoE (arXiv 2412.14711, equation 8). The coefficient is multiplied by `rate`
    if the tokens of all layers make more than `mean_choices` choices on average, and divided by `rate` if they make
    fewer. Each gate is compared with its own `mean_choices`. If a fused optimizer skips a step because of a gradient
    scaler, the choices count in the next step. The coefficient remains between 1e-12 and 1000. If the coefficient
    reaches 1000 and tokens still make too many choices, a warning lists possible reasons. The check runs every 100
    steps and synchronizes with the device.

    Args:
        model: the model, before it is wrapped in DDP or `torch.compile`.
        optimizer: the optimizer whose steps trigger the updates, possibly wrapped by accelerate.
        rate: the factor by which the coefficient changes, which must be greater than 1.
        group: the ranks that hold these gates and over which counts are summed. Default: all ranks if
            `torch.distributed` is initialized, regardless of the gates' `process_group`.

        gates: the gates to control, as gate names, gate modules, or layers that contain gates. Default: every
            `ReLUGating`. `control.gates` lists the names of the selected gates.

    Returns:
        An object that stops the updates when `close()` is called. The object can also be used as a context manager.

    Raises:
        TypeError: a gate in `gates` is not a `ReLUGating`.
        ValueError: the model has no `ReLUGating`, or an argument is invalid.

    Example:
        >>> import torch
        >>> from mixture_of_experts import MoE, ReLUGating, control_sparsity
        >>> moe = MoE(dim=8, gate=ReLUGating(8, num_experts=16, k=8, mean_choices=2), loss_coef=1.0)
        >>> optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
        >>> control = control_sparsity(moe, optimizer)
        >>> out, aux_loss = moe(torch.randn(2, 16, 8))
        >>> (out.square().mean() + aux_loss).backward()
        >>> optimizer.step()
        >>> moe.gate.l1_coef
        tensor(1.2000e-08)
    """
    control = SparsityControl(optimizer, group)
    control.rate = check_number("rate", rate, above=1.0)
    empty_message = f"{type(model).__name__} has no ReLUGating; pass a model with ReLU routers to control_sparsity"
    routers = find_updatable_routers(model, "control_sparsity", gates, sparsity_unsupported_reason, empty_message)
    control.routers = [router.gate for router in routers]
    ignore_counts_in_ddp(model)
    control.start(model, {router.name: router.gate.get_buffer("l1_coef") for router in routers})
    return control


class SparsityControl(OptimizerStepHook):
    """Updates the `l1_coef` of a model's ReLU routers after each optimizer step. Returned by `control_sparsity`.

    Attributes:
        gates: the names of the controlled gates.
        rate: the factor by which the coefficient changes.
    """

    rate: float
    routers: list[Any]
    num_steps: int = 0  # number of steps so far

    def after_step(self, step_taken: Tensor | int) -> None:
        device = self.routers[0].l1_coef.device
        totals = self.sum_over_ranks([gate.choice_counts for gate in self.routers])
        excess = [gate.excess(total).to(device) for gate, total in zip(self.routers, totals, strict=True)]
        excess = torch.stack(excess).sum()
        excess = excess * step_factor(step_taken, excess)
        for gate in self.routers:
            gate.scale_l1(self.rate, excess)
            gate.choice_counts.mul_(1 - step_factor(step_taken, gate.choice_counts))
        self.num_steps += 1
        if self.num_steps % CHECK_INTERVAL == 0:
            warn_if_unreachable(self.routers, excess)


def sparsity_unsupported_reason(router: RouterHandle) -> str | None:
    return None if isinstance(router.gate, ReLUGating) else "it is not a ReLUGating"


def warn_if_unreachable(gates: Sequence[ReLUGating], excess: Tensor) -> None:
    """Warn if the coefficient is at its maximum but tokens still make too many choices."""
    if is_fake_tensor(excess) or not bool((gates[0].l1_coef >= MAX_L1_COEF) & (excess > 0)):
        return
    means = sorted({gate.mean_choices for gate in gates})
    warnings.warn(
        f"mean_choices={', '.join(map(str, means))} cannot be reached: l1_coef is at its maximum, {MAX_L1_COEF:g}, and "
        "tokens still make more choices on average. Check that the loss includes aux_loss with loss_coef=1 and that "
        "the router is trained. If logits are positive for half of the experts regardless of the weights, for example "
        "because tokens have mean 0, pass bias=True to the gate. Otherwise, increase mean_choices",
        stacklevel=2,
    )
