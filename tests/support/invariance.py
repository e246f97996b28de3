"""Random layers under `batch_invariant`: each token keeps its bits in every batch, or the first call raises.

    python -m tests.support.invariance --layers 20000                     # every combination about once
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python -m tests.support.invariance   # a CPU without bf16 products

A combination is a router, experts, a shared expert, a dtype, one or two levels, and a mode. It is "equal" if every
token has the same bits alone, in a batch and in batches in another order: of outputs, of the router's state, and of the
gradients of inputs. It is "raised" if the first call raises an error that names `batch_invariant`, and "differing"
otherwise. `--layers` bounds how many combinations are drawn.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixture_of_experts import Experts, GatedExperts, HeirarchicalMoE, MoE, gating, ops
from mixture_of_experts.experts import ExpertList, RoutedExperts
from mixture_of_experts.gating.steps import AlwaysChosen, LearnedScale, NormalizeBy, OpenGroups
from mixture_of_experts.ops import ClampedGLU, ClampedSwiGLU, SiTU, SquaredReLU
from mixture_of_experts.ops.cpu.batch_invariant import sample_products
from mixture_of_experts.quantize import quantize_experts
from mixture_of_experts.recipes import SharedExpert
from mixture_of_experts.support.batch_invariance import find_block_rows
from mixture_of_experts.unstack import unstack
from mixture_of_experts.wrappers import (
    GatedSharedExpert,
    InputWeightedExperts,
    LatentExperts,
    NormedExperts,
    Scale,
    Shift,
    ZeroComputationExperts,
)

TOKENS, IDS, STATE, E = 40, 50, 12, 8
DIMS = (64, 36, 200)
DTYPES = ("float16", "bfloat16", "float32", "float64", "autocast")
DROPLESS: Any = dict(capacity_factor_train=None, capacity_factor_eval=None)
Make = Callable[..., Any]


class MyTopKGating(gating.TopKGating):
    """A subclass that changes nothing."""


class CentredTopKGating(gating.TopKGating):
    """A subclass whose choices depend on the other tokens of the call."""

    def _compute_scores(self, x: Tensor, *others: Any) -> Any:
        return super()._compute_scores(x - x.mean(dim=(-3, -2), keepdim=True), *others)


class MyGate(gating.TokenChoiceGate):
    """A router that multiplies without blocks."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts, 2)
        self.w_gating = self._empty_matrix(None, None)
        self.reset_parameters()

    def decide(self, tokens: gating.Tokens) -> gating.Choices:
        probs = (tokens.x.float() @ self.w_gating.float()).softmax(-1)
        weight, expert = probs.topk(2)
        return gating.Choices(expert, weight, probs, {"balance": probs.sum() * 0, "z": probs.sum() * 0})


class GroupGate(nn.Module):
    """A module that is no gate of this package: it calls one on inputs that depend on the whole call."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.dim, self.num_experts = dim, num_experts
        self.inner = gating.TopKGating(dim, num_experts)

    def forward(self, x: Tensor, mask: Tensor | None = None, **others: Any) -> Any:
        return self.inner(x + x.sum(dim=1, keepdim=True), mask=mask, **others)


class MLP(nn.Module):
    """A network of linear layers whose forward is unknown code."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, 24), nn.Linear(24, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class Mixing(MLP):
    """A network whose tokens read each other."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.cumsum(dim=-2))


class Bare(nn.Module):
    """A product with a stacked weight, which no linear layer owns."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, dim, dim) * dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight[0]


class LinearExperts(RoutedExperts):
    """Experts of one product, with a `compute` of their own."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_experts = E
        self.weight = nn.Parameter(torch.randn(E, dim, dim) * dim**-0.5)

    def compute(self, rows: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        return ops.grouped_matmul(rows, self.weight, num_tokens_per_expert)


class SlotExperts(nn.Module):
    """Experts that read slots."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, dim, dim) * dim**-0.5)

    def forward(self, slots: Tensor) -> Tensor:
        return torch.einsum("esd,edf->esf", slots, self.weight)


