"""What goes wrong on one rank, and what the others are told."""

from __future__ import annotations

import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixture_of_experts import Experts, MoE, TopKGating
from mixture_of_experts.parallel import (
    ExpertParallel,
    average_gradients,
    parallelize_module,
    replicated_parameters,
    tell_failures,
)
from support.parallel_checks import make_mesh, spread
from support.parallel_layers import DIM, EXPERTS, HIDDEN, batch, make, own_part


def odd_one() -> bool:
    """The rank on which things go wrong."""
    return dist.get_rank() == 1


def told(call) -> str:
    """The error that a call ends in, and the seconds until then."""
    start = time.perf_counter()
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__} after {time.perf_counter() - start:.1f} s: {error}"
    return "no error"


def ended(marker: Path) -> None:
    """Tell the odd rank that rank 0, which needs it, has ended."""
    if dist.get_rank() == 0:
        marker.touch()


def live_on(marker: Path) -> None:
    """Stay until rank 0 has ended, so that only a timeout can have helped it."""
    start = time.perf_counter()
    while not marker.exists() and time.perf_counter() - start < 120:
        time.sleep(0.05)


def tokens() -> Tensor:
    return own_part(batch()[0]).requires_grad_()


class Breaking(nn.Module):
    """Experts that fail on one rank, in the forward or in the backward."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.inner, self.where = Experts(DIM, EXPERTS, HIDDEN), where

    def forward(self, x: Tensor) -> Tensor:
        if odd_one() and self.where == "forward":
            raise ZeroDivisionError("the experts of rank 1 broke")
        out = self.inner(x)
        if odd_one() and self.where == "backward":
            out.register_hook(self._break)
        return out

    @staticmethod
    def _break(grad: Tensor) -> None:
        raise ZeroDivisionError("the experts of rank 1 broke")


def raising(marker: Path, where: str) -> str:
    """One rank raises, in the forward or the backward, and lives on."""
    moe = spread(MoE(DIM, EXPERTS, experts=Breaking(where)), make_mesh())

    def call() -> None:
        with nullcontext() if where == "forward" else tell_failures():  # the layer knows of what its experts do
            out, aux_loss = moe(tokens())
            (out.sum() + aux_loss).backward()

    result = told(call)
    live_on(marker) if odd_one() else ended(marker)
    return result


def failing(marker: Path, what: str) -> str:
    """In the second step something happens to one rank that its layers do not see."""
    moe = spread(make("top2"), make_mesh())

    def steps() -> None:
        with tell_failures():
            for step in range(2):
                x = tokens()
                if odd_one() and step == 1:
                    x = ODD[what](x)
                out, aux_loss = moe(x)
                (out.sum() + aux_loss).backward()
                average_gradients(replicated_parameters(moe).values(), dist.group.WORLD)

    result = told(steps)
    live_on(marker) if odd_one() else ended(marker)
    return result


def no_data(x: Tensor) -> Tensor:
    raise OSError("the file of rank 1 is gone")


def killed(x: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return x


ODD = {"data": no_data, "width": lambda x: x[..., 1:], "killed": killed}


def ending() -> str:
    """One rank does not come at all, and its process group ends."""
    moe = spread(make("top2"), make_mesh())
    if not odd_one():
        return told(lambda: moe(tokens()))
    dist.destroy_process_group()
    return "left"


def stuck(marker: Path, where: str, debug: bool, data_parallel: int = 1) -> str:
    """One rank does not come in time, before the layer or in its experts."""
    moe = spread(MoE(DIM, EXPERTS, HIDDEN), make_mesh(data_parallel), debug=debug)
    if odd_one() and where == "experts":
        moe.experts.act = Waiting(marker)  # not before: ranks compare their layers when they are set up
    if odd_one() and where == "before":
        live_on(marker)
        return "came late"
    result = told(lambda: moe(tokens()))
    ended(marker)
    return result


class Waiting(nn.Module):
    def __init__(self, marker: Path) -> None:
        super().__init__()
        self.marker = marker

    def forward(self, x: Tensor) -> Tensor:
        live_on(self.marker)
        return x


def topk(**settings: Any) -> MoE:
    return MoE(DIM, gate=TopKGating(DIM, EXPERTS, **settings), experts=Experts(DIM, EXPERTS, HIDDEN))


class Tempered(TopKGating):
    """A gate of one's own, with a setting that it does not show."""

    def __init__(self, temperature: float) -> None:
        super().__init__(DIM, EXPERTS)
        self.temperature = temperature


