"""What int8 experts cost and save: SmolLM2 upcycled to four experts in each of thirty layers, in bfloat16 and float32.

    python -m tests.support.pretrained    # fetches the model
    python -m experiments.quantized_experts    # two minutes of one core, 3 GB

Times are seconds that the process computes, on one thread, in turns. Perplexity is that of held-out Python text. The
last row of a dtype has experts that compute nothing: no experts can be faster.
"""

import argparse
import copy
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from mixture_of_experts import RoutedExperts
from mixture_of_experts.huggingface import upcycle
from mixture_of_experts.quantize import quantize_experts
from tests.support.pretrained import SMOLLM2, fetch

from .upcycle_pretrained import load

TURNS, STEPS = 5, 12


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    torch.set_num_threads(1)
    windows = load().windows[:16].long()
    print(
        "| dtype | experts | experts, MB | perplexity | error of logits | decoding, ms a token | 512 tokens, s |\n"
        + "|---" * 7
        + "|"
    )
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        plain: Any = LlamaForCausalLM.from_pretrained(fetch(SMOLLM2), dtype=dtype).eval().requires_grad_(False)
        upcycle(plain, num_experts=4, noise=0.1, loss_coef=0.0)
        shared: Any = {id(parameter): parameter for parameter in plain.parameters()}
        small = quantize_experts(copy.deepcopy(plain, dict(shared)))
        empty = copy.deepcopy(plain, dict(shared))
        for layer in empty.model.layers:
            layer.mlp.moe.experts = NoExperts()
        models = {"as they are": plain, "int8": small}
        found = {name: measure(model, windows) for name, model in models.items()}
        timed = {**models, "none": empty}
        decoding, reading = in_turns(timed, windows, decode), in_turns(timed, windows, read)
        wanted = found["as they are"][1]
        for name in models:
            loss, logits = found[name]
            error = (logits - wanted).norm() / wanted.norm()
            print(
                f"| {str(dtype)[6:]} | {name} | {megabytes(models[name]):.0f} | {loss.exp():.3f} | {error:.4f} "
                f"| {1000 * decoding[name]:.1f} | {reading[name]:.2f} |",
                flush=True,
            )
        times = f"{1000 * decoding['none']:.1f} | {reading['none']:.2f}"
        print(f"| {str(dtype)[6:]} | compute nothing | | | | {times} |", flush=True)
        del plain, small, empty, models, timed, shared
    return 0


class NoExperts(RoutedExperts):
    """What a layer costs without the products of its experts."""

    def forward(self, x: Tensor, decision: Any = None) -> Tensor:
        return torch.zeros_like(x)


def megabytes(model: Any) -> float:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return sum(tensor.numel() * tensor.element_size() for name, tensor in tensors if ".experts." in name) / 1e6


@torch.no_grad()
def measure(model: Any, windows: Tensor) -> tuple[Tensor, Tensor]:
    """The mean loss of a token, and logits of the first window."""
    losses, first = [], None
    for window in windows.split(1):
        logits = model(window[:, :-1]).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:]))
        first = logits if first is None else first
    assert first is not None
    return torch.stack(losses).mean(), first


@torch.no_grad()
def decode(model: Any, windows: Tensor) -> float:
    """Seconds of a token, with a cache."""
    out = model(windows[:1, :32], use_cache=True)
    start = time.process_time()
    for i in range(STEPS):
        out = model(windows[:1, 32 + i : 33 + i], past_key_values=out.past_key_values, use_cache=True)
    return (time.process_time() - start) / STEPS


@torch.no_grad()
def read(model: Any, windows: Tensor) -> float:
    """Seconds of four sequences of 128 tokens."""
    start = time.process_time()
    model(windows[:4, :128])
    return time.process_time() - start


def in_turns(models: dict[str, Any], windows: Tensor, function: Any) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(TURNS):
        for name, model in models.items():
            times[name].append(function(model, windows))
    return {name: median(found) for name, found in times.items()}


if __name__ == "__main__":
    raise SystemExit(main())