class MeanExperts(GatedExperts):
    """A subclass of stacked experts whose outputs depend on the other tokens of the call."""

    def forward(self, x: Tensor, assignments: Any = None, **others: Any) -> Tensor:
        return super().forward(x - x.mean(dim=0), assignments, **others)


def topk(**settings: Any) -> Make:
    return lambda dim, e, **outer: gating.TopKGating(dim, e, **{"k": 2, **settings}, **outer)


def logits(**settings: Any) -> Make:
    return lambda dim, e: gating.TopKGating(dim, e, logits=gating.RouterLogits(dim, e, **settings))


def depth(**settings: Any) -> Make:
    def make(dim: int, e: int) -> Any:
        made = {name: value() for name, value in settings.items() if name == "logits"}
        return gating.DepthAveragedGating(dim, e, 2, state_dim=STATE, **{**settings, **made})

    return make


def noisy(dim: int, e: int) -> Any:
    gate = gating.NoisyTopKGating(dim, e)
    for weight in (gate.w_gating, gate.w_noise):
        nn.init.normal_(weight, std=dim**-0.5)
    return gate


ROUTERS: dict[str, Make] = {
    "top-1": topk(k=1),
    "top-2": topk(),
    "top-2, bias": topk(bias=True),
    "top-8 of 8": topk(k=8),
    "top-2 sigmoid, expert bias": topk(score="sigmoid", expert_bias=True, scale=2.5),
    "top-2 sqrt_softplus": topk(score="sqrt_softplus"),
    "top-2 of groups": topk(score="sigmoid", num_groups=4, top_groups=2),
    "top-2, weigh softmax": topk(select="logits", weigh="softmax"),
    "top-2, learned scale": topk(weigh=LearnedScale(E)),
    "top-2, norm of order 2": topk(normalize=NormalizeBy(2.0, 1e-6)),
    "top-2, always chosen": topk(select=AlwaysChosen(1)),
    "top-2, open groups": topk(score="sigmoid", select=OpenGroups(4, 2)),
    "top-2, jitter": topk(jitter=0.1),
    "top-2, limited capacity": topk(capacity_factor_train=1.0, capacity_factor_eval=1.0),
    "top-2, tanh as score": topk(score=lambda logits: torch.tanh(logits).exp()),
    "top-2, score over the call": topk(score=lambda logits: (logits - logits.mean()).sigmoid()),
    "top-2, weigh over the call": topk(weigh=lambda logits, score, expert: score.gather(-1, expert) / score.max()),
    "top-2, normalize over the call": topk(normalize=lambda weight: weight / weight.max()),
    "top-2, select over the call": topk(select=lambda logits, score, bias: score - score.mean(dim=(0, 1))),
    "subclass": lambda dim, e: MyTopKGating(dim, e),
    "subclass over the call": lambda dim, e: CentredTopKGating(dim, e),
    "gate of one's own": lambda dim, e: MyGate(dim, e),
    "module as gate": lambda dim, e: GroupGate(dim, e),
    "logits of a linear layer": lambda dim, e: gating.TopKGating(dim, e, logits=nn.Linear(dim, e)),
    "router logits": logits(),
    "router logits, norm, softcap": logits(norm_eps=1e-6, softcap=3.0, multiplier=1.5, bias=True),
    "top-p": lambda dim, e: gating.TopPGating(dim, e, 4),
    "relu": lambda dim, e: gating.ReLUGating(dim, e, 4, mean_choices=2.0),
    "hash": lambda dim, e: gating.HashGating(dim, e, num_ids=IDS),
    "noisy": noisy,
    "sparse mixer": lambda dim, e: gating.SparseMixerGating(dim, e),
    "top2": lambda dim, e, **outer: gating.Top2Gating(dim, e, **DROPLESS, **outer),
    "top2, all": lambda dim, e, **outer: gating.Top2Gating(
        dim, e, second_policy_train="all", second_policy_eval="all", **DROPLESS, **outer
    ),
    "top2, threshold": lambda dim, e: gating.Top2Gating(
        dim, e, second_policy_train="threshold", second_policy_eval="threshold", **DROPLESS
    ),
    "top2, limited capacity": lambda dim, e: gating.Top2Gating(dim, e),
    "expert choice": lambda dim, e: gating.ExpertChoiceGating(dim, e),
    "depth averaged": depth(),
    "depth averaged, later layer": depth(first=False),
    "depth averaged, router logits": depth(logits=lambda: gating.RouterLogits(STATE, E)),
}


