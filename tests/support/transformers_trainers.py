"""How much of the auxiliary loss an optimizer's step receives: `python -m support.transformers_trainers` in `tests`.

A probe is a parameter whose gradient comes only through the auxiliary losses of layers, to which it is added times
their coefficient. So its gradient in an optimizer's step, divided by the coefficient and the number of layers, is the
factor: 1 if the step received the mean of the auxiliary losses of its micro-batches. docs/fine_tuning.md
says in words what this prints.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from mixture_of_experts import MoE
from mixture_of_experts.huggingface import aux_loss, replace_ffn
from support.transformers_models import ARCHITECTURES, VOCABULARY, disable_dropout

COEFFICIENT = 0.25
Case = Callable[[nn.Module, int, bool, Path], None]


def build_model(name: str = "llama") -> Any:
    model = disable_dropout(ARCHITECTURES[name].build()).train()
    replace_ffn(model, num_experts=4, loss_coef=COEFFICIENT)
    model.probe = nn.Parameter(torch.zeros(()))
    for module in model.modules():
        if isinstance(module, MoE):
            module.register_forward_hook(Probe(model.probe))
    return model


class Probe:
    """Forward hook of a layer."""

    def __init__(self, probe: nn.Parameter) -> None:
        self.probe = probe

    def __call__(self, moe: nn.Module, args: object, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        out, loss = output
        return out + 0 * self.probe, loss + COEFFICIENT * self.probe  # DDP looks for parameters in outputs


def measure_factor(case: Case, accumulation: int, padding: bool, name: str = "llama") -> float:
    """That of the first optimizer step."""
    torch.manual_seed(0)
    model, found = build_model(name), []
    layers = sum(isinstance(module, MoE) for module in model.modules())

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        found.append(0.0 if model.probe.grad is None else model.probe.grad.item())

    hook = register_optimizer_step_post_hook(keep)
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case(model, accumulation, padding, Path(folder))
    finally:
        hook.remove()
    return found[0] / (COEFFICIENT * layers)


# What is trained on


def make_texts(padding: bool, number: int = 16) -> list[str]:
    draw = random.Random(0)
    return [" ".join(f"w{draw.randrange(50)}" for _ in range(8 - i % 3 if padding else 8)) for i in range(number)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 4))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def make_rows(padding: bool, number: int = 16) -> list[dict[str, Tensor]]:
    encoded = make_tokenizer()(make_texts(padding, number), padding=True, return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    labels = torch.where(mask.bool(), ids, -100)
    return [{"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in zip(ids, mask, labels, strict=True)]


def make_settings(accumulation: int, folder: Path) -> dict[str, Any]:
    return dict(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        learning_rate=0.0,
        optim="sgd",
        max_grad_norm=0.0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )


def make_dataset(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    return Dataset.from_list(rows)


# The trainers


def run_trainer(model: nn.Module, accumulation: int, padding: bool, folder: Path, kind: type = Trainer, **more) -> None:
    arguments = TrainingArguments(**make_settings(accumulation, folder), **more)
    kind(model, arguments, train_dataset=make_rows(padding)).train()


def run_label_smoothing(model: nn.Module, accumulation: int, padding: bool, folder: Path, kind: type = Trainer) -> None:
    run_trainer(model, accumulation, padding, folder, kind, label_smoothing_factor=0.1)


def run_label_smoothing_and_aux_loss(model: nn.Module, accumulation: int, padding: bool, folder: Path) -> None:
    class WithAuxLoss(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, out = super().compute_loss(model, inputs, True, num_items_in_batch)
            loss = loss + aux_loss(model) / self.current_gradient_accumulation_steps
            return (loss, out) if return_outputs else loss

    run_label_smoothing(model, accumulation, padding, folder, WithAuxLoss)


def run_trl(kind: str, data: list[dict[str, Any]], *models: Any, of: dict[str, Any], **more) -> None:
    """Train with TRL's trainer of a kind, settings `of` all trainers and `more`."""
    import trl

    config = getattr(trl, f"{kind}Config")(**of, bf16=False, **more)
    made = getattr(trl, f"{kind}Trainer")
    made(*models, args=config, train_dataset=make_dataset(data), processing_class=make_tokenizer()).train()


def run_sft(model: nn.Module, accumulation: int, padding: bool, folder: Path, **more) -> None:
    data = [{"text": text} for text in make_texts(padding)]
    run_trl("SFT", data, model, of=make_settings(accumulation, folder), **more)


def make_preferences(padding: bool) -> list[dict[str, str]]:
    all_texts = make_texts(padding, 48)
    parts = zip(all_texts[:16], all_texts[16:32], all_texts[32:], strict=True)
    return [{"prompt": a, "chosen": f" {b}", "rejected": f" {c}"} for a, b, c in parts]


def run_dpo(model: nn.Module, accumulation: int, padding: bool, folder: Path, **more) -> None:
    run_trl(
        "DPO", make_preferences(padding), model, copy.deepcopy(model), of=make_settings(accumulation, folder), **more
    )


def run_kto(model: nn.Module, accumulation: int, padding: bool, folder: Path, **more) -> None:
    data = [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
        for i, row in enumerate(make_preferences(padding))
    ]
    run_trl("KTO", data, model, copy.deepcopy(model), of=make_settings(accumulation, folder), **more)


