"""The paths through the package on which every feature is tried: layer x experts x capacity x variant."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mixture_of_experts import (
    ExpertList,
    Experts,
    GatedExperts,
    HeirarchicalMoE,
    MoE,
    ReLUGating,
    Top2Gating,
    TopKGating,
)
from mixture_of_experts.gating import DepthAveragedGating, QuantileRule, RouterLogits

from .strategies import KINDS

LAYERS = ("MoE", "HeirarchicalMoE")
EXPERTS = ("Experts", "GatedExperts", "ExpertList", "custom")
CAPACITIES = ("capacity", "dropless")
VARIANTS = ("plain", "masked", "grouped")

DIM, HIDDEN, NUM_EXPERTS = 8, 16, 4


class TanhExperts(nn.Module):
    """Experts as a user would write them: all at once, slots `(*e, s, d)` to the same shape."""

    def __init__(self, dim: int, num_experts: int | tuple[int, ...], hidden_dim: int) -> None:
        super().__init__()
        sizes = num_experts if isinstance(num_experts, tuple) else (num_experts,)
        self.w1 = nn.Parameter(torch.empty(*sizes, dim, hidden_dim))
        self.w2 = nn.Parameter(torch.empty(*sizes, hidden_dim, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.w1, self.w2):
            nn.init.normal_(weight, std=weight.shape[-2] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w1) @ self.w2


def make_experts(kind: str, num_experts: int | tuple[int, ...], dim: int = DIM, hidden: int = HIDDEN) -> nn.Module:
    """Experts of a kind; a list is flat."""
    if kind == "ExpertList":
        count = torch.Size(num_experts).numel() if isinstance(num_experts, tuple) else num_experts
        modules = (nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)) for _ in range(count))
        return ExpertList(modules)
    return {"Experts": Experts, "GatedExperts": GatedExperts, "custom": TanhExperts}[kind](dim, num_experts, hidden)


class LayerVariant(NamedTuple):
    """One way through the package; `str(path)` is its name among the tests."""

    layer: str
    experts: str
    capacity: str
    variant: str

    def __str__(self) -> str:
        return "-".join(self)

    @property
    def cell(self) -> tuple[str, str]:
        """The table and the column in the documentation."""
        return "layers", f"{self.experts}, {self.capacity}"

    def build(
        self, num_experts: int | tuple[int, int] | None = None, policy: str = "random", seed: int = 0, **settings
    ):
        """The layer in training mode, with weights drawn from `seed`; tight capacities, so that tokens are dropped."""
        torch.manual_seed(seed)
        if num_experts is None:
            num_experts = NUM_EXPERTS if self.layer == "MoE" else (2, 2)
        factor = 1.0 if self.capacity == "capacity" else None
        layer = {"MoE": MoE, "HeirarchicalMoE": HeirarchicalMoE}[self.layer]
        return layer(
            DIM,
            num_experts,
            experts=make_experts(self.experts, num_experts),
            second_policy_train=policy,
            second_policy_eval=policy,
            capacity_factor_train=factor,
            capacity_factor_eval=factor,
            min_expert_capacity=2,
            group_size=5 if self.variant == "grouped" else None,
            z_loss_coef=1e-2,
            loss_coef=1e-1,
            **settings,
        )

    def inputs(self, *shape: int, seed: int = 1, dtype=torch.float32, device="cpu") -> tuple[Tensor, Tensor | None]:
        """Tokens `(*shape, DIM)`, by default `(2, 10, DIM)`, and a mask with short and long rows where there is one."""
        shape = shape or (2, 10)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(*shape, DIM, generator=generator, dtype=torch.float64).to(device, dtype)
        if self.variant != "masked":
            return x.requires_grad_(), None
        lengths = shape[-1] - torch.arange(torch.Size(shape[:-1]).numel()).view(shape[:-1]) % 3
        return x.requires_grad_(), (torch.arange(shape[-1]) < lengths.unsqueeze(-1)).to(device)


LAYER_VARIANTS = [LayerVariant(*names) for names in itertools.product(LAYERS, EXPERTS, CAPACITIES, VARIANTS)]

# What takes long is tried on these, and on the rest by exhaustive tests: every layer, kind of experts, capacity and
# variant is among them.
QUICK_LAYER_VARIANTS = [
    LayerVariant("MoE", "Experts", "capacity", "plain"),
    LayerVariant("MoE", "GatedExperts", "dropless", "masked"),
    LayerVariant("MoE", "ExpertList", "dropless", "grouped"),
    LayerVariant("HeirarchicalMoE", "custom", "capacity", "plain"),
    LayerVariant("HeirarchicalMoE", "Experts", "dropless", "masked"),
]


def put_quick_first(values: Iterable, some: Sequence = QUICK_LAYER_VARIANTS, quick: Sequence | None = None) -> list:
    """Parameters of a test that takes long: what is not in `some` is exhaustive, and what is not in `quick`, slow."""
    quick = some if quick is None else quick
    mark = {value: pytest.mark.slow if value in some else pytest.mark.exhaustive for value in values}
    return [value if value in quick else pytest.param(value, marks=mark[value]) for value in values]


def make_top2(policy: str, **settings) -> Top2Gating:
    """GShard's router with one policy in both modes."""
    return Top2Gating(DIM, NUM_EXPERTS, second_policy_train=policy, second_policy_eval=policy, **settings)


