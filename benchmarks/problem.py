"""The weights and inputs of a case, with the load that the case asks for; and the plain loop over experts: the obvious
sparse layer, a rival in its own right and what every output is checked by.

b groups, n tokens, d model dim, h hidden dim, e experts, k choices, c capacity
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Case

SEED = 20_240_229


@dataclass(frozen=True)
class Weights:
    """w_gating (d, e); w1, w3 (e, d, h), w2 (e, h, d); w3 is None without a gated activation.

    Two levels: w_gating is the outer gate's, w_inner (e, d, ei) the inner ones', experts are (e, ei, ...).
    """

    w_gating: Tensor
    w_inner: Tensor | None
    w1: Tensor
    w2: Tensor
    w3: Tensor | None


@dataclass(frozen=True)
class Inputs:
    """x and grad (b, n, d); threshold: of the normalised second gate under policy 'threshold'."""

    x: Tensor
    grad: Tensor
    threshold: float


def generator(stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(SEED + stream)


def gate_weights(d: int, e: int) -> Tensor:
    """(d, e), every column of length 1 (std 1/√d, as the layer starts), all as orthogonal as d allows.

    With more experts than dimensions: alternately orthogonal rows and equal columns, so that no expert is favoured.
    """
    w = torch.randn(d, e, generator=generator(1))
    if e <= d:
        return torch.linalg.qr(w).Q
    for _ in range(30):
        lower = torch.linalg.cholesky(w @ w.T)
        w = F.normalize(torch.linalg.solve_triangular(lower, w, upper=False), dim=0)
    return w


@lru_cache(maxsize=2)
def make_weights(d: int, h: int, e: int, inner: int, gated: bool, dtype: str) -> Weights:
    draw = generator(2)
    experts = (e, inner) if inner else (e,)
    w1 = torch.empty(*experts, d, h).normal_(std=d**-0.5, generator=draw)
    w2 = torch.empty(*experts, h, d).normal_(std=h**-0.5, generator=draw)
    w3 = torch.empty(*experts, d, h).normal_(std=d**-0.5, generator=draw) if gated else None
    w_inner = torch.empty(e, d, inner).normal_(std=d**-0.5, generator=draw) if inner else None
    tensors = (gate_weights(d, e), w_inner, w1, w2, w3)
    return Weights(*(None if w is None else w.to(getattr(torch, dtype)) for w in tensors))


def weights(case: Case) -> Weights:
    """The weights of a case; contestants that take them in this layout share the storage."""
    return make_weights(case.d, case.h, case.e, case.inner, case.gated, case.dtype)


def forget_weights() -> None:
    make_weights.cache_clear()


def wanted_logits(case: Case) -> Tensor:
    """(b, n, e): log p plus Gumbel noise, so that expert i is a token's first choice with probability p_i exactly."""
    p = torch.arange(1, case.e + 1).float() ** -case.skew
    gumbel = -torch.empty(case.b, case.n, case.e).exponential_(generator=generator(3)).log()
    logits = p.log() + gumbel
    return logits - logits.mean(-1, keepdim=True)


def inputs(case: Case) -> Inputs:
    """Tokens whose products with the gate's weights are the wanted logits, and noise in every direction it ignores."""
    w = gate_weights(case.d, case.e)
    back = torch.linalg.pinv(w)  # (e, d)
    noise = torch.randn(case.b, case.n, case.d, generator=generator(4))
    x = wanted_logits(case) @ back + noise - noise @ w @ back
    grad = torch.randn(case.b, case.n, case.d, generator=generator(5))
    dtype = getattr(torch, case.dtype)
    return Inputs(x.to(dtype), grad.to(dtype), second_threshold(case, (x @ w).softmax(-1)))


def second_threshold(case: Case, probs: Tensor) -> float:
    """What the normalised second gate must exceed so that firsts and kept seconds come to `fill` of factor x tokens."""
    if case.policy != "threshold":
        return 0.2
    assert case.fill is not None
    assert case.factor is not None
    two = probs.topk(2, dim=-1).values
    second = two[..., 1] / two.sum(-1)
    keep = case.fill * case.factor - 1  # seconds kept for each token
    return torch.quantile(second.flatten()[:10_000_000].double(), 1 - keep).item()


