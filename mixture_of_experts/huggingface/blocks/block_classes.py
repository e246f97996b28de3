"""Maps this package's recipes to `transformers` sparse blocks, and lists the attributes in which these blocks store
their settings, weights and modules."""

from __future__ import annotations

#: block classes, keyed by the name of their recipe in `recipes.MODELS`
BLOCK_CLASSES: dict[str, str] = {
    "switch": "SwitchTransformersSparseMLP",
    "mixtral": "MixtralSparseMoeBlock MiniMaxSparseMoeBlock Qwen3VLMoeTextSparseMoeBlock",
    "olmoe": "OlmoeSparseMoeBlock FlexOlmoSparseMoeBlock JambaSparseMoeBlock",
    "qwen2": "Qwen2MoeSparseMoeBlock Qwen3OmniMoeTalkerTextSparseMoeBlock",
    "qwen3": "Qwen3MoeSparseMoeBlock MellumSparseMoeBlock Qwen3OmniMoeThinkerTextSparseMoeBlock",
    "qwen3_next": "Qwen3NextSparseMoeBlock Qwen3_5MoeSparseMoeBlock Qwen4ExpTextSparseMoeBlock",
    "lara_mini": "LaraMiniSparseMoeBlock",
    "hunyuan": "HunYuanMoEV1Moe",
    "deepseek_v2": "DeepseekV2Moe DeepseekOcr2TextMoe UnlimitedOcrTextMoe",
    "deepseek_v3": """
        AXK1MoE AXK2MoE BailingHybridMoE BeamMoE DeepseekV3MoE DeepseekV32MoE Dots1MoE Dots3NoteTextMoE
        ExaoneMoeSparseMoEBlock Glm4MoeLiteMoE Glm4MoeMoE Glm4vMoeTextMoE GlmMoeDsaMoE KimiLinearMoE MiMoV2FlashMoE
        SolarOpenMoE
    """,
    "glm5_next": "Glm5NextTextMoE HYV4MoE HYV4VLMoE",
    "deepseek_v4": "DeepseekV4SparseMoeBlock",
    "nemotron_h": "NemotronHMoE",
    "hy_v3": "HYV3MoE Dots3NoteVisionMoE AfmoeSparseMoeBlock",
    "minimax_m2": "MiniMaxM2SparseMoeBlock",
    "minimax_m3": "MiniMaxM3VLSparseMoeBlock",
    "step3": "Step3p7SparseMoeBlock",
    "lfm2": "Lfm2MoeSparseMoeBlock",
    "flint": "FlintSparseMoeBlock",
    "ernie4_5": "Ernie4_5_MoeSparseMoeBlock Ernie4_5_VLMoeSparseMoeBlock",
    "mistral4": "Mistral4MoE MistralLarge4TextMoE",
    "granite4": "GraniteMoeMoE GraniteMoeHybridMoE GraniteMoeSharedMoE GraniteMoeSWAMoE",
    "aria": "AriaTextMoELayer",
    "jetmoe": "JetMoeMoE",
    "gpt_oss": "GptOssMLP OpenAIPrivacyFilterMLP",
    "cohere2": "Cohere2MoeSparseMoeBlock",
    "kolibri1": "Kolibri1SparseMoeBlock",
    "llama4": "Llama4TextMoe",
    "laguna": "LagunaSparseMoeBlock",
    "muse_spark": "MuseSparkMoE",
    "gemma4": "Gemma4TextDecoderLayer DiffusionGemmaEncoderTextLayer DiffusionGemmaDecoderTextLayer",
    "inkling": "InklingMoE",
    "inkling2": "Inkling2SparseMoeBlock Inkling2LoopSparseMoeBlock",
    "phi3_5": "PhimoeSparseMoeBlock",
    "dbrx": "DbrxFFN",
    "longcat_flash": "LongcatFlashMoE",
    "zaya": "ZayaSparseMoeBlock",
}
#: recipe names, keyed by block class
RECIPES_BY_BLOCK: dict[str, str] = {block: name for name, blocks in BLOCK_CLASSES.items() for block in blocks.split()}
#: return values of block routers that differ from `ExternalRouter.returns`
ROUTER_RETURNS: dict[str, tuple[str | None, ...]] = {
    "switch": (None, None, "logits"),
    "jetmoe": (None, None, None, None, "logits"),
    "llama4": (None, "logits"),
    "gemma4": ("probs", "weights", "experts"),
    "dbrx": ("logits",),
}
#: names of the attributes in which blocks or their routers store settings, weights and modules
BLOCK_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    part: tuple(names.split())
    for part, names in {
        "router": "gate router",
        "experts": "experts",
        # settings
        "k": "top_k config.top_k_experts",
        "normalize": "norm_topk_prob",
        "scale": "routed_scaling_factor route_scale router_scaling_factor",
        "num_groups": "num_group",
        "top_groups": "topk_group",
        "multiplier": "output_multiplier",
        "softcap": "router_logit_softcapping",
        "limit": "limit swiglu_limit",
        "alpha": "alpha swiglu_alpha",
        "tolerance": "router_jitter_noise",
        "jitter": "jitter_noise input_jitter_noise moe_jitter_eps",
        # names of the router's weights
        "weight": "weight classifier.weight layer.weight wg.weight gate.weight proj.weight",
        "expert_bias": "e_score_correction_bias expert_bias balancing_biases moe_statics.e_score_correction_bias",
        "experts_of_id": "tid2eid",
        "norm_weight": "scale",
        "scales": "per_expert_scale global_scale",
        # modules
        "shared": "shared_experts shared_expert shared_mlp",
        "shared_gate": "shared_expert_gate",
        "before": "fc1_latent_proj pre_expert_proj pre_feedforward_layernorm_2",
        "before_norm": "pre_expert_norm",
        "after": "fc2_latent_proj post_expert_proj post_feedforward_layernorm_2",
        "last": "post_mlp_layernorm",  # a norm that is applied after the shared expert's output is added
        "shift": "bias",
    }.items()
}
#: attributes that store a block's "gate_up", "down" and "activation", if their names are unusual
EXPERT_ATTRIBUTES: dict[str, dict[str, str]] = {
    "jetmoe": {"gate_up": "input_linear.weight", "down": "output_linear.weight", "activation": "activation"},
}
