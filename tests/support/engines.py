"""Models with experts under the `DistributedConfig` of transformers against one process, cell by cell.

`python -m support.engines` in `tests` runs all cells, and prints the largest relative differences of each.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from mixture_of_experts import Top2Gating, TopKGating
from mixture_of_experts.huggingface import from_pretrained, from_transformers, replace_ffn, upcycle
from mixture_of_experts.huggingface.feed_forward import find_feed_forwards
from mixture_of_experts.parallel import ShardedExperts
from support.parallel_workers import Workers, gather_tensor
from support.transformers_models import ARCHITECTURES, LLAMA, SINGLE_NETWORK, make_causal, make_two_lengths

Sizes = dict[str, int]
Differences = dict[str, float]

LAYOUTS: dict[str, Sizes] = {
    "fsdp 2": dict(fsdp_size=2),
    "tp 2": dict(tp_size=2),
    "tp 2, ep 2": dict(tp_size=2, ep_size=2),
    "fsdp 2, ep 2": dict(fsdp_size=2, ep_size=2),
}
FOUR_RANK_LAYOUTS: dict[str, Sizes] = {
    "fsdp 2, tp 2": dict(fsdp_size=2, tp_size=2),
    "fsdp 2, tp 2, ep 2": dict(fsdp_size=2, tp_size=2, ep_size=2),
    "fsdp 2, tp 2, ep 4": dict(fsdp_size=2, tp_size=2, ep_size=4),
    "fsdp 4, ep 2": dict(fsdp_size=4, ep_size=2),
    "2 x fsdp 2, ep 2": dict(dp_replicate_size=2, fsdp_size=2, ep_size=2),
}
LOADERS: dict[str, Any] = {"AutoModel": AutoModelForCausalLM.from_pretrained, "ours": from_pretrained}
TOLERANCE: Differences = {"loss": 1e-6, "logits": 3e-6, "gradients": 5e-6}  # relative, in float32
BFLOAT16_TOLERANCE: Differences = {"loss": 0.01, "logits": 0.03, "gradients": 0.06}


@dataclass(frozen=True)
class Cell:
    """What is computed: a model, and how it is trained."""

    architecture: str = "llama"
    build: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    side: str = "right"
    rounds: int = 1
    checkpointing: bool = False
    dtype: torch.dtype = torch.float32
    stock: str = ""  # of a model of transformers with experts of its own, their `experts_implementation`
    is_quick: bool = False  # whether all tokens choose experts of the first rank


CELLS: dict[str, Cell] = {
    "padding on the right": Cell(),
    "padding on the left": Cell(side="left"),
    "checkpointing, two rounds": Cell(checkpointing=True, rounds=2),
    "bfloat16": Cell(dtype=torch.bfloat16),
    "limited capacity": Cell(settings=dict(gate=SINGLE_NETWORK)),
    "shared expert": Cell(settings=dict(shared_expert=16)),
    "one layer of two": Cell(settings=dict(layers=[1])),
    "sparse blocks of Mixtral": Cell(architecture="mixtral"),
    "stock Mixtral, eager": Cell(architecture="mixtral", stock="eager"),
    "stock Mixtral, ours": Cell(architecture="mixtral", stock="mixture_of_experts"),
    "stock Mixtral, grouped_mm, checkpointing": Cell(architecture="mixtral", stock="grouped_mm", checkpointing=True),
    "stock Mixtral, an idle rank": Cell(architecture="mixtral", stock="eager", is_quick=True),
    "tied embeddings": Cell(build=dict(tie_word_embeddings=True)),
    "Phi-3": Cell(architecture="phi3"),
    "Qwen3": Cell(architecture="qwen3"),
}
RANDOM_CELLS = {
    "jitter": Cell(settings=dict(gate=partial(TopKGating, k=2, jitter=0.9))),
    "random second choice": Cell(settings=dict(gate=partial(Top2Gating, second_threshold_train=0.9))),
}
#: what the tests run; the command runs all
FIRST_CELLS, OTHER_CELLS = (
    "padding on the right",
    ["checkpointing, two rounds", "bfloat16", "limited capacity", "one layer of two"],
)
STOCK_CELLS = ["stock Mixtral, ours", "stock Mixtral, an idle rank"]


def build_model(cell: Cell, num_experts: int = 4) -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    if cell.architecture == "mixtral":
        model = make_causal("Mixtral", dict(LLAMA, num_local_experts=num_experts)).build()
        return model.to(cell.dtype) if cell.stock else from_transformers(model)
    model = ARCHITECTURES[cell.architecture].build(**cell.build)
    change = replace_ffn if "gate" in cell.settings else upcycle
    change(model, num_experts=num_experts, loss_coef=0.5, **cell.settings)
    for parameter in model.parameters():  # experts and networks of a layer are no copies of each other
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(cell.dtype)


def make_batches(number: int, side: str) -> list[dict[str, Tensor]]:
    """So many batches with padding and equally many labels."""
    torch.manual_seed(1)
    found = []
    for _ in range(number):
        _, batch = make_two_lengths(side)
        found.append({**batch, "labels": torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)})
    return found


def train_model(model: nn.Module, rounds: list[dict[str, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """The mean loss and the logits of all rounds; gradients of the mean stay on the model."""
    outputs = []
    for batch in rounds:
        outputs.append(model(**batch))
        (outputs[-1].loss / len(rounds)).backward()
    return torch.stack([out.loss.detach() for out in outputs]).mean(), [
        gather_tensor(out.logits).detach() for out in outputs
    ]


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-12))


def compute_gradient_difference(model: nn.Module, alone: nn.Module) -> float:
    """The largest difference of a gradient, relative to the norm of the gradient."""
    worst = 0.0
    for (name, parameter), (_, other) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if other.grad is not None:
            worst = max(worst, relative_difference(gather_tensor(parameter.grad), other.grad))
    return worst


def compare_layouts(folder: Path, cell: Cell, sizes: Sizes, loader: str) -> Differences:
    """The differences of this rank's loss, logits and gradients from one process that sees all batches."""
    silence_warnings()
    torch.set_default_dtype(torch.float32)
    config = DistributedConfig(**sizes, ep_implementation="mixture_of_experts" if cell.stock else "auto")
    load = partial(LOADERS[loader], experts_implementation=cell.stock) if cell.stock else LOADERS[loader]
    model, alone = load(folder, distributed_config=config).train(), load(folder).train()
    assert isinstance(model, FSDPModule) == (config.dp_size > 1)
    for layer in find_feed_forwards(model):
        assert isinstance(layer.moe.experts, ShardedExperts) == (config.ep_size > 1)
    if cell.is_quick:
        select_quick_cells(model)
        select_quick_cells(alone)
    if cell.checkpointing:
        model.activation_checkpointing_enable()
    given = make_batches(config.dp_size * cell.rounds, cell.side)
    place = dist.get_rank() // config.tp_size
    loss, logits = train_model(model, given[place :: config.dp_size])
    every = [given[i * config.dp_size : (i + 1) * config.dp_size] for i in range(cell.rounds)]
    wanted, wanted_logits = train_model(alone, [{n: torch.cat([b[n] for b in r]) for n in r[0]} for r in every])
    dist.all_reduce(loss)
    rows = [rows.chunk(config.dp_size)[place] for rows in wanted_logits]
    return {
        "loss": relative_difference(loss / dist.get_world_size(), wanted),
        "logits": relative_difference(torch.cat(logits), torch.cat(rows)),
        "gradients": compute_gradient_difference(model, alone),
    }


