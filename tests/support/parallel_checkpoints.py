"""Checkpoints between layouts and numbers of ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor

import mixture_of_experts
from mixture_of_experts import MoE
from mixture_of_experts.parallel import average_gradients, replicated_parameters
from support.checkpoint_recipe import list_checkpoints, load_checkpoint, save_checkpoint
from support.parallel_checks import make_mesh, parallelize_model
from support.parallel_layers import DIM, EXPERTS, HIDDEN, Model, make_layer, make_model
from support.parallel_training import LAYOUTS, make_optimizer, train_distributed
from support.parallel_workers import gather_tensor
from support.published_layers import OPTIONS

PUBLISHED = Path(__file__).parents[1] / "published" / "cases.pt"
EXTRA = {"step": 3, "name": "run", "nested": {"empty": [], "pair": (1, None)}}
State = dict[str, Tensor]


def read_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Everything that a checkpoint has to bring back, whole, by name: parameters, buffers, and the state of each."""
    numbers = {name: gather_tensor(buffer) for name, buffer in model.named_buffers()}
    settings = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        numbers[name] = gather_tensor(parameter.detach())
        for key, value in optimizer.state[parameter].items():
            numbers[f"{name}.{key}"] = gather_tensor(value)
        numbers[f"{name}.lr"] = torch.tensor(settings[id(parameter)])
    return {name: value.clone() for name, value in numbers.items()}


def save_training_state(folder: Path, layout: str, layers: tuple[str, ...], step: int = 3) -> State:
    """Train three steps in a layout, save, and tell what was saved."""
    model, optimizer, _ = train_distributed(layout, steps=3, layers=layers)
    for group in optimizer.param_groups:
        group["lr"] = 0.0123
    path = save_checkpoint(folder, model, optimizer, step=step, extra=EXTRA)
    assert path.name == f"step-{step:09d}"
    assert list_checkpoints(folder)[-1] == path
    return read_state(model, optimizer)


def load_training_state(folder: Path, layout: str | None, layers: tuple[str, ...], saved: State) -> None:
    """Load into a layout (None: one process) whose numbers are others, and find the saved ones."""
    model = make_model(layers=layers)
    for parameter in model.parameters():
        nn.init.normal_(parameter.data)
    if layout is not None:
        LAYOUTS[layout](model)
    optimizer = make_optimizer(model)
    extra = load_checkpoint(folder, model, optimizer)
    assert extra == EXTRA
    found = read_state(model, optimizer)
    assert found.keys() == saved.keys()
    for name, value in found.items():
        assert torch.equal(value, saved[name]), name
    assert len(found) > 30


def save_after_a_kill(folder: Path, step: int) -> None:
    """One process finds the checkpoint that is whole, and writes the one that is not."""
    model = make_model()
    optimizer = make_optimizer(model)
    assert load_checkpoint(folder, model, optimizer) == EXTRA
    save_checkpoint(folder, model, optimizer, step=step, extra=EXTRA)


def resume_training(folder: Path, layout: str, steps: int) -> State:
    """Load, train on, and tell where that led."""
    model = train_distributed(layout, steps=steps, resume=folder)[0]
    return {name: gather_tensor(parameter.detach()) for name, parameter in model.named_parameters()}


def save_and_die(folder: Path, steps: tuple[int, int]) -> str:
    """Save; save again, but rank 1 is killed while it writes."""
    model = make_model()
    LAYOUTS["expert_parallel_only"](model)
    save_checkpoint(folder, model, make_optimizer(model), step=steps[0], extra=EXTRA)
    if dist.get_rank() == 1:
        write = dcp.FileSystemWriter.write_data

        def die(self: Any, *args: Any) -> None:
            write(self, *args)
            os._exit(9)

        dcp.FileSystemWriter.write_data = die  # type: ignore[method-assign]
    try:
        save_checkpoint(folder, model, make_optimizer(model), step=steps[1], extra=EXTRA)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


# ---- state dicts of one process ----


