"""Random configurations for the property tests: routers, experts, inputs, and each one's slow counterpart.

A `Router` or `Bank` (of experts) is a plain description that hypothesis can shrink. `build` makes the package's module
from it, in float64 and with weights from a seed; `reference` makes the slow counterpart *on the same parameters*, so
that gradients of both can be taken with respect to one list of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mixture_of_experts import (
    ExpertChoiceGating,
    ExpertList,
    Experts,
    GatedExperts,
    HashGating,
    NoisyTopKGating,
    RoutedExperts,
    Top2Gating,
    TopKGating,
    TopPGating,
    ops,
    recipes,
)
from mixture_of_experts.gating import RouterLogits, SparseMixerGating
from mixture_of_experts.gating.steps import LearnedScale
from mixture_of_experts.wrappers import InputWeightedExperts, LatentExperts, NormedExperts, ZeroComputationExperts

from . import reference
from .doc_recipes import extract_recipe

settings.register_profile(
    "tests",
    derandomize=True,  # the same examples on every run: a failure is never news from another machine
    deadline=None,
    database=None,
    print_blob=False,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
settings.load_profile("tests")

ATOL = 1e-9  # float64, sums of some hundred terms
PRIORITIES = ("choice", "token", "score")
seeds = st.integers(0, 2**31 - 1)

# Hypothesis prefers what stands first and draws evenly from the rest, so the usual comes first and often, the
# degenerate last and once: most examples are then full of tokens, overflow and drops, and some are empty.
lengths = st.sampled_from([7, 9, 11, 8, 13, 10, 5, 12, 3, 2, 1, 0])
dims = st.sampled_from([3, 2, 4, 1])
expert_counts = st.sampled_from([4, 3, 5, 6, 2, 1])


# Random numbers


def make_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(gen: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=gen, dtype=torch.float64)


class RecordDraws(TorchFunctionMode):
    """Keeps what torch draws at random while it is active, in order."""

    NAMES = ("rand", "rand_like", "randn", "randn_like", "uniform_", "normal_", "exponential_")

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in self.NAMES:
            self.values.append(result.detach().clone())
        return result

    def take_draws(self, router: Router, training: bool) -> dict[str, Tensor] | None:
        """The draws of the next gate that ran, by the name under which the reference knows them."""
        names = router.uses_random_numbers(training)
        if not names:
            return None
        if router.kind == "sparse_mixer":  # two for each choice
            taken = [self.values.pop(0) for _ in range(2 * router.arguments["k"])]
            return {"exponential": torch.stack(taken[::2], -1), "whole": torch.stack(taken[1::2], -1)}
        return {names: self.values.pop(0)}


# Routers


@dataclass(frozen=True)
class Kind:
    """All that the tests know of a kind of router: a new one is an entry of `KINDS`.

    Attributes:
        make: the gate, from `(dim, num_experts, **arguments)`.
        drawn: routers for so many experts, now and then one that is not possible.
        slow: the slow counterpart, from the gate, all arguments, and what every router of token choice takes.
        defaults: the package's arguments, where they are not those of the slow counterpart.
        draws: what it draws at random with such arguments in a mode, "train" or "eval".
        refused: the error for such a k and number of experts, or None.
        given: whether others may choose instead of it.
        rarely: one in so many cases lets others choose, whether it takes that or not; None: never.
        shown: gates from `(dim, num_experts)`, by their names in `ROUTERS` of paths.py: compiling, dtypes,
            checkpointing and others are tried on them.
        row: its row in the table of routers in docs/concepts.md, without recipes.
    """

    make: Any
    drawn: Callable[[int], st.SearchStrategy[Router]]
    reference: Callable[[Any, dict, dict], Any]
    defaults: Mapping[str, Any] = field(default_factory=lambda: DROPLESS)
    draws: Callable[[dict, str], str | None] = lambda given, mode: None
    refused: Callable[[int, int], str | None] = lambda k, e: f"at most num_experts={e}, but got {k}" if k > e else None
    described_arguments: bool = True
    rare_arguments: int | None = None
    is_in_tables: Mapping[str, Callable[[int, int], nn.Module]] = field(default_factory=dict)
    row: str = ""


@dataclass(frozen=True)
class Router:
    """A router: its kind, the package's arguments (without sizes), and how strongly the weights prefer expert 0."""

    kind: str  # one of KINDS
    arguments: dict
    spread: float = 1.0

    @property
    def all_arguments(self) -> dict:
        return {**KINDS[self.kind].defaults, **self.arguments}

    def build(self, dim: int, num_experts: int, seed: int, outer: tuple[int, ...] = ()) -> nn.Module:
        given = dict(self.arguments)
        if "capacity_factor" not in KINDS[self.kind].defaults:
            given["outer_expert_dims"] = outer
        if (logits := given.pop("logits", None)) is not None:
            given["logits"] = RouterLogits(dim, num_experts, outer_expert_dims=outer, **logits)
        if (scales := given.pop("scales", None)) is not None:
            given["weigh"] = LearnedScale(num_experts if scales == "expert" else 1)
        torch.default_generator.manual_seed(seed)  # of which a hash layer draws
        gate = KINDS[self.kind].make(dim, num_experts, **given)
        return draw_parameters(gate.double(), seed, self.spread)

    def reference(self, gate: nn.Module):
        """The slow router on this gate's parameters, in its mode."""
        mode, given = "train" if gate.training else "eval", self.all_arguments
        common = select_arguments(given, "min_expert_capacity", "priority")
        if f"capacity_factor_{mode}" in given:
            common["capacity_factor"] = given[f"capacity_factor_{mode}"]
        return KINDS[self.kind].reference(gate, {**given, "mode": mode}, common)

    def is_dropless(self, training: bool) -> bool:
        """Whether it has no capacity in this mode."""
        return self.all_arguments.get(f"capacity_factor_{'train' if training else 'eval'}", 1.0) is None

    def without_underflow(self) -> Router:
        """The same with scores that float32 tells from 0."""
        return replace(self, spread=min(self.spread, 3.0))

    def uses_random_numbers(self, training: bool) -> str | None:
        """What this router draws at random in this mode."""
        return KINDS[self.kind].draws(self.all_arguments, "train" if training else "eval")