def run_grpo(model: nn.Module, accumulation: int, padding: bool, folder: Path, **more) -> None:
    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(completion)) for completion in completions]

    data = [{"prompt": text} for text in make_texts(padding)]
    own = dict(num_generations=2, max_completion_length=6, beta=0.0)
    run_trl("GRPO", data, model, reward, of=make_settings(accumulation, folder), **own, **more)


def make_batches(padding: bool, accumulation: int) -> Iterator[dict[str, Tensor]]:
    """As many as a step takes, those of this process."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    given = make_rows(padding, 2 * accumulation * processes)[rank::processes]
    for i in range(0, len(given), 2):
        yield {name: torch.stack([row[name] for row in given[i : i + 2]]) for name in given[i]}


def run_accelerate(model: nn.Module, accumulation: int, padding: bool, folder: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    for batch in make_batches(padding, accumulation):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()


def run_custom_loss(model: nn.Module, accumulation: int, padding: bool, folder: Path) -> None:
    run: Any = model
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        run = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for batch in make_batches(padding, accumulation):
        labels = batch.pop("labels")
        logits = run(**batch).logits[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten()) + aux_loss(model)
        (loss / accumulation).backward()
    optimizer.step()


def run_lightning(model: nn.Module, accumulation: int, padding: bool, folder: Path) -> None:
    import lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, Tensor]) -> Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    data: Any = make_rows(padding)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="auto" if processes == 1 else "ddp",
        max_steps=1,
        accumulate_grad_batches=accumulation,
        default_root_dir=folder,
        **quiet,
    ).fit(Module(), torch.utils.data.DataLoader(data, batch_size=2))


CASES: dict[str, tuple[Case, str | None]] = {
    "`Trainer`": (run_trainer, None),
    "`Trainer`, label smoothing": (run_label_smoothing, None),
    "the same, `aux_loss(model)` added": (run_label_smoothing_and_aux_loss, None),
    "TRL, SFT": (run_sft, "trl"),
    "TRL, DPO": (run_dpo, "trl"),
    "TRL, KTO": (run_kto, "trl"),
    "TRL, GRPO": (run_grpo, "trl"),
    "accelerate": (run_accelerate, None),
    "Lightning": (run_lightning, "lightning"),
    "a loss of your own, `+ aux_loss(model)`": (run_custom_loss, None),
}


def measure_factors(names: list[str]) -> dict[str, list[float]]:
    """Of each trainer: without accumulation, of four micro-batches, and of four with padding."""
    found = {}
    for name in names:
        case, package = CASES[name]
        if package is None or importlib.util.find_spec(package):
            found[name] = [measure_factor(case, *at) for at in ((1, False), (4, False), (4, True))]
    return found


@contextmanager
def join_processes(processes: int) -> Iterator[None]:
    """This process as one of several that were started."""
    if processes > 1:
        at, rank = f"file://{os.environ['RENDEZVOUS']}", int(os.environ["RANK"])
        dist.init_process_group("gloo", init_method=at, rank=rank, world_size=processes)
    yield
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def exit_process() -> None:
    """End one of two processes here. What still holds the group of processes would end while Python does. There torch
    2.13 was seen to wait for ever, in both, with no line of Python on a stack."""
    sys.stderr.flush()
    os._exit(0)


def in_two_processes(names: list[str], folder: Path) -> dict[str, list[float]]:
    """What the first of two finds."""
    run_two("support.transformers_trainers", folder, lambda rank: ["--results", str(folder / f"{rank}.json"), *names])
    return json.loads((folder / "0.json").read_text())


def run_two(module: str, folder: Path, arguments: Callable[[int], list[str]]) -> None:
    """Run a module of `tests` in two processes, each with arguments by its rank, in the environment of torchrun.

    They meet at a file: a port that is free at one moment may be taken at the next. If one fails or they take 500
    seconds, the error has what both wrote, and where a process that still ran was.
    """
    running = []
    for rank in range(2):
        more = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0")
        more |= dict(TORCHELASTIC_RUN_ID="two", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        more |= dict(RENDEZVOUS=str(folder / "rendezvous"), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
        with (folder / f"{rank}.txt").open("w") as errors:
            running.append(
                subprocess.Popen(
                    [sys.executable, "-X", "faulthandler", "-m", module, *arguments(rank)],
                    cwd=Path(__file__).parent.parent,
                    env={**os.environ, **more},
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                )
            )
    end = time.monotonic() + 500
    while time.monotonic() < end and {process.poll() for process in running} in ({None}, {None, 0}):
        time.sleep(0.05)
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGABRT)  # it writes its threads' stacks
    codes = [process.wait(timeout=60) for process in running]
    if any(codes):
        parts = (
            f"rank {i} ended with {code}:\n{(folder / f'{i}.txt').read_text()[-6000:]}" for i, code in enumerate(codes)
        )
        raise RuntimeError("\n\n".join(parts))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=list(CASES))
    parser.add_argument("--results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.results:
        with join_processes(int(os.environ.get("WORLD_SIZE", 1))):
            found = measure_factors(arguments.names)
        Path(arguments.results).write_text(json.dumps(found))
        exit_process()
    one = measure_factors(arguments.names)
    with tempfile.TemporaryDirectory() as folder:
        two = in_two_processes(arguments.names, Path(folder))
    print("| | 1 | 4 | 4, padding | two processes: 1 | 4 | 4, padding |")
    print("|---|---|---|---|---|---|---|")
    for name, values in one.items():
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in (*values, *two[name])) + " |")


if __name__ == "__main__":
    main()
