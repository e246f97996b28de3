"""Models whose experts are spread over ranks, trained by engines as `docs/distributed/trainers.md` shows."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.data import DataLoader

from mixture_of_experts.parallel import expert_parameters, ignore_experts_in_ddp
from support.parallel_checks import make_mesh, parallelize_model
from support.parallel_layers import DIM, EXPERTS, LENGTH, make_layer, make_model
from support.parallel_training import make_optimizer
from support.parallel_workers import gather_tensor

PAGE = Path(__file__).parents[2] / "docs" / "distributed" / "trainers.md"
LAYERS = ("top2", "top-k, dropless")  # a capacity, and none
STEPS, BATCH, MAX_NORM = 6, 4, 1.0
Weights = dict[str, Tensor]


EXAMPLES = {"lightning": "lightning_experts.py", "pipeline": "pipeline_aux.py", "torchtitan": "torchtitan_experts.py"}


def extract_recipe(engine: str) -> dict[str, Any]:
    """What the page, or an example, defines for an engine."""
    if engine in EXAMPLES:
        blocks = [PAGE.parents[2].joinpath("examples", EXAMPLES[engine]).read_text(encoding="utf-8")]
    else:
        blocks = re.findall(rf"<!-- engine: {engine} -->\n```py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    ours: dict[str, Any] = {"build": build_model, "loss_of": compute_loss}
    names = {**ours}
    exec(compile("\n".join(blocks), f"{PAGE.name}, {engine}", "exec"), names)
    names.update(ours)  # in the place of an example's own
    return names


def build_model() -> nn.Module:
    return make_model(layers=LAYERS)


def compute_loss(out: Tensor) -> Tensor:
    return (out - 1).square().mean()


def make_batch() -> Tensor:
    """That of every step, so that it does not matter where in its data an engine goes on."""
    return torch.randn(BATCH, LENGTH, DIM, generator=torch.Generator().manual_seed(1))


def gather_weights(model: nn.Module) -> Weights:
    return {name: gather_tensor(parameter.detach()).clone() for name, parameter in model.named_parameters()}


def train_single_process(steps: int = STEPS) -> tuple[Weights, list[float]]:
    """The run that all others must equal, in one process."""
    model, norms = build_model(), []
    optimizer = make_optimizer(model)
    for _ in range(steps):
        out, aux_loss = model(make_batch())
        (compute_loss(out) + aux_loss).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
    return gather_weights(model), norms


def check_equal(weights: Weights, expected: Weights) -> None:
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        atol = 1e-9 if value.dtype == torch.float64 else 2e-5
        torch.testing.assert_close(value, expected[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@contextmanager
def torchrun_environment() -> Iterator[None]:
    """The variables by which engines know the ranks."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": "0"}
    names |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    with mock.patch.dict(os.environ, names), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of engines: few workers of loaders, devices that are not used
        yield


# ---- Lightning ----


