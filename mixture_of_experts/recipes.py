"""Published models as recipes of one table: the settings of router and experts, and where their blocks store them::

    recipes.mixtral(dim=64, num_experts=8, hidden_dim=128)    # a plain MoE
    recipes.MODELS["mixtral"]                                 # its recipe

The table is read by the recipes, by `huggingface.from_transformers` and `to_transformers`, by `stats.track_routing`
and by the documentation. Nothing here needs `transformers`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mixture_of_experts.arguments import reject_unused_arguments
from mixture_of_experts.experts import Experts, GatedExperts
from mixture_of_experts.gating import (
    DepthAveragedGating,
    ExpertChoiceGating,
    NoisyTopKGating,
    ReLUGating,
    RouterLogits,
    SparseMixerGating,
    Top2Gating,
    TopKGating,
    TopPGating,
)
from mixture_of_experts.gating.balance_losses import OF_EXPERT_GROUPS
from mixture_of_experts.gating.steps import LearnedScale
from mixture_of_experts.moe import MoE
from mixture_of_experts.ops import ClampedGLU, ClampedSwiGLU, SiTU, SquaredReLU
from mixture_of_experts.ops.activations import compute_hidden, make_activation
from mixture_of_experts.support.checks import check_size
from mixture_of_experts.wrappers import GatedSharedExpert, InputWeightedExperts, LatentExperts, ZeroComputationExperts


class PublishedModel(NamedTuple):
    """A published model, according to its paper or model card.

    Attributes:
        name: name of the model.
        num_experts: the number of experts of a layer, without shared ones.
        active, total: parameters that compute a token, and all parameters, in billions; None if not published.
    """

    name: str
    num_experts: int
    active: float | None
    total: float | None


@dataclass(frozen=True)
class Recipe:
    """The recipe of a model's layers.

    Attributes:
        paper: number of its paper on arXiv.
        summary: description of its layers, the docstring of the function with its name.
        gate: arguments of the gate, as published. Settings stored in a block of `transformers` take precedence.
        gate_class: the class of the gate.
        logits: arguments of `RouterLogits`, if the router is more than a matrix. A `multiplier` may be "1/sqrt(d)".
        scales: learned scales that multiply the normalized weights: "expert", one for each expert, or "all", one.
        experts: "activation" ("silu", "gelu", ...), "gated" (True by default) and "bias"; for a clamped activation also
            "limit", "alpha" and "after".
        apply_router_weight_on_input: whether weights multiply the experts' inputs.
        latent: width of latent experts, which have a norm after them, as a share of d; 0: there are none.
        identity: number of experts that return the token, as a share of those that compute.
        zero: number of experts that return zero.
        shared: width of the shared expert, in hidden widths of an expert; 0: there is none.
        shared_gate: whether a learned gate of each token multiplies the shared expert's output.
        layer: arguments of `MoE`, the coefficients of losses; those of expert groups only if the gate has such groups.
        router_aux_loss_coef: coefficient of a loss over all layers, as in transformers, and the number of layers;
            `loss_coef` is coefficient * k / layers. The coefficient is that of the model's published configuration, or
            the default of its class in transformers.
        blocks: classes of `transformers` that compute this.
        block_attributes: where these blocks store "gate_up", "down" and "activation", if not under the usual names.
            The names of all other parts are in `BLOCK_ATTRIBUTES`.
        returns: the results of the router of these blocks, in order: "logits" or "probs", "weights", "experts", or None
            for another value. More values may follow.
        published: a model that has these layers, if its sizes are known.
    """

    paper: str = ""
    summary: str = ""
    gate: Mapping[str, Any] = field(default_factory=dict)
    gate_class: type[nn.Module] = TopKGating
    logits: Mapping[str, Any] | None = None
    scales: str | None = None
    experts: Mapping[str, Any] = field(default_factory=dict)
    apply_router_weight_on_input: bool = False
    latent: float = 0.0
    identity: float = 0.0
    zero: int = 0
    shared: float = 0.0
    shared_gate: bool = False
    layer: Mapping[str, Any] = field(default_factory=dict)
    router_aux_loss_coef: tuple[float, int] | None = None
    blocks: tuple[str, ...] = ()
    block_attributes: Mapping[str, str] = field(default_factory=dict)
    returns: tuple[str | None, ...] = ("logits", "weights", "experts")
    published: PublishedModel | None = None


#: attributes in which blocks of `transformers`, or their routers, store settings, weights and modules
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
        # weights of the router
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
        "last": "post_mlp_layernorm",  # runs after the shared expert's output is added
        "shift": "bias",
    }.items()
}


RECIPE_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "relu": nn.ReLU,
    "relu2": SquaredReLU,
    "silu": nn.SiLU,
    "situ": SiTU,
}


#: arguments of `MoE` that a recipe passes on
LAYER_ARGUMENTS = ("loss_coef", "z_loss_coef", "loss_coefs", "group_size", "shared_expert")


class SharedExpert(nn.Module):
    """A feed-forward network for every token: `(act(x gate) * (x up)) down`, or `act(x up) down`.

    Args:
        dim, hidden_dim: d and h.
        activation: a class, a module or a function; for a gated network also a function of `(x gate, x up)`.
        gated: whether the network has a gate projection.
        bias: whether its linear layers have biases.

    Example:
        >>> import torch
        >>> SharedExpert(8, 16)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    by_token: ClassVar[bool] = True
    gate_proj: nn.Linear | None
    up_proj: nn.Linear
    down_proj: nn.Linear
    act: nn.Module

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        activation: Any = nn.SiLU,
        gated: bool = True,
        bias: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.gate_proj = nn.Linear(dim, hidden_dim, bias, **factory) if gated else None
        self.up_proj = nn.Linear(dim, hidden_dim, bias, **factory)
        self.down_proj = nn.Linear(hidden_dim, dim, bias, **factory)
        self.act = make_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        parts = [up] if self.gate_proj is None else [self.gate_proj(x), up]
        return self.down_proj(compute_hidden(self.act, parts))


