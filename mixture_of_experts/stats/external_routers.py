"""Reads routers of MoE models in `transformers` as if they were gates. Nothing of that package is imported.

Most return `(logits, weights, experts)` of flattened tokens. If a router returns less, the choices are computed again
from its logits, by the recipe of its block in `recipes.MODELS`. The arguments of the model around tell which tokens are
padding, and where sequences end.

Axes: b sequences, n tokens of a sequence, e experts, k choices of a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from mixture_of_experts import losses
from mixture_of_experts.dispatch.queues import Length, queue_up
from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.gating.steps import SCORES
from mixture_of_experts.whole_model.block_settings import read_output
from mixture_of_experts.whole_model.model_tokens import TokensOfCall
from mixture_of_experts.whole_model.sites import Site, is_router


class Reader(TokensOfCall):
    """Reads the outputs of the routers in one model."""

    def routing(self, site: Site, output: Any) -> Routing:
        """What a router returned, as a `Routing` without a capacity."""
        block, tokens = site.block, self.tokens()
        logits, weight, expert = read_output(site.gate, output, block)
        *shape, e = logits.shape
        t, k = math.prod(shape), expert.shape[-1]
        b, n = shape if len(shape) == 2 else (1, t)  # some routers return (b, n, e)
        if tokens.shape is not None and tokens.shape[0] * tokens.shape[1] == t:
            b, n = tokens.shape
        real = tokens.mask if tokens.mask is not None and tuple(tokens.mask.shape) == (b, n) else None
        logits, expert = logits.float().view(b, n, e), expert.reshape(b, n * k).to(torch.int64)
        unknown = "sigmoid" if hasattr(site.gate, "e_score_correction_bias") else "softmax"
        probs = SCORES[unknown if block is None else block.score](logits)
        probs = probs / probs.sum(dim=-1, keepdim=True)
        kept = torch.ones_like(expert, dtype=torch.bool) if real is None else real.repeat_interleave(k, dim=-1)
        kept = kept & (expert < e)  # larger ids are experts of other ranks
        expert, chosen = torch.where(kept, expert, 0), kept
        capacity, queues = None if block is None else block.capacity, None
        if capacity is not None:
            queues = queue_up(expert, chosen, e, k)
            kept = chosen & (queues.position < capacity)
        load = expert.new_zeros(b, e).scatter_add(-1, expert, chosen.to(torch.int64))
        proxy = (probs if real is None else torch.where(real.unsqueeze(-1), probs, 0.0)).sum(dim=-2)
        return Routing(
            expert=expert,
            kept=kept,
            weight=torch.where(kept, weight.float().reshape(b, n * k), 0.0),
            probs=probs,
            losses={
                "balance": losses.load_balance(load, proxy, n if real is None else Length(real.sum(dim=-1)), k),
                "z": losses.z_loss(logits, real),
            },
            num_tokens=n,
            num_experts=e,
            capacity=capacity,
            k=k,
            chosen=chosen,
            queues=queues,
            real=real,
        )


def readers_of(sites: Sequence[Site]) -> dict[Site, Reader]:
    """A reader for every router of `transformers`; routers in the same model share one."""
    readers = {site.around: Reader(site.around) for site in sites if site.external}
    return {site: readers[site.around] for site in sites if site.external}


def why_no_routing(site: Site) -> str | None:
    """Why nobody can read what a site routes; None if it can be read."""
    known = not site.external or site.block is not None or is_router(site.gate)
    return None if known else "it is no router that is known, so what it returns cannot be read"