def run_lightning(start: Path | None, saved: Path, steps: int, one_file: bool) -> Weights:
    """Train so many steps, from the beginning or from a checkpoint, and save; returns the weights."""
    made, world = extract_recipe("lightning"), dist.get_world_size()
    module = made["Mixture"]()
    module.expert_ranks = world
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    quiet |= dict(accelerator="cpu", use_distributed_sampler=False)  # its own sampler shuffles
    own: Any = make_batch()[dist.get_rank() :: world]
    with torchrun_environment():
        trainer = made["make_trainer"](world, one_file=one_file, max_steps=steps, **quiet)
        trainer.fit(module, DataLoader(own, batch_size=BATCH // world), ckpt_path=start)
        trainer.save_checkpoint(saved)
    return gather_weights(module.model)


def check_lightning(folder: Path, one_file: bool) -> None:
    """Half of the steps, saved; then the others, from what was saved. Its strategy takes no float64."""
    torch.set_default_dtype(torch.float32)
    first, second = folder / "first", folder / "second"
    check_equal(run_lightning(None, first, STEPS // 2, one_file), train_single_process(STEPS // 2)[0])
    check_equal(run_lightning(first, second, STEPS, one_file), train_single_process()[0])


def check_lightning_resumes(folder: Path, one_file: bool) -> None:
    """The other half, from what another number of ranks saved."""
    torch.set_default_dtype(torch.float32)
    check_equal(run_lightning(folder / "first", folder / "elsewhere", STEPS, one_file), train_single_process()[0])


# ---- accelerate ----


def make_layout(layout: str) -> nn.Module:
    model: Any = build_model()
    mesh = make_mesh()
    parallelize_model(model, mesh, "layers.*.ffn")
    if layout == "ddp":
        return ignore_experts_in_ddp(model)
    experts = set(expert_parameters(model).values())
    for part in (*model.layers, model):
        fully_shard(part, mesh=mesh["ep"], ignored_params=experts)
    return model


def check_accelerate(folder: Path, layout: str) -> None:
    """Layouts "ddp", "fsdp", and "plugin": FSDP2 with accelerate's plugin, as on GPUs."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, GradientState, PartialState

    world = dist.get_world_size()
    with torchrun_environment():
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        if layout == "plugin":  # accelerate takes the plugin on GPUs alone
            state = AcceleratorState._shared_state
            state["fsdp_plugin"] = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
            state["distributed_type"] = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        model = make_layout(layout)
        optimizer: Any = make_optimizer(model)
        data: Any = DataLoader(make_batch(), batch_size=BATCH // world // 2)  # type: ignore[arg-type]
        if layout == "fsdp":
            prepared, (optimizer, data) = model, accelerator.prepare(optimizer, data)
        else:
            prepared, optimizer, data = accelerator.prepare(model, optimizer, data)
        train = extract_recipe("accelerate")["train"]
        norms = [train(accelerator, prepared, optimizer, data) for _ in range(STEPS // 2)]
        if layout == "plugin":
            accelerator.save_state(str(folder))
            train(accelerator, prepared, optimizer, data)
            accelerator.load_state(str(folder))
        norms += [train(accelerator, prepared, optimizer, data) for _ in range(STEPS // 2)]
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    weights, expected = train_single_process()
    torch.testing.assert_close(torch.tensor(norms).flatten(), torch.tensor(expected), rtol=0, atol=1e-9)
    check_equal(gather_weights(model), weights)


# ---- pipelines ----

PIECES = 4


def run_pipeline_stages(wrap: Callable[[nn.Module], nn.Module]) -> list[nn.Sequential]:
    """Two, of two layers each between dense ones; the same on every rank."""
    torch.manual_seed(5)
    parts = [
        [module for layer in LAYERS for module in (nn.Linear(DIM, DIM), wrap(make_layer(layer)))] for _ in range(2)
    ]
    return [nn.Sequential(*part) for part in parts]


def compute_reference_gradients(factor: float) -> list[Tensor | None]:
    """Those of all stages in one process, which adds the auxiliary losses itself."""
    whole = nn.Sequential(*(module for stage in run_pipeline_stages(lambda moe: moe) for module in stage))
    for x in make_batch().chunk(PIECES):
        total = x.new_zeros(())
        for module in whole:
            x = module(x)
            if isinstance(x, tuple):
                x, total = x[0], total + x[1]
        ((compute_loss(x) + total) * factor / PIECES).backward()
    return [parameter.grad for parameter in whole.parameters()]


def check_pipeline(schedule: str, factor: float, steps: int) -> None:
    """Gradients after some steps of a schedule, of which several divide the loss themselves."""
    from torch.distributed import pipelining

    wrap, rank, options = extract_recipe("pipeline")["AuxInBackward"], dist.get_rank(), {}
    own_factor = factor
    if steps > 1:
        own_factor, options = factor / (steps * PIECES), {"scale_grads": False}
    both = run_pipeline_stages(lambda moe: wrap(moe, scale=own_factor))
    stage = pipelining.PipelineStage(both[rank], rank, 2, torch.device("cpu"))
    run = getattr(pipelining, schedule)(stage, PIECES, loss_fn=lambda out, _: own_factor * compute_loss(out), **options)
    for _ in range(steps):
        run.step(*([make_batch()] if rank == 0 else []), **({"target": make_batch()} if rank == 1 else {}))
    alone, before = compute_reference_gradients(factor), sum(len([*part.parameters()]) for part in both[:rank])
    own = [parameter.grad for parameter in both[rank].parameters()]
    for gradient, expected in zip(own, alone[before : before + len(own)], strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-10)


# ---- torchtitan ----


def make_torchtitan_layer(dispatcher: type) -> Any:
    """A layer of torchtitan, its experts computed here; the same on every rank."""
    from torchtitan.models.common import moe  # pyright: ignore[reportMissingImports]
    from torchtitan.models.common.linear import Linear  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    experts = extract_recipe("torchtitan")["MixtureExperts"].Config(dim=DIM, hidden_dim=12, num_experts=EXPERTS)
    routed = moe.RoutedExperts.Config(
        inner_experts=experts, token_dispatcher=dispatcher.Config(num_experts=EXPERTS, top_k=2)
    )
    router = moe.TokenChoiceTopKRouter.Config(
        num_experts=EXPERTS, gate=Linear.Config(in_features=DIM, out_features=EXPERTS), top_k=2
    )
    layer = moe.MoE.Config(num_experts=EXPERTS, routed_experts=routed, router=router).build()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def run_every_expert(layer: Any, x: Tensor) -> Tensor:
    """What the layer means: all experts compute all tokens."""
    scores, ids, _ = layer.router(x, layer.expert_bias_E)
    experts = layer.routed_experts.inner_experts
    hidden = nn.functional.silu(torch.einsum("bnd,efd->bnef", x, experts.w1_EFD))
    hidden = hidden * torch.einsum("bnd,efd->bnef", x, experts.w3_EFD)
    out = torch.einsum("bnef,edf->bned", hidden, experts.w2_EDF)
    return (out.gather(2, ids[..., None].expand(*ids.shape, DIM)) * scores[..., None]).sum(dim=2)


def check_torchtitan() -> None:
    """One process against the definition; then two ranks, each with half of the experts, against one process.

    It combines in float32.
    """
    warnings.simplefilter("ignore")  # its imports warn, and it asks a CPU for autocast to float32
    from torchtitan.distributed.utils import set_spmd_backend  # pyright: ignore[reportMissingImports]
    from torchtitan.models.common import token_dispatcher  # pyright: ignore[reportMissingImports]

    set_spmd_backend("default")
    layer, x = make_torchtitan_layer(token_dispatcher.LocalTokenDispatcher), make_batch()
    expected = run_every_expert(layer, x)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(compute_loss(expected), parameters), strict=True))

    spread_layer, mesh = make_torchtitan_layer(token_dispatcher.AllToAllTokenDispatcher), make_mesh()["ep"]
    experts = spread_layer.routed_experts.inner_experts
    for name, parameter in list(experts.named_parameters()):
        setattr(experts, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
    spread_layer.routed_experts.token_dispatcher.wire_meshes(ep_mesh=mesh)
    own = x.chunk(dist.get_world_size())[dist.get_rank()]
    out = spread_layer(own)
    torch.testing.assert_close(out, expected.chunk(dist.get_world_size())[dist.get_rank()], rtol=0, atol=1e-5)
    compute_loss(out).backward()
    for name, parameter in spread_layer.named_parameters():
        gradient = gather_tensor(parameter.grad)
        if gradient is parameter.grad:
            dist.all_reduce(gradient)
        torch.testing.assert_close(gradient / dist.get_world_size(), gradients[name], rtol=0, atol=1e-5)
