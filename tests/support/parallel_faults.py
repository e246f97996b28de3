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
from support.parallel_checks import parallelize_model
from support.parallel_layers import DIM, EXPERTS, HIDDEN, CustomExperts, local_part, make_batch, make_layer


def make_mesh(data_parallel: int = 1) -> DeviceMesh:
    """All ranks in a mesh ("dp", "ep"), of groups with the default group's timeout, made as a user makes them."""
    ranks = torch.arange(dist.get_world_size()).view(data_parallel, -1)
    timeout = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout  # type: ignore[union-attr]
    made = [dist.new_subgroups_by_enumeration(of.tolist(), timeout=timeout)[0] for of in (ranks.T, ranks)]
    groups = [group for group in made if isinstance(group, dist.ProcessGroup)]
    return DeviceMesh.from_group(groups, "cpu", ranks, mesh_dim_names=("dp", "ep"))


def is_faulty_rank() -> bool:
    """The rank on which things go wrong."""
    return dist.get_rank() == 1


def catch_error(call) -> str:
    """The error that a call ends in, and the seconds until then."""
    start = time.perf_counter()
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__} after {time.perf_counter() - start:.1f} s: {error}"
    return "no error"


def wait_for_end(marker: Path) -> None:
    """Tell the odd rank that rank 0, which needs it, has ended."""
    if dist.get_rank() == 0:
        marker.touch()


def keep_running(marker: Path) -> None:
    """Stay until rank 0 has ended, so that only a timeout can have helped it."""
    start = time.perf_counter()
    while not marker.exists() and time.perf_counter() - start < 120:
        time.sleep(0.05)


def make_tokens() -> Tensor:
    return local_part(make_batch()[0]).requires_grad_()


class FaultyExperts(nn.Module):
    """Experts that fail on one rank, in the forward or in the backward."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.inner, self.where = Experts(DIM, EXPERTS, HIDDEN), where

    def forward(self, x: Tensor) -> Tensor:
        if is_faulty_rank() and self.where == "forward":
            raise ZeroDivisionError("the experts of rank 1 broke")
        out = self.inner(x)
        if is_faulty_rank() and self.where == "backward":
            out.register_hook(self._break)
        return out

    @staticmethod
    def _break(grad: Tensor) -> None:
        raise ZeroDivisionError("the experts of rank 1 broke")


def raise_on_one_rank(marker: Path, where: str) -> str:
    """One rank raises, in the forward or the backward, and lives on."""
    moe = parallelize_model(MoE(DIM, EXPERTS, experts=FaultyExperts(where)), make_mesh())

    def call() -> None:
        out, aux_loss = moe(make_tokens())
        (out.sum() + aux_loss).backward()

    result = catch_error(call)
    keep_running(marker) if is_faulty_rank() else wait_for_end(marker)
    return result


def exit_on_one_rank(how: str) -> str:
    """One rank does not come at all: its process group ends, or its process."""
    moe = parallelize_model(make_layer("top2"), make_mesh())
    if not is_faulty_rank():
        return catch_error(lambda: moe(make_tokens()))
    os.kill(os.getpid(), signal.SIGKILL) if how == "killed" else dist.destroy_process_group()
    return "left"


def hang_one_rank(marker: Path, where: str, data_parallel: int) -> str:
    """One rank does not come in time, before the layer or in its experts."""
    moe = parallelize_model(MoE(DIM, EXPERTS, HIDDEN), make_mesh(data_parallel))
    if is_faulty_rank() and where == "experts":
        moe.experts.act = HangingExperts(marker)  # not before: ranks compare their layers when they are set up
    if is_faulty_rank() and where == "before":
        keep_running(marker)
        return "came late"
    result = catch_error(lambda: moe(make_tokens()))
    wait_for_end(marker)
    return result


class HangingExperts(nn.Module):
    def __init__(self, marker: Path) -> None:
        super().__init__()
        self.marker = marker

    def forward(self, x: Tensor) -> Tensor:
        keep_running(self.marker)
        return x


def make_gate(**settings: Any) -> MoE:
    return MoE(DIM, gate=TopKGating(DIM, EXPERTS, **settings), experts=Experts(DIM, EXPERTS, HIDDEN))


class TemperatureGate(TopKGating):
    """A gate of one's own, with a setting that it shows."""

    def __init__(self, temperature: float) -> None:
        super().__init__(DIM, EXPERTS)
        self.temperature = temperature

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature}"


def build_different_layers(difference: str) -> str:
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
        "gate": lambda: make_gate(),
        "k": lambda: make_gate(k=3),
        "balance_over": lambda: make_gate(balance_over="batch"),
        "capacity": lambda: make_gate(capacity_factor_eval=2.0),
        "gate of one's own": lambda: MoE(DIM, gate=TemperatureGate(0.5), experts=Experts(DIM, EXPERTS, HIDDEN)),
        "replicated": lambda: MoE(DIM, EXPERTS, HIDDEN),
    }
    usual = {
        **dict.fromkeys(("k", "balance_over", "capacity"), make_gate),
        "gate of one's own": lambda: MoE(DIM, gate=TemperatureGate(2.0), experts=Experts(DIM, EXPERTS, HIDDEN)),
    }
    moe = made[difference]() if is_faulty_rank() else usual.get(difference, lambda: MoE(DIM, EXPERTS, HIDDEN))()
    options = {"gradient": {"gradient": "sum"}, "replicated": {"replicated": "w1"}}.get(difference, {})
    options = options if is_faulty_rank() else {}
    return catch_error(lambda: parallelize_module(moe, make_mesh()["ep"], ExpertParallel(**options)))


def call_differently(difference: str) -> str:
    """The ranks call one layer differently; every rank is told, at once."""
    gate = TopKGating(DIM, EXPERTS, capacity_factor_train=1.0)  # dropless in evaluation
    experts = CustomExperts() if difference == "dtype" else Experts(DIM, EXPERTS, HIDDEN)
    moe = parallelize_model(MoE(DIM, gate=gate, experts=experts), make_mesh())
    x = make_tokens()
    if difference == "mode with capacity":
        moe.gate.capacity_factor_eval = 1.0
    if is_faulty_rank() and difference.startswith("mode"):
        moe.eval()
    if is_faulty_rank() and difference == "gradients":
        torch.set_grad_enabled(False)
    if is_faulty_rank() and difference == "dtype":
        x = x.to(torch.float32)
    try:
        return catch_error(lambda: moe(x))
    finally:
        torch.set_grad_enabled(True)


def fail_setup_on_one_rank(problem: str) -> str:
    """What is wrong with one rank's model alone: its plan names nothing, or its experts cannot be divided."""
    odd = MoE(DIM, EXPERTS + 1, HIDDEN) if problem == "experts" else MoE(DIM, EXPERTS, HIDDEN)
    name = "mlp" if is_faulty_rank() and problem == "plan" else "ffn"
    model = nn.ModuleDict({name: odd if is_faulty_rank() else MoE(DIM, EXPERTS, HIDDEN)})
    return catch_error(lambda: parallelize_module(model, make_mesh()["ep"], {"ffn": ExpertParallel()}))


def skip_setup_on_one_rank(marker: Path, data_parallel: int, by_name: bool) -> str:
    """One rank does not come to `parallelize_module`."""
    mesh = make_mesh(data_parallel)["ep"]
    if is_faulty_rank():
        keep_running(marker)
        return "came late"
    plan = {"": ExpertParallel()} if by_name else ExpertParallel()
    result = catch_error(lambda: parallelize_module(MoE(DIM, EXPERTS, HIDDEN), mesh, plan))
    wait_for_end(marker)
    return result
