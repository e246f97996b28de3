"""Reads router settings from `transformers` sparse blocks, using the attribute names listed in `block_classes.py`.

Axes: k (choices per token).
"""

from __future__ import annotations

from itertools import product
from typing import Any

from torch import nn

from mixture_of_experts.gating.bias_rules import check_rule_supports_router, scores_insufficient_reason
from mixture_of_experts.gating.steps import AlwaysChosen, NormalizeBy, OpenGroups
from mixture_of_experts.huggingface.blocks.block_classes import (
    BLOCK_ATTRIBUTES,
    EXPERT_ATTRIBUTES,
    RECIPES_BY_BLOCK,
    ROUTER_RETURNS,
)
from mixture_of_experts.providers import ExternalRouter
from mixture_of_experts.recipes import MODELS, Recipe
from mixture_of_experts.support.private_torch import get_original_class

#: score functions of routers, keyed by the transformers class that computes them
SCORE_NAMES = {"Sigmoid": "sigmoid", "Softmax": "softmax", "SqrtSoftplusActivation": "sqrt_softplus"}


def find_attribute(holder: Any, *names: str) -> Any:
    """Return the first attribute in `names` that exists on `holder` and is not None. Return None if there is no such
    attribute. Names may be dotted paths."""
    for name in names:
        found = holder
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not None:
            return found
    return None


def find_recipe(block: nn.Module) -> str | None:
    """Return the name of a block's recipe, or None if the block's class is unknown or the block has no router."""
    kind = get_original_class(block)
    known = RECIPES_BY_BLOCK.get(kind.__name__) if kind.__module__.startswith("transformers.") else None
    return known if known is not None and find_attribute(block, *BLOCK_ATTRIBUTES["router"]) is not None else None