def different_layers(difference: str) -> str:
    """The ranks build different layers."""
    made = {
        "number of experts": lambda: MoE(DIM, 2 * EXPERTS, HIDDEN),
        "shapes": lambda: MoE(DIM, EXPERTS, HIDDEN + 4),
        "dtypes": lambda: MoE(DIM, EXPERTS, HIDDEN).to(torch.bfloat16),
        "bias": lambda: MoE(DIM, experts=Experts(DIM, EXPERTS, HIDDEN, bias=True)),
        "gradient": lambda: MoE(DIM, EXPERTS, HIDDEN),
        "activation": lambda: MoE(DIM, EXPERTS, HIDDEN, nn.ReLU),
        "function": lambda: MoE(DIM, experts=Experts(DIM, EXPERTS, HIDDEN, torch.sigmoid)),
        "z_loss_coef": lambda: MoE(DIM, EXPERTS, HIDDEN, z_loss_coef=0.1),
        "loss_coefs": lambda: MoE(DIM, EXPERTS, HIDDEN, loss_coefs={"balance_batch": 0.1}),
        "policy": lambda: MoE(DIM, EXPERTS, HIDDEN, second_policy_eval="all"),
        "gate": lambda: topk(),
        "k": lambda: topk(k=3),
        "balance_over": lambda: topk(balance_over="batch"),
        "capacity": lambda: topk(capacity_factor_eval=2.0),
        "gate of one's own": lambda: MoE(DIM, gate=Tempered(0.5), experts=Experts(DIM, EXPERTS, HIDDEN)),
        "replicated": lambda: MoE(DIM, EXPERTS, HIDDEN),
    }
    usual = {
        **dict.fromkeys(("k", "balance_over", "capacity"), topk),
        "gate of one's own": lambda: MoE(DIM, gate=Tempered(2.0), experts=Experts(DIM, EXPERTS, HIDDEN)),
    }
    moe = made[difference]() if odd_one() else usual.get(difference, lambda: MoE(DIM, EXPERTS, HIDDEN))()
    options = {"gradient": {"gradient": "sum"}, "replicated": {"replicated": "w1"}}.get(difference, {})
    options = options if odd_one() else {}
    return told(lambda: parallelize_module(moe, make_mesh()["ep"], ExpertParallel(**options)))


def different_calls(difference: str) -> str:
    """The ranks call one layer differently; every rank is told, at once."""
    gate = TopKGating(DIM, EXPERTS, capacity_factor_train=1.0)  # dropless in evaluation
    moe = spread(MoE(DIM, gate=gate, experts=Experts(DIM, EXPERTS, HIDDEN)), make_mesh())
    x = tokens()
    if difference == "mode with capacity":
        moe.gate.capacity_factor_eval = 1.0
    if odd_one() and difference.startswith("mode"):
        moe.eval()
    if odd_one() and difference == "gradients":
        torch.set_grad_enabled(False)
    if odd_one() and difference == "dtype":
        x = x.to(torch.float32)
    try:
        return told(lambda: moe(x))
    finally:
        torch.set_grad_enabled(True)


def unequal_under_static_shapes() -> str:
    """`static_shapes` is a promise; `debug` looks whether it is kept."""
    moe = spread(make("top2"), make_mesh(), static_shapes=True, debug=True)
    return told(lambda: moe(tokens()))


def one_cannot_be_set_up(problem: str) -> str:
    """What is wrong with one rank's model alone: its plan names nothing, or its experts cannot be divided."""
    odd = MoE(DIM, EXPERTS + 1, HIDDEN) if problem == "experts" else MoE(DIM, EXPERTS, HIDDEN)
    name = "mlp" if odd_one() and problem == "plan" else "ffn"
    model = nn.ModuleDict({name: odd if odd_one() else MoE(DIM, EXPERTS, HIDDEN)})
    return told(lambda: parallelize_module(model, make_mesh()["ep"], {"ffn": ExpertParallel()}))


def one_never_sets_up(marker: Path, data_parallel: int, by_name: bool) -> str:
    """One rank does not come to `parallelize_module`."""
    mesh = make_mesh(data_parallel)["ep"]
    if odd_one():
        live_on(marker)
        return "came late"
    plan = {"": ExpertParallel()} if by_name else ExpertParallel()
    result = told(lambda: parallelize_module(MoE(DIM, EXPERTS, HIDDEN), mesh, plan))
    ended(marker)
    return result
