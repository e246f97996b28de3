"""How experts are kept busy alike: a loss, or a bias that moves by one of three rules, over the steps of short runs.

    python -m experiments.balance_rules                  # interrupted, the same command goes on after the last run
    python -m experiments.balance_rules --report         # the table, and the picture of docs/experiments.md

The model is the smallest of `scaling` with sigmoid scores, two of 32 experts, dropless. All runs of a seed begin with
the same parameters and read the same batches. A record is a line of JSON: the run, and for each step the training loss
and the load of the busiest expert over the mean load, of the layers the mean.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # draws to files, needs no screen

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor, nn
from tqdm import trange

from mixture_of_experts import GatedExperts, MoE, TopKGating, balance_experts
from mixture_of_experts.gating.bias_rules import RuleName

from .language_model.corpus import Batches, held_out_windows
from .language_model.model import ByteLM
from .language_model.report import format_rows
from .language_model.settings import Settings
from .language_model.trainee import LoadRecorder
from .language_model.training import learning_rate_at
from .scaling import RECORDS
from .text import Text, load_text

Record = dict[str, Any]


class Way(NamedTuple):
    """One way to balance: the coefficient of the loss, or rule and rate of the bias; and how its line is drawn."""

    label: str
    loss_coef: float
    rule: RuleName | None
    rate: float | None
    colour: str  # Okabe and Ito's, told apart by all eyes; in grey by dashes
    dashes: tuple[float, ...]


WAYS = {
    "none": Way("nothing", 0.0, None, None, "#999999", (1, 1)),
    "loss": Way("balancing loss, 0.01", 0.01, None, None, "#000000", (6, 2)),
    "sign": Way("bias, by sign", 0.0, "sign", None, "#E69F00", (3, 1, 1, 1)),
    "centred_sign": Way("bias, by sign, centred", 0.0, "centred_sign", None, "#56B4E9", (2, 2)),
    "fast_sign": Way("bias, by sign, rate 0.01", 0.0, "sign", 0.01, "#009E73", (6, 1, 1, 1, 1, 1)),
    "quantile": Way("bias, by quantile", 0.0, "quantile", None, "#D55E00", ()),
}


def train(name: str, settings: Settings, text: Text) -> Record:
    """One run, from its beginning to its end."""
    torch.manual_seed(settings.seed)
    model = ByteLM(
        lambda: layer(WAYS[name], settings),
        dim=settings.dim,
        layers=settings.layers,
        heads=settings.heads,
        context=settings.context,
    )
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), fused=True)
    if (rule := WAYS[name].rule) is not None:
        balance_experts(model, optimizer, rule, WAYS[name].rate)
    recorder, batches = LoadRecorder(model), Batches(text.train, settings.context, settings.batch_size, settings.seed)
    bits, busiest = [], []
    for step in trange(settings.steps, desc=f"{name}, seed {settings.seed}", disable=None):
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, settings)
        nats, aux_loss = losses(model.train(), batches.next())
        (nats + aux_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bits.append(round(nats.item() / math.log(2), 4))
        load = recorder.take().float()  # (layers, experts)
        busiest.append(round((load.amax(-1) / load.mean(-1)).mean().item(), 3))
    return {
        "way": name,
        "seed": settings.seed,
        "steps": settings.steps,
        "corpus": text.digest,
        "sources": text.sources,
        "torch": torch.__version__,
        "held_out": round(held_out(model, settings, text), 4),
        "bits": bits,
        "busiest": busiest,
    }


def layer(way: Way, settings: Settings) -> MoE:
    dim, num_experts = settings.dim, settings.num_experts
    gate = TopKGating(dim, num_experts, k=2, score="sigmoid", expert_bias=way.rule is not None)
    return MoE(dim, gate=gate, experts=GatedExperts(dim, num_experts, settings.width // 2), loss_coef=way.loss_coef)


def losses(model: nn.Module, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean nats a byte, and the balancing loss with its coefficient."""
    logits, aux_loss = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()), aux_loss


@torch.no_grad()
def held_out(model: nn.Module, settings: Settings, text: Text) -> float:
    """Bits a byte of the files that no run reads."""
    windows = held_out_windows(text.held_out, settings.context, settings.eval_windows)
    nats = [losses(model.eval(), part)[0].item() * len(part) for part in windows.split(settings.batch_size)]
    return sum(nats) / len(windows) / math.log(2)


def read(path: Path, steps: int) -> dict[tuple[str, int], Record]:
    """The finished runs of that length, by way and seed."""
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    return {(record["way"], record["seed"]): record for record in records if record["steps"] == steps}


def table(finished: Mapping[tuple[str, int], Record]) -> str:
    """A line for each way: held-out bits of each seed, and the busiest expert's load early and late, mean of seeds."""
    seeds = sorted({seed for _, seed in finished})
    header = (
        "balanced by",
        *(f"seed {seed}" for seed in seeds),
        "mean",
        "busiest ÷ mean, steps 11 to 50",
        "last quarter",
    )
    rows: list[tuple[str, ...]] = [header]
    for name, way in WAYS.items():
        own = [finished[name, seed] for seed in seeds if (name, seed) in finished]
        if len(own) == len(seeds):
            early = mean(mean(record["busiest"][10:50]) for record in own)
            late = mean(mean(record["busiest"][-record["steps"] // 4 :]) for record in own)
            bits = [record["held_out"] for record in own]
            rows.append((way.label, *(f"{b:.3f}" for b in bits), f"{mean(bits):.3f}", f"{early:.2f}", f"{late:.2f}"))
    return format_rows(rows)


def draw(finished: Mapping[tuple[str, int], Record], path: Path) -> None:
    """Two panels over the steps: the busiest expert's load, and the training loss; means of the seeds, smoothed."""
    figure, (above, below) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for name, way in WAYS.items():
        own = [record for (of, _), record in finished.items() if of == name]
        if own:
            draw_line(above, way, [record["busiest"] for record in own], width=5)
            draw_line(below, way, [record["bits"] for record in own], width=25)
    above.set(yscale="log", ylabel="load of the busiest of 32 experts ÷ mean load", xlabel="step")
    above.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    above.minorticks_off()
    below.set(ylabel="training loss, bits a byte", xlabel="step", ylim=(3, 4.5))
    below.legend(frameon=False, handlelength=4, title="balanced by")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.5, alpha=0.4)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_line(axes: Axes, way: Way, runs: Sequence[Sequence[float]], width: int) -> None:
    """The mean of the runs, each number that of the steps up to `width` before it."""
    values = torch.tensor(runs, dtype=torch.float64).mean(0)
    smooth = [values[max(0, end - width) : end].mean().item() for end in range(1, len(values) + 1)]
    (line,) = axes.plot(range(1, len(values) + 1), smooth, color=way.colour, linewidth=1.8, label=way.label)
    if way.dashes:
        line.set_dashes(way.dashes)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--records", type=Path, default=RECORDS / "balance_rules.jsonl")
    parser.add_argument("--picture", type=Path, default=Path("docs/images/balance_rules.png"))
    parser.add_argument("--report", action="store_true", help="train nothing, report what is finished")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args(argv)
    finished = read(args.records, args.steps)
    if not args.report:
        torch.set_num_threads(1)
        text = load_text()
        for seed in args.seeds:
            for name in WAYS:
                if (name, seed) not in finished:
                    finished[name, seed] = train(name, Settings(steps=args.steps, seed=seed), text)
                    with open(args.records, "a") as file:
                        file.write(json.dumps(finished[name, seed]) + "\n")
    print(table(finished))
    draw(finished, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