def draw_parameters(module: Any, seed: int, spread: float) -> Any:
    """The module with parameters, and biases of experts, from a seed."""
    gen = make_generator(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(spread * normal(gen, *parameter.shape))
        if getattr(module, "expert_bias", None) is not None:
            module.expert_bias.copy_(0.3 * normal(gen, *module.expert_bias.shape))
    return module


# 0 makes every score equal; 1000 makes probabilities of exactly 0, so choices of weight 0
spreads = st.sampled_from([1.0, 0.3, 3.0, 2.0, 0.0, 1000.0])
factors = st.sampled_from([0.6, 1.0, 1.25, 2.0])


@st.composite
def capacities(draw, dropless: bool | None = None, priority: str | None = None) -> dict:
    """Capacity and priority arguments that token-choice routers share."""
    is_dropless = draw(st.booleans()) if dropless is None else dropless
    return {
        "capacity_factor_train": None if is_dropless else draw(factors),
        "capacity_factor_eval": None if is_dropless else draw(factors),
        "min_expert_capacity": draw(st.sampled_from([1, 1, 2, 4])),
        "priority": draw(st.sampled_from(PRIORITIES)) if priority is None else priority,
    }


@st.composite
def top2_routers(draw, policies=("all", "none", "threshold", "random"), **limits) -> Router:
    return Router(
        "top2",
        {
            "second_policy_train": draw(st.sampled_from(policies)),
            "second_policy_eval": draw(st.sampled_from(policies)),
            "second_threshold_train": draw(st.sampled_from([0.2, 0.45, 0.0])),
            "second_threshold_eval": draw(st.sampled_from([0.2, 0.45, 0.0])),
            "second_place_loss": draw(st.booleans()),
            **draw(capacities(**limits)),
        },
        draw(spreads),
    )


@st.composite
def topk_routers(draw, num_experts: int, **limits) -> Router:
    groups = draw(st.sampled_from([None, *(g for g in range(1, num_experts + 1) if num_experts % g == 0)]))
    top_groups = None if groups is None else draw(st.integers(1, groups))
    open_experts = num_experts if groups is None else num_experts // groups * top_groups
    score = draw(st.sampled_from(["softmax", "sigmoid"]))
    return Router(
        "topk",
        {
            "k": draw(st.sampled_from(sorted(range(1, min(3, open_experts) + 1), key=lambda k: k != 2))),
            "score": score,
            "normalize": draw(st.sampled_from([None, True, False])),
            "scale": draw(st.sampled_from([1.0, 2.5])),
            "bias": draw(st.booleans()),
            "jitter": draw(st.sampled_from([0.0, 0.1])),
            "num_groups": groups,
            "top_groups": top_groups,
            "expert_bias": draw(st.booleans()),
            "balance_over": draw(st.sampled_from(["group", "batch"])),
            **draw(capacities(**limits)),
        },
        draw(spreads) if score == "softmax" else draw(st.sampled_from([1.0, 0.3, 3.0, 0.0])),
    )


@st.composite
def noisy_routers(draw, num_experts: int, **limits) -> Router:
    k = draw(st.sampled_from(sorted(range(1, min(4, num_experts)), key=lambda k: k != 2)))
    return Router("noisy", {"k": k, **draw(capacities(**limits))}, draw(st.sampled_from([1.0, 0.3])))


@st.composite
def expert_choice_routers(draw) -> Router:
    return Router("expert_choice", {"capacity_factor": draw(st.sampled_from([0.5, 1.0, 1.7, 2.0]))}, draw(spreads))


@st.composite
def stepped_routers(draw, num_experts: int) -> Router:
    """Top-k routers of other steps: logits of a module, what is chosen by, what weighs."""
    router = draw(topk_routers(num_experts))
    score = draw(st.sampled_from(["softmax", "sigmoid", "sqrt_softplus"]))
    given = {
        **router.arguments,
        "score": score,
        "select": draw(st.sampled_from(["score", "logits"])),
        "group_score": draw(st.sampled_from(["two_best", "best"])),
        "eps": draw(st.sampled_from([1e-20, 0.0, 1e-6, 1e-2])),
    }
    weigh = draw(st.sampled_from(["score", "softmax", "expert", "all"]))
    if weigh in ("score", "softmax"):
        given["weigh"] = weigh
    else:
        given.update(scales=weigh, normalize=None)
    if draw(st.booleans()):
        given.update(bias=False, logits=draw(logits_settings()))
    return Router("topk", given, min(router.spread, 3.0) or 1.0)


@st.composite
def logits_settings(draw) -> dict:
    return {
        "norm_eps": draw(st.sampled_from([None, 1e-6, 0.1])),
        "multiplier": draw(st.sampled_from([1.0, 0.5])),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "bias": draw(st.booleans()),
    }


@st.composite
def sparse_mixer_routers(draw) -> Router:
    given = {"k": draw(st.sampled_from([2, 1, 3])), "tolerance": draw(st.sampled_from([0.3, 0.01, 1.0, 0.0]))}
    return Router("sparse_mixer", {**given, **draw(capacities())}, draw(st.sampled_from([1.0, 0.3, 3.0, 0.0])))


@st.composite
def custom_routers(draw, num_experts: int) -> Router:
    k, p = draw(st.integers(1, min(4, num_experts))), draw(st.sampled_from([0.5, 0.9, 0.2]))
    return Router("own", {"k": k, "p": p, **draw(capacities())}, draw(st.sampled_from([1.0, 0.3, 3.0])))


@st.composite
def any_topk_routers(draw, num_experts: int) -> Router:
    router = draw(st.one_of(topk_routers(num_experts), stepped_routers(num_experts)))
    odd = [{}, {}, {}, {}, {}, {"k": num_experts + 1, "num_groups": None, "top_groups": None}]
    odd += [{"num_groups": 4, "top_groups": 1, "k": 2}]
    return replace(router, arguments={**router.arguments, **draw(st.sampled_from(odd))})


def make_router(kind: str, drawn: st.SearchStrategy[Router]) -> st.SearchStrategy[Router]:
    return drawn.map(lambda router: replace(router, kind=kind))


# Their slow counterparts


def select_arguments(given: dict, *names: str) -> dict:
    """The arguments of these names; the slow routers know what the others are by default."""
    return {name: given[name] for name in names if name in given}


def make_reference_top2(gate: Any, given: dict, common: dict) -> Any:
    of_mode = {name: given[f"second_{name}_{given['mode']}"] for name in ("policy", "threshold")}
    return reference.Top2(gate.w_gating, **of_mode, **select_arguments(given, "second_place_loss"), **common)


def make_reference_topk(gate: Any, given: dict, common: dict) -> Any:
    names = ("k", "score", "normalize", "scale", "num_groups", "top_groups", "balance_over")
    more = ("select", "weigh", "group_score", "eps")
    weights = {"w_gating": gate.w_gating, "b_gating": gate.b_gating}
    if (logits := gate.logits) is not None:
        weights = {"w_gating": logits.weight, "b_gating": logits.bias, "norm_weight": logits.norm_weight}
        weights.update({name: getattr(logits, name) for name in ("norm_eps", "multiplier", "softcap")})
    return reference.TopK(
        expert_bias=None if gate.expert_bias is None else gate.expert_bias.double(),
        scales=gate.weigh.scale if isinstance(gate.weigh, LearnedScale) else None,
        experts_of_id=getattr(gate, "experts_of_id", None),
        **weights,
        **select_arguments(given, *names, *more),
        **common,
    )


def make_reference_top_p(gate: Any, given: dict, common: dict) -> Any:
    return reference.TopP(gate.w_gating, k=given["k"], p=given["p"], **common)


def find_jitter(given: dict, mode: str) -> str | None:
    return "jitter" if mode == "train" and given.get("jitter") else None


DROPLESS = {"capacity_factor_train": None, "capacity_factor_eval": None}
NUM_IDS = 7  # of a hash layer
DEFAULT_KINDS = 'by default | if dropless or `priority="token"`'  # of a row

KINDS: dict[str, Kind] = {
    "topk": Kind(TopKGating, any_topk_routers, make_reference_topk, draws=find_jitter, rare_arguments=5),
    "top2": Kind(
        Top2Gating,
        lambda e: top2_routers(),
        make_reference_top2,
        {
            "second_policy_train": "random",
            "second_policy_eval": "random",
            "second_threshold_train": 0.2,
            "second_threshold_eval": 0.2,
            "capacity_factor_train": 1.25,
            "capacity_factor_eval": 2.0,
        },
        draws=lambda given, mode: "uniforms" if given[f"second_policy_{mode}"] == "random" else None,
    ),
    "noisy": Kind(
        NoisyTopKGating,
        lambda e: noisy_routers(e) if e > 1 else st.just(Router("noisy", {"k": 1})),
        lambda gate, given, common: reference.NoisyTopK(gate.w_gating, w_noise=gate.w_noise, k=given["k"], **common),
        draws=lambda given, mode: "noise" if mode == "train" else None,
        refused=lambda k, e: rf"k must be less than num_experts={e}, but got {k}" if k >= e else None,
        is_in_tables={"NoisyTopK": lambda d, e: NoisyTopKGating(d, e, k=2)},
        row=f"`NoisyTopKGating` | each token chooses k experts by noisy scores | {DEFAULT_KINDS} | two losses",
    ),
    "expert_choice": Kind(
        ExpertChoiceGating,
        lambda e: expert_choice_routers(),
        lambda gate, given, common: reference.ExpertChoice(gate.w_gating, given["capacity_factor"]),
        {"capacity_factor": 2.0},
        described_arguments=False,
        rare_arguments=40,
        is_in_tables={"ExpertChoice": lambda d, e: ExpertChoiceGating(d, e, capacity_factor=1.5)},
        row="`ExpertChoiceGating` | each expert chooses tokens | a token may get no expert | **no** | construction",
    ),
    "sparse_mixer": Kind(
        SparseMixerGating,
        lambda e: sparse_mixer_routers(),
        lambda gate, given, common: reference.SparseMixer(
            gate.w_gating, **select_arguments(given, "k", "tolerance"), **common
        ),
        draws=lambda given, mode: "sampling" if mode == "train" else None,
        row=f"`SparseMixerGating` | each token chooses k experts, sampled in training | {DEFAULT_KINDS} | loss",
    ),
    "hash": Kind(
        lambda *sizes, **settings: HashGating(*sizes, num_ids=NUM_IDS, **settings),
        lambda e: make_router("hash", topk_routers(e)),
        make_reference_topk,
        draws=find_jitter,
        rare_arguments=5,
        row=f"`HashGating` | each token's id determines k experts | {DEFAULT_KINDS} | its table",
    ),
    "top_p": Kind(
        TopPGating,
        lambda e: make_router("top_p", custom_routers(e)),
        make_reference_top_p,
        is_in_tables={"TopP": lambda d, e: TopPGating(d, e, k=2, p=0.6)},
        row=f"`TopPGating` | each token chooses at most k experts, up to probability p | {DEFAULT_KINDS} | loss",
    ),
    "own": Kind(
        extract_recipe("A router of your own")["SureGating"],
        lambda e: custom_routers(e),
        make_reference_top_p,
        refused=lambda k, e: None,
        described_arguments=False,
        rare_arguments=40,
    ),
}


@st.composite
def recipe_parts(draw, name: str) -> tuple[Router, Bank, int, bool]:
    """Router and experts of a record for a few experts, how many those are, and whether one is shared."""
    model, e = recipes.MODELS[name], draw(st.sampled_from([4, 6, 8]))
    kind = next(name for name, kind in KINDS.items() if kind.make is model.gate_class)
    given = dict(model.gate)
    if "k" in given:
        given["k"] = min(given["k"], draw(st.sampled_from([2, 3, 1])))
    if "num_groups" in given:
        given.update(num_groups=2, top_groups=1, k=min(given["k"], 2))
    if kind != "expert_choice" and draw(st.booleans()):
        given.update(capacity_factor_train=1.0, capacity_factor_eval=1.25)
    if model.logits is not None:
        given["logits"] = dict(model.logits)
    if model.scales is not None:
        given["scales"] = model.scales
    settings, identity = dict(model.experts), round(model.identity * e)
    activation = settings.get("activation", "silu")
    activation = {"gelu_tanh": "tanh gelu", "clamped_swiglu": "clamped swiglu"}.get(activation, activation)
    if activation == "silu" and "limit" in settings:
        activation = f"clamped silu, {settings['limit']:g}" + (", after" if settings.get("after") else "")
    experts = "gated" if settings.get("gated", True) else "ffn"
    if model.apply_router_weight_on_input:
        experts = "input_weighted"
    elif identity or model.zero:
        experts = "identity"
    bank = Bank(experts, settings.get("bias", False), activation, identity=identity, zero=model.zero)
    return Router(kind, given), bank, e + identity + model.zero, bool(model.shared)


#: routers that draw nothing in eval, for so many experts; the rest fixes `dropless` or `priority`
TOKEN_CHOICE: dict[str, Callable[..., st.SearchStrategy[Router]]] = {
    "top2": lambda num_experts, **limits: top2_routers(policies=("all", "none", "threshold"), **limits),
    "topk": topk_routers,
    "noisy": noisy_routers,
}


def draw_counts(kind: str, counts=expert_counts):
    """Numbers of experts that a kind of router can work with: the noisy one needs a next best."""
    return counts.filter(lambda e: e > 1) if kind == "noisy" else counts


# Tokens


@st.composite
def masks(draw, *shape: int) -> Tensor | None:
    """No mask, or any pattern of padding, fully masked groups included."""
    share = draw(st.sampled_from([None, 0.7, None, 0.9, None, 0.4, 0.8, 0.0]))
    if share is None:
        return None
    return torch.rand(shape, generator=make_generator(draw(seeds))) < share


@st.composite
def importances(draw, *shape: int) -> Tensor | None:
    if draw(st.booleans()):
        return None
    values = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5, 0.3, 0.0], dtype=torch.float64)
    return values[torch.randint(len(values), shape, generator=make_generator(draw(seeds)))]