def build(
    recipe: Recipe,
    dim: int,
    num_experts: int,
    hidden_dim: int | None = None,
    *,
    layers: int | None = None,
    latent_dim: int | None = None,
    activation: Any = None,
    gate: nn.Module | None = None,
    experts: Any = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
    **changes: Any,
) -> MoE:
    """Build a layer according to a recipe.

    Args:
        recipe: one of `MODELS`, or a custom recipe.
        dim, num_experts: d and e, the number of experts that compute.
        hidden_dim: h, hidden width of an expert; 4 d by default.
        layers: number of such layers in your model, by which the coefficient of a loss over all layers is divided; by
            default the published number. Recipes whose papers give coefficients for each layer do not accept it.
        latent_dim: width in which experts compute, between two linear layers (arXiv 2601.18089); by default that of
            the recipe, or d.
        activation: activation of the networks that are built, instead of the recipe's; as in `MoE`.
        gate, experts: replacements for those that the recipe describes; as in `MoE`.
        device, dtype: of the weights.
        changes: arguments that replace the recipe's: of `MoE` (`loss_coef`, `z_loss_coef`, `loss_coefs`, `group_size`,
            `shared_expert`), and of the gate (`k`, `capacity_factor_train` and all others).

    Raises:
        ValueError: `num_experts` is at most the published k, so that all experts would be chosen; or an argument would
            have no effect.

    Example:
        >>> import torch
        >>> moe = build(Recipe(gate=dict(k=3, score="sigmoid")), dim=16, num_experts=8, hidden_dim=4)
        >>> moe(torch.randn(2, 10, 16))[0].shape
        torch.Size([2, 10, 16])
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a Recipe, such as recipes.MODELS['mixtral'], got {recipe!r:.99}")
    e, factory = check_size("num_experts", num_experts), dict(device=device, dtype=dtype)
    d, h = check_size("dim", dim), check_size("hidden_dim", 4 * dim if hidden_dim is None else hidden_dim)
    of_layer = {name: changes.pop(name) for name in LAYER_ARGUMENTS if name in changes}
    spare = [0, 0] if experts is not None else [round(recipe.identity * e), recipe.zero]
    if gate is None:
        _check_published_k(recipe, e, sum(spare), changes)
        gate = make_gate(recipe, d, e + sum(spare), changes, factory)
    else:
        reject_unused_arguments("gate", changes)
    act = (lambda: make_recipe_activation(recipe)) if activation is None else activation
    if experts is None:
        experts = _make_experts(recipe, d, e, h, spare, latent_dim, act, factory)
    else:
        unused = dict(latent_dim=latent_dim)
        if not recipe.shared or "shared_expert" in of_layer:
            unused |= dict(hidden_dim=hidden_dim, activation=activation)
        reject_unused_arguments("experts", {name: value for name, value in unused.items() if value is not None})
    settings = _loss_coefficients(recipe, gate, layers, "loss_coef" in of_layer)
    if recipe.shared and "shared_expert" not in of_layer:
        gated, width = recipe.experts.get("gated", True), round(recipe.shared * h)
        shared: nn.Module = SharedExpert(d, width, act, gated, **factory)
        shared_gate = nn.Linear(d, 1, bias=False, **factory) if recipe.shared_gate else None
        settings["shared_expert"] = shared if shared_gate is None else GatedSharedExpert(shared, shared_gate)
    return MoE(d, gate=gate, experts=experts, **settings | of_layer)


def _check_published_k(recipe: Recipe, e: int, spare: int, changes: Mapping[str, Any]) -> None:
    """Raise ValueError if the published k would choose all experts. An explicit k may choose all."""
    k, total = recipe.gate.get("k"), e + spare
    may_be_all = k == 1 or recipe.gate_class in (TopPGating, ReLUGating)  # tokens make fewer choices than k
    if k is None or "k" in changes or total > k or (total == k and may_be_all):
        return
    beside = f" and {spare} beside them" if spare else ""
    raise ValueError(
        f"num_experts={e}{beside} must be more than the published model's k={k} choices of a token: give more experts, "
        f"or a k of your own, such as k={max(total // 4, 1)} (k={total} if every expert is to compute every token)"
    )


def _make_experts(
    recipe: Recipe,
    d: int,
    e: int,
    h: int,
    spare: list[int],
    latent_dim: int | None,
    activation: Any,
    factory: dict[str, Any],
) -> nn.Module:
    """The experts of a recipe: `e` that compute, zero-computation experts in addition, and their wrappers."""
    if latent_dim is None and recipe.latent:
        latent_dim = round(recipe.latent * d)
    width = d if latent_dim is None else check_size("latent_dim", latent_dim)
    kind: Any = GatedExperts if recipe.experts.get("gated", True) else Experts
    experts = kind(width, e, h, activation, bias=recipe.experts.get("bias", False), **factory)
    if recipe.apply_router_weight_on_input:
        experts = InputWeightedExperts(experts)
    if any(spare):
        experts = ZeroComputationExperts(experts, num_identity=spare[0], num_zero=spare[1])
    if latent_dim is not None:
        narrow, wide = nn.Linear(d, width, bias=False, **factory), nn.Linear(width, d, bias=False, **factory)
        after = nn.Sequential(nn.RMSNorm(width, eps=1e-5, **factory), wide) if recipe.latent else wide
        experts = LatentExperts(experts, before=narrow, after=after)
    return experts


def _loss_coefficients(recipe: Recipe, gate: Any, layers: int | None, has_loss_coef: bool) -> dict[str, Any]:
    """The coefficients of a recipe's losses for a model with `layers` such layers. With `has_loss_coef`, that of the
    load-balancing loss is passed by the caller."""
    coefs = dict(recipe.layer)
    if "loss_coefs" in coefs and not getattr(gate, "num_groups", None):
        coefs["loss_coefs"] = {n: coef for n, coef in coefs["loss_coefs"].items() if n not in OF_EXPERT_GROUPS}
    if layers is not None:
        check_size("layers", layers)
        if has_loss_coef:
            raise ValueError(f"loss_coef is that of each layer, so layers={layers} would do nothing: give one of them")
        if recipe.router_aux_loss_coef is None:
            raise ValueError(
                f"this recipe's losses are weighted in each layer, so layers={layers} would do nothing: leave it out"
            )
    if recipe.router_aux_loss_coef is not None and not has_loss_coef:
        coef, published = recipe.router_aux_loss_coef
        k = getattr(gate, "k", None) or 1  # a gate without k computes its own means
        coefs["loss_coef"] = coef * k / (published if layers is None else layers)
    return coefs


def make_gate(recipe: Recipe, dim: int, num_experts: int, changes: Mapping[str, Any], factory: dict[str, Any]) -> Any:
    """The gate of a recipe, for `num_experts` experts; `changes` replace its settings."""
    known = list_gate_arguments(recipe.gate_class)
    if known is not None and (unknown := sorted(changes.keys() - known)):
        raise TypeError(
            f"neither MoE nor the recipe's {recipe.gate_class.__name__} has an argument {unknown[0]!r}: the gate has "
            f"{', '.join(sorted({*known} - {'self', 'dim', 'num_experts', 'num_gates', 'settings', *factory}))}"
        )
    settings = {**recipe.gate, **changes, **factory}
    if recipe.logits is not None:
        logits = dict(recipe.logits)
        if logits.get("multiplier") == "1/sqrt(d)":
            logits["multiplier"] = dim**-0.5
        settings["logits"] = RouterLogits(dim, num_experts, **logits, **factory)
    if recipe.scales is not None:
        settings["weigh"] = LearnedScale(num_experts if recipe.scales == "expert" else 1, **factory)
    return recipe.gate_class(dim, num_experts, **settings)


def list_gate_arguments(router: type) -> list[str] | None:
    """The names of a gate's arguments, with those that it passes on to its base; None if they are not known."""
    names: dict[str, None] = {}
    for cls in router.__mro__:
        found = inspect.signature(cls.__init__).parameters
        names |= dict.fromkeys(found)
        if cls is nn.Module:
            return None
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in found.values()):
            break
    return list(names)


