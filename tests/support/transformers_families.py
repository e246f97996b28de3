"""Tiny models with random weights of every family of `transformers`, made from their configurations by rules."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import configuration_auto, modeling_auto

DIM, HIDDEN, HEADS, HEAD_DIM, VOCABULARY = 32, 48, 4, 8, 99

#: sizes by the names that configurations give them
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "embedding_size"), DIM),
    **dict.fromkeys(("word_embed_proj_dim", "model_dim", "hidden_dim_text", "cross_attention_hidden_size"), DIM),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "trunk_dim"), DIM),
    **dict.fromkeys(("attention_hidden_size", "dim_att", "decoder_hidden_size", "lru_width"), DIM),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner"), HIDDEN),
    **dict.fromkeys(("d_inner", "ffn_hidden_size", "feed_forward_size", "intermediate_size_mlp"), HIDDEN),
    **dict.fromkeys(("dense_intermediate_size", "prefix_dense_intermediate_size", "decoder_intermediate_size"), HIDDEN),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_query_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_decoder_attention_heads",), HEADS),
    **dict.fromkeys(("num_key_value_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim", "d_head", "attention_head_size"), HEAD_DIM),
    **dict.fromkeys(("global_head_dim", "kv_channels"), HEAD_DIM),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim",), 4),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "text_vocab_size"), VOCABULARY),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_2d_position_embeddings"), 128
    ),
    **dict.fromkeys(("image_size", "crop_size"), 16),
    **dict.fromkeys(("patch_size",), 4),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), 1),
    **dict.fromkeys(("eos_token_id",), 2),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "time_step_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("projection_dim",), DIM),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank"), 8),
    **dict.fromkeys(("first_k_dense_replace", "first_k_dense"), 1),
    **dict.fromkeys(("decoder_sparse_step", "encoder_sparse_step"), 1),
}

#: what the rules do not know, by model type
MIXED = ["linear_attention", "full_attention"]
SWIN = dict(embed_dim=24, depths=[1, 1], num_heads=[2, 4], image_size=32, window_size=4)
MORE: dict[str, dict[str, Any]] = {
    "bailing_hybrid": dict(layer_types=MIXED),
    "bamba": dict(attn_layer_indices=[1]),
    "codegen": dict(rotary_dim=8),
    "diffusion_gemma": dict(find_text_config=dict(top_k_experts=2)),
    "dots1": dict(n_shared_experts=1),
    "dots3_note": dict(num_key_value_heads=HEADS),
    "dots3_note_text": dict(num_key_value_heads=HEADS),
    "falcon_h1": dict(mamba_d_ssm=64),
    "gemma3n": dict(find_text_config=dict(num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"])),
    "gemma3n_text": dict(num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"]),
    "glm4v_moe_text": dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 0])),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "gptj": dict(rotary_dim=8),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"]),
    "inkling2_text": dict(unpadded_vocab_size=90),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "kimi_linear": dict(layer_types=MIXED, mlp_layer_types=["dense", "sparse"], linear_head_dim=8, linear_num_heads=4),
    "layoutlmv3": dict(coordinate_size=4, shape_size=8),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "lfm3": dict(layer_types=["conv", "full_attention"]),
    "lilt": dict(hidden_size=48),
    "longcat_flash": dict(head_dim=4, num_layers=1),
    **{f"qwen3_5{kind}": dict(layer_types=MIXED) for kind in ("", "_text", "_moe", "_moe_text")},
    "blt": dict(patch_in_forward=False),
    "cohere_compass_text": dict(layer_types=["sliding_attention", "full_attention"]),
    "esmc": dict(num_key_value_heads=HEADS),
    "nemotron_h": dict(n_groups=2, layers_block_type=["linear_attention", "moe", "full_attention", "mlp"]),
    "neomme": dict(head_dim=16),
    "qwen3_next": dict(layer_types=MIXED),
    "recurrent_gemma": dict(block_types=["recurrent", "attention"], intermediate_size=4 * HIDDEN),
    "reformer": dict(is_decoder=True, axial_pos_shape=[4, 4], axial_pos_embds_dim=[16, 16], attn_layers=["local"] * 2),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(attn_layer_period=2, attn_layer_offset=1, attention_hidden_size=64, attention_head_dim=16),
    "zamba2": dict(layers_block_type=["mamba", "hybrid"]),
    "zaya": dict(num_experts_per_tok=1),
    "luke": dict(entity_vocab_size=16, entity_emb_size=16),
    "mamba2": dict(num_heads=4, head_dim=16, n_groups=2),
    **{name: dict(SWIN) for name in ("swin", "swinv2", "donut-swin")},
    "siglip2": dict(vision_config=dict(num_channels=3, num_patches=16)),
    "mobilebert": dict(intra_bottleneck_size=16),
    "moshi": dict(audio_vocab_size=32),
}

TASKS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "sequences": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "encoding": "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES",
    "classes": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "questions": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "pretraining": "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
    "any": "MODEL_MAPPING_NAMES",
}


TEXT = ("causal", "sequences", "masked", "encoding", "classes", "questions")


def model_class(model_type: str) -> Any:
    for mapping in TASKS.values():
        name = getattr(modeling_auto, mapping).get(model_type)
        if name is not None:
            return getattr(transformers, name if isinstance(name, str) else name[0], None)
    return None


def config_fields(config_class: Any) -> set[str]:
    names = set(inspect.signature(config_class.__init__).parameters)
    if dataclasses.is_dataclass(config_class):
        names |= {field.name for field in dataclasses.fields(config_class)}
    return names


def make_tiny_config(config_class: Any, **more: Any) -> dict[str, Any]:
    """Arguments of a small configuration."""
    names = config_fields(config_class)
    aliases = getattr(config_class, "attribute_map", {})
    many = {name for name in names if isinstance(getattr(config_class, name, None), list | tuple)}  # one for each stage
    settings = {name: size for name, size in SIZES.items() if name in names - many}
    for name, alias in aliases.items():
        settings.pop(name, None) if alias in settings else None
    if "dim" in names and "hidden_dim" in names:
        settings["hidden_dim"] = HIDDEN
    for name, sub in getattr(config_class, "sub_configs", {}).items():
        if inspect.isclass(sub) and name in names and sub.__name__ != "AutoConfig":
            settings[name] = make_tiny_config(sub)
        elif name in names:
            default = getattr(config_class(), name, None)
            if default is not None:
                settings[name] = {**make_tiny_config(type(default)), "model_type": default.model_type}
    if "kv_lora_rank" in names and "num_key_value_heads" in settings:
        settings["num_key_value_heads"] = HEADS
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(settings.get(name), dict):
            settings[name] |= value
        else:
            settings[name] = value
    return settings


def build_model(model_type: str, kind: Any = None, **more: Any) -> Any:
    kind = kind or model_class(model_type)
    config_class = kind.config_class
    if config_class is None:
        config_class = configuration_auto.CONFIG_MAPPING[model_type]
    config = config_class(**make_tiny_config(config_class, **{**MORE.get(model_type, {}), **more}))
    torch.manual_seed(0)
    model = kind(config)
    draw_weights(model)
    return model.eval()


def draw_weights(model: nn.Module) -> None:
    """Weights as large as trained ones, biases too."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
        elif parameter.ndim > 1 and parameter.is_floating_point():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)


