"""Layers and batches on which expert parallelism is compared with one process.

Axes: b sequences, n tokens of one, d model dim, e experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixture_of_experts import (
    ExpertChoiceGating,
    Experts,
    GatedExperts,
    HeirarchicalMoE,
    MoE,
    NoisyTopKGating,
    ReLUGating,
    TopKGating,
    TopPGating,
)
from mixture_of_experts.gating import BALANCE_LOSSES
from mixture_of_experts.wrappers import LatentExperts

DIM, EXPERTS, HIDDEN, LENGTH = 8, 8, 12, 7
SIZES = {2: [2, 4], 4: [3, 0, 2, 1]}  # sequences of every rank: one of four has none
BATCH = 6


class CustomExperts(nn.Module):
    """Batched experts of one's own: a stack inside a submodule, a scale that all experts share, and buffers."""

    def __init__(self, num_experts: int = EXPERTS) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.inner = Experts(DIM, num_experts, HIDDEN, bias=True)
        self.shared_scale = nn.Parameter(torch.linspace(0.5, 1.5, DIM))  # (d,) with d = e: looks like a stack
        self.register_buffer("offset", torch.arange(num_experts, dtype=torch.float64).view(-1, 1, 1) / 10)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x * self.shared_scale) + x.square().mean(-1, keepdim=True) * self.offset


def make_latent_experts() -> LatentExperts:
    """Experts of width 4 between layers that all ranks have."""
    experts = GatedExperts(4, EXPERTS, HIDDEN)
    return LatentExperts(experts, before=nn.Linear(DIM, 4), beside=nn.Linear(DIM, 4), after=nn.Linear(4, DIM))


def make_shared_expert() -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, 5), nn.GELU(), nn.Linear(5, DIM))


def make_top2(**more) -> MoE:
    experts = {} if "experts" in more else {"hidden_dim": HIDDEN}
    return MoE(DIM, EXPERTS, second_policy_train="all", z_loss_coef=0.3, loss_coef=0.7, **experts, **more)


def make_topk(experts: object = None, **more) -> MoE:
    experts = GatedExperts(DIM, EXPERTS, HIDDEN, bias=True) if experts is None else experts
    losses = {"z_loss_coef": 0.3, "loss_coef": 0.7, "loss_coefs": more.pop("loss_coefs", None)}
    gate = TopKGating(DIM, EXPERTS, **{"k": 2, **more})
    return MoE(DIM, gate=gate, experts=experts, shared_expert=make_shared_expert(), **losses)


def make_variable(gate: TopKGating, **losses) -> MoE:
    """With a variable number of choices."""
    if isinstance(gate, ReLUGating):
        gate.l1_coef.fill_(0.3)  # else nobody would see it
    return MoE(DIM, gate=gate, experts=Experts(DIM, EXPERTS, HIDDEN), z_loss_coef=0.3, loss_coef=0.7, **losses)


def make_noisy() -> MoE:
    moe = MoE(DIM, gate=NoisyTopKGating(DIM, EXPERTS), experts=Experts(DIM, EXPERTS, HIDDEN), loss_coef=0.7)
    for weight in moe.gate.parameters():
        nn.init.normal_(weight, std=0.3)
    moe.gate.train = lambda mode=True: moe.gate  # noise drawn by rank is other noise: keep it off
    moe.gate.training = False
    return moe


def make_expert_choice() -> MoE:
    return MoE(DIM, gate=ExpertChoiceGating(DIM, EXPERTS), experts=Experts(DIM, EXPERTS, HIDDEN), z_loss_coef=0.3)


def make_two_levels(**more) -> HeirarchicalMoE:
    experts = {} if "experts" in more else {"hidden_dim": HIDDEN}
    losses = {"z_loss_coef": 0.3, "loss_coef": 0.7, "second_place_loss": True}
    return HeirarchicalMoE(DIM, (4, 2), second_policy_train="all", **losses, **experts, **more)


def make_two_level_layer(outer: dict, inner: dict, **more) -> HeirarchicalMoE:
    gates = {
        "gate_outer": TopKGating(DIM, 4, k=2, **outer),
        "gate_inner": TopKGating(DIM, 2, k=1, outer_expert_dims=(4,), **inner),
    }
    experts = {} if "experts" in more else {"hidden_dim": HIDDEN}
    return HeirarchicalMoE(DIM, (4, 2), z_loss_coef=0.3, loss_coef=0.7, **gates, **experts, **more)


