"""What experts in 8 and 4 bits cost and save: SmolLM2 upcycled to four experts in each of thirty layers.

    python -m tests.support.pretrained    # fetches the model
    python -m experiments.quantized_experts    # a quarter of an hour of one core, 9 GB
    python -m experiments.quantized_experts --calibrated    # numbers of 4 bits by GPTQ; ten minutes
    python -m experiments.quantized_experts --fits    # how large published models are

The experts and routers of the last eight layers first train a little, on Python text. Then the model is cast, and its
experts are quantised. Times are seconds that the process computes, on one thread, in turns. Perplexity is that of
held-out text; the second table has it after LoRA of rank 8 beside the experts of all layers has trained a little. The
last row of a dtype has experts that compute nothing: no experts can be faster.

GPTQ is the recipe of docs/stacked_experts.md. It sees text that the model also trains on, never the held-out one.
"""

import argparse
import copy
import json
import re
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from mixture_of_experts import GatedExperts, RoutedExperts
from mixture_of_experts.huggingface import fast_lora, from_transformers, upcycle, weights_shown
from mixture_of_experts.quantize import QuantizedExperts, quantize_experts
from tests.support.pretrained import SMOLLM2, fetch

from .language_model.corpus import Batches
from .scaling import RECORDS
from .upcycle_pretrained import BATCH, CONTEXT, Text, load

page, recipe = Path(__file__).parents[1] / "docs" / "stacked_experts.md", {}
(code,) = re.findall(r"^```python\n([^`]*?^def gptq.*?)^moe = ", page.read_text(encoding="utf-8"), re.M | re.S)
exec(code, recipe)
gptq, moments = recipe["gptq"], recipe["moments"]

TURNS, STEPS, TRAINED, LORA = 3, 12, 8, 8
SHOWN, CALIBRATION = 16, 16  # windows whose perplexity is told, batches of 1,024 tokens
WEIGHTS = ["experts.w1", "experts.w3", "experts.w2"]
KINDS: dict[str, dict[str, Any]] = {
    "8 bits": dict(bits=8),
    "4 bits": dict(bits=4),
    "4 bits, groups of 32": dict(bits=4, group=32),
}
#: configurations of published models, by the class of transformers
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral 8x7B": (
        "Mixtral",
        dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
        | dict(num_key_value_heads=8, num_local_experts=8, vocab_size=32000),
    ),
    "Qwen3-30B-A3B": (
        "Qwen3Moe",
        dict(hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48)
        | dict(num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, vocab_size=151936)
        | dict(mlp_only_layers=[], decoder_sparse_step=1),
    ),
    "gpt-oss-20b": (
        "GptOss",
        dict(hidden_size=2880, intermediate_size=2880, num_hidden_layers=24, num_attention_heads=64, head_dim=64)
        | dict(num_key_value_heads=8, num_local_experts=32, vocab_size=201088),
    ),
    "DeepSeek-V2-Lite": (
        "DeepseekV2",
        dict(hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27)
        | dict(num_attention_heads=16, num_key_value_heads=16, n_routed_experts=64, n_shared_experts=2)
        | dict(first_k_dense_replace=1, kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64)
        | dict(v_head_dim=128, vocab_size=102400, num_experts_per_tok=6, n_group=1, topk_group=1),
    ),
    "OLMoE-1B-7B": (
        "Olmoe",
        dict(hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16)
        | dict(num_key_value_heads=16, num_experts=64, vocab_size=50304),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fits", action="store_true", help="print how large published models are, and train nothing")
    parser.add_argument(
        "--calibrated", action="store_true", help="compare GPTQ with the nearest numbers, without times"
    )
    parser.add_argument("--trained", type=Path, help="file that keeps the trained weights, or has them already")
    parser.add_argument("--records", type=Path, default=RECORDS / "quantized_experts.jsonl", help="of --calibrated")
    args = parser.parse_args(argv)
    if args.fits:
        print_sizes()
        return 0
    torch.set_num_threads(1)
    text = load()
    windows, trained = text.windows[:SHOWN].long(), upcycled(text, args.trained)
    if args.calibrated:
        calibrated(trained.bfloat16(), text, args.records)
        return 0
    print(
        "| dtype | experts | experts, MB | perplexity | error of logits | decoding, ms a token | 512 tokens, s |\n"
        + "|---" * 7
        + "|",
        flush=True,
    )
    for dtype in (torch.bfloat16, torch.float32):
        plain = copy.deepcopy(trained).to(dtype) if dtype == torch.bfloat16 else trained
        models = {"as they are": plain}
        for name, settings in KINDS.items():
            models[name] = quantize_experts(copy.deepcopy(plain, shared_with(plain)), **settings)
        empty = copy.deepcopy(plain, shared_with(plain))
        for layer in empty.model.layers:
            layer.mlp.moe.experts = NoExperts()
        found = {name: measure(model, windows) for name, model in models.items()}
        timed = {**models, "none": empty}
        decoding, reading = in_turns(timed, windows, decode), in_turns(timed, windows, read)
        wanted = found["as they are"][1]
        for name, model in models.items():
            losses, logits = found[name]
            error = (logits - wanted).norm() / wanted.norm()
            print(
                f"| {str(dtype)[6:]} | {name} | {megabytes(model):.0f} | {losses.mean().exp():.3f} | {error:.4f} "
                f"| {1000 * decoding[name]:.1f} | {reading[name]:.2f} |",
                flush=True,
            )
        times = f"{1000 * decoding['none']:.1f} | {reading['none']:.2f}"
        print(f"| {str(dtype)[6:]} | compute nothing | | | | {times} |", flush=True)
        del plain, models, empty, timed
    print("\n| experts, float32 | perplexity after LoRA |\n|---|---|", flush=True)
    for name, settings in {"as they are": {}, **KINDS}.items():
        model = copy.deepcopy(trained, shared_with(trained))
        model = quantize_experts(model, **settings) if settings else model
        print(f"| {name} | {adapted(model, text, windows).exp():.3f} |", flush=True)
    return 0


def print_sizes() -> None:
    """The bytes of published models, whose weights need not be there."""
    print(
        "| model | parameters | in experts | bfloat16, GB | 8 bits | 4 bits | 4 bits, groups of 32 |\n"
        + "|---" * 7
        + "|"
    )
    for name, (kind, settings) in PUBLISHED.items():
        config = getattr(transformers, f"{kind}Config")(**settings)
        with torch.device("meta"):
            model = getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16).requires_grad_(False)
            whole = {id(parameter): parameter.numel() for parameter in model.parameters()}
            layers = [module for module in from_transformers(model).modules() if isinstance(module, GatedExperts)]
            inside = sum(weight.numel() for experts in layers for weight in experts.parameters())
            total = sum(whole.values())
            sizes = []
            for bits in KINDS.values():
                made = [QuantizedExperts(experts, **bits) for experts in layers]
                small = sum(buffer.numel() * buffer.element_size() for experts in made for buffer in experts.buffers())
                sizes.append(f"{(2 * (total - inside) + small) / 1e9:.1f}")
        print(f"| {name} | {total / 1e9:.1f} B | {inside / total:.0%} | {2 * total / 1e9:.1f} | {' | '.join(sizes)} |")