def select_quick_cells(model: Any) -> None:
    """Let the routers of a stock model choose the first two experts alone."""
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, found: (*found[:2], found[2] % 2))


def check_cells(folder: Path, cells: list[str], layouts: dict[str, Sizes], loaders: list[str]) -> None:
    """All of them, in one start of the processes."""
    for name in cells:
        close = TOLERANCE if CELLS[name].dtype == torch.float32 else BFLOAT16_TOLERANCE
        for layout, sizes in layouts.items():
            for loader in loaders:
                found = compare_layouts(folder / name, CELLS[name], sizes, loader)
                far = {what: value for what, value in found.items() if not value <= close[what]}
                assert not far, (name, layout, loader, far)


def check_all(folder: Path) -> None:
    """What the tests show, in one start of the processes."""
    with_experts = {name: sizes for name, sizes in LAYOUTS.items() if "ep_size" in sizes}
    check_cells(folder, [FIRST_CELLS], LAYOUTS, list(LOADERS))
    check_cells(folder, [*OTHER_CELLS, *STOCK_CELLS], with_experts, ["AutoModel"])
    check_saving(folder, FIRST_CELLS)
    check_refused(folder / "three")
    check_seeds(folder)
    check_modes_differ(folder, STOCK_CELLS[0])


def silence_warnings() -> None:
    """Ignore what torch warns of in models of transformers without experts too, under fsdp beside tp."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    logging.disable_progress_bar()


def check_saving(folder: Path, cell: str) -> None:
    """Trained weights are saved whole from every layout, and load into the layout before it and one process."""
    silence_warnings()
    torch.set_default_dtype(torch.float32)
    before = list(LAYOUTS.values())[-1]
    for layout, sizes in LAYOUTS.items():
        model = from_pretrained(folder / cell, distributed_config=DistributedConfig(**sizes)).train()
        train_model(model, make_batches(1, "right"))
        torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False).step()
        trained = {name: gather_tensor(value).clone() for name, value in model.state_dict().items()}
        model.save_pretrained(folder / layout)
        for other in ({}, before):
            config = DistributedConfig(**other) if other else None
            again = AutoModelForCausalLM.from_pretrained(folder / layout, distributed_config=config).state_dict()
            assert again.keys() == trained.keys()
            for name, value in again.items():
                assert torch.equal(gather_tensor(value), trained[name]), (layout, other, name)
        before = sizes


def check_modes_differ(folder: Path, cell: str) -> None:
    """If one rank evaluates where the other trains, both say so."""
    config = DistributedConfig(fsdp_size=2, ep_size=2, ep_implementation="mixture_of_experts")
    model = AutoModelForCausalLM.from_pretrained(folder / cell, distributed_config=config)
    model.train(dist.get_rank() == 0)
    with pytest.raises(ValueError, match=r"rank \d sends .* (in training|in evaluation)"):
        model(input_ids=torch.ones(1, 4, dtype=torch.int64))


def check_seeds(folder: Path) -> None:
    """Ranks that share a batch must draw the same numbers for gates that choose at random."""
    for name in RANDOM_CELLS:
        config = DistributedConfig(tp_size=2, ep_size=2)
        model = from_pretrained(folder / name, distributed_config=config).train()
        (batch,) = make_batches(1, "right")
        torch.manual_seed(0)
        model(**batch).loss.backward()
        torch.manual_seed(dist.get_rank())
        with pytest.raises(ValueError, match="ranks that share a batch chose different experts for it"):
            model(**batch)


def check_refused(folder: Path) -> None:
    """An expert count that `ep_size` does not divide is an error on every rank."""
    for loader in LOADERS.values():
        with pytest.raises(ValueError, match="3 experts cannot be divided evenly among 2 ranks"):
            loader(folder, distributed_config=DistributedConfig(tp_size=2, ep_size=2))


def save_models(folder: Path, cells: list[str]) -> None:
    logging.disable_progress_bar()
    for name in cells:
        build_model({**CELLS, **RANDOM_CELLS}[name]).save_pretrained(folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", nargs="*", default=list(CELLS))
    cells, workers = parser.parse_args().cells, Workers()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_models(folder, cells)
        for cell in cells:
            for ranks, layouts in ((2, LAYOUTS), (4, FOUR_RANK_LAYOUTS)):
                for layout, sizes in layouts.items():
                    for loader in list(LOADERS)[: 1 if CELLS[cell].stock else 2]:
                        print_results(
                            f"{cell}, {layout}, {loader}", workers, ranks, folder / cell, CELLS[cell], sizes, loader
                        )
    workers.stop()


def print_results(title: str, workers: Workers, ranks: int, *arguments: Any) -> None:
    """Print the largest differences of any rank, or the error of the first one."""
    found = workers.outcomes(compare_layouts, ranks, *arguments)
    if isinstance(found[0], dict):
        print(f"{title:50}", *(f"{what} {max(one[what] for one in found):.1e}" for what in found[0]), flush=True)
    else:
        print(f"{title:50}", str(found[0]).strip().splitlines()[-1], flush=True)


if __name__ == "__main__":
    from support import engines  # so that the processes find its functions by the module's name

    engines.main()