def make_recipe_activation(recipe: Recipe) -> nn.Module:
    """The activation of a recipe's experts."""
    name, limit = recipe.experts.get("activation", "silu"), recipe.experts.get("limit")
    if name == "clamped_swiglu":
        return ClampedSwiGLU(recipe.experts["alpha"], recipe.experts["limit"])
    activation = RECIPE_ACTIVATIONS[name]()
    return activation if limit is None else ClampedGLU(activation, limit, after=recipe.experts.get("after", False))


class RecipeFunction(Protocol):
    """Builds a layer according to one of `MODELS`, with `build`, whose other arguments it accepts too."""

    def __call__(self, dim: int, num_experts: int, hidden_dim: int | None = None, **changes: Any) -> MoE: ...


MODELS: dict[str, Recipe] = {}


def _register_recipe(
    name: str,
    paper: str = "",
    summary: str = "",
    gate: Mapping[str, Any] | None = None,
    *,
    blocks: str = "",
    **fields: Any,
) -> RecipeFunction:
    """Add a `Recipe` with these fields to `MODELS`, with arguments of `MoE` as its `layer`; return its function."""
    layer = {key: fields.pop(key) for key in LAYER_ARGUMENTS if key in fields}
    recipe = MODELS[name] = Recipe(paper, summary, gate or {}, layer=layer, blocks=tuple(blocks.split()), **fields)

    def make(dim: int, num_experts: int, hidden_dim: int | None = None, **changes: Any) -> MoE:
        return build(recipe, dim, num_experts, hidden_dim, **changes)

    make.__name__, make.__qualname__, make.__doc__ = name, name, recipe.summary
    return make


