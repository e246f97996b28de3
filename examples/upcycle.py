"""Upcycle a model of `transformers`, and go on with it and with the dense one at equal compute.

    python examples/upcycle.py    # some minutes on two CPU cores; --steps 100 is shorter

It needs the extras `examples` and `hf`. A small Llama with random weights learns bytes of Python's library: nothing
is downloaded. Then its feed-forward networks become mixtures: eight experts, each half of a copy, of which a token uses
two, so that a token is computed by as many hidden units as before. Both models see the same further batches, with the
same fresh optimizer and learning rates. The picture has the held-out bits per byte after every few steps.
"""

import argparse
import copy
import math
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mixture_of_experts.huggingface import upcycle

CONTEXT, BATCH, EVALUATIONS, RATE = 128, 16, 6, 0.003


class Curve(NamedTuple):
    """Held-out bits per byte after so many steps of a phase, and the processor time of all its steps."""

    steps: list[int]
    bits: list[float]
    seconds: float


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of pre-training, and again of each model after it")
    parser.add_argument("--eval-windows", type=int, default=128, help="held-out windows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/upcycle"), help="folder of the picture")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    text, held_out = bytes_of_python()
    windows = held_out.unfold(0, CONTEXT, (len(held_out) - CONTEXT) // (args.eval_windows - 1))

    sizes = dict(hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4)
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=CONTEXT, **sizes))
    first = train(dense, text, windows, args.steps, RATE, args.seed)
    moe = copy.deepcopy(dense)
    upcycle(moe, num_experts=8, k=2, granularity=2)
    assert math.isclose(held_out_bits(moe, windows), first.bits[-1], rel_tol=1e-4), "upcycling changed the model"

    further = {}
    for name, model in {"dense": dense, "upcycled": moe}.items():
        curve = train(model, text, windows, args.steps, RATE / 2, args.seed + 1)
        count, seconds = sum(p.numel() for p in model.parameters()), curve.seconds / args.steps
        told = f"{1000 * seconds:.0f} ms a step, {curve.bits[0]:.3f} bits per byte before, {curve.bits[-1]:.3f} after"
        print(f"{name}: {count:,} parameters, {told}", flush=True)
        further[name] = curve
    draw(first, further, args.out / "upcycle.png")


def bytes_of_python() -> tuple[Tensor, Tensor]:
    """To learn from, and every tenth file to be held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts = [file for place, file in enumerate(files) if place % 10], files[::10]
    train, held_out = (torch.tensor(list(b"".join(map(Path.read_bytes, part)))) for part in parts)
    return train, held_out


def train(model: LlamaForCausalLM, text: Tensor, windows: Tensor, steps: int, rate: float, seed: int) -> Curve:
    """AdamW with a warm-up of a tenth and a cosine to zero. The loss of an upcycled model holds its auxiliary loss."""
    draws = torch.Generator().manual_seed(seed)  # the same batches for every model
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    evaluated, bits, seconds = [0], [held_out_bits(model, windows)], 0.0
    for step in range(1, steps + 1):
        begun = time.process_time()
        tokens = text.unfold(0, CONTEXT, 1)[torch.randint(len(text) - CONTEXT, (BATCH,), generator=draws)]
        model.train()(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds += time.process_time() - begun
        if step * EVALUATIONS // steps > (step - 1) * EVALUATIONS // steps:
            evaluated.append(step)
            bits.append(held_out_bits(model, windows))
            print(f"  step {step}: {bits[-1]:.3f}", flush=True)
    return Curve(evaluated, bits, seconds)


@torch.no_grad()
def held_out_bits(model: LlamaForCausalLM, windows: Tensor) -> float:
    """Mean bits per byte of the held-out windows, without the auxiliary loss."""
    nats = sum(model.eval()(part, labels=part).loss.item() * len(part) for part in windows.split(BATCH))
    return nats / len(windows) / math.log(2)


def draw(first: Curve, further: dict[str, Curve], file: Path) -> None:
    axes = (figure := Figure(figsize=(6.4, 3.6), layout="constrained")).subplots()
    axes.plot(first.steps[1:], first.bits[1:], color="#444444", marker="o", markersize=3, label="pre-training")
    for (name, curve), colour in zip(further.items(), ("#0072B2", "#D55E00"), strict=True):
        steps = [first.steps[-1] + step for step in curve.steps]
        axes.plot(steps, curve.bits, color=colour, marker="o", markersize=3, label=name)
    axes.set(xlabel="step", ylabel="held-out bits per byte")
    axes.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