def score_by_margin(logits: Tensor, score: Tensor, bias: Tensor | None) -> Tensor:
    """Experts are chosen by how far they are above the mean."""
    return score - score.mean(dim=-1, keepdim=True)


def score_by_norm(weight: Tensor) -> Tensor:
    return weight / (weight.square().sum(dim=-1, keepdim=True) + 1e-9).sqrt()


def make_capped_logits_gate() -> TopKGating:
    """A router whose training forwards count histograms, of logits that a module makes."""
    logits = RouterLogits(DIM, NUM_EXPERTS, norm_eps=1e-6, multiplier=2.0, softcap=3.0, bias=True)
    gate = TopKGating(DIM, NUM_EXPERTS, k=2, score="sigmoid", select="logits", expert_bias=True, logits=logits)
    gate.bias_rule = QuantileRule(50)
    return gate


ROUTERS = {
    "Top2, policy all": lambda: make_top2("all"),
    "Top2, policy threshold": lambda: make_top2("threshold"),
    "Top2, policy random": lambda: make_top2("random"),
    "Top2, by token": lambda: make_top2("all", priority="token", second_place_loss=True),
    "TopK": lambda: TopKGating(DIM, NUM_EXPERTS, k=2, bias=True),
    "TopK, jitter, by score": lambda: TopKGating(
        DIM, NUM_EXPERTS, k=1, jitter=0.01, priority="score", capacity_factor_train=1.0, capacity_factor_eval=1.0
    ),
    "TopK, expert bias": lambda: TopKGating(
        DIM, NUM_EXPERTS, k=2, score="sigmoid", scale=2.5, num_groups=2, top_groups=1, expert_bias=True
    ),
    "TopK, chosen by capped logits": make_capped_logits_gate,
    "TopK, steps of one's own": lambda: TopKGating(
        DIM,
        NUM_EXPERTS,
        k=2,
        score="sqrt_softplus",
        weigh="softmax",
        num_groups=2,
        top_groups=1,
        group_score="best",
        select=score_by_margin,
        normalize=score_by_norm,
    ),
    "ReLU": lambda: ReLUGating(DIM, NUM_EXPERTS, k=2, mean_choices=1),
    "DepthAveraged": lambda: DepthAveragedGating(DIM, NUM_EXPERTS, k=2, state_dim=6),
    **{name: partial(make, DIM, NUM_EXPERTS) for kind in KINDS.values() for name, make in kind.is_in_tables.items()},
}


def make_layer_with_router(name: str, seed: int = 0) -> MoE:
    """A one-level layer with that router."""
    torch.manual_seed(seed)
    layer = MoE(DIM, gate=ROUTERS[name](), experts=Experts(DIM, NUM_EXPERTS, HIDDEN), loss_coef=1e-1, z_loss_coef=1e-2)
    with torch.no_grad():
        for weight in layer.gate.parameters():  # some start at zero
            weight.normal_(std=0.5)
    return layer


MASKED = LayerVariant("MoE", "Experts", "capacity", "masked")


class RouterVariant(NamedTuple):
    """A one-level layer with a router by name, on masked tokens."""

    name: str

    def __str__(self) -> str:
        return self.name

    @property
    def cell(self) -> tuple[str, str]:
        return "routers", self.name

    def build(self) -> MoE:
        return make_layer_with_router(self.name)

    def inputs(self, *shape: int, **options) -> tuple[Tensor, Tensor | None]:
        return MASKED.inputs(*shape, **options)


ALL_VARIANTS = [*LAYER_VARIANTS, *map(RouterVariant, ROUTERS)]


def run_layer(layer, x: Tensor, mask: Tensor | None = None, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Output and auxiliary loss, random numbers from `seed`."""
    torch.manual_seed(seed)
    return layer(x, mask=mask)


def compute_gradients(layer: nn.Module, x: Tensor, results: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Gradients of a loss that weighs every output differently, of the input and all parameters."""
    out, aux_loss = results
    weigh = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    loss = (out * weigh).sum() + aux_loss.to(out.dtype)
    named = {"input": x, **dict(layer.named_parameters())}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, grads, strict=True))


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance) -> None:
    """Every named tensor, compared with a tolerance."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def assert_all_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every named tensor, to the last bit."""
    assert_all_close(actual, expected, rtol=0, atol=0, equal_nan=True)