BATCH_BALANCE = dict(balance_over="batch")
SIGMOID_ROUTER = dict(normalize=True, score="sigmoid", expert_bias=True)
UNGATED_RELU = dict(activation="relu", gated=False)
#: the complementary loss of DeepSeek-V3 (arXiv 2412.19437, section 4.2: alpha = 0.0001)
COMPLEMENTARY_LOSS: dict[str, Any] = dict(loss_coef=0.0, loss_coefs=dict(balance_score=1e-4))

gshard: RecipeFunction = _register_recipe(
    "gshard",
    "2006.16668",
    "GShard: two choices, the second one random in training; in eval all are computed (arXiv 2006.16668).",
    dict(
        capacity_factor_train=2.0,
        capacity_factor_eval=None,
        second_threshold_train=0.5,  # algorithm 1: sent if 2 g2 > a random number
        second_policy_eval="all",
    ),
    gate_class=Top2Gating,
    experts=UNGATED_RELU,
    loss_coef=1e-2,  # Mesh TensorFlow's `moe_loss_coef`; the paper names none
    published=PublishedModel("GShard, 36 layers", 2048, None, 600),
)
switch: RecipeFunction = _register_recipe(
    "switch",
    "2101.03961",
    "Switch Transformer: one choice, with a capacity in training; in eval all are computed (arXiv 2101.03961).",
    dict(k=1, jitter=0.01, capacity_factor_train=1.25),
    experts=UNGATED_RELU,
    loss_coef=1e-2,  # section 2.2
    blocks="SwitchTransformersSparseMLP",
    returns=(None, None, "logits"),
    published=PublishedModel("Switch-C", 2048, None, 1571),
)
shazeer: RecipeFunction = _register_recipe(
    "shazeer",
    "1701.06538",
    "Shazeer et al. 2017: k choices by noisy logits, softmax over the chosen, importance and load losses "
    "(arXiv 1701.06538).",
    dict(k=4),
    gate_class=NoisyTopKGating,
    experts=UNGATED_RELU,
    loss_coef=0.1,  # w_importance = w_load, appendix C
)
expert_choice: RecipeFunction = _register_recipe(
    "expert_choice",
    "2202.09368",
    "Expert choice: every expert takes its best tokens of a group (arXiv 2202.09368). Not for models that generate.",
    dict(capacity_factor=2.0),
    gate_class=ExpertChoiceGating,
    experts=UNGATED_RELU,
    loss_coef=0.0,
)
mixtral: RecipeFunction = _register_recipe(
    "mixtral",
    "2401.04088",
    "Mixtral: two choices, softmax normalised (arXiv 2401.04088).",
    dict(k=2, normalize=True, **BATCH_BALANCE),
    router_aux_loss_coef=(0.02, 32),  # config.json of Mixtral-8x7B
    blocks="MixtralSparseMoeBlock MiniMaxSparseMoeBlock Qwen3VLMoeTextSparseMoeBlock",
    published=PublishedModel("Mixtral-8x7B", 8, 12.9, 46.7),
)
olmoe: RecipeFunction = _register_recipe(
    "olmoe",
    "2409.02060",
    "OLMoE: 8 choices, softmax not normalised (arXiv 2409.02060).",
    dict(k=8, normalize=False, **BATCH_BALANCE),
    z_loss_coef=1e-3,  # both as in the paper, section 2
    router_aux_loss_coef=(0.01, 16),
    blocks="OlmoeSparseMoeBlock FlexOlmoSparseMoeBlock JambaSparseMoeBlock",
    published=PublishedModel("OLMoE-1B-7B", 64, 1.3, 6.9),
)
qwen2: RecipeFunction = _register_recipe(
    "qwen2",
    "2407.10671",
    "Qwen2-MoE: 4 choices, and a shared expert with a gate of each token (arXiv 2407.10671).",
    dict(k=4, normalize=False, **BATCH_BALANCE),
    router_aux_loss_coef=(0.001, 24),
    shared=4.0,
    shared_gate=True,
    blocks="Qwen2MoeSparseMoeBlock Qwen3OmniMoeTalkerTextSparseMoeBlock",
    published=PublishedModel("Qwen1.5-MoE-A2.7B", 60, 2.7, 14.3),
)
qwen3: RecipeFunction = _register_recipe(
    "qwen3",
    "2505.09388",
    "Qwen3-MoE: 8 choices, softmax normalised, balanced over the batch (arXiv 2505.09388).",
    dict(k=8, normalize=True, **BATCH_BALANCE),
    router_aux_loss_coef=(0.001, 48),
    blocks="Qwen3MoeSparseMoeBlock MellumSparseMoeBlock Qwen3OmniMoeThinkerTextSparseMoeBlock",
    published=PublishedModel("Qwen3-30B-A3B", 128, 3.3, 30.5),
)
qwen3_next: RecipeFunction = _register_recipe(
    "qwen3_next",
    summary="Qwen3-Next, Qwen3.5: 10 choices, softmax normalised, and a shared expert with a gate of each token.",
    gate=dict(k=10, normalize=True, **BATCH_BALANCE),
    router_aux_loss_coef=(0.001, 48),
    shared=1.0,
    shared_gate=True,
    blocks="Qwen3NextSparseMoeBlock Qwen3_5MoeSparseMoeBlock Qwen4ExpTextSparseMoeBlock",
    published=PublishedModel("Qwen3-Next-80B-A3B", 512, 3, 80),
)
_register_recipe(
    "lara_mini", gate=dict(k=8, normalize=True, **BATCH_BALANCE), shared=1.0, blocks="LaraMiniSparseMoeBlock"
)
_register_recipe(
    "hunyuan", "2411.02265", gate=dict(k=1, normalize=True, **BATCH_BALANCE), shared=1.0, blocks="HunYuanMoEV1Moe"
)
deepseek_v2: RecipeFunction = _register_recipe(
    "deepseek_v2",
    "2405.04434",
    "DeepSeek-V2: 6 choices in the 3 of 8 expert groups with the best experts; shared experts (arXiv 2405.04434).",
    dict(k=6, normalize=False, num_groups=8, top_groups=3, group_score="best", scale=16.0),
    shared=2.0,
    # alpha 1 to 3, section 3.1.2
    loss_coef=3e-3,
    loss_coefs=dict(balance_device=0.05, balance_communication=0.02),
    blocks="DeepseekV2Moe DeepseekOcr2TextMoe UnlimitedOcrTextMoe",
    published=PublishedModel("DeepSeek-V2", 160, 21, 236),
)
deepseek_v3: RecipeFunction = _register_recipe(
    "deepseek_v3",
    "2412.19437",
    "DeepSeek-V3: 8 choices in 4 of 8 expert groups, sigmoid, an expert bias, a shared expert (arXiv 2412.19437).",
    dict(k=8, scale=2.5, num_groups=8, top_groups=4, **SIGMOID_ROUTER),
    shared=1.0,
    **COMPLEMENTARY_LOSS,
    blocks="""
    AXK1MoE AXK2MoE BailingHybridMoE BeamMoE DeepseekV3MoE DeepseekV32MoE Dots1MoE Dots3NoteTextMoE
    ExaoneMoeSparseMoEBlock Glm4MoeLiteMoE Glm4MoeMoE Glm4vMoeTextMoE GlmMoeDsaMoE KimiLinearMoE MiMoV2FlashMoE
    SolarOpenMoE
    """,
    published=PublishedModel("DeepSeek-V3", 256, 37, 671),
)
_register_recipe(
    "glm5_next",
    gate=dict(k=8, scale=2.5, **SIGMOID_ROUTER),
    experts=dict(activation="silu", limit=10.0),
    shared=1.0,
    **COMPLEMENTARY_LOSS,
    blocks="Glm5NextTextMoE HYV4MoE HYV4VLMoE",
)
deepseek_v4: RecipeFunction = _register_recipe(
    "deepseek_v4",
    summary="DeepSeek-V4: 6 choices by sqrt(softplus). Its first layers choose by token id: for them use `HashGating`.",
    gate=dict(k=6, score="sqrt_softplus", expert_bias=True, normalize=True, scale=1.5),
    experts=dict(activation="silu", limit=10.0),
    shared=1.0,
    **COMPLEMENTARY_LOSS,
    blocks="DeepseekV4SparseMoeBlock",
    published=PublishedModel("DeepSeek-V4-Flash", 256, 13, 284),
)
nemotron_h: RecipeFunction = _register_recipe(
    "nemotron_h",
    "2512.20848",
    "Nemotron 3: 6 choices, sigmoid, an expert bias, squared ReLU; latent experts with `latent_dim=` "
    "(arXiv 2512.20848).",
    dict(k=6, scale=2.5, **SIGMOID_ROUTER),
    experts=dict(activation="relu2", gated=False),
    shared=2.0,
    loss_coef=1e-4,  # report of Nemotron 3 Nano: the standard loss in addition to the bias
    blocks="NemotronHMoE",
    published=PublishedModel("Nemotron-3-Nano-30B-A3B", 128, 3.2, 31.6),
)
kimi_k2: RecipeFunction = _register_recipe(
    "kimi_k2",
    "2507.20534",
    "Kimi K2: 8 choices, sigmoid, an expert bias, and a shared expert (arXiv 2507.20534).",
    dict(k=8, scale=2.827, **SIGMOID_ROUTER),
    shared=1.0,
    loss_coef=0.0,
    loss_coefs=dict(balance_score=1e-3),  # `aux_loss_alpha` of config.json
    published=PublishedModel("Kimi-K2", 384, 32, 1040),
)
# config.json as in torchtitan's flavor 2p8t, SiTU as in vLLM; balanced by quantile, no loss is published
kimi_k3: RecipeFunction = _register_recipe(
    "kimi_k3",
    summary="Kimi K3: 16 choices, sigmoid, an expert bias, experts in half the width with a norm behind them, "
    "SiTU, and shared experts. Move the bias by `balance_experts(model, optimizer, 'quantile')`.",
    gate=dict(k=16, **SIGMOID_ROUTER),
    experts=dict(activation="situ"),
    latent=0.5,
    shared=2.0,
    loss_coef=0.0,
    published=PublishedModel("Kimi-K3", 896, None, 2800),
)
_register_recipe(
    "hy_v3",
    gate=dict(k=8, scale=2.5, **SIGMOID_ROUTER),
    shared=1.0,
    **COMPLEMENTARY_LOSS,
    blocks="HYV3MoE Dots3NoteVisionMoE AfmoeSparseMoeBlock",
)
minimax_m2: RecipeFunction = _register_recipe(
    "minimax_m2",
    summary="MiniMax-M2: 8 choices, sigmoid normalised, an expert bias.",
    gate=dict(k=8, eps=0.0, **SIGMOID_ROUTER, **BATCH_BALANCE),
    router_aux_loss_coef=(0.001, 62),
    blocks="MiniMaxM2SparseMoeBlock",
    published=PublishedModel("MiniMax-M2", 256, 10, 230),
)
_register_recipe(
    "minimax_m3",
    gate=dict(k=4, eps=0.0, scale=2.0, **SIGMOID_ROUTER),
    experts=dict(activation="clamped_swiglu", alpha=1.702, limit=7.0),
    shared=1.0,
    router_aux_loss_coef=(0.001, 60),
    blocks="MiniMaxM3VLSparseMoeBlock",
)
_register_recipe(
    "step3",
    gate=dict(k=8, eps=0.0, scale=3.0, **SIGMOID_ROUTER),
    experts=dict(activation="silu", limit=7.0, after=True),
    shared=1.0,
    blocks="Step3p7SparseMoeBlock",
)
_register_recipe("lfm2", gate=dict(k=4, eps=1e-6, **SIGMOID_ROUTER), blocks="Lfm2MoeSparseMoeBlock")
_register_recipe(
    "flint", gate=dict(k=4, score="sigmoid", normalize=True, eps=0.0), shared=1.0, blocks="FlintSparseMoeBlock"
)
ernie4_5: RecipeFunction = _register_recipe(
    "ernie4_5",
    summary="Ernie 4.5: 6 choices, softmax with an expert bias, and shared experts.",
    gate=dict(k=6, expert_bias=True, **BATCH_BALANCE),
    shared=2.0,
    router_aux_loss_coef=(0.001, 27),  # the first of 28 layers is dense
    blocks="Ernie4_5_MoeSparseMoeBlock Ernie4_5_VLMoeSparseMoeBlock",
    published=PublishedModel("ERNIE-4.5-21B-A3B", 64, 3, 21),
)
_register_recipe("mistral4", gate=dict(k=4, normalize=True), shared=1.0, blocks="Mistral4MoE MistralLarge4TextMoE")
granite4: RecipeFunction = _register_recipe(
    "granite4",
    summary="Granite 4: 8 choices, softmax over the chosen.",
    gate=dict(k=8, weigh="softmax", **BATCH_BALANCE),
    router_aux_loss_coef=(0.001, 32),
    blocks="GraniteMoeMoE GraniteMoeHybridMoE GraniteMoeSharedMoE GraniteMoeSWAMoE",
)
_register_recipe("aria", "2410.05993", gate=dict(k=6, weigh="softmax"), shared=2.0, blocks="AriaTextMoELayer")
_register_recipe(
    "jetmoe",
    "2404.07413",
    gate=dict(k=2, weigh="softmax"),
    blocks="JetMoeMoE",
    returns=(None, None, None, None, "logits"),
    block_attributes={"gate_up": "input_linear.weight", "down": "output_linear.weight", "activation": "activation"},
)
gpt_oss: RecipeFunction = _register_recipe(
    "gpt_oss",
    "2508.10925",
    "GPT-OSS: 4 choices, softmax over the chosen, a router bias, clamped SwiGLU with biases (arXiv 2508.10925).",
    dict(k=4, weigh="softmax", bias=True, **BATCH_BALANCE),
    experts=dict(activation="clamped_swiglu", alpha=1.702, limit=7.0, bias=True),
    router_aux_loss_coef=(0.9, 36),  # config.json of gpt-oss-120b
    blocks="GptOssMLP OpenAIPrivacyFilterMLP",
    published=PublishedModel("gpt-oss-120b", 128, 5.1, 117),
)
_register_recipe(
    "cohere2",
    gate=dict(k=8, score="sigmoid", select="logits", normalize=True, eps=0.0),
    shared=1.0,
    blocks="Cohere2MoeSparseMoeBlock",
)
_register_recipe(
    "kolibri1",
    gate=dict(k=8, select="logits", eps=0.0, **SIGMOID_ROUTER),
    shared=1.0,
    blocks="Kolibri1SparseMoeBlock",
)
llama4: RecipeFunction = _register_recipe(
    "llama4",
    summary="Llama 4: one choice; the sigmoid of its logit multiplies what the expert reads; a shared expert.",
    gate=dict(k=1, score="sigmoid", select="logits", normalize=False, **BATCH_BALANCE),
    apply_router_weight_on_input=True,
    shared=1.0,
    router_aux_loss_coef=(0.001, 48),
    blocks="Llama4TextMoe",
    returns=(None, "logits"),
    published=PublishedModel("Llama-4-Scout", 16, 17, 109),
)
_register_recipe(
    "laguna",
    gate=dict(k=8, eps=0.0, scale=2.5, **SIGMOID_ROUTER),
    logits=dict(softcap=30.0),
    shared=1.0,
    blocks="LagunaSparseMoeBlock",
)
_register_recipe(
    "muse_spark",
    gate=dict(k=8, eps=1e-15, scale=2.5, **SIGMOID_ROUTER),
    logits=dict(multiplier=1.0),
    blocks="MuseSparkMoE",
)
gemma4: RecipeFunction = _register_recipe(
    "gemma4",
    summary=(
        "Gemma 4: a norm before the router, 8 choices, learned scales of experts. The layer's own norms are left out."
    ),
    gate=dict(k=8, **BATCH_BALANCE),
    logits=dict(norm_eps=1e-6, multiplier="1/sqrt(d)"),
    scales="expert",
    experts=dict(activation="gelu_tanh"),
    returns=("probs", "weights", "experts"),
    blocks="Gemma4TextDecoderLayer DiffusionGemmaEncoderTextLayer DiffusionGemmaDecoderTextLayer",
    published=PublishedModel("Gemma-4-26B-A4B", 128, 3.8, 25.2),
)
_register_recipe(
    "inkling", gate=dict(k=6, scale=2.5, score="sigmoid", expert_bias=True), scales="all", blocks="InklingMoE"
)
_register_recipe(
    "inkling2",
    gate=dict(k=6, score="sqrt_softplus", expert_bias=True, normalize=True, scale=2.5),
    blocks="Inkling2SparseMoeBlock Inkling2LoopSparseMoeBlock",
)
phi3_5: RecipeFunction = _register_recipe(
    "phi3_5",
    "2409.12136",
    "Phi-3.5-MoE: SparseMixer, two choices (arXiv 2409.12136).",
    dict(k=2, tolerance=0.01),
    gate_class=SparseMixerGating,
    router_aux_loss_coef=(0.001, 32),
    blocks="PhimoeSparseMoeBlock",
    published=PublishedModel("Phi-3.5-MoE", 16, 6.6, 42),
)
_register_recipe(
    "dbrx",
    gate=dict(k=4, normalize=True, **BATCH_BALANCE),
    router_aux_loss_coef=(0.05, 40),
    blocks="DbrxFFN",
    returns=("logits",),
)
longcat_flash: RecipeFunction = _register_recipe(
    "longcat_flash",
    "2509.01322",
    "LongCat-Flash: 12 choices, an expert bias, and e / 2 added experts that return the token (arXiv 2509.01322).",
    dict(k=12, normalize=False, expert_bias=True, scale=6.0),
    identity=0.5,
    loss_coef=1e-4,  # no coefficient of its device-level loss is published
    blocks="LongcatFlashMoE",
    published=PublishedModel("LongCat-Flash", 512, 27, 560),
)
dynamic_moe: RecipeFunction = _register_recipe(
    "dynamic_moe",
    "2403.07652",
    "MoE-Dynamic: as many choices as together reach a probability of 0.4, at most 8 (arXiv 2403.07652).",
    dict(k=8, p=0.4),
    gate_class=TopPGating,
    loss_coef=1e-2,
    loss_coefs=dict(entropy=1e-4),  # section 4.1
)
remoe: RecipeFunction = _register_recipe(
    "remoe",
    "2412.14711",
    "ReMoE: all experts of positive logits, at most 8; `control_sparsity` holds them to one on average "
    "(arXiv 2412.14711).",
    dict(k=8, mean_choices=1),
    gate_class=ReLUGating,
    loss_coef=1.0,
)
zaya: RecipeFunction = _register_recipe(
    "zaya",
    "2605.05365",
    "ZAYA1: one choice by a network on a state that passes from layer to layer, an expert bias, and an added "
    "expert that returns zero (arXiv 2605.05365). All layers but the first are made with `first=False`.",
    dict(k=1, normalize=False, expert_bias=True),
    gate_class=DepthAveragedGating,
    zero=1,  # in the published weights
    loss_coef=0.0,  # the bias alone balances, section II-A
    blocks="ZayaSparseMoeBlock",
    published=PublishedModel("ZAYA1-8B", 16, 0.76, 8.4),
)

#: the recipe of each class of a block
RECIPES_BY_BLOCK: dict[str, Recipe] = {block: model for model in MODELS.values() for block in model.blocks}