@dataclass(frozen=True)
class Choices:
    """expert, weight, kept, each (b, n, k)."""

    expert: Tensor
    weight: Tensor
    kept: Tensor


def route(case: Case, logits: Tensor, threshold: float) -> Choices:
    """The k most probable experts of each token, their normalised weights, and who got a slot (firsts queue first)."""
    probs, expert = logits.float().softmax(-1).topk(case.k, dim=-1)
    weight = probs / probs.sum(-1, keepdim=True) if case.k > 1 else probs
    allowed = torch.ones_like(expert, dtype=torch.bool)
    if case.router_is_top2 and case.policy != "all":
        allowed[..., 1] = weight[..., 1] > threshold if case.policy == "threshold" else False
    return Choices(expert, weight, allowed & has_slot(case, expert, allowed))


def has_slot(case: Case, expert: Tensor, allowed: Tensor) -> Tensor:
    """(b, n, k) of bool: each choice's place in its expert's queue is below the capacity."""
    if case.capacity is None:
        return torch.ones_like(allowed)
    taken = torch.zeros(expert.shape[0], 1, case.e, dtype=torch.long)
    kept = []
    for choice in range(case.k):
        mask = F.one_hot(expert[..., choice], case.e) * allowed[..., choice, None]
        place = ((mask.cumsum(1) - mask + taken) * mask).sum(-1)
        kept.append(place < case.capacity)
        taken = taken + (mask * kept[-1][..., None]).sum(1, keepdim=True)
    return torch.stack(kept, dim=-1)


class LoopMoE(nn.Module):
    """For each expert: gather its tokens, two products, add the weighted result back."""

    def __init__(self, case: Case, weights: Weights, threshold: float) -> None:
        super().__init__()
        self.case, self.threshold = case, threshold
        self.w_gating, self.w1, self.w2 = map(nn.Parameter, (weights.w_gating, weights.w1, weights.w2))
        self.w3 = nn.Parameter(weights.w3) if weights.w3 is not None else None

    def forward(self, x: Tensor) -> Tensor:
        choices = route(self.case, x @ self.w_gating, self.threshold)
        tokens = x.reshape(-1, x.shape[-1])
        expert, weight, kept = (t.reshape(-1, self.case.k) for t in (choices.expert, choices.weight, choices.kept))
        expert = torch.where(kept, expert, -1)
        out = torch.zeros_like(tokens)
        gates = self.w3.unbind(0) if self.w3 is not None else [None] * self.case.e
        for i, (w1, w2, w3) in enumerate(zip(self.w1.unbind(0), self.w2.unbind(0), gates, strict=True)):
            token, choice = torch.where(expert == i)
            if len(token):
                rows = feed_forward(tokens[token], w1, w2, w3)
                out = out.index_add(0, token, rows * weight[token, choice, None])
        return out.reshape(x.shape)


def feed_forward(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None) -> Tensor:
    """One expert: GELU, or SiLU gated by w3."""
    hidden = F.gelu(x @ w1) if w3 is None else F.silu(x @ w1) * (x @ w3)
    return hidden @ w2


def expected_output(case: Case, weights: Weights, inputs: Inputs) -> Tensor:
    """What every contestant must return, in float32 from the case's own values."""
    full = Weights(*(None if w is None else w.float() for w in vars(weights).values()))
    with torch.no_grad():
        return LoopMoE(case, full, inputs.threshold)(inputs.x.float())


def load_of(case: Case, weights: Weights, inputs: Inputs) -> dict[str, float]:
    """The load that the case's inputs achieve, before and after capacity."""
    choices = route(case, inputs.x.float() @ weights.w_gating.float(), inputs.threshold)
    first = torch.bincount(choices.expert[..., 0].flatten(), minlength=case.e).double()
    asked = torch.bincount(choices.expert.flatten(), minlength=case.e).double()
    kept = choices.kept.double().sum().item()
    shares = {
        "first choices of the busiest expert ÷ mean": (first.max() / first.mean()).item(),
        "choices of the busiest expert ÷ mean": (asked.max() / asked.mean()).item(),
        "choices computed": kept / choices.kept.numel(),
    }
    if case.capacity is not None:
        shares["slots filled"] = kept / case.rows
    return shares
