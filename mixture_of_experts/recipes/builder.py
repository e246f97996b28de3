"""Builds a layer from a recipe, including the gate, the experts with their wrappers, and the loss coefficients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mixture_of_experts.arguments import reject_unused_arguments
from mixture_of_experts.experts import Experts, GatedExperts
from mixture_of_experts.gating import ReLUGating, RouterLogits, TopKGating, TopPGating
from mixture_of_experts.gating.balance_losses import OF_EXPERT_GROUPS
from mixture_of_experts.gating.steps import LearnedScale
from mixture_of_experts.moe import MoE
from mixture_of_experts.ops import ClampedGLU, ClampedSwiGLU, SiTU, SquaredReLU
from mixture_of_experts.ops.activations import compute_hidden, make_activation
from mixture_of_experts.support.checks import check_size
from mixture_of_experts.wrappers import GatedSharedExpert, InputWeightedExperts, LatentExperts, ZeroComputationExperts


class PublishedModel(NamedTuple):
    """A published model as described in its paper or model card.

    Attributes:
        name: name of the model.
        num_experts: number of experts per layer, excluding shared experts.
        active, total: the number of parameters used per token and the total number of parameters, in billions, or None
            if they are not published.
    """

    name: str
    num_experts: int
    active: float | None
    total: float | None


@dataclass(frozen=True)
class Recipe:
    """A recipe for a model's layers.

    Attributes:
        paper: arXiv number of the paper.
        summary: description of the layers, used as the docstring of the recipe's function.
        gate: the gate's arguments, as published.
        gate_class: the class of the gate.
        logits: arguments of `RouterLogits`, if the router consists of more than a matrix. `multiplier` may be
            "1/sqrt(d)".
        scales: learned scales that multiply the normalized weights. "expert" uses one scale per expert, and "all" uses
            a single scale.
        experts: settings of the experts: "activation" ("silu", "gelu", ...), "gated" (True by default) and "bias".
            Clamped activations have the additional settings "limit", "alpha" and "after".
        apply_router_weight_on_input: whether the experts' inputs are multiplied by the router weights.
        latent: width of the latent space as a fraction of d, or 0 for no latent experts. Latent experts are followed by
            a normalization layer.
        identity: number of identity experts, which return the token, as a fraction of the number of regular experts.
        zero: number of zero experts, which return zero.
        shared: hidden width of the shared expert as a multiple of an expert's hidden width, or 0 for no shared expert.
        shared_gate: whether the shared expert's output is multiplied by a learned gate for each token.
        layer: loss coefficients, passed as arguments to `MoE`. Coefficients of losses over expert groups apply only if
            the gate has expert groups.
        router_aux_loss_coef: for a loss that the published model computes once over all layers, a pair that consists of
            the loss coefficient and the number of layers. `loss_coef` is then coefficient * k / layers. The coefficient
            comes from the model's published configuration or is the default of the configuration class.
        published: a model with these layers, if its dimensions are known.
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
    published: PublishedModel | None = None


RECIPE_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "relu": nn.ReLU,
    "relu2": SquaredReLU,
    "silu": nn.SiLU,
    "situ": SiTU,
}


#: arguments that a recipe passes on to `MoE`
LAYER_ARGUMENTS = ("loss_coef", "z_loss_coef", "loss_coefs", "group_size", "shared_expert")