class BlockSettings(ExternalRouter):
    """The router settings of a sparse block. Settings that the block does not store are taken from its recipe."""

    module: Any
    recipe: Recipe
    path: str
    returns: tuple[str | None, ...]
    remedy: str = "convert its block with from_transformers"
    aux_loss_remedy: str = (
        "call the model with output_router_logits=True, so that its own loss includes one, or convert its block with "
        "from_transformers"
    )

    def __init__(self, module: Any, recipe: str) -> None:
        self.module, self.recipe = module, MODELS[recipe]
        self.expert_attributes: dict[str, str] = EXPERT_ATTRIBUTES.get(recipe, {})
        self.returns = ROUTER_RETURNS.get(recipe, ExternalRouter.returns)
        self.path = next(name for name in BLOCK_ATTRIBUTES["router"] if find_attribute(module, name) is not None)
        self.router: Any = find_attribute(module, self.path)
        # whether the router is a network rather than a single matrix
        self.has_router_network: bool = hasattr(self.router, "router_mlp")
        self.router_weight: Any = None if self.has_router_network else self.read_attribute("weight")

    def read_attribute(self, role: str) -> Any:
        """Look up the attribute for `role`, first in the router and then in the block. Return None if neither has such
        an attribute."""
        found = find_attribute(self.router, *BLOCK_ATTRIBUTES[role])
        return find_attribute(self.module, *BLOCK_ATTRIBUTES[role]) if found is None else found

    @property
    def dim(self) -> int:
        return self.router.down_proj.in_features if self.router_weight is None else self.router_weight.shape[1]

    @property
    def num_weighted_experts(self) -> int:
        """The number of experts to which the router assigns weights, including shared experts."""
        return self.router.num_router_classes if self.router_weight is None else self.router_weight.shape[0]

    @property
    def num_experts(self) -> int:
        return self.num_weighted_experts - self.num_always_chosen

    @property
    def num_always_chosen(self) -> int:
        """The number of shared experts to which the router assigns weights. Shared experts have the highest ids."""
        return self.module.shared_experts.n_shared_experts if self.recipe.scales == "all" else 0

    @property
    def k(self) -> int:
        found = self.read_attribute("k")
        return self.recipe.gate["k"] if found is None else found

    @property
    def score(self) -> str:
        if (function := find_attribute(self.router, "score_fn")) is not None:
            return SCORE_NAMES[type(function).__name__]
        if find_attribute(self.router, "expert_selection_fn") == "softmax":
            return "softmax"
        return self.recipe.gate.get("score", "softmax")

    @property
    def capacity(self) -> int | None:
        """The expert capacity for each sequence, which does not depend on the sequence length, or None if no tokens are
        dropped."""
        return find_attribute(self.router, "expert_capacity")

    @property
    def router_bias(self) -> Any:
        """The bias added to the router logits, or None if the router adds no bias."""
        # these routers do not add a bias to their logits, even if they have one
        if self.has_router_network or hasattr(self.router, "get_topk_indices"):
            return None
        return find_attribute(
            self.router, *(path.removesuffix("weight") + "bias" for path in BLOCK_ATTRIBUTES["weight"])
        )

    @property
    def expert_bias(self) -> Any:
        if not self.recipe.gate.get("expert_bias") or find_attribute(self.router, "use_expert_bias") is False:
            return None
        return self.read_attribute("expert_bias")

    @property
    def experts_of_id(self) -> Any:
        """The ids of the experts assigned to each token id, with shape `(v, k)`, or None if the router does not choose
        experts by token id."""
        return self.read_attribute("experts_of_id")

    @property
    def chooses_by_token_ids(self) -> bool:
        return self.experts_of_id is not None

    @property
    def group_sizes(self) -> tuple[Any, Any]:
        return self.read_attribute("num_groups"), self.read_attribute("top_groups")

    @property
    def zero_weight_expert(self) -> int | None:
        return self.num_weighted_experts - 1 if self.recipe.zero else None

    @property
    def scale(self) -> float:
        """The factor applied to the experts' output: the product of the router's scale and the block's scale."""
        scale = 1.0
        for holder in (self.router, self.module):
            factor = find_attribute(holder, *BLOCK_ATTRIBUTES["scale"])
            scale *= 1.0 if factor is None else float(factor)
        return scale / 2 if self.averages_shared_expert else scale

    @property
    def averages_shared_expert(self) -> bool:
        """Whether the block averages the routed experts' output with the shared expert's output."""
        averages = find_attribute(self.module, "shared_expert_combination_strategy") == "average"
        return averages and find_attribute(self.module, *BLOCK_ATTRIBUTES["shared"]) is not None

    def gate_arguments(self) -> dict[str, Any]:
        """Return the gate's constructor arguments, except those that are modules."""
        if "tolerance" in self.recipe.gate:
            return dict(k=self.recipe.gate["k"], tolerance=float(self.read_attribute("tolerance")))
        excluded = {"jitter", "balance_over", "num_groups", "top_groups", "group_score", "capacity_factor_train"}
        settings = {name: value for name, value in self.recipe.gate.items() if name not in excluded}
        settings |= dict(k=self.k, score=self.score, scale=self.scale)
        settings |= dict(bias=self.router_bias is not None, expert_bias=self.expert_bias is not None)
        for holder, name in product((self.module, self.router), BLOCK_ATTRIBUTES["normalize"]):
            if "normalize" in settings and hasattr(holder, name):
                settings["normalize"] = bool(getattr(holder, name))  # None means False
        if find_attribute(self.router, "expert_selection_fn") == "softmax":
            settings |= dict(weigh="softmax", normalize=True)
        if (minimum := find_attribute(self.router, "norm_min")) is not None:
            settings["normalize"] = NormalizeBy(eps=float(minimum))
        if hasattr(self.module, "moe_normalize_expert_weights"):
            order = self.module.moe_normalize_expert_weights
            settings["normalize"] = False if order is None else NormalizeBy(p=float(order))
        if self.num_always_chosen:
            settings |= dict(select=AlwaysChosen(self.num_always_chosen), k=self.k + self.num_always_chosen)
        if self.capacity is not None:
            settings |= dict(capacity_factor_train=1e-9, capacity_factor_eval=1e-9, min_expert_capacity=self.capacity)
        return settings | self.group_arguments()

    def group_arguments(self) -> dict[str, Any]:
        groups, best = self.group_sizes
        if groups is None or groups == 1 or find_attribute(self.router, "topk_method") == "greedy":
            return {}
        if hasattr(self.router, "apply_group_scoring"):
            return dict(select=OpenGroups(groups, best))
        return dict(num_groups=groups, top_groups=best, group_score=self.recipe.gate.get("group_score", "two_best"))

    def logits_arguments(self) -> dict[str, Any]:
        """Return the constructor arguments for `RouterLogits`."""
        settings = dict(self.recipe.logits or {})
        if "norm_eps" in settings:
            return dict(norm_eps=self.router.eps, multiplier=self.router.scalar_root_size)
        if "softcap" in settings:
            return dict(softcap=float(self.read_attribute("softcap")) or None)
        return dict(multiplier=float(self.read_attribute("multiplier")))

    def check_rule(self, rule: Any, name: str) -> None:
        if rule.reads_scores:
            settings = self.gate_arguments()  # arguments that a conversion would pass to the gate
            select, num_groups = settings.get("select", "score"), settings.get("num_groups")
            reason = scores_insufficient_reason(settings["k"], self.num_experts, select, num_groups)
            check_rule_supports_router(rule, repr(name), reason)
        super().check_rule(rule, name)
