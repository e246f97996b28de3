"""`train_lm.py --expert-parallel RANKS`: the same run on several processes, each with a part of every batch and of the
experts. Everything else of the models is whole on every rank, and its gradients are averaged.

Started by torchrun, on the CPU (gloo) or with one GPU for each process (NCCL). Checkpoints load on any number of ranks.
"""

import os
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpoints import checkpoints, load_checkpoint, save_checkpoint
from corpus import Corpus
from model import ByteLM
from settings import Settings
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from training import REMEDIES, History, Trainee, Training, make_optimizer

from mixture_of_experts import MoE
from mixture_of_experts.parallel import (
    ExpertParallel,
    average_gradients,
    clip_grad_norm_,
    parallelize_module,
    replicated_parameters,
    tell_failures,
)


def start(ranks: int, settings: Settings) -> None:
    """Join the other processes; alone, if there is to be one rank, torchrun is not needed."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update({name: os.environ.get(name, value) for name, value in place.items()})
    world = int(os.environ["WORLD_SIZE"])
    if world != ranks:
        raise SystemExit(
            f"--expert-parallel {ranks} needs torchrun --nproc-per-node {ranks}: the number of processes is {world}"
        )
    for name in ("batch_size", "eval_windows"):
        if getattr(settings, name) % ranks:
            raise SystemExit(f"{name} is {getattr(settings, name)}: give a multiple of the {ranks} ranks")
    if settings.device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(timeout=timedelta(minutes=10))


def make_mesh(settings: Settings) -> DeviceMesh:
    """All ranks: each has a part of the experts."""
    return init_device_mesh(torch.device(settings.device).type, (dist.get_world_size(),), mesh_dim_names=("ep",))


class SpreadTrainee(Trainee):
    """A model of which this rank has a part of the experts."""

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

    def _own(self, windows: Tensor) -> Tensor:
        return windows.chunk(dist.get_world_size())[dist.get_rank()]

    def _sum(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item()

    def _clip(self) -> None:
        average_gradients(replicated_parameters(self.model).values(), self.mesh)
        clip_grad_norm_(self.model, 1.0)


def by_mesh(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups for an optimizer, divided: fused steps take no mixture of DTensors of one mesh and of none."""
    divided = []
    for group in groups:
        of_mesh: dict[Any, list[Tensor]] = {}
        for parameter in group["params"]:
            of_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
        divided += [{**group, "params": parameters} for parameters in of_mesh.values()]
    return divided


class SpreadTraining(Training):
    """A run of several processes."""

    trainee = SpreadTrainee

    def __init__(self, settings: Settings, corpus: Corpus, out: Path, ranks: int):
        start(ranks, settings)
        self.first = dist.get_rank() == 0
        self.folder = out / "checkpoints"
        super().__init__(settings, corpus, out)
        torch.manual_seed(settings.seed + dist.get_rank())  # routers that draw numbers draw others on every rank

    def run(self, stop_at: int | None = None) -> None:
        with tell_failures():  # the errors of the other ranks name the one that failed
            super().run(stop_at)
        for trainee in self.trainees:
            for line in loads_of_ranks(trainee.history.loads, dist.get_world_size()):
                self.say(f"{trainee.name}: {line}")

    def close(self) -> None:
        dist.destroy_process_group()

    def has_checkpoint(self) -> bool:
        return bool(checkpoints(self.folder))

    def refuse_to_overwrite(self) -> None:
        for path in checkpoints(self.folder)[-1:]:
            if int(path.name.removeprefix("step-")) < self.settings.steps:
                raise SystemExit(f"{path} is of an unfinished run: {REMEDIES}")

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


def rng_of_ranks(settings: Settings) -> list[dict[str, Any]]:
    """What every rank's next random numbers depend on."""
    cuda = torch.cuda.get_rng_state(settings.device) if settings.device.startswith("cuda") else None
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, {"cpu": torch.get_rng_state(), "cuda": cuda})
    return told


def set_rng(saved: list[dict[str, Any]], settings: Settings, step: int) -> None:
    """As many ranks as before go on with their numbers; others with new ones, others on every rank."""
    if len(saved) != dist.get_world_size():
        torch.manual_seed(hash((settings.seed, step, dist.get_rank())) % 2**63)
        return
    own = saved[dist.get_rank()]
    torch.set_rng_state(own["cpu"])
    if own["cuda"] is not None and settings.device.startswith("cuda"):
        torch.cuda.set_rng_state(own["cuda"], settings.device)


def loads_of_ranks(loads: list[Tensor], ranks: int) -> list[str]:
    """What part of the choices the experts of every rank computed, over the run and in the layer where most."""
    total = torch.stack(loads).sum(dim=0).double() if loads else torch.empty(0, 0)  # (layers, experts)
    if not total.numel():
        return []
    by_rank = total.unflatten(1, (ranks, -1)).sum(dim=-1)  # (layers, ranks)
    share, most = by_rank.sum(dim=0) / by_rank.sum(), (by_rank / by_rank.sum(dim=1, keepdim=True)).amax(dim=0)
    each = total.shape[1] // ranks
    return [
        f"rank {rank} (experts {rank * each} to {(rank + 1) * each - 1}) computed {share[rank]:.1%} of the choices, "
        f"at most {most[rank]:.1%} of a layer's"
        for rank in range(ranks)
    ]