class SharedExpert(nn.Module):
    """A feed-forward network that processes every token: `(act(x gate) * (x up)) down` or `act(x up) down`.

    Args:
        dim, hidden_dim: model dimension d and hidden dimension h.
        activation: a class, a module or a function. Gated networks also accept a function of `(x gate, x up)`.
        gated: whether the network has a gate projection.
        bias: whether the linear layers have biases.

    Example:
        >>> import torch
        >>> SharedExpert(8, 16)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    is_tokenwise: ClassVar[bool] = True
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
    """Build a layer from a recipe.

    Args:
        recipe: one of `MODELS`, or a custom recipe.
        dim, num_experts: model dimension d, and number of experts e, excluding zero-computation experts.
        hidden_dim: hidden dimension of each expert, h. Default: 4 d.
        layers: number of these layers in your model. If a loss is computed over all layers, its coefficient is divided
            by this number. Default: the published number of layers. Recipes whose papers specify coefficients per layer
            do not accept this argument.
        latent_dim: width of the latent space in which experts operate, between two linear layers (arXiv 2601.18089).
            Default: the recipe's width, or d.
        activation: activation that replaces the recipe's activation; see `MoE`.
        gate, experts: modules that replace the recipe's gate and experts; see `MoE`.
        device, dtype: device and dtype of the weights.
        changes: arguments that replace the recipe's settings. These can be arguments of `MoE` (`loss_coef`,
            `z_loss_coef`, `loss_coefs`, `group_size`, `shared_expert`) or any arguments of the gate, such as `k` and
            `capacity_factor_train`.

    Raises:
        ValueError: if `num_experts` is at most the published k, so that every expert would be chosen, or if an argument
            would have no effect.

    Example:
        >>> import torch
        >>> moe = build(Recipe(gate=dict(k=3, score="sigmoid")), dim=16, num_experts=8, hidden_dim=4)
        >>> moe(torch.randn(2, 10, 16))[0].shape
        torch.Size([2, 10, 16])
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(f"expected recipe to be a Recipe, such as recipes.MODELS['mixtral'], but got {recipe!r:.99}")
    e, factory = check_size("num_experts", num_experts), dict(device=device, dtype=dtype)
    d, h = check_size("dim", dim), check_size("hidden_dim", 4 * dim if hidden_dim is None else hidden_dim)
    of_layer = {name: changes.pop(name) for name in LAYER_ARGUMENTS if name in changes}
    spare = [0, 0] if experts is not None else [round(recipe.identity * e), recipe.zero]
    if gate is None:
        _check_published_k(recipe, e, sum(spare), changes)
        gate = make_gate(recipe, d, e + sum(spare), changes, factory)
    else:
        reject_unused_arguments("gate", changes)
    # each network gets its own activation
    act = partial(make_recipe_activation, recipe) if activation is None else activation
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
    """Raise ValueError if the published k would choose all experts. If the caller passes k, choosing all experts is
    allowed."""
    k, total = recipe.gate.get("k"), e + spare
    may_be_all = k == 1 or recipe.gate_class in (TopPGating, ReLUGating)  # tokens may choose fewer than k experts
    if k is None or "k" in changes or total > k or (total == k and may_be_all):
        return
    extra = f" plus {spare} zero-computation experts" if spare else ""
    raise ValueError(
        f"num_experts={e}{extra} must exceed the published model's k={k} choices per token; increase num_experts, or "
        f"pass another k, such as k={max(total // 4, 1)} (or k={total} to send every token to every expert)"
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
    """Return a recipe's experts: `e` regular experts, additional zero-computation experts, and their wrappers."""
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
    """Return a recipe's loss coefficients for a model that has `layers` such layers. If `has_loss_coef` is True, the
    caller passes the coefficient of the load-balancing loss."""
    coefs = dict(recipe.layer)
    if "loss_coefs" in coefs and not getattr(gate, "num_groups", None):
        coefs["loss_coefs"] = {n: coef for n, coef in coefs["loss_coefs"].items() if n not in OF_EXPERT_GROUPS}
    if layers is not None:
        check_size("layers", layers)
        if has_loss_coef:
            raise ValueError(
                f"loss_coef applies to each layer, so layers={layers} would have no effect; pass only one of them"
            )
        if recipe.router_aux_loss_coef is None:
            raise ValueError(
                f"this recipe specifies its loss coefficients per layer, so layers={layers} would have no effect; omit "
                "layers"
            )
    if recipe.router_aux_loss_coef is not None and not has_loss_coef:
        coef, published = recipe.router_aux_loss_coef
        k = getattr(gate, "k", None) or 1  # gates without k compute their own mean
        coefs["loss_coef"] = coef * k / (published if layers is None else layers)
    return coefs


def make_gate(recipe: Recipe, dim: int, num_experts: int, changes: Mapping[str, Any], factory: dict[str, Any]) -> Any:
    """Return a recipe's gate for `num_experts` experts. `changes` override the recipe's settings."""
    known = list_gate_arguments(recipe.gate_class)
    if known is not None and (unknown := sorted(changes.keys() - known)):
        raise TypeError(
            f"neither MoE nor the recipe's {recipe.gate_class.__name__} has an argument {unknown[0]!r}; the arguments "
            "of the gate are "
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
    """Return the names of a gate's arguments, including those passed to its base class, or None if they are unknown."""
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
    """Return the activation of a recipe's experts."""
    name, limit = recipe.experts.get("activation", "silu"), recipe.experts.get("limit")
    if name == "clamped_swiglu":
        return ClampedSwiGLU(recipe.experts["alpha"], recipe.experts["limit"])
    activation = RECIPE_ACTIVATIONS[name]()
    return activation if limit is None else ClampedGLU(activation, limit, after=recipe.experts.get("after", False))


class RecipeFunction(Protocol):
    """A function that builds a layer from one of `MODELS`. It also accepts all other arguments of `build`."""

    def __call__(self, dim: int, num_experts: int, hidden_dim: int | None = None, **changes: Any) -> MoE: ...


def make_recipe_function(name: str, recipe: Recipe) -> RecipeFunction:
    """Return a function named after a recipe, with the recipe's summary as its docstring."""

    def make(dim: int, num_experts: int, hidden_dim: int | None = None, **changes: Any) -> MoE:
        return build(recipe, dim, num_experts, hidden_dim, **changes)

    make.__name__, make.__qualname__, make.__doc__ = name, name, recipe.summary
    return make
