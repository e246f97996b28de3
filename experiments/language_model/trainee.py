"""Models that train on the same batches, each with its optimizer and history."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixture_of_experts import MoE, Routing, balance_experts

from .model import ByteLM, FeedForward, count_parameters
from .routers import ROUTERS
from .settings import Settings


class LoadRecorder:
    """Counts the choices that each expert computed in a training step, for every mixture layer of a model.

    A forward hook reads the `Routing` that each gate returns. Nothing is stored on the model.
    """

    def __init__(self, model: nn.Module):
        self._counts: list[Tensor] = []
        for layer in model.modules():
            if isinstance(layer, MoE):
                layer.gate.register_forward_hook(self._count)

    def _count(self, gate: nn.Module, args: tuple[Tensor, ...], routing: Routing) -> None:
        if gate.training:
            kept = routing.kept.flatten().long()
            counts = torch.zeros(routing.num_experts, dtype=torch.int64, device=kept.device)
            self._counts.append(counts.scatter_add(0, routing.expert.flatten().long(), kept))

    def take(self) -> Tensor:
        """Return and reset the counts since the last call, (layers, experts) int32 on the CPU."""
        counts = torch.stack(self._counts).int().cpu() if self._counts else torch.empty(0, 0, dtype=torch.int32)
        self._counts.clear()
        return counts


@dataclass
class History:
    """A model's training history, with one entry per step, except for `held_out`: (step, bits per byte)."""

    train: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    loads: list[Tensor] = field(default_factory=list)  # each (layers, experts): choices that each expert computed


class Trainee:
    """One model in training: its parameters, its optimizer and its history."""

    def __init__(self, name: str, model: ByteLM, settings: Settings):
        self.name, self.settings = name, settings
        self.device = torch.device(settings.device)
        self.model = model.to(self.device)
        self.optimizer = self._make_optimizer()
        rule = ROUTERS[settings.router].bias_rule
        if name == "moe" and rule is not None:
            balance_experts(self.model, self.optimizer, rule)
        self.history = History()
        self._recorder = LoadRecorder(self.model)  # before compiling, so that the graph includes the hooks
        self._forward = torch.compile(self.model) if settings.compile else self.model

    def train_step(self, windows: Tensor, learning_rate: float) -> None:
        """Take an optimizer step on windows of bytes (b, n + 1)."""
        begin = time.perf_counter()
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["rate"]
        own = self._take_local_windows(windows)
        nats, aux_loss = self._loss(own)
        (nats + aux_loss).backward()
        self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        # waits for the device, so that the time below includes the whole step
        bits = self._sum(nats.item() * len(own)) / len(windows) / math.log(2)
        if not math.isfinite(bits):
            raise FloatingPointError(f"the {self.name} model's loss is {bits}: try a smaller --learning-rate")
        self.history.train.append(bits)
        self.history.seconds.append(time.perf_counter() - begin)
        self.history.loads.append(self._recorder.take())

    @torch.no_grad()
    def evaluate(self, windows: Tensor) -> float:
        """Return bits per byte over windows (count, n + 1), without changing the random state of training."""
        self.model.eval()
        nats = 0.0
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)  # random routers draw the same numbers in every evaluation
            for batch in windows.split(self.settings.batch_size):
                own = self._take_local_windows(batch)
                nats += self._loss(own)[0].item() * len(own)
        bits = self._sum(nats) / len(windows) / math.log(2)
        self.history.held_out.append((len(self.history.train), bits))
        return bits

    # ---- overridden when several processes share a batch: see expert_parallel.py ----

    def _make_optimizer(self) -> torch.optim.Optimizer:
        return make_optimizer(self.model, self.settings.learning_rate, self.settings.expert_rate)

    def _take_local_windows(self, windows: Tensor) -> Tensor:
        """Return this process's part of a batch."""
        return windows

    def _sum(self, value: float) -> float:
        """Return the sum of a number over all processes."""
        return value

    def _clip(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def _loss(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean nats per byte for predicting each byte from earlier bytes, and the auxiliary loss."""
        windows = windows.to(self.device)
        dtype = getattr(torch, self.settings.dtype)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            logits, aux_loss = self._forward(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten()), aux_loss

    def state_dict(self) -> dict[str, Any]:
        history = {**vars(self.history), "loads": torch.stack(self.history.loads)}
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "history": history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = History(**{**state["history"], "loads": list(state["history"]["loads"].unbind())})

    def summary(self) -> dict[str, Any]:
        """Return the results for the final table."""
        total, active = count_parameters(self.model, ROUTERS[self.settings.router].choices)
        return {
            "model": self.name,
            "total_parameters": total,
            "active_parameters": active,
            "step_seconds": median(self.history.seconds),
            "training_seconds": sum(self.history.seconds),
            "held_out_bits_per_byte": self.history.held_out[-1][1],
        }


def make_trainee(name: str, settings: Settings, kind: type[Trainee] = Trainee) -> Trainee:
    """Create the model `name`, 'dense' or 'moe'. Except for feed-forward layers, both start with equal parameters."""
    router = ROUTERS[settings.router]
    torch.manual_seed(settings.seed)

    def make_moe() -> nn.Module:
        layer = router.build(settings.dim, settings.num_experts, settings.width)
        layer.loss_coef = layer.loss_coef if settings.balance is None else settings.balance
        return layer

    def make_dense() -> nn.Module:
        return FeedForward(settings.dim, dense_hidden_dim(settings), router.gated)

    shape = {"dim": settings.dim, "layers": settings.layers, "heads": settings.heads, "context": settings.context}
    model = ByteLM({"moe": make_moe, "dense": make_dense}[name], **shape)
    return kind(name, model, settings)


def dense_hidden_dim(settings: Settings) -> int:
    """Return the hidden units of a dense layer with as many active parameters as the mixture layer and its router."""
    router = ROUTERS[settings.router]
    with torch.device("meta"):
        layer = router.build(settings.dim, settings.num_experts, settings.width)
    active = count_parameters(layer, router.choices)[1]
    return round(active / (settings.dim * (3 if router.gated else 2)))


def make_optimizer(
    model: nn.Module,
    learning_rate: float,
    expert_rate: float = 1.0,
    split: Callable[[list[dict]], list[dict]] = list,
) -> torch.optim.Optimizer:
    """Create an AdamW optimizer without weight decay on norms and biases.

    The learning rate of each group is multiplied by its `rate`, which is `expert_rate` for the experts' matrices.
    `split` may divide the parameter groups further.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, MoE)]
    of_experts = {parameter for layer in layers for parameter in layer.experts.parameters()}
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": [matrix for matrix in matrices if matrix not in of_experts], "weight_decay": 0.1, "rate": 1.0},
        {"params": [matrix for matrix in matrices if matrix in of_experts], "weight_decay": 0.1, "rate": expert_rate},
        {"params": vectors, "weight_decay": 0.0, "rate": 1.0},
    ]
    groups = split([group for group in groups if group["params"]])
    return torch.optim.AdamW(groups, learning_rate, betas=(0.9, 0.98), fused=True)
