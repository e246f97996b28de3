"""The Trainer and TRL's SFT with models spread by `DistributedConfig`, against one process that sees all batches.

`torchrun --nproc-per-node 2 -m support.engines_trainers` in `tests` runs all cells, and prints what each shows.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from mixture_of_experts import TopKGating, balance_experts
from mixture_of_experts.huggingface import BalanceCallback, upcycle
from mixture_of_experts.huggingface.feed_forward import find_feed_forwards
from support import engines
from support.checkpoint_recipe import load_checkpoint, save_checkpoint
from support.engines import LAYOUTS, Differences, Sizes, relative_difference, silence_warnings
from support.parallel_workers import gather_tensor
from support.transformers_models import ARCHITECTURES, VOCABULARY
from support.transformers_trainers import make_tokenizer

NUM_ROWS, LENGTH, ACCUMULATION, LEARNING_RATE = 8, 12, 2, 0.1


def build_model() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    model = ARCHITECTURES["llama"].build()
    upcycle(model, num_experts=4, loss_coef=0.5, gate=partial(TopKGating, k=2, expert_bias=True))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def make_rows() -> Tensor:
    torch.manual_seed(1)
    return torch.randint(3, VOCABULARY, (NUM_ROWS, LENGTH))


def step_single_process(model: nn.Module, coef: float | None = None) -> dict[str, Tensor]:
    """The gradients of one optimizer step on all rows in two micro-batches, which is made."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for layer in find_feed_forwards(model):
        layer.moe.loss_coef = layer.moe.loss_coef if coef is None else coef
    with balance_experts(model.train(), optimizer):
        for part in make_rows().chunk(ACCUMULATION):
            model(input_ids=part, labels=part, num_items_in_batch=NUM_ROWS * (LENGTH - 1)).loss.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        optimizer.step()
    return gradients


def make_settings(folder: Path, ranks: int) -> dict[str, Any]:
    return dict(
        output_dir=str(folder),
        per_device_train_batch_size=NUM_ROWS // ACCUMULATION // ranks,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
    )


def make_trainer(kind: str, model: nn.Module, folder: Path, ranks: int) -> Any:
    data = [{"input_ids": row, "labels": row} for row in make_rows().tolist()]
    if kind == "Trainer":
        arguments = TrainingArguments(**make_settings(folder, ranks))
        return Trainer(model, arguments, train_dataset=data, callbacks=[BalanceCallback()])
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(**make_settings(folder, ranks), max_length=None)
    given = Dataset.from_list(data)
    return SFTTrainer(
        model, args=arguments, train_dataset=given, processing_class=make_tokenizer(), callbacks=[BalanceCallback()]
    )


def compare_trainers(folder: Path, kind: str, sizes: Sizes) -> Differences:
    """What a step's gradients, the saved weights and the bias differ from one process by; and the auxiliary loss's
    factor in the routers' gradients, 1 if the step received the mean over ranks and micro-batches."""
    torch.set_default_dtype(torch.float32)
    config = DistributedConfig(**sizes)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
    found: dict[str, Tensor] = {}

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        found.update((name, gather_tensor(p.grad).clone()) for name, p in model.named_parameters())

    saved = folder / f"{kind}, {sizes}"
    with warnings.catch_warnings(), mock.patch(STRICT_WARNINGS):
        warnings.simplefilter("ignore")
        trainer = make_trainer(kind, model, saved, config.dp_size)
        hook = register_optimizer_step_pre_hook(keep)
        trainer.train()
        hook.remove()
        trainer.save_model(str(saved))
    dist.barrier()

    alone, without = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    wanted, plain = step_single_process(alone), step_single_process(without, coef=0.0)
    routers = [name for name in wanted if name.endswith("w_gating")]
    given, share = (torch.cat([(of[n] - plain[n]).flatten() for n in routers]) for of in (found, wanted))
    again = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    bias = [name for name in again if name.endswith("expert_bias")]
    assert bias
    assert all(again[name].abs().max() > 0 and torch.equal(again[name], alone.state_dict()[name]) for name in bias)
    return {
        "gradients": max(relative_difference(found[name], wanted[name]) for name in wanted),
        "weights": max(relative_difference(again[name], value) for name, value in alone.state_dict().items()),
        "factor - 1": abs(float(given @ share / share.square().sum()) - 1),
    }