def make_inputs(model: Any, b: int = 2, n: int = 12) -> dict[str, Tensor]:
    """What a model of any kind takes."""
    generator = torch.Generator().manual_seed(1)
    parameters = inspect.signature(model.forward).parameters
    given = {}
    sees = model.main_input_name == "pixel_values" or model.config.model_type in TWO_TOWERS
    if "pixel_values" in parameters and sees:
        size = image_size(model.config)
        given["pixel_values"] = torch.randn(b, 3, *size, generator=generator)
    if "input_values" in parameters:
        given["input_values"] = torch.randn(b, 4000, generator=generator)
    if "input_features" in parameters and model.main_input_name == "input_features":
        config = model.config
        bins = getattr(config, "num_mel_bins", getattr(config, "feature_projection_input_dim", 80))
        frames = 2 * getattr(config, "max_source_positions", 20)
        wide = config.model_type in ("whisper",)
        shape = (b, bins, frames) if wide else (b, 40, bins)
        given["input_features"] = torch.randn(*shape, generator=generator)
    if "input_ids" in parameters and (not given or model.config.model_type in TWO_TOWERS):
        books = getattr(getattr(model.config, "decoder", model.config), "num_codebooks", 1)
        rows = b * (books if model.config.model_type.startswith("musicgen") else 1)
        given["input_ids"] = torch.randint(3, 30, (rows, n), generator=generator)
    if "decoder_input_ids" in parameters and getattr(model.config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = torch.randint(3, 30, (b, n), generator=generator)
    return given


TWO_TOWERS = ("clip", "siglip", "siglip2", "altclip", "chinese_clip", "clipseg", "align", "blip", "groupvit", "owlvit")


def image_size(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", None), "image_size", 32)
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def compute_outputs(model: Any, given: dict[str, Tensor]) -> Tensor:
    """All floating-point tensors that a model returns first, one after the other."""
    with torch.no_grad():
        out = model(**given)
    return torch.cat([tensor.flatten().float() for tensor in find_tensors(out)])


def find_tensors(out: Any) -> list[Tensor]:
    """Those of an output; not of a cache."""
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() else []
    values = out.to_tuple() if hasattr(out, "to_tuple") else out if isinstance(out, tuple) else ()
    return [tensor for value in values for tensor in find_tensors(value)]


def list_text_types() -> Iterator[str]:
    """Model types with a class that is for text."""
    known = {name for task in TEXT for name in getattr(modeling_auto, TASKS[task])}
    for model_type in configuration_auto.CONFIG_MAPPING_NAMES:
        if model_type in known and getattr(model_class(model_type), "main_input_name", "") == "input_ids":
            yield model_type


#: mappings of transformers with families that are not for text, the first ones asked first
OTHERS = {
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES": "zero-shot",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "pictures",
    "MODEL_FOR_CTC_MAPPING_NAMES": "sound",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES": "sound",
}


def list_other_classes() -> dict[str, Any]:
    """Classes for pictures and sound, by model type, that are for no text alone."""
    found: dict[str, Any] = {}
    text = {name for task in TEXT for name in getattr(modeling_auto, TASKS[task])}
    for mapping in OTHERS:
        for model_type, name in getattr(modeling_auto, mapping).items():
            kind = getattr(transformers, name if isinstance(name, str) else name[0], None)
            if model_type not in text and kind is not None:
                found.setdefault(model_type, kind)
    return found
