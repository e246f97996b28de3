"""Does upcycling pay on a pretrained model? SmolLM2 reads on in Python's sources, dense and with experts.

    python -m tests.support.pretrained                                # fetches the model
    export GLIBC_TUNABLES=glibc.malloc.mmap_threshold=4294967295:glibc.malloc.trim_threshold=4294967295
    python -m experiments.upcycle_pretrained                          # hours of one core; interrupted, it goes on
    python -m experiments.upcycle_pretrained --report                 # the table of what there is
    python -m experiments.upcycle_pretrained --report --picture docs/images/upcycle_pays.png

A model that has read much goes on with text it has read little of, in steps of 4 windows of 128 tokens. Only the
feed-forward networks of some last layers train, and their routers; the mixtures have 8 experts, of which a token uses
two. Each run adds a line to the records at every evaluation. Seconds are those that the process computes, on one
thread: others on the machine do not count.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

from mixture_of_experts import TopKGating
from mixture_of_experts.huggingface import upcycle
from tests.support.pretrained import SMOLLM2, fetch

from .language_model.corpus import Batches, held_out_windows
from .language_model.report import format_rows
from .scaling import RECORDS
from .text import load_text

CONTEXT, BATCH, WINDOWS, EVERY, WARM_UP = 128, 4, 32, 10, 5
LAYERS, RATES, SEEDS = (8, 30), (1e-4, 3e-4, 1e-3), (0, 1, 2)
EXPERTS = dict(num_experts=8, k=2)


class Variant(NamedTuple):
    """What makes the experts differ: arguments of `upcycle`, the routers' rate over the experts', and for which share
    of the steps a token uses one expert only. `experts` None is the dense model."""

    label: str
    experts: dict[str, Any] | None
    router_rate: float = 1.0
    one_expert: float = 0.0


VARIANTS = {
    "dense": Variant("dense", None),
    "copies": Variant("8 copies", {}),
    "noise": Variant("copies with noise, 0.1", dict(noise=0.1)),
    "redraw": Variant("a tenth drawn again", dict(redraw=0.1)),
    "router": Variant("routers at ten times the rate", {}, router_rate=10.0),
    "top1": Variant("one expert for a third of the steps", {}, one_expert=1 / 3),
}


class Run(NamedTuple):
    """One training."""

    variant: str
    layers: int
    rate: float
    seed: int
    steps: int


@dataclass
class Text:
    """Tokens of the sources: windows to train on, windows held out `(w, n + 1)`, and how many bytes a token has."""

    train: Tensor
    windows: Tensor
    bytes_per_token: float
    sources: str


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    parser.add_argument("--records", type=Path, default=RECORDS / "upcycle_pretrained.jsonl")
    parser.add_argument("--report", action="store_true", help="print the table of the records, and train nothing")
    parser.add_argument("--picture", type=Path, help="draw the records to this file")
    args = parser.parse_args(argv)
    if not args.report:
        train_all(args.steps, args.records)
    found = read(args.records, args.steps)
    print(table(found))
    if args.picture:
        draw(found, args.picture)
        print(f"wrote {args.picture}")
    return 0


# The plan


def planned(found: dict[Run, list[dict[str, Any]]], steps: int) -> Iterator[Run]:
    """Rates on one seed, what makes experts differ at the best rate, and seeds; the last layers alone come first."""
    for layers in LAYERS:
        for rate in (RATES[1], RATES[0], RATES[2]):
            for variant in ("dense", "copies"):
                yield Run(variant, layers, rate, SEEDS[0], steps)
        best = {name: best_rate(found, name, layers, steps) for name in ("dense", "copies")}
        if layers == LAYERS[0]:
            yield from (Run(name, layers, best["copies"], SEEDS[0], steps) for name in list(VARIANTS)[2:])
        for seed in SEEDS[1:]:
            yield from (Run(name, layers, rate, seed, steps) for name, rate in best.items())


def best_rate(found: dict[Run, list[dict[str, Any]]], variant: str, layers: int, steps: int) -> float:
    runs = {rate: found.get(Run(variant, layers, rate, SEEDS[0], steps), []) for rate in RATES}
    last = {rate: lines[-1]["bits"] for rate, lines in runs.items() if lines and lines[-1]["step"] == steps}
    return min(last, key=last.__getitem__, default=RATES[1])


def read(path: Path, steps: int) -> dict[Run, list[dict[str, Any]]]:
    """The evaluations of each run of that length, in their order; of a run that began again the last ones."""
    found: dict[Run, list[dict[str, Any]]] = {}
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        if not line.endswith("}\n"):
            continue  # its writer was killed
        record = json.loads(line)
        run = Run(*record["run"])
        if run.steps == steps:
            before = [] if record["step"] == 0 else found.get(run, [])
            found[run] = [*before, record]
    return found


# Training


def train_all(steps: int, path: Path) -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    text = load()
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        found = read(path, steps)
        if others := {line["text"] for lines in found.values() for line in lines} - {text.sources}:
            raise SystemExit(
                f"{path} holds runs on {', '.join(others)}, this is {text.sources}: give another --records"
            )
        ended = {run for run, lines in found.items() if lines[-1]["step"] == steps}
        run = next((run for run in planned(found, steps) if run not in ended), None)
        if run is None:
            return
        print(run, flush=True)
        with open(path, "a") as file:
            if file.tell() and not path.read_text().endswith("\n"):
                file.write("\n")  # after a line whose writer was killed
            for record in train(run, text):
                file.write(json.dumps({"run": list(run), "text": text.sources, **record}) + "\n")
                file.flush()
                print(
                    f"  step {record['step']}: {record['bits']:.4f} bits a byte, {record['seconds']:.0f} s", flush=True
                )


def load() -> Text:
    tokenizer, sources = AutoTokenizer.from_pretrained(fetch(SMOLLM2), trust_remote_code=False), load_text()

    def tokens_of(part: Tensor) -> Tensor:
        files = part.numpy().tobytes().decode(errors="replace").split("\0")
        ids = ([*ids, tokenizer.eos_token_id] for ids in tokenizer(files)["input_ids"])
        return torch.tensor([*chain.from_iterable(ids)], dtype=torch.int32)

    held_out = tokens_of(sources.held_out)
    windows = held_out_windows(held_out, CONTEXT, WINDOWS)
    of_token = len(sources.held_out) / len(held_out)
    return Text(tokens_of(sources.train), windows, of_token, f"{', '.join(sources.sources)}, {sources.digest}")


def train(run: Run, text: Text) -> Iterator[dict[str, Any]]:
    """Train, and yield what each evaluation finds: the first before training, the last after it."""
    torch.manual_seed(run.seed)
    model = pretrained()
    below, variant = split(model, run.layers), VARIANTS[run.variant]
    yield from train_model(model, below, variant, prepare(model, variant), run, text)


def train_model(
    model: Any, below: Callable[[Tensor], Tensor], variant: Variant, routers: list[nn.Parameter], run: Run, text: Text
) -> Iterator[dict[str, Any]]:
    seconds = 0.0
    rest = [p for p in model.parameters() if p.requires_grad and not any(p is router for router in routers)]
    groups = [{"params": rest, "lr": run.rate}]
    groups += [{"params": routers, "lr": run.rate * variant.router_rate}] if routers else []
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_at(run.steps))
    batches = Batches(text.train, CONTEXT, BATCH, run.seed)
    held_out = [(below(part[:, :-1]), part[:, :-1]) for part in text.windows.split(BATCH)]
    yield evaluation(model, held_out, text, 0, seconds)
    for step in range(1, run.steps + 1):
        for gate in gates(model):
            gate.k = 1 if step <= variant.one_expert * run.steps else EXPERTS["k"]
        tokens = batches.next()[:, :-1]
        start = time.process_time()
        loss = model.train()(inputs_embeds=below(tokens), labels=tokens, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_([*rest, *routers], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds += time.process_time() - start
        if step % EVERY == 0 or step == run.steps:
            yield evaluation(model, held_out, text, step, seconds)


def pretrained() -> Any:
    return LlamaForCausalLM.from_pretrained(fetch(SMOLLM2), dtype=torch.float32)


def split(model: Any, layers: int) -> Callable[[Tensor], Tensor]:
    """Leave the model its last `layers`; return what computes the hidden states below them, without gradients."""
    inner, whole, norm = model.model, model.model.layers, model.model.norm
    cut = len(whole) - layers

    def leave(some: Any, norm: nn.Module) -> None:
        inner.layers, inner.norm, inner.config.num_hidden_layers = some, norm, len(some)

    @torch.no_grad()
    def below(tokens: Tensor) -> Tensor:
        if not cut:
            return inner.embed_tokens(tokens)
        leave(whole[:cut], nn.Identity())
        try:
            return inner(tokens, use_cache=False).last_hidden_state
        finally:
            leave(whole[cut:], norm)

    leave(whole[cut:], norm)
    return below


def prepare(model: Any, variant: Variant) -> list[nn.Parameter]:
    """Upcycle the model, and let its feed-forward networks train alone; return the routers' weights."""
    if variant.experts is not None:
        upcycle(
            model, gate=lambda d, e: TopKGating(d, e, EXPERTS["k"], normalize=True), num_experts=8, **variant.experts
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    return [gate.w_gating for gate in gates(model)]


def gates(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, TopKGating)]