def forced(dim: int, e: int) -> Any:
    gate = gating.TopKGating(dim, e)
    gate.forced = "random"
    return gate


ROUTERS["forced"] = forced


def asks_for_blocks(p: int, q: int) -> bool:
    """Whether a row alone gets other bits from this CPU's products of float32, `p x q`. Where it does not, the fastest
    implementation keeps the bits too."""
    return find_block_rows(sample_products, (p, q), torch.empty(2, p, q, dtype=torch.float32)) > 1


def lora(dim: int, fast: bool) -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    from mixture_of_experts.huggingface import fast_lora

    layer = MoE(dim, gate=gating.TopKGating(dim, E), experts=GatedExperts(dim, E, 48))
    names = ["experts.w1", "experts.w3", "experts.w2"]
    config = LoraConfig(r=2, target_parameters=names, init_lora_weights=False)
    inject_adapter_in_model(config, layer)
    return (fast_lora(layer) if fast else layer).experts


def quantized(dim: int, bits: int) -> Any:
    layer = MoE(dim, gate=gating.TopKGating(dim, E), experts=GatedExperts(dim, E, 64)).requires_grad_(False)
    return quantize_experts(layer, bits=bits, **({"group": 32} if bits == 4 else {})).experts


def unstacked(dim: int) -> Any:
    return unstack(MoE(dim, gate=gating.TopKGating(dim, E), experts=GatedExperts(dim, E, 48))).experts


def strided(dim: int) -> Any:
    """Experts whose weights are transposed views, as converted ones have them."""
    experts = GatedExperts(dim, E, 48, bias=True)
    for name in ("w1", "w3", "w2"):
        weight = getattr(experts, name).data
        setattr(experts, name, nn.Parameter(weight.mT.contiguous().mT))
    return experts


EXPERTS: dict[str, Make] = {
    "experts": lambda d: Experts(d, E, 48),
    "experts, bias": lambda d: Experts(d, E, 40, bias=True),
    "experts, odd": lambda d: Experts(d, E, 33, nn.ReLU, bias=True),
    "experts, squared relu": lambda d: Experts(d, E, 48, SquaredReLU),
    "experts, tanh": lambda d: Experts(d, E, 48, nn.Tanh),
    "experts, dropout": lambda d: Experts(d, E, 48, dropout=0.5),
    "gated": lambda d: GatedExperts(d, E, 48),
    "gated, bias": lambda d: GatedExperts(d, E, 40, nn.GELU, bias=True),
    "gated, wide": lambda d: GatedExperts(d, E, 160),
    "gated, clamped": lambda d: GatedExperts(d, E, 48, ClampedSwiGLU, bias=True),
    "gated, clamped GLU": lambda d: GatedExperts(d, E, 48, ClampedGLU),
    "gated, SiTU": lambda d: GatedExperts(d, E, 48, SiTU),
    "gated, transposed": strided,
    "gated, over the call": lambda d: MeanExperts(d, E, 48),
    "8 bits": lambda d: quantized(d, 8),
    "4 bits": lambda d: quantized(d, 4),
    "LoRA": lambda d: lora(d, False),
    "fast LoRA": lambda d: lora(d, True),
    "latent": lambda d: LatentExperts(Experts(16, E, 32), before=nn.Linear(d, 16), after=nn.Linear(16, d)),
    "latent, no bias": lambda d: LatentExperts(
        GatedExperts(d, E, 32), beside=nn.Linear(d, d, bias=False), after=nn.Sequential(nn.RMSNorm(d), Scale(0.5))
    ),
    "latent, shift": lambda d: LatentExperts(GatedExperts(d, E, 32), after=Shift(d), dim_out=d),
    "latent, over the call": lambda d: LatentExperts(GatedExperts(d, E, 32), before=Mixing(d)),
    "identities": lambda d: ZeroComputationExperts(GatedExperts(d, E - 3, 48), num_identity=2, num_zero=1),
    "weighted inputs": lambda d: InputWeightedExperts(GatedExperts(d, E, 48)),
    "normed": lambda d: NormedExperts(GatedExperts(d, E, 48), nn.RMSNorm(d)),
    "list of linear layers": lambda d: ExpertList([nn.Linear(d, d) for _ in range(E)]),
    "unstacked": unstacked,
    "compute of one's own": LinearExperts,
    "slots of one's own": SlotExperts,
}
OF_TWO_LEVELS = ("top-1", "top-2", "top-2, bias", "top2", "top2, all")
STACKED: dict[str, Make] = {"experts": Experts, "gated": GatedExperts}
SHARED: dict[str, Make] = {
    "none": lambda d: None,
    "linear": lambda d: nn.Linear(d, d),
    "linear, no bias": lambda d: nn.Linear(d, d, bias=False),
    "shared": lambda d: SharedExpert(d, 24),
    "shared, bias": lambda d: SharedExpert(d, 33, nn.GELU, bias=True),
    "shared, clamped": lambda d: SharedExpert(d, 40, ClampedSwiGLU),
    "shared, SiTU": lambda d: SharedExpert(d, 40, SiTU),
    "token gated": lambda d: GatedSharedExpert(SharedExpert(d, 24), nn.Linear(d, 1, bias=False)),
    "sequential": lambda d: nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 24), nn.Tanh(), nn.Linear(24, d), Scale(0.5)),
    "norm": lambda d: nn.RMSNorm(d),
    "softmax": lambda d: nn.Sequential(nn.Linear(d, d), nn.Softmax(dim=-1)),
    "dropout": lambda d: nn.Sequential(nn.Linear(d, d), nn.Dropout(0.5)),
    "module of one's own": MLP,
    "tokens that read each other": Mixing,
    "bare product": Bare,
}


