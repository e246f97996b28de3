"""Models as records of one table: the settings of their router and experts, and where their block keeps them.

    recipes.mixtral(dim=64, num_experts=8, hidden_dim=128)    # a plain MoE
    recipes.MODELS["mixtral"]                                 # what it is made of

The table is read by the recipes, by `huggingface.from_transformers` and `to_transformers`, by `stats.track_routing`
and by the documentation. Nothing here needs `transformers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from mixture_of_experts.gating import (
    ExpertChoiceGating,
    NoisyTopKGating,
    SparseMixerGating,
    Top2Gating,
    TopKGating,
)


@dataclass(frozen=True)
class Model:
    """One record.

    Attributes:
        paper: where it is described.
        gate: settings of `router`, as published; what a block holds itself goes before them.
        router: the class of the gate.
        logits: settings of `RouterLogits`, where the router is more than a matrix; a `multiplier` of "1/sqrt(d)".
        scales: learned numbers that multiply the normalised weights: "expert", one for each, or "all".
        experts: "activation" ("silu", "gelu", ...), "gated" (True by default), "bias", and "limit", "alpha" and
            "after" of a clamped gating.
        weigh_input: whether weights multiply what the experts read.
        identity: experts that return the token, as a share of the others; `zero`: that return nothing.
        latent: the width the experts compute in, as a share of the model's.
        shared: width of the shared expert in hidden widths of an expert; `shared_gate`: whether a token gates it.
        layer: settings of `MoE`: coefficients of losses.
        blocks: classes of `transformers` that compute this.
        keeps: where those keep a part, if under none of the names in `KEEPS`.
        tells: whether their router returns logits, or probabilities in the place of those.
    """

    paper: str = ""
    gate: Mapping[str, Any] = field(default_factory=dict)
    router: type[nn.Module] = TopKGating
    logits: Mapping[str, Any] | None = None
    scales: str | None = None
    experts: Mapping[str, Any] = field(default_factory=dict)
    weigh_input: bool = False
    identity: float = 0.0
    zero: int = 0
    latent: float | None = None
    shared: float = 0.0
    shared_gate: bool = False
    layer: Mapping[str, Any] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    keeps: Mapping[str, str] = field(default_factory=dict)
    tells: Literal["logits", "probs"] = "logits"


#: names under which blocks of `transformers`, or their routers, keep what varies: settings, weights and modules
KEEPS: dict[str, tuple[str, ...]] = {
    "router": ("gate", "router"),
    "experts": ("experts",),
    # settings
    "k": ("top_k",),
    "normalize": ("norm_topk_prob",),
    "scale": ("routed_scaling_factor", "route_scale", "router_scaling_factor"),
    "num_groups": ("num_group",),
    "top_groups": ("topk_group",),
    "multiplier": ("output_multiplier",),
    "softcap": ("router_logit_softcapping",),
    "limit": ("limit", "swiglu_limit"),
    "alpha": ("alpha", "swiglu_alpha"),
    "tolerance": ("router_jitter_noise",),
    "jitter": ("jitter_noise", "input_jitter_noise", "moe_jitter_eps"),
    # weights of the router
    "weight": ("weight", "classifier.weight", "layer.weight", "wg.weight", "gate.weight", "proj.weight"),
    "bias": ("bias",),
    "expert_bias": (
        "e_score_correction_bias",
        "expert_bias",
        "balancing_biases",
        "moe_statics.e_score_correction_bias",
    ),
    "norm_weight": ("scale",),
    "scales": ("per_expert_scale", "global_scale"),
    # modules
    "shared": ("shared_experts", "shared_expert", "shared_mlp"),
    "shared_gate": ("shared_expert_gate",),
    "before": ("fc1_latent_proj", "pre_expert_proj", "pre_feedforward_layernorm_2"),
    "before_norm": ("pre_expert_norm",),
    "after": ("fc2_latent_proj", "post_expert_proj", "post_feedforward_layernorm_2"),
    "last": ("post_mlp_layernorm",),  # after the shared expert was added
    "shift": ("bias",),
}

BATCH = dict(balance_over="batch")
SIGMOID = dict(score="sigmoid", expert_bias=True)
LOSS_OF_TRANSFORMERS = 1e-3  # of their 0.001 in one layer: see docs/routers.md

MODELS: dict[str, Model] = {
    "gshard": Model(
        "2006.16668",
        router=Top2Gating,
        gate=dict(capacity_factor_train=2.0, capacity_factor_eval=None, second_policy_eval="all"),
        experts=dict(activation="relu", gated=False),
        layer=dict(loss_coef=1e-2),
    ),
    "switch": Model(
        "2101.03961",
        gate=dict(k=1, jitter=0.01, capacity_factor_train=1.25),
        experts=dict(activation="relu", gated=False),
        layer=dict(loss_coef=1e-2),
        blocks=("SwitchTransformersSparseMLP",),
    ),
    "shazeer": Model(
        "1701.06538",
        router=NoisyTopKGating,
        gate=dict(k=4),
        experts=dict(activation="relu", gated=False),
        layer=dict(loss_coef=0.1),
    ),
    "expert_choice": Model(
        "2202.09368",
        router=ExpertChoiceGating,
        gate=dict(capacity_factor=2.0),
        experts=dict(activation="relu", gated=False),
        layer=dict(loss_coef=0.0),
    ),
    "mixtral": Model(
        "2401.04088",
        gate=dict(k=2, normalize=True, **BATCH),
        layer=dict(loss_coef=2e-2),
        blocks=(
            "MixtralSparseMoeBlock",
            "MiniMaxSparseMoeBlock",
            "Qwen3VLMoeTextSparseMoeBlock",
        ),
    ),
    "olmoe": Model(
        "2409.02060",
        gate=dict(k=8, normalize=False, **BATCH),
        layer=dict(loss_coef=1e-2, z_loss_coef=1e-3),
        blocks=("OlmoeSparseMoeBlock", "FlexOlmoSparseMoeBlock", "JambaSparseMoeBlock"),
    ),
    "qwen2": Model(
        "2407.10671",
        gate=dict(k=4, normalize=False, **BATCH),
        layer=dict(loss_coef=1e-3),
        shared=4.0,
        shared_gate=True,
        blocks=("Qwen2MoeSparseMoeBlock", "Qwen3OmniMoeTalkerTextSparseMoeBlock"),
    ),
    "qwen3": Model(
        "2505.09388",
        gate=dict(k=8, normalize=True, **BATCH),
        layer=dict(loss_coef=1e-3),
        blocks=("Qwen3MoeSparseMoeBlock", "MellumSparseMoeBlock", "Qwen3OmniMoeThinkerTextSparseMoeBlock"),
    ),
    "qwen3_next": Model(
        "",
        gate=dict(k=10, normalize=True, **BATCH),
        layer=dict(loss_coef=1e-3),
        shared=1.0,
        shared_gate=True,
        blocks=("Qwen3NextSparseMoeBlock", "Qwen3_5MoeSparseMoeBlock", "Qwen4ExpTextSparseMoeBlock"),
    ),
    "lara_mini": Model(gate=dict(k=8, normalize=True, **BATCH), shared=1.0, blocks=("LaraMiniSparseMoeBlock",)),
    "hunyuan": Model(
        "2411.02265",
        gate=dict(k=1, normalize=True, **BATCH),
        shared=1.0,
        blocks=("HunYuanMoEV1Moe",),
    ),
    "deepseek_v2": Model(
        "2405.04434",
        gate=dict(k=6, normalize=False, num_groups=8, top_groups=3, group_score="best", scale=16.0),
        shared=2.0,
        layer=dict(loss_coef=3e-3),
        blocks=("DeepseekV2Moe", "DeepseekOcr2TextMoe", "UnlimitedOcrTextMoe"),
    ),
    "deepseek_v3": Model(
        "2412.19437",
        gate=dict(k=8, normalize=True, scale=2.5, num_groups=8, top_groups=4, **SIGMOID),
        shared=1.0,
        layer=dict(loss_coef=1e-4),
        blocks=(
            "AXK1MoE",
            "AXK2MoE",
            "BailingHybridMoE",
            "BeamMoE",
            "DeepseekV3MoE",
            "DeepseekV32MoE",
            "Dots1MoE",
            "Dots3NoteTextMoE",
            "ExaoneMoeSparseMoEBlock",
            "Glm4MoeLiteMoE",
            "Glm4MoeMoE",
            "Glm4vMoeTextMoE",
            "GlmMoeDsaMoE",
            "KimiLinearMoE",
            "MiMoV2FlashMoE",
            "SolarOpenMoE",
        ),
    ),
    "glm5_next": Model(
        gate=dict(k=8, normalize=True, scale=2.5, **SIGMOID),
        experts=dict(activation="silu", limit=10.0),
        shared=1.0,
        layer=dict(loss_coef=1e-4),
        blocks=("Glm5NextTextMoE", "HYV4MoE", "HYV4VLMoE"),
    ),
    "deepseek_v4": Model(
        gate=dict(k=6, score="sqrt_softplus", expert_bias=True, normalize=True, scale=1.5),
        experts=dict(activation="silu", limit=10.0),
        shared=1.0,
        layer=dict(loss_coef=1e-4),
        blocks=("DeepseekV4SparseMoeBlock",),
    ),
    "nemotron_h": Model(
        "2504.03624",
        gate=dict(k=6, normalize=True, scale=2.5, **SIGMOID),
        experts=dict(activation="relu2", gated=False),
        latent=0.25,
        shared=2.0,
        layer=dict(loss_coef=1e-4),
        blocks=("NemotronHMoE",),
    ),
    "kimi_k3": Model(
        gate=dict(k=16, normalize=True, scale=2.5, **SIGMOID),
        shared=1.0,
        layer=dict(loss_coef=0.0),
    ),
    "hy_v3": Model(
        gate=dict(k=8, normalize=True, scale=2.5, **SIGMOID),
        shared=1.0,
        layer=dict(loss_coef=1e-4),
        blocks=("HYV3MoE", "Dots3NoteVisionMoE", "AfmoeSparseMoeBlock"),
    ),
    "minimax_m2": Model(
        "",
        gate=dict(k=8, normalize=True, eps=0.0, **SIGMOID),
        layer=dict(loss_coef=1e-3),
        blocks=("MiniMaxM2SparseMoeBlock",),
    ),
    "minimax_m3": Model(
        gate=dict(k=4, normalize=True, eps=0.0, scale=2.0, **SIGMOID),
        experts=dict(activation="clamped_swiglu", alpha=1.702, limit=7.0),
        shared=1.0,
        layer=dict(loss_coef=1e-3),
        blocks=("MiniMaxM3VLSparseMoeBlock",),
    ),
    "step3": Model(
        gate=dict(k=8, normalize=True, eps=0.0, scale=3.0, **SIGMOID),
        experts=dict(activation="silu", limit=7.0, after=True),
        shared=1.0,
        blocks=("Step3p7SparseMoeBlock",),
    ),
    "lfm2": Model(
        gate=dict(k=4, normalize=True, eps=1e-6, **SIGMOID),
        blocks=("Lfm2MoeSparseMoeBlock",),
    ),
    "flint": Model(
        gate=dict(k=4, score="sigmoid", normalize=True, eps=0.0), shared=1.0, blocks=("FlintSparseMoeBlock",)
    ),
    "ernie4_5": Model(
        "",
        gate=dict(k=6, expert_bias=True),
        shared=2.0,
        layer=dict(loss_coef=1e-3),
        blocks=("Ernie4_5_MoeSparseMoeBlock", "Ernie4_5_VLMoeSparseMoeBlock"),
    ),
    "mistral4": Model(
        gate=dict(k=4, normalize=True),
        shared=1.0,
        blocks=("Mistral4MoE", "MistralLarge4TextMoE"),
    ),
    "granite4": Model(
        "",
        gate=dict(k=8, weigh="softmax", **BATCH),
        layer=dict(loss_coef=8e-3),
        blocks=("GraniteMoeMoE", "GraniteMoeHybridMoE", "GraniteMoeSharedMoE", "GraniteMoeSWAMoE"),
    ),
    "aria": Model("2410.05993", gate=dict(k=6, weigh="softmax"), shared=2.0, blocks=("AriaTextMoELayer",)),
    "jetmoe": Model(
        "2404.07413",
        gate=dict(k=2, weigh="softmax"),
        blocks=("JetMoeMoE",),
        keeps={"gate_up": "input_linear.weight", "down": "output_linear.weight", "activation": "activation"},
    ),
    "gpt_oss": Model(
        "2508.10925",
        gate=dict(k=4, weigh="softmax", bias=True, **BATCH),
        experts=dict(activation="clamped_swiglu", alpha=1.702, limit=7.0, bias=True),
        layer=dict(loss_coef=3.6e-3),
        blocks=("GptOssMLP", "OpenAIPrivacyFilterMLP"),
    ),
    "cohere2": Model(
        gate=dict(k=8, score="sigmoid", select="logits", normalize=True, eps=0.0),
        shared=1.0,
        blocks=("Cohere2MoeSparseMoeBlock",),
    ),
    "kolibri1": Model(
        gate=dict(k=8, select="logits", normalize=True, eps=0.0, **SIGMOID),
        shared=1.0,
        blocks=("Kolibri1SparseMoeBlock",),
    ),
    "llama4": Model(
        "",
        gate=dict(k=1, score="sigmoid", select="logits", normalize=False, **BATCH),
        weigh_input=True,
        shared=1.0,
        layer=dict(loss_coef=1e-3),
        blocks=("Llama4TextMoe",),
    ),
    "laguna": Model(
        gate=dict(k=8, normalize=True, eps=0.0, scale=2.5, **SIGMOID),
        logits=dict(softcap=30.0),
        shared=1.0,
        blocks=("LagunaSparseMoeBlock",),
    ),
    "muse_spark": Model(
        gate=dict(k=8, normalize=True, eps=1e-15, scale=2.5, **SIGMOID),
        logits=dict(multiplier=1.0),
        latent=0.5,
        blocks=("MuseSparkMoE",),
    ),
    "gemma4": Model(
        "",
        gate=dict(k=8, **BATCH),
        logits=dict(norm_eps=1e-6, multiplier="1/sqrt(d)"),
        scales="expert",
        experts=dict(activation="gelu_tanh"),
        tells="probs",
        blocks=("Gemma4TextDecoderLayer", "DiffusionGemmaEncoderTextLayer", "DiffusionGemmaDecoderTextLayer"),
    ),
    "inkling": Model(
        gate=dict(k=6, scale=2.5, **SIGMOID),
        scales="all",
        blocks=("InklingMoE",),
    ),
    "inkling2": Model(
        gate=dict(k=6, score="sqrt_softplus", expert_bias=True, normalize=True, scale=2.5),
        blocks=("Inkling2SparseMoeBlock", "Inkling2LoopSparseMoeBlock"),
    ),
    "phi3_5": Model(
        "2409.12136",
        router=SparseMixerGating,
        gate=dict(k=2, tolerance=0.01),
        layer=dict(loss_coef=1e-2),
        blocks=("PhimoeSparseMoeBlock",),
    ),
    "dbrx": Model("", gate=dict(k=4, normalize=True), layer=dict(loss_coef=5e-2), blocks=("DbrxFFN",)),
    "longcat_flash": Model(
        "2509.01322",
        gate=dict(k=12, normalize=False, expert_bias=True, scale=6.0),
        identity=0.5,
        layer=dict(loss_coef=1e-4),
        blocks=("LongcatFlashMoE",),
    ),
    "zaya": Model(gate=dict(k=1, normalize=False, expert_bias=True), zero=1, blocks=("ZayaSparseMoeBlock",)),
}

#: the record of each class of a block
BLOCKS: dict[str, Model] = {block: model for model in MODELS.values() for block in model.blocks}