def rate_at(steps: int) -> Callable[[int], float]:
    """A warm-up, and a cosine to a tenth."""
    return lambda step: min((step + 1) / WARM_UP, 0.55 + 0.45 * math.cos(math.pi * step / steps))


@torch.no_grad()
def evaluation(model: Any, held_out: list[tuple[Tensor, Tensor]], text: Text, step: int, seconds: float) -> Any:
    model.eval()
    losses = [model(inputs_embeds=x, labels=tokens, use_cache=False).loss.item() for x, tokens in held_out]
    bits = sum(losses) / len(losses) / math.log(2) / text.bytes_per_token
    return {"step": step, "bits": round(bits, 5), "seconds": round(seconds, 2)}


# Tables and pictures


def table(found: dict[Run, list[dict[str, Any]]]) -> str:
    """A line for each run: bits at its end, and what the dense model of its rate and seed has at equal seconds."""
    rows = [("layers", "model", "rate", "seed", "steps", "seconds a step", "bits a byte", "dense, equal seconds")]
    for run, lines in sorted(found.items(), key=lambda item: (item[0].layers, item[0].rate, item[0].seed)):
        last, dense = lines[-1], found.get(run._replace(variant="dense"), [])
        each = f"{last['seconds'] / last['step']:.2f}" if last["step"] else ""
        steps = f"{last['step']}" if last["step"] == run.steps else f"{last['step']} of {run.steps}"
        at_equal = "" if run.variant == "dense" else bits_after(dense, last["seconds"])
        row = (f"last {run.layers}", VARIANTS[run.variant].label, f"{run.rate:g}", f"{run.seed}", steps, each)
        rows.append((*row, f"{last['bits']:.4f}", at_equal))
    return format_rows(rows)


