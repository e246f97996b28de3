"""LoRA on stacked experts: inside the layer (`fast_lora`), as PEFT does it, and the frozen layer alone.

    python -m benchmarks.lora
    python -m benchmarks.lora --parts  # a step that trains all experts, 8 of them by hooks, or 8 by LoRA

Forward and backward of a layer with gradients of its inputs, in processor time of one thread. The
contestants run interleaved; a figure is the median over the rounds of each round's own ratio to the frozen layer.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from statistics import median
from time import process_time

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from mixture_of_experts import GatedExperts, MoE, TopKGating
from mixture_of_experts.huggingface import fast_lora

EXPERTS, K, RANK = 64, 8, 16
TARGETS = ["experts.w1", "experts.w3", "experts.w2"]


def contestants(dim: int, hidden: int, rank: int) -> dict[str, nn.Module]:
    """The same layer three times; its adapters are not zero."""
    torch.manual_seed(0)
    frozen = MoE(dim, gate=TopKGating(dim, EXPERTS, K), experts=GatedExperts(dim, EXPERTS, hidden)).requires_grad_(
        False
    )
    lora = LoraConfig(r=rank, target_parameters=TARGETS, init_lora_weights=False)
    slow = inject_adapter_in_model(lora, copy.deepcopy(frozen))
    return {"frozen": frozen, "inside": fast_lora(copy.deepcopy(slow)), "PEFT": slow}


def seconds(layer: nn.Module, x: torch.Tensor) -> float:
    """The processor time of one step; the gradients of the step before are dropped first."""
    x.grad = None
    layer.zero_grad()
    start = process_time()
    layer(x)[0].square().mean().backward()
    return process_time() - start


def ratios(layers: dict[str, nn.Module], tokens: int, dim: int, rounds: int) -> dict[str, float]:
    """The time of each but the frozen layer, over that of the frozen layer."""
    x = torch.randn(1, tokens, dim, requires_grad=True)
    outputs = [layers[name](x)[0] for name in ("inside", "PEFT")]
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)
    times = {name: [] for name in layers}
    for _ in range(rounds + 1):
        for name, layer in layers.items():
            times[name].append(seconds(layer, x))
    frozen = times.pop("frozen")[1:]
    return {name: median(a / b for a, b in zip(its[1:], frozen, strict=True)) for name, its in times.items()}


def parts(dim: int, hidden: int, rank: int, tokens: int, rounds: int) -> dict[str, tuple[float, int]]:
    """Seconds of a step, and bytes of gradients and AdamW's states, for three ways to train experts."""
    frozen, inside, _ = contestants(dim, hidden, rank).values()
    layers = {
        "all experts": copy.deepcopy(frozen),
        "8 of 64, by hooks": copy.deepcopy(frozen),
        "8 of 64, by LoRA": inside,
    }
    mask = (torch.arange(EXPERTS) < 8).float()
    for name, layer in layers.items():
        for key, parameter in layer.named_parameters():
            if "lora_A" in key:
                parameter.register_hook(lambda grad: (grad.view(EXPERTS, -1) * mask.unsqueeze(-1)).view_as(grad))
            elif "lora_B" in key:
                parameter.register_hook(lambda grad: (grad.view(-1, EXPERTS) * mask).view_as(grad))
            elif name != "8 of 64, by LoRA" and key.startswith("experts."):
                parameter.requires_grad_()
                if name == "8 of 64, by hooks":
                    parameter.register_hook(lambda grad: grad * mask.view(-1, 1, 1))
    trained = {name: [p for p in layer.parameters() if p.requires_grad] for name, layer in layers.items()}
    optimizers = {name: torch.optim.AdamW(of, weight_decay=0.0) for name, of in trained.items()}
    x, times = torch.randn(1, tokens, dim, requires_grad=True), {name: [] for name in layers}
    for _ in range(rounds + 1):
        for name, layer in layers.items():
            start = process_time()
            layer(x)[0].square().mean().backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            times[name].append(process_time() - start)
    # a gradient and two states of each number
    return {name: (median(times[name][1:]), 3 * sum(p.numel() * 4 for p in trained[name])) for name in layers}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 128])
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 512, 4096])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--parts", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.parts:
        found = parts(options.dim, options.hidden[0], options.rank, 512, options.rounds)
        whole = found["all experts"][0]
        print("| trained | time of a step | gradients and states |\n|---|---|---|")
        for name, (time, size) in found.items():
            print(f"| {name} | {time / whole:.2f} | {size / 1e6:,.0f} MB |")
        return
    print("| h | tokens | inside the layer | PEFT |\n|---|---|---|---|")
    for hidden in options.hidden:
        layers = contestants(options.dim, hidden, options.rank)
        for tokens in options.tokens:
            found = ratios(layers, tokens, options.dim, options.rounds)
            print(f"| {hidden} | {tokens:,} | {found['inside']:.2f} | {found['PEFT']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
