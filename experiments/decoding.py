"""Time decoding with a Llama that has mixture layers, compared with dense models and transformers' own mixtures.

    OMP_NUM_THREADS=1 python -m experiments.decoding                    # needs transformers
    OMP_NUM_THREADS=1 python -m experiments.decoding --dtype bfloat16   # ATEN_CPU_CAPABILITY=avx2 disables AVX-512

All models have the dimensions of SmolLM2-135M and random weights. They take turns, decoding one token each, and each
ratio is the median over all turns. `twin` is a dense model with as many hidden units as two experts, so it reads the
same number of bytes.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from mixture_of_experts import TopKGating
from mixture_of_experts.huggingface import upcycle
from mixture_of_experts.quantize import quantize_experts

SIZES = dict(vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)
HIDDEN, EXPERTS, PROMPT, WARM_UP = 1536, 4, 16, 3


def make_llama(hidden: int) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=hidden, tie_word_embeddings=True))


def make_upcycled(k: int, bits: int | None = None) -> PreTrainedModel:
    model = make_llama(HIDDEN).requires_grad_(False)
    upcycle(model, num_experts=EXPERTS, gate=partial(TopKGating, k=k, normalize=True))
    if bits is not None:
        quantize_experts(model, bits=bits)
    return model


def make_mixtral(implementation: str) -> PreTrainedModel:
    sizes = dict(SIZES, intermediate_size=HIDDEN, num_local_experts=EXPERTS, tie_word_embeddings=True)
    model = MixtralForCausalLM(MixtralConfig(**sizes))
    model.set_experts_implementation(implementation)
    return model


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "twin": partial(make_llama, 2 * HIDDEN),
    "dense": partial(make_llama, HIDDEN),
    "1 of 4 experts": partial(make_upcycled, 1),
    "2 of 4 experts": partial(make_upcycled, 2),
    "8 bits": partial(make_upcycled, 2, 8),
    "4 bits": partial(make_upcycled, 2, 4),
    "Mixtral, eager": partial(make_mixtral, "eager"),
    "Mixtral, grouped_mm": partial(make_mixtral, "grouped_mm"),
}


@torch.no_grad()
def time_tokens(models: dict[str, PreTrainedModel], tokens: int) -> dict[str, list[float]]:
    """Return the seconds that each model takes for each token. The models take turns, in alternating order."""
    caches = {name: model(torch.arange(PROMPT)[None], use_cache=True).past_key_values for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(tokens + WARM_UP):
        token = torch.randint(SIZES["vocab_size"], (1, 1))
        for name in list(models)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            models[name](token, past_key_values=caches[name], use_cache=True)
            seconds[name].append(time.perf_counter() - start)
    return {name: taken[WARM_UP:] for name, taken in seconds.items()}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--tokens", type=int, default=60, help="number of tokens to time")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), help="models to time, besides twin")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    names = [name for name in MODELS if name == "twin" or name in args.only]
    models = {name: MODELS[name]().to(getattr(torch, args.dtype)).eval() for name in names}
    seconds = time_tokens(models, args.tokens)
    ratios = {
        name: statistics.median(own / twin for own, twin in zip(taken, seconds["twin"], strict=True))
        for name, taken in seconds.items()
    }
    print(f"{args.dtype}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    for name, taken in seconds.items():
        print(f"{name:>20}: {1e3 * statistics.median(taken):6.1f} ms a token, {ratios[name]:.2f}x the twin")
    return ratios


if __name__ == "__main__":
    main()
