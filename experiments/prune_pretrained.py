"""Which experts can go? SmolLM2 with trained experts, pruned by each rule to fewer and fewer of them.

    python -m tests.support.pretrained           # fetches the model
    python -m experiments.prune_pretrained       # trains once (ten minutes of one core), then the table (three)

The last four layers have eight experts, of which a token uses two. A tenth of each expert's hidden units is drawn
again, and the routers learn at ten times the rate: on fresh copies every pruning is free and shows nothing. The
trained weights stay in the cache of the pretrained models, so that the table comes again without training.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from mixture_of_experts.huggingface import expert_scores, prune
from tests.support.pretrained import cache

from .language_model.corpus import Batches
from .language_model.report import format_rows
from .upcycle_pretrained import (
    BATCH,
    CONTEXT,
    Run,
    Text,
    Variant,
    evaluation,
    load,
    prepare,
    pretrained,
    split,
    train_model,
)

VARIANT = Variant("a tenth drawn again, routers at ten times the rate", dict(redraw=0.1), router_rate=10.0)
LAYERS, RATE, SEED, STEPS = 4, 1e-3, 0, 200
KEEP, CALIBRATION, DRAWS = (7, 6, 5, 4, 3, 2), 16, 3  # experts; batches of text that rules read; random choices


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=cache() / "prune_pretrained.pt", help="the trained layers")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the training, if the weights are not there")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    text = load()
    if not args.weights.exists():
        train(args.weights, text, args.steps)
    print(table(args.weights, text))
    return 0


def start() -> tuple[Any, Callable[[Tensor], Tensor], list[Any]]:
    """The last layers with fresh experts, what computes the states below them, and the routers' weights."""
    torch.manual_seed(SEED)
    model = pretrained()
    return model, split(model, LAYERS), prepare(model, VARIANT)


def train(path: Path, text: Text, steps: int) -> None:
    model, below, routers = start()
    run = Run("different", LAYERS, RATE, SEED, steps)
    for record in train_model(model, below, VARIANT, routers, run, text):
        print(f"step {record['step']}: {record['bits']:.4f} bits a byte, {record['seconds']:.0f} s", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: value for name, value in model.state_dict().items() if ".mlp." in name}, path)


def table(path: Path, text: Text) -> str:
    """Held-out bits a byte by experts kept and rule, and what the trained experts have in common."""
    model, below, _ = start()
    model.load_state_dict(torch.load(path, weights_only=True), strict=False)
    batches = Batches(text.train, CONTEXT, BATCH, SEED + 1)
    read = [dict(inputs_embeds=below(batches.next()[:, :-1]), use_cache=False) for _ in range(CALIBRATION)]
    held_out = [(below(part[:, :-1]), part[:, :-1]) for part in text.windows.split(BATCH)]
    reap, frequency = (expert_scores(model, rule, calibration=read) for rule in ("reap", "frequency"))
    least = {name: -scores for name, scores in reap.items()}
    rules = {"REAP": [reap], "frequency": [frequency], f"random, mean of {DRAWS}": ["random"] * DRAWS}
    rules["the other way: lowest by REAP"] = [least]

    def bits(keep: int, by: Any) -> float:
        whole, model.model.layers = model.model.layers, copy.deepcopy(model.model.layers)
        try:
            prune(model, keep, by)
            found = evaluation(model, held_out, text, 0, 0.0)["bits"]
        finally:
            model.model.layers = whole
        print(f"{keep} kept: {found:.4f}", flush=True)
        return found

    rows = [
        (f"{keep}", *(f"{fmean(bits(keep, by) for by in ways):.4f}" for ways in rules.values())) for keep in (8, *KEEP)
    ]
    rows = [("experts kept", *rules), *rows]
    shares = torch.stack([counts / counts.sum() for counts in frequency.values()])
    told = f"share of choices of an expert: {shares.min():.3f} to {shares.max():.3f}"
    return f"{format_rows(rows)}\n\n{told}; distance from the mean expert: {distance(model):.2f} of an expert's norm"


def distance(model: Any) -> float:
    stacks = [value.detach() for name, value in model.named_parameters() if name.endswith("experts.w1")]
    return fmean(float(((w - w.mean(0)).norm(dim=(1, 2)) / w.norm(dim=(1, 2))).mean()) for w in stacks)


if __name__ == "__main__":
    sys.exit(main())