def shared_with(model: nn.Module) -> Any:
    """What a deep copy is to share with the model: all tensors."""
    return {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}


def calibrated(model: Any, text: Text, path: Path) -> None:
    """Perplexity with the nearest numbers of 4 bits and with those of GPTQ; a line of the records for each. What it has
    more than before is of all held-out windows, with its standard error, as that of many others would be."""
    batches, windows = Batches(text.train, CONTEXT, 8, seed=1), text.windows.long()
    rounding = gptq(moments(model, (batches.next()[:, :-1] for _ in range(CALIBRATION))))
    before, wanted = measure(model, windows)
    print(f"as they are: {before[:SHOWN].mean().exp():.3f}\n", flush=True)
    print("| group | numbers | perplexity | more | error of logits |\n" + "|---" * 5 + "|", flush=True)
    for group in (64, 32):
        for name, choose in (("nearest", None), ("GPTQ", rounding)):
            small = copy.deepcopy(model, shared_with(model))
            losses, logits = measure(quantize_experts(small, 4, group=group, rounding=choose), windows)
            change, error = losses - before, ((logits - wanted).norm() / wanted.norm()).item()
            perplexity, more = losses[:SHOWN].mean().exp().item(), change.mean().expm1().item()
            by = change.std().item() / len(change) ** 0.5
            print(f"| {group} | {name} | {perplexity:.3f} | {more:.2%} ± {by:.2%} | {error:.4f} |", flush=True)
            line = dict(group=group, numbers=name, calibration=CALIBRATION * 8 * CONTEXT if choose else 0)
            line |= dict(perplexity=round(perplexity, 4), more=round(more, 5), by=round(by, 5), error=round(error, 5))
            with open(path, "a") as file:
                file.write(json.dumps(line | {"text": text.sources}) + "\n")


def upcycled(text: Text, kept: Path | None = None) -> Any:
    """The model in float32, frozen; a file has its weights or gets them."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM.from_pretrained(fetch(SMOLLM2), dtype=torch.float32).requires_grad_(False)
    upcycle(model, num_experts=4, noise=0.1, loss_coef=0.0)
    if kept is not None and kept.exists():
        model.load_state_dict(torch.load(kept, weights_only=True))
        return model.eval().requires_grad_(False)
    for layer in model.model.layers[-8:]:
        layer.mlp.requires_grad_(True)
    train(model, text, TRAINED, 3e-4, BATCH)
    if kept is not None:
        torch.save(model.state_dict(), kept)
    return model.eval().requires_grad_(False)


def adapted(model: Any, text: Text, windows: Tensor) -> Tensor:
    """The loss of a model after LoRA beside its experts has trained."""
    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=[], target_parameters=WEIGHTS)
    quantised = any(isinstance(module, QuantizedExperts) for module in model.modules())
    with weights_shown(model) if quantised else nullcontext():
        tuned = fast_lora(get_peft_model(model, lora))
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_("lora_" in name)
    train(tuned, text, LORA, 1e-3, BATCH // 2)
    return measure(tuned.eval(), windows)[0].mean()


def train(model: Any, text: Text, steps: int, rate: float, batch: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0)
    batches = Batches(text.train, CONTEXT, batch, seed=0)
    for _ in range(steps):
        tokens = batches.next()[:, :-1]
        model.train()(tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


class NoExperts(RoutedExperts):
    """What a layer costs without the products of its experts."""

    def forward(self, x: Tensor, decision: Any = None) -> Tensor:
        return torch.zeros_like(x)


def megabytes(model: Any) -> float:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return sum(tensor.numel() * tensor.element_size() for name, tensor in tensors if ".experts." in name) / 1e6


@torch.no_grad()
def measure(model: Any, windows: Tensor) -> tuple[Tensor, Tensor]:
    """The mean loss of a token in each window, and logits of the first one."""
    losses, first = [], None
    for window in windows.split(1):
        logits = model(window[:, :-1]).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:]))
        first = logits if first is None else first
    assert first is not None
    return torch.stack(losses), first


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
