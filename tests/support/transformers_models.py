"""Tiny models with random weights of every architecture whose feed-forward networks are known, and batches for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from mixture_of_experts import TopKGating

DIM, HIDDEN, LAYERS, VOCABULARY = 32, 48, 2, 64
SINGLE_NETWORK = partial(
    TopKGating, k=2, capacity_factor_train=1.0, capacity_factor_eval=1.0, min_expert_capacity=1, priority="token"
)
SHORT, LONG = 4, 9

GPT2 = dict(n_embd=DIM, n_inner=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=64)
LLAMA = dict(
    hidden_size=DIM,
    intermediate_size=HIDDEN,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    head_dim=8,
)
PHI = {name: value for name, value in LLAMA.items() if name != "head_dim"}
NEOX = {name: value for name, value in PHI.items() if name != "num_key_value_heads"}
BERT = NEOX
T5 = dict(d_model=DIM, d_kv=8, d_ff=HIDDEN, num_layers=LAYERS, num_decoder_layers=LAYERS, num_heads=4)
OPT = dict(hidden_size=DIM, ffn_dim=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4, word_embed_proj_dim=DIM)
VIT = dict(NEOX, image_size=16, patch_size=4, num_labels=3)
WHISPER = dict(
    d_model=DIM,
    encoder_layers=LAYERS,
    decoder_layers=LAYERS,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=HIDDEN,
    decoder_ffn_dim=HIDDEN,
    num_mel_bins=8,
    max_source_positions=10,
    max_target_positions=32,
)


@dataclass(frozen=True)
class Architecture:
    """How to build a model, and what it is given."""

    model: str
    config: str
    settings: Mapping[str, Any]
    kind: str = "causal"
    pattern: str = "model.layers.{}.mlp"
    also: tuple[str, ...] = field(default=())  # patterns of more networks, in the model's order

    def build(self, **more: Any) -> Any:
        settings = {**self.settings, **more}
        if self.kind not in ("picture",):
            settings = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **settings}
        if self.kind in ("sequences", "sound"):
            settings.setdefault("decoder_start_token_id", 1)
        config = getattr(transformers, self.config)(**settings)
        model = getattr(transformers, self.model)(config)
        for parameter in model.parameters():  # as large as trained ones, biases too
            if parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
            else:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        return model.eval()

    def names(self) -> list[str]:
        return [pattern.format(i) for pattern in (self.pattern, *self.also) for i in range(LAYERS)]

    def inputs(self, b: int = 2, n: int = 7) -> dict[str, Tensor]:
        tokens = torch.randint(3, VOCABULARY, (b, n))
        if self.kind == "picture":
            return {"pixel_values": torch.randn(b, 3, 16, 16)}
        if self.kind == "sequences":
            return {"input_ids": tokens, "decoder_input_ids": torch.randint(3, VOCABULARY, (b, n - 1))}
        if self.kind == "sound":
            return {"input_features": torch.randn(b, 8, 20), "decoder_input_ids": tokens}
        return {"input_ids": tokens}

    def labels(self, inputs: Mapping[str, Tensor]) -> Tensor:
        if self.kind == "picture":
            return torch.randint(3, (len(inputs["pixel_values"]),))
        return inputs["decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"]


def make_causal(name: str, settings: Mapping[str, Any], **more: Any) -> Architecture:
    return Architecture(f"{name}ForCausalLM", f"{name}Config", settings, **more)


def make_t5(act: str) -> Architecture:
    return Architecture(
        "T5ForConditionalGeneration",
        "T5Config",
        dict(T5, feed_forward_proj=act),
        kind="sequences",
        pattern="encoder.block.{}.layer.1.DenseReluDense",
        also=("decoder.block.{}.layer.2.DenseReluDense",),
    )


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture("GPT2LMHeadModel", "GPT2Config", GPT2, pattern="transformer.h.{}.mlp"),
    "llama": make_causal("Llama", LLAMA),
    "llama_bias": make_causal("Llama", dict(LLAMA, mlp_bias=True)),
    "mistral": make_causal("Mistral", LLAMA),
    "qwen2": make_causal("Qwen2", PHI),
    "qwen3": make_causal("Qwen3", LLAMA),
    "gemma": make_causal("Gemma", LLAMA),
    "gemma2": make_causal("Gemma2", LLAMA),
    "gemma3": Architecture("Gemma3ForCausalLM", "Gemma3TextConfig", LLAMA),
    "phi": make_causal("Phi", PHI),
    "phi3": make_causal("Phi3", PHI),
    "gpt_neox": make_causal("GPTNeoX", NEOX, pattern="gpt_neox.layers.{}.mlp"),
    "opt": make_causal("OPT", OPT, pattern="model.decoder.layers.{}.fc2"),
    "opt_without_bias": make_causal("OPT", dict(OPT, enable_bias=False), pattern="model.decoder.layers.{}.fc2"),
    "bert": Architecture(
        "BertForMaskedLM", "BertConfig", BERT, kind="tokens", pattern="bert.encoder.layer.{}.output.dense"
    ),
    "roberta": Architecture(
        "RobertaForMaskedLM", "RobertaConfig", BERT, kind="tokens", pattern="roberta.encoder.layer.{}.output.dense"
    ),
    "t5": make_t5("relu"),
    "t5_gated": make_t5("gated-gelu"),
    "vit": Architecture("ViTForImageClassification", "ViTConfig", VIT, kind="picture", pattern="vit.layers.{}.mlp"),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        WHISPER,
        kind="sound",
        pattern="model.encoder.layers.{}.fc2",
        also=("model.decoder.layers.{}.fc2",),
    ),
}
CAUSAL = [name for name, architecture in ARCHITECTURES.items() if architecture.kind == "causal"]


def disable_dropout(model: nn.Module) -> nn.Module:
    """The model, with every dropout in modules and in numbers on them set to 0."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and (name == "p" or "drop" in name):
                setattr(module, name, 0.0)
    return model


def pad_tokens(tokens: Tensor, to: int, side: str) -> tuple[Tensor, Tensor]:
    """Tokens `(1, n)` with random ones in the padding, and their mask."""
    filler = torch.randint(3, VOCABULARY, (1, to - tokens.shape[1]))
    parts = [(tokens, torch.ones_like(tokens)), (filler, torch.zeros_like(filler))]
    parts = parts if side == "right" else parts[::-1]
    return torch.cat([part for part, _ in parts], 1), torch.cat([mask for _, mask in parts], 1)


def make_two_lengths(side: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Two sequences, and both as one batch."""
    alone = [torch.randint(3, VOCABULARY, (1, n)) for n in (LONG, SHORT)]
    padded, mask = zip(*(pad_tokens(tokens, LONG, side) for tokens in alone), strict=True)
    return alone, {"input_ids": torch.cat(padded), "attention_mask": torch.cat(mask)}