DEEPSEEK = dict(k=2, score="sigmoid", bias=True, scale=2.5, num_groups=4, top_groups=2, expert_bias=True)

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "top2": lambda: make_top2(second_place_loss=True),
    "top2, threshold, token priority": lambda: MoE(
        DIM, EXPERTS, HIDDEN, second_policy_train="threshold", priority="token", loss_coef=0.7, z_loss_coef=0.3
    ),
    "top2, dropless": lambda: make_top2(capacity_factor_train=None),
    "top2, own experts": lambda: make_top2(experts=CustomExperts()),
    "switch": lambda: make_topk(k=1, capacity_factor_train=1.25),
    "top-k, dropless": make_topk,
    "top-k, score priority": lambda: make_topk(capacity_factor_train=0.7, priority="score", balance_over="batch"),
    "top-k, deepseek": lambda: make_topk(**DEEPSEEK, loss_coefs=dict.fromkeys(BALANCE_LOSSES, 0.1)),
    "top-k, dropless batch": lambda: make_topk(balance_over="batch"),
    "top-k, dropless own experts": lambda: make_topk(CustomExperts()),
    "top-k, latent": lambda: make_topk(make_latent_experts(), capacity_factor_train=1.0),
    "top-k, dropless latent": lambda: make_topk(make_latent_experts()),
    "top-p": lambda: make_variable(TopPGating(DIM, EXPERTS, 4, p=0.5), loss_coefs={"entropy": 0.2}),
    "relu": lambda: make_variable(ReLUGating(DIM, EXPERTS, 4, mean_choices=1.5, capacity_factor_train=0.7)),
    "noisy top-k": make_noisy,
    "expert choice": make_expert_choice,
    "two levels": make_two_levels,
    "two levels, dropless": lambda: make_two_level_layer({}, {"balance_over": "batch"}),
    "two levels, mixed": lambda: make_two_level_layer({"capacity_factor_train": 1.0}, {}),
    "two levels, dropless first": lambda: make_two_level_layer({}, {"capacity_factor_train": 1.0}),
}


def replicate_layer(layer: str) -> tuple[str, ...]:
    """What `ExpertParallel(replicated=...)` has to be told of a layer."""
    return ("shared_scale",) if "own experts" in layer else ()


def make_layer(layer: str) -> nn.Module:
    """A layer, the same on every rank; expert 3 (of a level) is never chosen."""
    torch.manual_seed(1)
    moe = LAYERS[layer]()
    for name, parameter in moe.named_parameters():
        if name in ("gate.w_gating", "gate_outer.w_gating") and "choice" not in layer:
            parameter.data[0, 3] = -40.0
    return moe


def make_batch(masked: bool = False) -> tuple[Tensor, Tensor | None]:
    """Tokens (b, n, d) of all ranks together, whose first feature is 1, and a mask."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(BATCH, LENGTH, DIM, generator=generator)
    x[..., 0] = 1.0
    lengths = torch.tensor([7, 3, 5, 0, 7, 1])
    return x, torch.arange(LENGTH) < lengths[:, None] if masked else None


def local_part(whole: Tensor, rank: int | None = None) -> Tensor:
    """A rank's sequences of a whole batch."""
    sizes = SIZES[dist.get_world_size()]
    return whole.split(sizes)[dist.get_rank() if rank is None else rank]


LAYERS_OF_MODEL = ("top2", "top-k, deepseek", "top-k, latent")


class Block(nn.Module):
    """A residual layer, recomputed in the backward if asked to."""

    def __init__(self, ffn: nn.Module, recompute: bool) -> None:
        super().__init__()
        self.norm, self.ffn, self.recompute = nn.LayerNorm(DIM), ffn, recompute

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return checkpoint(self._run, x, use_reentrant=False) if self.recompute else self._run(x)

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, aux_loss = self.ffn(self.norm(x))
        return x + out, aux_loss


class Model(nn.Module):
    """Layers with limited capacity, without, and with latent experts, between dense ones."""

    def __init__(self, layers: Sequence[str] = LAYERS_OF_MODEL, recompute: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, DIM)
        self.layers = nn.ModuleList(Block(make_layer(layer), recompute) for layer in layers)
        self.last = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, total = self.first(x), x.new_zeros(())
        for layer in self.layers:
            x, aux_loss = layer(x)
            total = total + aux_loss
        return self.last(x), total


def make_model(**options) -> Model:
    torch.manual_seed(4)
    return Model(**options)
