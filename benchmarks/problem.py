"""The weights and inputs of a case, with the load that the case asks for.

b groups, n tokens, d model dim, h hidden dim, e experts, k choices
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

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