class Combination(NamedTuple):
    router: str
    experts: str
    shared: str
    dtype: str
    levels: int
    training: bool
    dim: int


def combinations(count: int, seed: int) -> list[Combination]:
    """All routers with all experts, dtypes, levels and modes, and all shared experts with all dtypes and modes, in
    random order; the first `count` of them."""
    draw, modes = random.Random(seed), (False, True)
    of_levels = (itertools.product(ROUTERS, EXPERTS, DTYPES, [1], modes),)
    of_levels += (itertools.product(OF_TWO_LEVELS, STACKED, DTYPES, [2], modes),)
    found = [
        Combination(router, experts, "none", *others, draw.choice(DIMS))
        for router, experts, *others in itertools.chain(*of_levels)
    ]
    found += [
        Combination(draw.choice(list(ROUTERS)[:8]), "gated", shared, dtype, 1, training, dim)
        for shared, dtype, training, dim in itertools.product(SHARED, DTYPES, modes, DIMS)
        for _ in range(3)
    ]
    draw.shuffle(found)
    return found[:count]


def layer_of(c: Combination) -> nn.Module | None:
    """The layer; None if there is none, as groups of 4 bits have 32 numbers."""
    torch.manual_seed(0)
    if c.experts == "4 bits" and c.dim % 32:
        return None
    if c.levels == 1:
        gate, experts, shared = ROUTERS[c.router](c.dim, E), EXPERTS[c.experts](c.dim), SHARED[c.shared](c.dim)
        layer: nn.Module = MoE(c.dim, gate=gate, experts=experts, shared_expert=shared)
    else:
        outer, inner = ROUTERS[c.router](c.dim, 2), ROUTERS[c.router](c.dim, 4, outer_expert_dims=(2,))
        layer = HeirarchicalMoE(c.dim, gate_outer=outer, gate_inner=inner, experts=STACKED[c.experts](c.dim, (2, 4)))
    layer.train(c.training)
    return layer if c.dtype == "autocast" else layer.to(getattr(torch, c.dtype))