#: accelerate refuses tensor parallelism on CPUs alone; this refusal is switched off
STRICT_WARNINGS = "accelerate.parallelism_config.ParallelismConfig._validate_accelerator"


def check_trainers(folder: Path) -> None:
    run_as_rank()
    for kind, layout in REPORTED:
        found = compare_trainers(folder, kind, LAYOUTS[layout])
        assert max(found.values()) < 1e-5, (kind, layout, found)


#: what the tests run; the command runs all
REPORTED = (
    ("Trainer", "fsdp 2"),
    ("Trainer", "fsdp 2, ep 2"),
    ("Trainer", "tp 2, ep 2"),
    ("SFTTrainer", "fsdp 2, ep 2"),
)


def check_all(folder: Path) -> None:
    """What the tests show, in one start of the processes."""
    engines.check_all(folder)
    check_trainers(folder / "trainers")
    check_resume(folder / "trainers", {name: LAYOUTS[name] for name in ("fsdp 2, ep 2", "tp 2, ep 2")})
    check_refusals(folder / "trainers")


def check_refusals(folder: Path) -> None:
    """What transformers and accelerate refuse: docs/distributed/trainers.md says so."""
    cut, whole = (
        AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**LAYOUTS[layout]))
        for layout in ("tp 2", "fsdp 2")
    )
    options = make_settings(folder / "refused", 1)
    with pytest.raises(ValueError, match="optimizer state cannot be checkpointed"):
        Trainer(whole, TrainingArguments(**{**options, "save_strategy": "steps"}))
    with pytest.raises(ValueError, match=r"ParallelismConfig is only compatible .* got DistributedType.MULTI_CPU"):
        Trainer(cut, TrainingArguments(**options))


def run_as_rank() -> None:
    """What torchrun tells a process."""
    silence_warnings()
    rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500")


def check_resume(folder: Path, layouts: dict[str, Sizes]) -> None:
    """Weights and optimizer of one layout go on in another one, by the recipe for distributed checkpoints."""
    torch.set_default_dtype(torch.float32)
    part = make_rows()[:2]
    for i, (layout, sizes) in enumerate(layouts.items()):
        run = folder / f"run {layout}"
        model, optimizer = start_training(folder, sizes)
        run_steps(model, optimizer, part)
        save_checkpoint(run, model, optimizer, step=1, extra={"step": 1})
        run_steps(model, optimizer, part)
        other, its = start_training(folder, list(layouts.values())[i - 1])
        assert load_checkpoint(run, other, its) == {"step": 1}
        run_steps(other, its, part)
        for (name, value), found in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
            assert relative_difference(gather_tensor(found), gather_tensor(value)) < 1e-5, (layout, name)


def start_training(folder: Path, sizes: Sizes) -> tuple[Any, torch.optim.Optimizer]:
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**sizes)).train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)


def run_steps(model: nn.Module, optimizer: torch.optim.Optimizer, part: Tensor) -> None:
    model(input_ids=part, labels=part).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    dist.init_process_group("gloo")
    run_as_rank()
    names: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    folder = Path(names[0])
    if dist.get_rank() == 0:
        build_model().save_pretrained(folder)
    dist.barrier()
    for kind in ("Trainer", "SFTTrainer"):
        for layout, sizes in LAYOUTS.items():
            found = compare_trainers(folder, kind, sizes)
            if dist.get_rank() == 0:
                print(f"{kind}, {layout:14}", *(f"{what} {value:.1e}" for what, value in found.items()), flush=True)
    check_resume(folder, LAYOUTS)
    print("every layout goes on in the one before it", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
