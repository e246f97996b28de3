"""What goes wrong on one rank, and what the others are told."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mixture_of_experts import Experts, MoE, TopKGating
from mixture_of_experts.parallel import ExpertParallel, parallelize_module
from support.parallel_checks import spread
from support.parallel_layers import DIM, EXPERTS, HIDDEN, OwnExperts, batch, make, own_part


def make_mesh(data_parallel: int = 1) -> DeviceMesh:
    """All ranks in a mesh ("dp", "ep"), of groups with the default group's timeout, made as a user makes them."""
    ranks = torch.arange(dist.get_world_size()).view(data_parallel, -1)
    timeout = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout  # type: ignore[union-attr]
    made = [dist.new_subgroups_by_enumeration(of.tolist(), timeout=timeout)[0] for of in (ranks.T, ranks)]
    groups = [group for group in made if isinstance(group, dist.ProcessGroup)]
    return DeviceMesh.from_group(groups, "cpu", ranks, mesh_dim_names=("dp", "ep"))


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
        out, aux_loss = moe(tokens())
        (out.sum() + aux_loss).backward()

    result = told(call)
    live_on(marker) if odd_one() else ended(marker)
    return result


def ending(how: str) -> str:
    """One rank does not come at all: its process group ends, or its process."""
    moe = spread(make("top2"), make_mesh())
    if not odd_one():
        return told(lambda: moe(tokens()))
    os.kill(os.getpid(), signal.SIGKILL) if how == "killed" else dist.destroy_process_group()
    return "left"


def stuck(marker: Path, where: str, data_parallel: int) -> str:
    """One rank does not come in time, before the layer or in its experts."""
    moe = spread(MoE(DIM, EXPERTS, HIDDEN), make_mesh(data_parallel))
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
    """A gate of one's own, with a setting that it shows."""

    def __init__(self, temperature: float) -> None:
        super().__init__(DIM, EXPERTS)
        self.temperature = temperature

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature}"


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
    experts = OwnExperts() if difference == "dtype" else Experts(DIM, EXPERTS, HIDDEN)
    moe = spread(MoE(DIM, gate=gate, experts=experts), make_mesh())
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
