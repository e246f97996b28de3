"""A table of recipes with one entry for each published model."""

from __future__ import annotations

from typing import Any

from mixture_of_experts.gating import (
    DepthAveragedGating,
    ExpertChoiceGating,
    NoisyTopKGating,
    ReLUGating,
    SparseMixerGating,
    Top2Gating,
    TopPGating,
)
from mixture_of_experts.recipes.builder import PublishedModel, Recipe

BATCH_BALANCE = dict(balance_over="batch")
SIGMOID_ROUTER = dict(normalize=True, score="sigmoid", expert_bias=True)
UNGATED_RELU = dict(activation="relu", gated=False)
#: the complementary loss of DeepSeek-V3 (arXiv 2412.19437, section 4.2: alpha = 0.0001)
COMPLEMENTARY_LOSS: dict[str, Any] = dict(loss_coef=0.0, loss_coefs=dict(balance_score=1e-4))

MODELS: dict[str, Recipe] = {
    "gshard": Recipe(
        paper="2006.16668",
        summary="GShard: two choices, the second one random in training; all are computed in eval (arXiv 2006.16668).",
        gate=dict(
            capacity_factor_train=2.0,
            capacity_factor_eval=None,
            second_threshold_train=0.5,  # algorithm 1: a token is sent if 2 g2 exceeds a random number
            second_policy_eval="all",
        ),
        gate_class=Top2Gating,
        experts=UNGATED_RELU,
        layer=dict(loss_coef=1e-2),  # Mesh TensorFlow's `moe_loss_coef`; the paper specifies none
        published=PublishedModel("GShard, 36 layers", 2048, None, 600),
    ),
    "switch": Recipe(
        paper="2101.03961",
        summary=(
            "Switch Transformer: one choice, with a capacity in training; all are computed in eval (arXiv 2101.03961)."
        ),
        gate=dict(k=1, jitter=0.01, capacity_factor_train=1.25),
        experts=UNGATED_RELU,
        layer=dict(loss_coef=1e-2),  # section 2.2
        published=PublishedModel("Switch-C", 2048, None, 1571),
    ),
    "shazeer": Recipe(
        paper="1701.06538",
        summary=(
            "Shazeer et al. 2017: k choices by noisy logits, softmax over the chosen experts, importance and load "
            "losses "
            "(arXiv 1701.06538)."
        ),
        gate=dict(k=4),
        gate_class=NoisyTopKGating,
        experts=UNGATED_RELU,
        layer=dict(loss_coef=0.1),  # appendix C: w_importance = w_load
    ),
    "expert_choice": Recipe(
        paper="2202.09368",
        summary=(
            "Expert choice: each expert selects the tokens of a group that score highest (arXiv 2202.09368). Not "
            "suitable for generative models."
        ),
        gate=dict(capacity_factor=2.0),
        gate_class=ExpertChoiceGating,
        experts=UNGATED_RELU,
        layer=dict(loss_coef=0.0),
    ),
    "mixtral": Recipe(
        paper="2401.04088",
        summary="Mixtral: two choices, softmax normalized (arXiv 2401.04088).",
        gate=dict(k=2, normalize=True, **BATCH_BALANCE),
        router_aux_loss_coef=(0.02, 32),  # config.json of Mixtral-8x7B
        published=PublishedModel("Mixtral-8x7B", 8, 12.9, 46.7),
    ),
    "olmoe": Recipe(
        paper="2409.02060",
        summary="OLMoE: 8 choices, softmax not normalized (arXiv 2409.02060).",
        gate=dict(k=8, normalize=False, **BATCH_BALANCE),
        router_aux_loss_coef=(0.01, 16),
        layer=dict(z_loss_coef=1e-3),  # section 2 of the paper specifies both
        published=PublishedModel("OLMoE-1B-7B", 64, 1.3, 6.9),
    ),
    "qwen2": Recipe(
        paper="2407.10671",
        summary="Qwen2-MoE: 4 choices, and a shared expert with a gate per token (arXiv 2407.10671).",
        gate=dict(k=4, normalize=False, **BATCH_BALANCE),
        router_aux_loss_coef=(0.001, 24),
        shared=4.0,
        shared_gate=True,
        published=PublishedModel("Qwen1.5-MoE-A2.7B", 60, 2.7, 14.3),
    ),
    "qwen3": Recipe(
        paper="2505.09388",
        summary="Qwen3-MoE: 8 choices, softmax normalized, balanced over the batch (arXiv 2505.09388).",
        gate=dict(k=8, normalize=True, **BATCH_BALANCE),
        router_aux_loss_coef=(0.001, 48),
        published=PublishedModel("Qwen3-30B-A3B", 128, 3.3, 30.5),
    ),
    "qwen3_next": Recipe(
        summary="Qwen3-Next, Qwen3.5: 10 choices, softmax normalized, and a shared expert with a gate per token.",
        gate=dict(k=10, normalize=True, **BATCH_BALANCE),
        router_aux_loss_coef=(0.001, 48),
        shared=1.0,
        shared_gate=True,
        published=PublishedModel("Qwen3-Next-80B-A3B", 512, 3, 80),
    ),
    "lara_mini": Recipe(gate=dict(k=8, normalize=True, **BATCH_BALANCE), shared=1.0),
    "hunyuan": Recipe(paper="2411.02265", gate=dict(k=1, normalize=True, **BATCH_BALANCE), shared=1.0),
    "deepseek_v2": Recipe(
        paper="2405.04434",
        summary=(
            "DeepSeek-V2: 6 choices in the 3 of 8 expert groups with the best experts, and shared experts "
            "(arXiv 2405.04434)."
        ),
        gate=dict(k=6, normalize=False, num_groups=8, top_groups=3, group_score="best", scale=16.0),
        shared=2.0,
        layer=dict(  # section 3.1.2: alpha 1 to 3
            loss_coef=3e-3, loss_coefs=dict(balance_device=0.05, balance_communication=0.02)
        ),
        published=PublishedModel("DeepSeek-V2", 160, 21, 236),
    ),
    "deepseek_v3": Recipe(
        paper="2412.19437",
        summary=(
            "DeepSeek-V3: 8 choices in 4 of 8 expert groups, sigmoid, an expert bias, and a shared expert "
            "(arXiv 2412.19437)."
        ),
        gate=dict(k=8, scale=2.5, num_groups=8, top_groups=4, **SIGMOID_ROUTER),
        shared=1.0,
        layer=COMPLEMENTARY_LOSS,
        published=PublishedModel("DeepSeek-V3", 256, 37, 671),
    ),
    "glm5_next": Recipe(
        gate=dict(k=8, scale=2.5, **SIGMOID_ROUTER),
        experts=dict(activation="silu", limit=10.0),
        shared=1.0,
        layer=COMPLEMENTARY_LOSS,
    ),
    "deepseek_v4": Recipe(
        summary=(
            "DeepSeek-V4: 6 choices by sqrt(softplus). Its first layers choose by token id; use `HashGating` for them."
        ),
        gate=dict(k=6, score="sqrt_softplus", expert_bias=True, normalize=True, scale=1.5),
        experts=dict(activation="silu", limit=10.0),
        shared=1.0,
        layer=COMPLEMENTARY_LOSS,
        published=PublishedModel("DeepSeek-V4-Flash", 256, 13, 284),
    ),
    "nemotron_h": Recipe(
        paper="2512.20848",
        summary=(
            "Nemotron 3: 6 choices, sigmoid, an expert bias, squared ReLU, and latent experts with `latent_dim=` "
            "(arXiv 2512.20848)."
        ),
        gate=dict(k=6, scale=2.5, **SIGMOID_ROUTER),
        experts=dict(activation="relu2", gated=False),
        shared=2.0,
        layer=dict(loss_coef=1e-4),  # Nemotron 3 Nano report: the standard loss in addition to the bias
        published=PublishedModel("Nemotron-3-Nano-30B-A3B", 128, 3.2, 31.6),
    ),
    "kimi_k2": Recipe(
        paper="2507.20534",
        summary="Kimi K2: 8 choices, sigmoid, an expert bias, and a shared expert (arXiv 2507.20534).",
        gate=dict(k=8, scale=2.827, **SIGMOID_ROUTER),
        shared=1.0,
        layer=dict(
            loss_coef=0.0,
            loss_coefs=dict(balance_score=1e-3),  # `aux_loss_alpha` of config.json
        ),
        published=PublishedModel("Kimi-K2", 384, 32, 1040),
    ),
    # config.json as in torchtitan's flavor 2p8t, and SiTU as in vLLM; balanced by quantile; no loss was published
    "kimi_k3": Recipe(
        summary=(
            "Kimi K3: 16 choices, sigmoid, an expert bias, experts of half the width followed by a norm, SiTU, and "
            "shared experts. Update the bias with `balance_experts(model, optimizer, 'quantile')`."
        ),
        gate=dict(k=16, **SIGMOID_ROUTER),
        experts=dict(activation="situ"),
        latent=0.5,
        shared=2.0,
        layer=dict(loss_coef=0.0),
        published=PublishedModel("Kimi-K3", 896, None, 2800),
    ),
    "hy_v3": Recipe(gate=dict(k=8, scale=2.5, **SIGMOID_ROUTER), shared=1.0, layer=COMPLEMENTARY_LOSS),
    "minimax_m2": Recipe(
        summary="MiniMax-M2: 8 choices, normalized sigmoid, and an expert bias.",
        gate=dict(k=8, eps=0.0, **SIGMOID_ROUTER, **BATCH_BALANCE),
        router_aux_loss_coef=(0.001, 62),
        published=PublishedModel("MiniMax-M2", 256, 10, 230),
    ),
    "minimax_m3": Recipe(
        gate=dict(k=4, eps=0.0, scale=2.0, **SIGMOID_ROUTER),
        experts=dict(activation="clamped_swiglu", alpha=1.702, limit=7.0),
        shared=1.0,
        router_aux_loss_coef=(0.001, 60),
    ),
    "step3": Recipe(
        gate=dict(k=8, eps=0.0, scale=3.0, **SIGMOID_ROUTER),
        experts=dict(activation="silu", limit=7.0, after=True),
        shared=1.0,
    ),
    "lfm2": Recipe(gate=dict(k=4, eps=1e-6, **SIGMOID_ROUTER)),
    "flint": Recipe(gate=dict(k=4, score="sigmoid", normalize=True, eps=0.0), shared=1.0),
    "ernie4_5": Recipe(
        summary="Ernie 4.5: 6 choices, softmax with an expert bias, and shared experts.",
        gate=dict(k=6, expert_bias=True, **BATCH_BALANCE),
        shared=2.0,
        router_aux_loss_coef=(0.001, 27),  # the first of 28 layers is dense
        published=PublishedModel("ERNIE-4.5-21B-A3B", 64, 3, 21),
    ),
    "mistral4": Recipe(gate=dict(k=4, normalize=True), shared=1.0),
    "granite4": Recipe(
        summary="Granite 4.0: 6 choices, softmax over the chosen experts, and a shared expert.",
        gate=dict(k=6, weigh="softmax", **BATCH_BALANCE),
        shared=2.0,
        router_aux_loss_coef=(0.001, 40),
        published=PublishedModel("Granite-4.0-H-Tiny", 64, 1, 7),
    ),
    "aria": Recipe(paper="2410.05993", gate=dict(k=6, weigh="softmax"), shared=2.0),
    "jetmoe": Recipe(paper="2404.07413", gate=dict(k=2, weigh="softmax")),
    "gpt_oss": Recipe(
        paper="2508.10925",
        summary=(
            "GPT-OSS: 4 choices, softmax over these, a router bias, and clamped SwiGLU with biases (arXiv 2508.10925)."
        ),
        gate=dict(k=4, weigh="softmax", bias=True, **BATCH_BALANCE),
        experts=dict(activation="clamped_swiglu", alpha=1.702, limit=7.0, bias=True),
        router_aux_loss_coef=(0.9, 36),  # config.json of gpt-oss-120b
        published=PublishedModel("gpt-oss-120b", 128, 5.1, 117),
    ),
    "cohere2": Recipe(gate=dict(k=8, score="sigmoid", select="logits", normalize=True, eps=0.0), shared=1.0),
    "kolibri1": Recipe(gate=dict(k=8, select="logits", eps=0.0, **SIGMOID_ROUTER), shared=1.0),
    "llama4": Recipe(
        summary="Llama 4: one choice, a shared expert, and the sigmoid of the logit as a factor of the expert's input.",
        gate=dict(k=1, score="sigmoid", select="logits", normalize=False, **BATCH_BALANCE),
        apply_router_weight_on_input=True,
        shared=1.0,
        router_aux_loss_coef=(0.001, 48),
        published=PublishedModel("Llama-4-Scout", 16, 17, 109),
    ),
    "laguna": Recipe(gate=dict(k=8, eps=0.0, scale=2.5, **SIGMOID_ROUTER), logits=dict(softcap=30.0), shared=1.0),
    "muse_spark": Recipe(gate=dict(k=8, eps=1e-15, scale=2.5, **SIGMOID_ROUTER), logits=dict(multiplier=1.0)),
    "gemma4": Recipe(
        summary=(
            "Gemma 4: a norm before the router, 8 choices, and learned scales of experts. The layer's own norms and "
            "its dense network are not included."
        ),
        gate=dict(k=8, **BATCH_BALANCE),
        logits=dict(norm_eps=1e-6, multiplier="1/sqrt(d)"),
        scales="expert",
        experts=dict(activation="gelu_tanh"),
        published=PublishedModel("Gemma-4-26B-A4B", 128, 3.8, 25.2),
    ),
    "inkling": Recipe(gate=dict(k=6, scale=2.5, score="sigmoid", expert_bias=True), scales="all"),
    "inkling2": Recipe(gate=dict(k=6, score="sqrt_softplus", expert_bias=True, normalize=True, scale=2.5)),
    "phi3_5": Recipe(
        paper="2409.12136",
        summary="Phi-3.5-MoE: SparseMixer, two choices (arXiv 2409.12136).",
        gate=dict(k=2, tolerance=0.01),
        gate_class=SparseMixerGating,
        router_aux_loss_coef=(0.001, 32),  # the class's default; Phi-3.5-MoE-instruct has 0
        published=PublishedModel("Phi-3.5-MoE", 16, 6.6, 42),
    ),
    "dbrx": Recipe(gate=dict(k=4, normalize=True, **BATCH_BALANCE), router_aux_loss_coef=(0.05, 40)),
    "longcat_flash": Recipe(
        paper="2509.01322",
        summary=(
            "LongCat-Flash: 12 choices, an expert bias, and e / 2 additional experts that return the token "
            "(arXiv 2509.01322)."
        ),
        gate=dict(k=12, normalize=False, expert_bias=True, scale=6.0),
        identity=0.5,
        layer=dict(loss_coef=1e-4),  # the coefficient of its device-level loss is not published
        published=PublishedModel("LongCat-Flash", 512, 27, 560),
    ),
    "dynamic_moe": Recipe(
        paper="2403.07652",
        summary="MoE-Dynamic: as few choices as reach a probability of 0.4 together, at most 8 (arXiv 2403.07652).",
        gate=dict(k=8, p=0.4),
        gate_class=TopPGating,
        layer=dict(
            loss_coef=1e-2,
            loss_coefs=dict(entropy=1e-4),  # section 4.1
        ),
    ),
    "remoe": Recipe(
        paper="2412.14711",
        summary=(
            "ReMoE: all experts with positive logits, at most 8. `control_sparsity` keeps their mean number at one "
            "(arXiv 2412.14711)."
        ),
        gate=dict(k=8, mean_choices=1),
        gate_class=ReLUGating,
        layer=dict(loss_coef=1.0),
    ),
    "zaya": Recipe(
        paper="2605.05365",
        summary=(
            "ZAYA1: one choice by a network on a state that is passed from layer to layer, an expert bias, and an "
            "additional expert that returns zero (arXiv 2605.05365). Construct all layers except the first with "
            "`first=False`."
        ),
        gate=dict(k=1, normalize=False, expert_bias=True),
        gate_class=DepthAveragedGating,
        zero=1,  # as in the published weights
        layer=dict(loss_coef=0.0),  # section II-A: only the bias balances the experts
        published=PublishedModel("ZAYA1-8B", 16, 0.76, 8.4),
    ),
}