def poison_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """x with NaN at the masked positions."""
    return x if mask is None else torch.where(mask.unsqueeze(-1), x, torch.nan)


# Experts


class ScaledExperts(nn.Module):
    """A batched module of one's own: (*e, s, d) -> (*e, s, d)."""

    def __init__(self, *shape: int):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + 0.5) * self.scale.unsqueeze(-2)


class LinearExperts(RoutedExperts):
    """A subclass that writes `compute`: one matrix an expert."""

    def __init__(self, dim: int, *sizes: int) -> None:
        super().__init__()
        self.num_experts = sizes[0] if len(sizes) == 1 else sizes
        self.weight = nn.Parameter(torch.empty(*sizes, dim, dim))

    def compute(self, rows: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        weight = self.weight.flatten(0, -3)
        if torch.is_autocast_enabled("cpu"):
            rows, weight = rows.float(), weight.float()
        return ops.grouped_matmul(rows, weight, num_tokens_per_expert)


ACTIVATIONS = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": torch.tanh,
    "tanh gelu": nn.GELU(approximate="tanh"),
}
# the same for the reference, written once more; those of (gate, up) say so
MORE_ACTIVATIONS: dict[str, tuple[Any, Any]] = {
    "relu2": (ops.SquaredReLU, lambda h: F.relu(h) ** 2),
    "clamped swiglu": (ops.ClampedSwiGLU, lambda g, u: clamped_swiglu(g, u, 1.702, 7.0)),
    "clamped swiglu, tight": (ops.ClampedSwiGLU(0.5, 0.6), lambda g, u: clamped_swiglu(g, u, 0.5, 0.6)),
    "clamped silu, 10": (ops.ClampedGLU(limit=10.0), lambda g, u: F.silu(clamp_max(g, 10.0)) * clamp_both(u, 10.0)),
    "clamped silu, 0.5": (ops.ClampedGLU(limit=0.5), lambda g, u: F.silu(clamp_max(g, 0.5)) * clamp_both(u, 0.5)),
    "clamped silu, 7, after": (
        ops.ClampedGLU(limit=7.0, after=True),
        lambda g, u: clamp_max(F.silu(g), 7.0) * clamp_both(u, 7.0),
    ),
}
KNOWN_ACTIVATIONS = ("gelu", "relu", "silu", "tanh gelu", "relu2", "clamped swiglu", "clamped swiglu, tight")
SMOOTH = ("gelu", "silu", "tanh", "tanh gelu", "relu2", "clamped swiglu", "clamped silu, 10", "clamped silu, 7, after")