def check_state_dict_of_one_process(layout: str) -> None:
    """`load_state_dict` as in one process; under FSDP2 `set_model_state_dict`, as for any model."""
    state = perturb_state(make_model().state_dict())
    model: Model = make_model()
    LAYOUTS[layout](model)
    if "fsdp" in layout:
        set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))
    else:
        result = model.load_state_dict(state)
        assert not result.missing_keys
        assert not result.unexpected_keys
    for name, value in model.state_dict().items():
        assert torch.equal(gather_tensor(value), state[name]), name


def perturb_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype) if value.is_floating_point() else value
        for name, value in state.items()
    }


def check_published_checkpoint() -> None:
    """Recorded in mixture-of-experts 0.2.3 on two sequences: one on each of two ranks, loaded when already spread.

    Policy "random" draws a number a token: the second rank skips the first one's. (Not so with two levels, where the
    second draws for each outer expert: there policy "all".)
    """
    rank, seen = dist.get_rank(), 0
    for name, case in torch.load(PUBLISHED, weights_only=True).items():
        kind, num_experts, options = OPTIONS[name.rpartition("_")[0]]
        if ("random" in name and kind == "HeirarchicalMoE") or name.startswith("moe_drops"):  # the latter has 3 experts
            continue
        layer = getattr(mixture_of_experts, kind)(6, num_experts, **{"activation": nn.ReLU, **options})
        parallelize_model(layer.to(case["x"].dtype), make_mesh()).train(name.endswith("train"))
        layer.load_state_dict(case["state"])
        x = case["x"][rank : rank + 1].clone().requires_grad_()
        torch.manual_seed(1)
        torch.rand(rank, x.shape[1], dtype=torch.float32)
        out, loss = layer(x)
        ((out * case["cotangent"][rank : rank + 1]).sum() * 2 + loss).backward()
        compare_with_published(layer, out, loss, x, case)
        seen += 1
    assert seen == 12


def compare_with_published(layer: nn.Module, out: Tensor, loss: Tensor, x: Tensor, case: dict[str, Any]) -> None:
    """Outputs and gradients of this rank's half, and the ranks' mean of the rest, are the recorded ones."""
    rank = dist.get_rank()
    tolerance = 1e-9 if x.dtype == torch.double else 2e-6
    close = dict(rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out, case["out"][rank : rank + 1], **close)
    torch.testing.assert_close(x.grad / 2, case["grad_x"][rank : rank + 1], **close)
    loss = loss.detach()
    dist.all_reduce(loss)
    torch.testing.assert_close(loss / 2, case["loss"], **close)
    average_gradients(replicated_parameters(layer).values(), dist.group.WORLD)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(gather_tensor(parameter.grad), case["grads"][name], **close, msg=name)


def save_local_part(folder: Path) -> None:
    """What a rank has of a stack, as a DTensor and as a plain tensor."""
    state = parallelize_model(make_layer("top2"), make_mesh()).state_dict()
    plain = {key: value.to_local() if isinstance(value, DTensor) else value for key, value in state.items()}
    torch.save([state, plain], folder / f"{dist.get_rank()}.pt")


def check_part_of_other_ranks(folder: Path, saved_by: int) -> None:
    """A part that a rank of other ranks saved is refused by name."""
    for state in torch.load(folder / f"{saved_by - 1 - dist.get_rank()}.pt", weights_only=True):
        with pytest.raises(RuntimeError, match=r"(?s)experts\.w1.*experts\.w2"):
            parallelize_model(make_layer("top2"), make_mesh()).load_state_dict(state)


def check_wrong_shape_is_named() -> None:
    moe = parallelize_model(MoE(DIM, EXPERTS, HIDDEN), make_mesh())
    state = MoE(DIM, EXPERTS, HIDDEN + 1).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for experts.w1: .*\[8, 8, 13\].*\[8, 8, 12\]"):
        moe.load_state_dict(state)


def save_without_changes(folder: Path, layout: str) -> None:
    """Train three steps and save."""
    model, optimizer, _ = train_distributed(layout, steps=3)
    save_checkpoint(folder, model, optimizer, step=3, extra={"step": 3})
