"""Implements `train_lm.py --expert-parallel RANKS`, which shards each batch and the experts over several processes. All
other parameters are replicated on every rank, and their gradients are averaged.

Start it with torchrun, on the CPU (gloo) or with one GPU for each process (NCCL). Checkpoints load on any number of
ranks.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from mixture_of_experts import MoE
from mixture_of_experts.parallel import (
    ExpertParallel,
    average_gradients,
    clip_grad_norm_,
    parallelize_module,
    replicated_parameters,
)

from .corpus import Corpus
from .model import ByteLM
from .ranks import by_mesh, loads_of_ranks, make_mesh, rng_of_ranks, set_rng, start
from .settings import Settings
from .trainee import History, Trainee, make_optimizer
from .training import REMEDIES, Training


class ShardedTrainee(Trainee):
    """A model whose experts are sharded, so that this rank holds some of them."""

    def __init__(self, name: str, model: ByteLM, settings: Settings):
        self.mesh = make_mesh(settings)
        if any(isinstance(module, MoE) for module in model.modules()):
            parallelize_module(model, self.mesh, {"blocks.*.ffn": ExpertParallel()})
        super().__init__(name, model, settings)

    def train_step(self, windows: Tensor, learning_rate: float) -> None:
        super().train_step(windows, learning_rate)
        loads = self.history.loads[-1].to(self.device)
        dist.all_reduce(loads)
        self.history.loads[-1] = loads.cpu()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        return make_optimizer(self.model, self.settings.learning_rate, self.settings.expert_rate, by_mesh)

    def _take_local_windows(self, windows: Tensor) -> Tensor:
        return windows.chunk(dist.get_world_size())[dist.get_rank()]

    def _sum(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item()

    def _clip(self) -> None:
        average_gradients(replicated_parameters(self.model).values(), self.mesh)
        clip_grad_norm_(self.model, 1.0)


class ShardedTraining(Training):
    """A run that several processes share."""

    trainee = ShardedTrainee

    def __init__(self, settings: Settings, corpus: Corpus, out: Path, ranks: int):
        start(ranks, settings)
        self.first = dist.get_rank() == 0
        self.folder = out / "checkpoints"
        super().__init__(settings, corpus, out)
        torch.manual_seed(settings.seed + dist.get_rank())  # random routers draw different numbers on each rank

    def run(self, stop_at: int | None = None) -> None:
        super().run(stop_at)
        for trainee in self.trainees:
            for line in loads_of_ranks(trainee.history.loads, dist.get_world_size()):
                self.say(f"{trainee.name}: {line}")

    def close(self) -> None:
        dist.destroy_process_group()

    def has_checkpoint(self) -> bool:
        return bool(list_checkpoints(self.folder))

    def refuse_to_overwrite(self) -> None:
        for path in list_checkpoints(self.folder)[-1:]:
            if int(path.name.removeprefix("step-")) < self.settings.steps:
                raise SystemExit(f"{path} belongs to an unfinished run: {REMEDIES}")

    def _models(self) -> tuple[nn.Module, tuple[torch.optim.Optimizer, ...]]:
        models = nn.ModuleDict({trainee.name: trainee.model for trainee in self.trainees})
        return models, tuple(trainee.optimizer for trainee in self.trainees)

    def save(self) -> None:
        state = {
            "settings": asdict(self.settings),
            "corpus": self.corpus.digest,
            "step": self.step,
            "data_position": self.batches.position,
            "rng": rng_of_ranks(self.settings),
            "histories": {trainee.name: vars(trainee.history) for trainee in self.trainees},
        }
        save_checkpoint(self.folder, *self._models(), step=self.step, extra=state)

    def load(self) -> None:
        state: dict[str, Any] = load_checkpoint(self.folder, *self._models())
        self._check_same_run(state)
        for trainee in self.trainees:
            trainee.history = History(**state["histories"][trainee.name])
        self.step, self.batches.position = state["step"], state["data_position"]
        set_rng(state["rng"], self.settings, self.step)
