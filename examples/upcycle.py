"""Upcycle a model of `transformers`, and go on with it and with the dense one at equal compute.

    python examples/upcycle.py                      # some minutes on two CPU cores
    python examples/upcycle.py --steps 100          # shorter

A small Llama learns bytes of the standard library's sources, from random weights: nothing is downloaded. Then its
feed-forward networks become mixtures: eight experts, each half of a copy, of which a token uses two, so that a token
is computed by as many hidden units as before. Both models see the same further batches, with the same fresh optimizer
and learning rates. The table has the held-out bits per byte, the picture those after every few steps.
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # draws to files, needs no screen

import matplotlib.pyplot as plt
import torch
from corpus import Batches, held_out_windows, load_corpus
from report import COLOURS, LABELS, format_rows
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from mixture_of_experts.huggingface import upcycle

CONTEXT, BATCH, EVALUATIONS = 128, 16, 6


class Curve(NamedTuple):
    """Held-out bits per byte after so many steps of the phase, and the processor time of all its steps."""

    steps: list[int]
    bits: list[float]
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    torch.manual_seed(arguments.seed)
    corpus = load_corpus()
    print(f"text: {corpus}")
    windows = held_out_windows(corpus.held_out, CONTEXT, arguments.eval_windows)
    batches = Batches(corpus.train, CONTEXT, BATCH, arguments.seed)

    dense = small_llama()
    first = train(dense, batches, windows, arguments.steps, arguments.learning_rate, "pre-training")
    moe = copy.deepcopy(dense)
    upcycle(moe, num_experts=8, k=2, granularity=2)
    assert math.isclose(held_out_bits(moe, windows), first.bits[-1], rel_tol=1e-4), "upcycling changed the model"

    models = {"dense": dense, "moe": moe}
    further = {}
    for name, model in models.items():  # the same batches for both
        batches.position = arguments.steps * BATCH
        further[name] = train(model, batches, windows, arguments.steps, arguments.learning_rate / 2, LABELS[name])
    print(table(models, first, further, arguments.steps))
    picture = arguments.out / "upcycle.png"
    draw(first, further, picture)
    print(f"picture: {picture}")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--steps", type=int, default=300, help="of pre-training, and again of each model after it")
    parser.add_argument("--learning-rate", type=float, default=0.003, help="the highest of pre-training; then half")
    parser.add_argument("--eval-windows", type=int, default=128, help="held-out windows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/upcycle"), help="folder of the picture")
    arguments = parser.parse_args(argv)
    if arguments.steps < EVALUATIONS:
        parser.error(f"--steps must be at least {EVALUATIONS}, got {arguments.steps}")
    return arguments


def small_llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def train(
    model: LlamaForCausalLM, batches: Batches, windows: Tensor, steps: int, learning_rate: float, name: str
) -> Curve:
    """AdamW with a warm-up of a tenth and a cosine to zero. The loss of a swapped model holds its auxiliary loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, 10 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    evaluated, bits, seconds = [0], [held_out_bits(model, windows)], 0.0
    for step in tqdm(range(1, steps + 1), desc=name, disable=not sys.stderr.isatty()):
        tokens, begun = batches.next(), time.process_time()
        model.train()(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds += time.process_time() - begun
        if step * EVALUATIONS // steps > (step - 1) * EVALUATIONS // steps:
            evaluated.append(step)
            bits.append(held_out_bits(model, windows))
    return Curve(evaluated, bits, seconds)


@torch.no_grad()
def held_out_bits(model: LlamaForCausalLM, windows: Tensor) -> float:
    """Mean bits per byte of the held-out windows, without the auxiliary loss."""
    losses = [model.eval()(part, labels=part).loss.item() * len(part) for part in windows.split(BATCH)]
    return sum(losses) / len(windows) / math.log(2)


def table(models: dict[str, LlamaForCausalLM], first: Curve, further: dict[str, Curve], steps: int) -> str:
    rows = [("model", "parameters", "step (processor)", "before", "after")]
    for name, model in models.items():
        count, curve = sum(p.numel() for p in model.parameters()), further[name]
        step = f"{1000 * curve.seconds / steps:.0f} ms"
        rows.append((LABELS[name], f"{count:,}", step, f"{curve.bits[0]:.3f}", f"{curve.bits[-1]:.3f}"))
    gap = further["dense"].bits[-1] - further["moe"].bits[-1]
    return f"{format_rows(rows)}\nheld-out bits per byte; upcycled {gap:+.3f} better after {steps} further steps"


def draw(first: Curve, further: dict[str, Curve], file: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    axes.plot(first.steps[1:], first.bits[1:], color="#444444", marker="o", markersize=3)
    axes.annotate("pre-training", (first.steps[1], first.bits[1]), xytext=(8, 0), textcoords="offset points")
    for name, curve in further.items():
        steps = [first.steps[-1] + step for step in curve.steps]
        label = "dense, trained on" if name == "dense" else "upcycled"
        axes.plot(steps, curve.bits, color=COLOURS[name], marker="o", markersize=3, label=label)
    axes.axvline(first.steps[-1], color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.set(xlabel="step", ylabel="held-out bits per byte")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
