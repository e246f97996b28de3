"""A pretrained model with experts beside dense ones and Mixtral of transformers: decoding, prefill, and a step.

    python -m tests.support.pretrained                # fetches SmolLM2, once
    python -m benchmarks.pretrained --threads 1       # all, some ten minutes; 5 GB of memory with all layers
    python -m benchmarks.pretrained --only step --choices 2 --layers 15

The model is upcycled, top-2 and top-1 of 4. "dense" computes as much: twice as wide for top-2, the model itself for
top-1. "mixtral" is the exported model, with the same weights, by each of its experts implementations. All compute the
same logits, which is checked. They run interleaved. Two figures are printed: the median of the rounds' own ratios, and
the ratio of the least times, which other programs disturb less. On one thread the clock is processor time. A step is
forward and backward of a batch in training, without an optimizer, whose time grows with parameters and not with
computation.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import CLOCKS, paired_ratio
from mixture_of_experts import TopKGating
from mixture_of_experts.huggingface import export, upcycle
from tests.support.pretrained import COMMAND, SMOLLM2, folder_of

EXPERTS, PROMPT, DECODED = 4, 16, 4
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
Step = Callable[[], None]


def load(folder: Path, layers: int | None) -> Any:
    """The dense model, or its first layers, in float32 and eval mode."""
    from transformers import AutoModelForCausalLM

    fewer = {} if layers is None else {"num_hidden_layers": layers}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False, **fewer).eval()


def widened(model: Any, times: int) -> Any:
    """A dense model with equal outputs, so many times as wide: it has each hidden unit so many times."""
    if times == 1:
        return model
    config = deepcopy(model.config)
    config.intermediate_size *= times
    state = model.state_dict()
    for name, weight in state.items():
        if "gate_proj" in name or "up_proj" in name:
            state[name] = torch.cat([weight] * times)
        elif "down_proj" in name:
            state[name] = torch.cat([weight / times] * times, dim=1)
    wide = type(model)(config).eval()
    wide.load_state_dict(state)
    return wide


def with_experts(model: Any, k: int) -> Any:
    upcycle(model, num_experts=EXPERTS, gate=lambda dim, e: TopKGating(dim, e, k, normalize=True))
    return model.eval()


def decode_step(model: Any, ids: Tensor) -> Step:
    """A step that decodes some tokens, one after the other."""
    with torch.no_grad():
        cache = model(ids[:, :PROMPT], use_cache=True).cache

    @torch.no_grad()
    def step() -> None:
        for place in range(PROMPT, PROMPT + DECODED):
            model(ids[:, place : place + 1], cache=cache, use_cache=True)
        cache.crop(-DECODED)

    return step


def prefill_step(model: Any, ids: Tensor) -> Step:
    @torch.no_grad()
    def step() -> None:
        model(ids)

    return step


def training_step(model: Any, ids: Tensor) -> Step:
    def step() -> None:
        model.train()(ids, labels=ids).loss.backward()

    return step


#: by name: what makes the step, tokens, and whether other dtypes than float32 are measured too
KINDS = {
    "decode": (decode_step, PROMPT + DECODED, True),
    "prefill": (prefill_step, 512, False),
    "step": (training_step, 256, False),
}


def race(steps: dict[str, Step], models: dict[str, nn.Module], rounds: int) -> dict[str, list[float]]:
    """The seconds of each round, after two that do not count. Gradients are dropped outside the time."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    clock = CLOCKS["cpu" if torch.get_num_threads() == 1 else "wall"]
    gc.disable()
    for turn in range(2 + rounds):
        for name, step in steps.items():
            model: Any = models[name.partition(" ")[0]]
            if name.startswith("mixtral"):
                model.set_experts_implementation(name.partition(" ")[2])
            start = clock()
            step()
            taken = clock() - start
            model.eval().zero_grad(set_to_none=True)
            if turn >= 2:
                seconds[name].append(taken)
    gc.enable()
    return seconds


def report(kind: str, k: int, dtype: torch.dtype, seconds: dict[str, list[float]]) -> None:
    name, own = f"{kind}, top-{k}, {str(dtype).removeprefix('torch.')}", seconds["layer"]
    unit = 1000 / (DECODED if kind == "decode" else 1)
    print(f"{name}: layer {unit * median(own):.1f} ms", flush=True)
    for other, taken in seconds.items():
        if other != "layer":
            ratio = f"layer ÷ it {paired_ratio(own, taken):.2f}, of the least {min(own) / min(taken):.2f}"
            print(f"    {other:20} {unit * median(taken):9.1f} ms   {ratio}", flush=True)


def check(models: dict[str, Any], ids: Tensor) -> None:
    with torch.no_grad():
        wanted, *others = [model(ids[:, :PROMPT]).logits for model in models.values()]
    for found in others:
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.pretrained", description="A pretrained model, upcycled.")
    parser.add_argument("--folder", type=Path, default=folder_of(SMOLLM2), help="a Llama; by default SmolLM2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, help="the first layers alone, which take less memory")
    parser.add_argument("--choices", type=int, nargs="+", default=[2, 1], help="experts of a token")
    parser.add_argument("--only", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--against", choices=("dense", "mixtral"), nargs="+", default=["dense", "mixtral"])
    options = parser.parse_args(arguments)
    if options.folder is None:
        parser.error(f"SmolLM2 is not there: fetch it with `{COMMAND}`")
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    for k in options.choices:
        dense = load(options.folder, options.layers)
        models = {"dense": widened(dense, k)} if "dense" in options.against else {}
        models["layer"] = with_experts(load(options.folder, options.layers), k)
        if "mixtral" in options.against:
            models["mixtral"] = export(models["layer"])
        del dense
        ids = torch.randint(models["layer"].config.vocab_size, (1, 512))
        check(models, ids)
        for kind in options.only:
            make, tokens, low = KINDS[kind]
            for dtype in (torch.float32, torch.bfloat16) if low else (torch.float32,):
                names = [*(name for name in models if name != "mixtral")]
                names += [f"mixtral {each}" for each in IMPLEMENTATIONS if "mixtral" in models and fits(kind, each)]
                changed = {name: model.to(dtype) for name, model in models.items()}
                steps = {name: make(changed[name.partition(" ")[0]], ids[:, :tokens]) for name in names}
                report(kind, k, dtype, race(steps, changed, options.rounds))
                for model in models.values():
                    model.to(torch.float32)


def fits(kind: str, implementation: str) -> bool:
    """Whether an implementation is measured: not `batched_mm` with many tokens, as it copies weights for each."""
    return implementation != "batched_mm" or kind == "decode"


if __name__ == "__main__":
    main()