class Inputs(NamedTuple):
    """Tokens `(n, d)`, the weights of their outputs in what is differentiated, and side inputs of the router."""

    x: Tensor
    weight: Tensor
    side: dict[str, Tensor]

    def at(self, some: list[int]) -> Inputs:
        return Inputs(self.x[some], self.weight[some], {name: value[some] for name, value in self.side.items()})


def inputs_of(c: Combination, count: int) -> Inputs:
    draw = torch.Generator().manual_seed(1)
    dtype = torch.float32 if c.dtype == "autocast" else getattr(torch, c.dtype)
    x, weight = torch.randn(2, count, c.dim, generator=draw).to(dtype).unbind(0)
    side = {}
    if c.router == "hash":
        side["token_ids"] = torch.randint(IDS, (count,), generator=draw)
    if c.router == "depth averaged, later layer":
        side["router_state"] = torch.randn(count, STATE, generator=draw)
    return Inputs(x, weight, side)


def run(layer: nn.Module, c: Combination, inputs: Inputs) -> dict[str, Tensor]:
    """Output, state and gradient of each token; in eval also the output without gradients."""
    side = {name: value.unsqueeze(0) for name, value in inputs.side.items()}
    found, cast = {}, torch.autocast("cpu", torch.bfloat16, enabled=c.dtype == "autocast")
    if not c.training:
        with torch.no_grad(), cast:
            found["without gradients"] = layer(inputs.x.unsqueeze(0), **side)[0][0]
    x = inputs.x.clone().requires_grad_()
    with cast:
        out, _, *state = layer(x.unsqueeze(0), **side)
    (gradient,) = torch.autograd.grad(out, x, inputs.weight.unsqueeze(0).to(out.dtype), allow_unused=True)
    found |= {"output": out[0].detach(), "gradient": torch.zeros_like(x) if gradient is None else gradient}
    return found | ({"state": state[0][0].detach()} if state else {})


def batches_of(count: int, most_alone: int) -> Iterator[list[int]]:
    draw = random.Random(0)
    order = draw.sample(range(count), count)
    yield from ([token] for token in order[:most_alone])
    for size in (2, 3, 5, 7, 13, count // 2, count - 1, count):
        yield draw.sample(range(count), size)
        yield list(range(count - size, count))


def outcome(c: Combination, tokens: int = TOKENS) -> tuple[str, str]:
    """ "equal", "raised", "differing", or "" if there is no such layer or no way computes it; and why."""
    layer = layer_of(c)
    if layer is None:
        return "", ""
    inputs = inputs_of(c, tokens)
    try:
        run(layer, c, inputs)
    except Exception as error:
        return "", f"no way computes it: {error}"
    with ops.use("batch_invariant"):
        try:
            wanted = run(layer, c, inputs)
        except (ValueError, RuntimeError) as error:
            return ("raised" if "batch_invariant" in str(error) else "differing"), f"{type(error).__name__}: {error}"
        for some in batches_of(tokens, min(tokens, 12)):
            try:
                found = run(layer, c, inputs.at(some))
            except (ValueError, RuntimeError) as error:
                return "differing", f"a later call raises {error}"
            for name, tensor in found.items():
                other = (tensor != wanted[name][some]).any(-1).nonzero().flatten().tolist()
                if other:
                    return "differing", f"{name} of {len(other)} of {len(some)} tokens"
    return "equal", ""


def attack(count: int, seed: int = 0, tokens: int = TOKENS) -> tuple[collections.Counter, list[str]]:
    """How many of the combinations came to what, and a line for each that differs."""
    found, lines = collections.Counter(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for c in combinations(count, seed):
            result, why = outcome(c, tokens)
            found[result] += 1
            if result == "differing":
                lines.append(f"{tuple(c)}: {why}")
    return found, lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=500, help="combinations that are drawn (default 500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of the whole batch (default {TOKENS})")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    found, lines = attack(args.layers, args.seed, args.tokens)
    print("\n".join(sorted(lines)))
    print(f"{torch.backends.cpu.get_cpu_capability()}, {args.threads} threads: ", end="")
    print(", ".join(f"{found[name]} {name}" for name in ("equal", "raised", "differing")), end="")
    print(f"; {found['']} that exist in no way")


if __name__ == "__main__":
    main()
