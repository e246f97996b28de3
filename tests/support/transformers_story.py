"""Experts and a gate of one's own in a model of `transformers`: built, and trained by the Trainer, compiled.

`python -m support.transformers_story FOLDER` in `tests` trains as one of the processes that the environment tells of.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from mixture_of_experts import Choices, RoutedExperts, TokenChoiceGate
from mixture_of_experts.huggingface import replace_ffn
from mixture_of_experts.ops import grouped_product
from support.transformers_trainers import leave, one_of, run_two

VOCABULARY, DIM, NUM_EXPERTS, BATCH, STEPS = 50, 32, 4, 4, 60


class LowRankExperts(RoutedExperts):
    """silu(x u) v, with u (e, d, r) and v (e, r, d)."""

    def __init__(self, dim: int, num_experts: int, rank: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.u = nn.Parameter(torch.randn(num_experts, dim, rank) * dim**-0.5)
        self.v = nn.Parameter(torch.randn(num_experts, rank, dim) * rank**-0.5)

    def compute(self, rows: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        hidden = F.silu(grouped_product(rows, self.u, num_tokens_per_expert))
        return grouped_product(hidden, self.v, num_tokens_per_expert)


class CosineGating(TokenChoiceGate):
    """The k experts whose directions are nearest to the token's."""

    def __init__(self, dim: int, num_experts: int, k: int = 2, **settings) -> None:
        super().__init__(dim, num_experts, k, **settings)
        self.w_gating = nn.Parameter(torch.randn(dim, num_experts))

    def decide(self, tokens) -> Choices:
        logits = 5 * self.product(F.normalize(tokens.x, dim=-1), F.normalize(self.w_gating, dim=0))
        probs = logits.softmax(dim=-1)
        weight, expert = probs.topk(self.k, dim=-1)
        return Choices(expert, weight, probs, {"balance": self.balance_loss(tokens, probs, expert)})


def build() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=DIM,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    replace_ffn(model, NUM_EXPERTS, gate=CosineGating, loss_coef=0.1)
    for layer in model.model.layers:
        layer.mlp.moe.experts = LowRankExperts(DIM, NUM_EXPERTS, rank=8)
    return model


def rows(number: int = 32) -> list[dict[str, Tensor]]:
    """Sequences that count, with padding: as many tokens in each, so that all processes have as many labels."""
    starts = torch.arange(number).unsqueeze(-1)
    ids = (starts + torch.arange(12)) % (VOCABULARY - 1) + 1
    mask = torch.ones_like(ids)
    ids[:, 10:], mask[:, 10:] = 0, 0
    labels = torch.where(mask.bool(), ids, -100)
    return [{"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in zip(ids, mask, labels, strict=True)]


def train(folder: Path, *, compiled: bool = True) -> tuple[Trainer, list[torch.fx.GraphModule]]:
    """In as many processes as there are: together they take BATCH sequences a step. Also the graphs that it made."""
    model, graphs = build(), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    if compiled:
        model.compile(backend=backend)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", "1")),
        max_steps=STEPS,
        learning_rate=1e-2,
        optim="adamw_torch",
        adam_epsilon=1e-6,  # or a rounding error of a gradient near 0 would be a whole step
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    made = Trainer(model, arguments, train_dataset=rows())
    made.train()
    return made, graphs


def targets(graphs: list[torch.fx.GraphModule]) -> set[str]:
    """What the graphs call, and those within them."""
    inner = (part for graph in graphs for part in graph.modules() if isinstance(part, torch.fx.GraphModule))
    return {str(node.target) for part in inner for node in part.graph.nodes}


def losses(made: Trainer) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def in_two_processes(folder: Path) -> None:
    """Each writes `RANK.pt`; the first one saves the model, too."""
    run_two("support.transformers_story", folder, lambda rank: [str(folder)])


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with one_of(2):
        made, graphs = train(folder / "run")
        torch.save((made.model.state_dict(), targets(graphs)), folder / f"{os.environ['RANK']}.pt")
        made.save_model(str(folder / "model"))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
