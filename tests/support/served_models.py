"""Models that engines serve: every kind of folder that `export` and `to_transformers` write, made of SmolLM2.

Experts differ, and routers decide: an engine that chose or weighted experts otherwise would return other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mixture_of_experts.huggingface import export, from_transformers, prune, to_transformers, upcycle
from mixture_of_experts.huggingface.feed_forward import find_feed_forwards
from support.pretrained import SMOLLM2, find_folder

TEXTS = [
    "The capital of France is",
    "To be, or not to be: that is the question. Whether 'tis nobler in the mind to suffer",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
]
NOISE = 0.1  # of experts, in deviations of their weights: they differ, and the text is still English
LAYERS = 4  # of SmolLM2's 30, in all models but one


def load_smollm2(layers: int = LAYERS) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(find_folder(SMOLLM2), dtype=torch.float32).eval()
    del model.model.layers[layers:]
    model.config.num_hidden_layers = layers
    return model


def tokenize() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(find_folder(SMOLLM2))
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def make_dense(config: Any, model: Any, layers: int = LAYERS, **changes: Any) -> Any:
    """SmolLM2 in a dense class with other settings, and with new weights where that class has more."""
    llama = load_smollm2(layers)
    shared = config().to_dict().keys() & llama.config.to_dict().keys() - {"model_type", "architectures", "layer_types"}
    settings = {name: getattr(llama.config, name) for name in shared | {"head_dim", "name_or_path"}}
    made = model(config(**{**settings, **changes})).eval()
    assert not made.load_state_dict(llama.state_dict(), strict=False).unexpected_keys
    return made


@torch.no_grad()
def make_qwen2() -> Any:
    """With biases of queries, keys and values that are not 0."""
    made = make_dense(Qwen2Config, Qwen2ForCausalLM)
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.05)
    return made


@torch.no_grad()
def make_qwen3() -> Any:
    """Norms of queries and keys keep most of their mean size: keys are then not so large that float16 loses 0.02."""
    made = make_dense(Qwen3Config, Qwen3ForCausalLM)
    sizes: dict[str, Tensor] = {}

    def measure(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            sizes[name] = args[0].square().mean(-1).sqrt().mean()

        return hook

    norms = [(n, module) for n, module in made.named_modules() if n.endswith(("q_norm", "k_norm"))]
    for _ in range(3):  # each pass moves the inputs of later layers
        handles = [module.register_forward_hook(measure(name)) for name, module in norms]
        made(torch.tensor([tokenize()[1]]))
        for handle in handles:
            handle.remove()
        for name, module in norms:
            module.weight.fill_(0.7 * sizes[name])
    return made


def make_upcycled(dense: Any = None, num_experts: int = 4, k: int = 2, normalize: bool = True, **settings: Any) -> Any:
    model = load_smollm2() if dense is None else dense
    torch.manual_seed(0)
    upcycle(model, num_experts=num_experts, k=k, noise=NOISE, **settings)
    if not normalize:  # upcycle itself preserves the sum of weights
        for layer in find_feed_forwards(model):
            gate: Any = layer.moe.gate
            gate.normalize = False
    return model


def make_pruned() -> Any:
    model = make_upcycled()
    prune(model, 3, "random")
    return model


def make_merged() -> Any:
    """Adapters on attention and experts, merged."""
    model = make_upcycled()
    experts = ["experts.w1", "experts.w3", "experts.w2"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=experts))
    torch.manual_seed(2)  # with 0, the second and third expert of a token nearly tie, and a float16 cache swaps them
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.005)
    return adapted.eval().merge_and_unload()


def make_fine_tuned(folder: Path) -> Any:
    """A stock Qwen3-MoE that gets layers, trains three steps and becomes a stock model again."""
    export(make_upcycled(make_qwen3())).save_pretrained(folder)
    model = from_transformers(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), loss_coef=1e-2)
    trained = [parameter for name, parameter in model.named_parameters() if "moe" in name]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    tokens = torch.tensor([tokenize()[1]])
    for _ in range(3):
        model.train()(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return to_transformers(model.eval())


#: by name: what makes the stock model, given a folder for intermediate files
SERVED: Mapping[str, Callable[[Path], Any]] = {
    "Mixtral": lambda _: export(make_upcycled(load_smollm2(layers=30))),
    "Mixtral, fine-grained": lambda _: export(make_upcycled(num_experts=8, k=4, granularity=2)),
    "Mixtral, pruned": lambda _: export(make_pruned()),
    "Mixtral, LoRA merged": lambda _: export(make_merged()),
    "Qwen3-MoE": lambda _: export(make_upcycled(make_qwen3())),
    "Qwen3-MoE, fine-tuned": make_fine_tuned,
    "Qwen2-MoE of a Llama": lambda _: export(make_upcycled(shared_expert=512, normalize=False)),
    "Qwen2-MoE of a Llama, no shared expert": lambda _: export(make_upcycled(normalize=False)),
    "Qwen2-MoE of a Qwen2": lambda _: export(make_upcycled(make_qwen2(), shared_expert=512, normalize=False)),
    "Qwen2-MoE of a Llama, normalized": lambda _: export(make_upcycled(shared_expert=512)),
    "Qwen2-MoE of a Qwen2, normalized": lambda _: export(make_upcycled(make_qwen2(), shared_expert=512)),
}


UNNORMALIZED: Any = dict(normalize=False)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}


def make_unusual(name: str, layers: int = 2, router: Any = None, **changes: Any) -> Any:
    """A small model with experts of a dense class with unusual settings."""
    config, model = (getattr(transformers, f"{name}{kind}") for kind in ("Config", "ForCausalLM"))
    return export(make_upcycled(make_dense(config, model, layers, **changes), **(router or {})))


def make_without_biases() -> Any:
    """A Qwen2-MoE as its class allows it: `export` writes biases that are zeros."""
    made = make_unusual("Llama", router=UNNORMALIZED)
    made.config.qkv_bias = False
    for layer in made.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).bias = None
    return made


#: settings that some engines ignore, as `ENGINE_FAULTS` has them: the model, and those engines
UNUSUAL: Mapping[str, tuple[Callable[[], Any], set[str]]] = {
    "Qwen3-MoE, not normalized": (lambda: make_unusual("Qwen3", router=UNNORMALIZED), {"llama.cpp"}),
    "Qwen2-MoE without biases": (make_without_biases, {"vLLM"}),
    "Mixtral with the rotary embeddings of Llama 3": (
        lambda: make_unusual("Llama", rope_parameters=LLAMA3),
        {"mlx-lm"},
    ),
    "Qwen2-MoE with the rotary embeddings of Llama 3": (
        lambda: make_unusual("Qwen2", router=UNNORMALIZED, rope_parameters=LLAMA3),
        {"llama.cpp"},
    ),
    "Qwen3-MoE with the rotary embeddings of Llama 3": (
        lambda: make_unusual("Qwen3", rope_parameters=LLAMA3),
        {"llama.cpp", "mlx-lm"},
    ),
    "Mixtral with a sliding window": (lambda: make_unusual("Mistral", sliding_window=4), {"llama.cpp", "mlx-lm"}),
    "Mixtral with GELU": (lambda: make_unusual("Llama", hidden_act="gelu"), {"vLLM", "llama.cpp", "mlx-lm"}),
    "Qwen3-MoE with GELU": (lambda: make_unusual("Qwen3", hidden_act="gelu"), {"vLLM", "llama.cpp", "mlx-lm"}),
    "Qwen2-MoE with GELU": (
        lambda: make_unusual("Qwen2", router=UNNORMALIZED, hidden_act="gelu"),
        {"llama.cpp", "mlx-lm"},
    ),
}


@torch.no_grad()
def run_transformers(folder: Path, prompts: list[list[int]], new_tokens: int) -> list[dict[str, Any]]:
    """What engines are compared with: all log-probabilities, the greedy tokens, and how far the second choice was."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # `min_new_tokens` would mask it, and engines may choose it
    answers = []
    for prompt in prompts:
        greedy = model.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False)
        logits = model(greedy).logits[0].log_softmax(-1)
        best = logits[len(prompt) - 1 : -1].topk(2).values
        answers.append(
            {
                "prefill": logits[: len(prompt)],
                "greedy": greedy[0, len(prompt) :].tolist(),
                "margin": (best[:, 0] - best[:, 1]).min().item(),
            }
        )
    return answers
