"""What the same bits in any batch cost and give: the way `batch_invariant` against the fastest one.

    python -m experiments.batch_invariant  # a minute of a core: times of a layer of SmolLM2's size
    python -m tests.support.pretrained     # fetches SmolLM2
    python -m experiments.batch_invariant --pretrained --threads 2   # minutes: how many tokens get other bits
    python -m experiments.batch_invariant --grpo                     # minutes: what GRPO divides

Times are those of the processor, of one thread; a ratio is the median over pairs of runs. SmolLM2 gets four experts in
each layer, copies with noise, of which a token uses two. Each layer gets the inputs of a prefill again: token by token,
in pairs and in random batches. Then the model decodes token by token, as it is: attention, norms and head are torch's.
GRPO trains routers; the probability of a sampled token is divided by the one that it was sampled with.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_experts import GatedExperts, MoE, TopKGating, ops

WAYS: tuple[Any, ...] = ("auto", "batch_invariant")
DTYPES = (torch.float32, torch.bfloat16)
CASES = {"a decoded token": (1, False), "512 tokens": (512, False), "a step of 512 tokens": (512, True)}


def seconds(layer: nn.Module, x: Tensor, way: Any) -> float:
    start = time.process_time()
    with ops.use(way), torch.set_grad_enabled(layer.training):
        out, aux_loss = layer(x)
        if layer.training:
            (out.sum() + aux_loss).backward()
    return time.process_time() - start


def main(arguments: list[str] | None = None, dim: int = 576, hidden_dim: int = 1536) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=20, help="pairs of runs (default 20; of a token 10 times as many)"
    )
    parser.add_argument("--pretrained", action="store_true", help="count tokens with other bits in SmolLM2")
    parser.add_argument("--grpo", action="store_true", help="measure GRPO's ratios on SmolLM2")
    parser.add_argument("--tokens", type=int, default=64, help="of a prefill (default 64)")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if not (args.pretrained or args.grpo):
        costs(args.rounds, dim, hidden_dim)
    for dtype in DTYPES if args.pretrained or args.grpo else ():
        for way in WAYS:
            model, tokenizer = upcycled(dtype)
            text = tokenizer(__doc__ or "", return_tensors="pt")["input_ids"][:, : args.tokens]
            for found in bits(model, text, way) if args.pretrained else ratios(model, tokenizer, way):
                print(f"{dtype}, {args.threads} threads, {way}: {found}", flush=True)


def costs(rounds: int, dim: int, hidden_dim: int) -> None:
    for dtype in DTYPES:
        experts = GatedExperts(dim, 4, hidden_dim, nn.SiLU)
        layer = MoE(dim, gate=TopKGating(dim, 4, k=2), experts=experts).to(dtype)
        for name, (tokens, training) in CASES.items():
            layer.train(training)
            x = torch.randn(1, tokens, dim, dtype=dtype, requires_grad=training)
            ratios = []
            for turn in range(2 + rounds * (10 if tokens == 1 else 1)):
                ways = random.Random(turn).sample(WAYS, 2)
                took = {way: seconds(layer, x, way) for way in ways}
                if turn > 1:  # the first two warm up
                    ratios.append(took["batch_invariant"] / took["auto"])
            print(f"{dtype}, {name}: {median(ratios):.2f} of the fastest way's time", flush=True)


def upcycled(dtype: torch.dtype) -> tuple[Any, Any]:
    """SmolLM2 with experts, frozen but for its routers, and its tokenizer."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    from mixture_of_experts.huggingface import upcycle
    from tests.support.pretrained import SMOLLM2, fetch

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM.from_pretrained(fetch(SMOLLM2), dtype=torch.float32).requires_grad_(False)
    upcycle(model, num_experts=4, noise=0.1, loss_coef=0.0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("w_gating"))
    return model.to(dtype), AutoTokenizer.from_pretrained(fetch(SMOLLM2), trust_remote_code=False)


@torch.no_grad()
def bits(model: Any, tokens: Tensor, way: Any) -> Iterator[str]:
    """How many tokens `(1, n)` get other bits than in a prefill, in the experts and in the logits."""
    kept: list[tuple[nn.Module, Tensor, Tensor]] = []
    layers, n = [module for module in model.eval().modules() if isinstance(module, MoE)], tokens.shape[1]

    def keep(layer: nn.Module, args: Any, output: Any) -> None:
        kept.append((layer, args[0][0], output[0][0]))

    with ops.use(way):
        hooks = [layer.register_forward_hook(keep) for layer in layers]
        logits = model(tokens).logits[0]
        for hook in hooks:
            hook.remove()
        for name, batches in batched(n).items():
            others = sum(other_bits(*layer, batches) for layer in kept)
            yield f"experts of {others} of {n * len(kept)} tokens differ {name}"
        cache, steps = None, []
        for token in tokens.split(1, dim=1):
            out = model(token, cache=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits[0])
    differ = (torch.cat(steps) != logits).any(-1).sum()
    gap = (torch.cat(steps).float().log_softmax(-1) - logits.float().log_softmax(-1)).abs().max()
    yield f"logits of {differ} of {n} tokens differ in decoding, log-probabilities by {gap:.1g} at most"


def batched(n: int) -> dict[str, list[list[int]]]:
    """The numbers up to n, in batches."""
    draw = random.Random(0)
    order, cuts = draw.sample(range(n), n), sorted(draw.sample(range(1, n), n // 8))
    return {
        "alone": [[token] for token in range(n)],
        "in pairs": [order[i : i + 2] for i in range(0, n, 2)],
        "in random batches": [order[i:j] for i, j in zip([0, *cuts], [*cuts, n], strict=True)],
    }


def other_bits(layer: nn.Module, x: Tensor, out: Tensor, batches: list[list[int]]) -> int:
    """How many tokens x `(n, d)` get other bits than out `(n, d)`, in these batches of sequences of one token."""
    return sum(int((layer(x[some].unsqueeze(1))[0].squeeze(1) != out[some]).any(-1).sum()) for some in batches)


def ratios(model: Any, tokenizer: Any, way: Any) -> Iterator[str]:
    """Of the trainer's and the sampler's probabilities, for all tokens that it samples."""
    from datasets import Dataset
    from trl import GRPOConfig

    from tests.support.measured_grpo import measured

    prompts = Dataset.from_list([{"prompt": line} for line in (__doc__ or "").splitlines() if len(line) > 40])
    with tempfile.TemporaryDirectory() as folder, ops.use(way):
        kinds = dict(report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False)
        sizes = dict(per_device_train_batch_size=8, num_generations=4, max_completion_length=16, max_steps=2)
        config = GRPOConfig(folder, gradient_checkpointing=False, seed=0, **kinds, **sizes)  # type: ignore[arg-type]
        trainer: Any = measured()(model, lengths, config, train_dataset=prompts, processing_class=tokenizer)
        trainer.train()
    found = torch.cat([sampled for sampled, _ in trainer.found]).abs()
    equal, most = (found == 0).float().mean(), found.max()
    yield f"|log ratio| of {len(found)} tokens: mean {found.mean():.1e}, largest {most:.1e}, 0 for {equal:.0%}"


def lengths(completions: list[str], **_: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


if __name__ == "__main__":
    main()