def bits_after(lines: list[dict[str, Any]], seconds: float) -> str:
    """Bits of a run after so many seconds, on the line between two evaluations; below its end, if it is shorter."""
    for one, other in pairwise(lines):
        if other["seconds"] >= seconds:
            share = (seconds - one["seconds"]) / (other["seconds"] - one["seconds"])
            return f"{one['bits'] + share * (other['bits'] - one['bits']):.4f}"
    return f"under {lines[-1]['bits']:.4f}" if lines else ""


def draw(found: dict[Run, list[dict[str, Any]]], path: Path) -> None:
    """Held-out bits over steps and over seconds, of the runs at their best rates; above the last layers, below all.

    What ends worse than the model before training is not drawn.
    """
    from matplotlib.figure import Figure

    shown = [layers for layers in LAYERS if any(run.layers == layers for run in found)]
    figure = Figure(figsize=(9, 3.3 * len(shown)), layout="constrained")
    colours = dict(zip(VARIANTS, ("#0072B2", "#D55E00", "#E69F00", "#CC79A7", "#009E73", "#56B4E9"), strict=True))
    before = max(lines[0]["bits"] for run, lines in found.items() if run.variant == "dense")
    for layers, row in zip(shown, figure.subplots(len(shown), 2, sharey="row", squeeze=False), strict=True):
        for axes, unit in zip(row, ("step", "seconds"), strict=True):
            for run, lines in found.items():
                best = best_rate(found, "dense" if run.variant == "dense" else "copies", layers, run.steps)
                if run.layers == layers and run.rate == best and lines[-1]["bits"] < before:
                    label = VARIANTS[run.variant].label if run.seed == SEEDS[0] else None
                    places, bits = [line[unit] for line in lines], [line["bits"] for line in lines]
                    axes.plot(places, bits, color=colours[run.variant], marker="o", markersize=3, label=label)
            axes.set(xlabel={"step": "steps of 512 tokens", "seconds": "seconds of one core"}[unit])
        row[0].set(
            ylabel="held-out bits a byte",
            ylim=(None, before + 0.002),
            title="all 30 layers" if layers == 30 else f"the last {layers} of 30 layers",
        )
        row[1].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