def clamp_max(x: Tensor, limit: float) -> Tensor:
    return torch.where(x > limit, limit, x)


def clamp_both(x: Tensor, limit: float) -> Tensor:
    return torch.where(x < -limit, -limit, clamp_max(x, limit))


def clamped_swiglu(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    gate = clamp_max(gate, limit)
    return gate / (1 + torch.exp(-alpha * gate)) * (clamp_both(up, limit) + 1)


@dataclass(frozen=True)
class Bank:
    """A bank of experts of one kind."""

    kind: str  # ffn, gated, list, custom, routed, and around gated ones: input_weighted, identity, enclosed, normed
    bias: bool = False
    activation: str = "gelu"
    hidden_dim: int = 5
    identity: int = 0  # experts behind the others that return the token, and
    zero: int = 0  # those that return nothing

    @property
    def takes_two(self) -> bool:
        return self.kind != "list" and self.activation.startswith("clamped")

    def computing(self, num_experts: int) -> int:
        """How many compute something."""
        return max(1, num_experts - self.identity - self.zero)

    def build(self, dim: int, num_experts: int | tuple[int, ...], seed: int) -> nn.Module:
        sizes = num_experts if isinstance(num_experts, tuple) else (num_experts,)
        act, outer = ACTIVATIONS.get(self.activation) or MORE_ACTIVATIONS[self.activation][0], None
        if self.kind == "ffn":
            experts = Experts(dim, num_experts, self.hidden_dim, act, bias=self.bias)
        elif self.kind == "list":
            experts = ExpertList(nn.Linear(dim, dim, bias=self.bias) for _ in range(torch.Size(sizes).numel()))
        elif self.kind == "custom":
            experts = ScaledExperts(*sizes, dim)
        elif self.kind == "routed":
            experts = LinearExperts(dim, *sizes)
        else:
            width, number = dim + 1 if self.kind == "enclosed" else dim, num_experts
            if self.kind == "identity" and isinstance(num_experts, int):
                number = self.computing(num_experts)
            experts = GatedExperts(width, number, self.hidden_dim, act, bias=self.bias)
            if self.kind == "input_weighted":
                experts = InputWeightedExperts(experts)
            elif self.kind == "identity":
                spare = num_experts - number if isinstance(num_experts, int) else 0
                zero = min(self.zero, spare)
                experts = ZeroComputationExperts(experts, num_identity=spare - zero, num_zero=zero)
            elif self.kind == "normed":
                experts = NormedExperts(experts, nn.RMSNorm(dim, eps=0.5))
            elif self.kind == "enclosed":
                outer = nn.Linear(dim, width, bias=self.bias), nn.Linear(width, dim, bias=False)
                experts = LatentExperts(experts, before=outer[0], after=outer[1])
        return draw_parameters(experts.double(), seed, 0.7)

    def reference(self, experts: Any, num_inner: int | None = None) -> Any:
        """The same experts one token at a time; of two levels a list is indexed by outer · num_inner + inner."""
        if self.kind == "list":
            single = reference.wrap_modules(experts)
            return single if num_inner is None else lambda pair, x: single(pair[0] * num_inner + pair[1], x)
        if self.kind == "custom":
            return lambda index, x: torch.tanh(x + 0.5) * experts.scale[index]
        if self.kind == "routed":
            return lambda index, x: x @ experts.weight[index]
        inner = experts if self.kind in ("ffn", "gated") else experts.experts
        act = MORE_ACTIVATIONS[self.activation][1] if self.activation in MORE_ACTIVATIONS else inner.act
        if self.kind == "ffn":
            return reference.feed_forward(inner.w1, inner.w2, act, inner.b1, inner.b2)
        weights, biases = (inner.w1, inner.w3, inner.w2), (inner.b1, inner.b3, inner.b2)
        gated = reference.gated_feed_forward(*weights, act, *biases, of_both=self.takes_two)
        if self.kind == "input_weighted":
            return reference.WeighedInput(gated)
        if self.kind == "identity":
            identities = range(len(inner.w1), len(inner.w1) + experts.num_identity)
            return lambda i, x: gated(i, x) if i < len(inner.w1) else x * (i in identities)
        if self.kind == "normed":
            return lambda index, x: rms_normed(gated(index, x)) * experts.norm.weight
        if self.kind == "enclosed":
            return lambda index, x: gated(index, experts.before(x))
        return gated


def rms_normed(x: Tensor) -> Tensor:
    return x / (x.square().mean() + 0.5).sqrt()


WRAPPERS = ("input_weighted", "identity", "enclosed", "normed")


@st.composite
def matrix_banks(draw, smooth: bool) -> Bank:
    """Any experts; of low precision with smooth activations, for rounding turns the others' gradients."""
    kind = draw(st.sampled_from(["ffn", "gated", "list", "custom", "routed", "ffn", "gated", *WRAPPERS]))
    names = [*ACTIVATIONS, *MORE_ACTIVATIONS] if kind != "ffn" else [*ACTIVATIONS, "relu2", "relu2", "clamped swiglu"]
    activation = draw(st.sampled_from([name for name in names if not smooth or name in SMOOTH]))
    identity, zero = draw(st.sampled_from([(1, 0), (1, 1), (0, 1), (0, 0)])) if kind == "identity" else (0, 0)
    return Bank(kind, draw(st.booleans()), activation, identity=identity, zero=zero)


# Comparing


def compute_gradients(loss: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    """Gradients of a loss, zeros where it does not depend on a tensor."""
    if not loss.requires_grad:
        return [torch.zeros_like(w) for w in wanted]
    found = torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]


def assert_same(got: Tensor, expected: Tensor, what: str, atol: float = ATOL) -> None:
    torch.testing.assert_close(got, expected, atol=atol, rtol=atol, msg=lambda text: f"{what}: {text}")
