"""Reads routers of MoE models in `transformers` as if they were gates. Nothing of that package is imported.

Most return `(logits, weights, experts)` of flattened tokens. If a router returns less, the choices are computed again
from its logits, by the record of its block in `recipes.MODELS`. The arguments of the model around tell which tokens are
padding, and where sequences end.

Axes: b sequences, n tokens of a sequence, e experts, k choices of a token.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn

from mixture_of_experts import losses
from mixture_of_experts.gating.steps import SCORES
from mixture_of_experts.held import BlockSettings, num_logits, record_of, told
from mixture_of_experts.model_tokens import TokensOfCall, model_around
from mixture_of_experts.queues import Length, queue_up
from mixture_of_experts.routing import Routing

ROUTER = re.compile(r"Top[kK]Router$")


def is_router(module: nn.Module) -> bool:
    """Whether a module is a router of `transformers`, by its package, its name and its sizes."""
    kind = type(module)
    sized = isinstance(getattr(module, "top_k", None), int) and isinstance(getattr(module, "num_experts", None), int)
    return kind.__module__.startswith("transformers.") and ROUTER.search(kind.__name__) is not None and sized


class Reader(TokensOfCall):
    """Reads the outputs of the routers in one model.

    Args:
        model: the nearest module around the routers that gets an attention mask, or the outermost one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.blocks: dict[nn.Module, BlockSettings] = {}  # by router, for known blocks

    def num_experts(self, router: nn.Module) -> int:
        """The number of experts that a router chooses from."""
        held = self.blocks.get(router)
        return getattr(router, "num_experts") if held is None else num_logits(held)  # noqa: B009

    def routing(self, router: nn.Module, output: Any) -> Routing:
        """What a router returned, as a `Routing` without a capacity."""
        held, tokens = self.blocks.get(router), self.tokens()
        logits, weight, expert = told(router, output, held)
        *shape, e = logits.shape
        t, k = math.prod(shape), expert.shape[-1]
        b, n = shape if len(shape) == 2 else (1, t)  # some routers return (b, n, e)
        if tokens.shape is not None and tokens.shape[0] * tokens.shape[1] == t:
            b, n = tokens.shape
        real = tokens.mask if tokens.mask is not None and tuple(tokens.mask.shape) == (b, n) else None
        logits, expert = logits.float().view(b, n, e), expert.reshape(b, n * k).to(torch.int64)
        unknown = "sigmoid" if hasattr(router, "e_score_correction_bias") else "softmax"
        probs = SCORES[unknown if held is None else held.score](logits)
        probs = probs / probs.sum(dim=-1, keepdim=True)
        kept = torch.ones_like(expert, dtype=torch.bool) if real is None else real.repeat_interleave(k, dim=-1)
        kept = kept & (expert < e)  # larger ids are experts of other ranks
        expert, chosen = torch.where(kept, expert, 0), kept
        capacity, queues = None if held is None else held.capacity, None
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
            balance_loss=losses.load_balance(load, proxy, n if real is None else Length(real.sum(dim=-1)), k),
            z_loss=losses.z_loss(logits, real),
            num_tokens=n,
            num_experts=e,
            capacity=capacity,
            k=k,
            chosen=chosen,
            queues=queues,
            real=real,
        )


def find_readers(model: nn.Module) -> dict[nn.Module, Reader]:
    """A reader for every router of `transformers` in a model; routers with the same model around share one."""
    readers: dict[nn.Module, Reader] = {}
    found: dict[nn.Module, Reader] = {}
    modules = dict(model.named_modules())
    blocks = {held.router: held for module in modules.values() if (held := block_of(module)) is not None}
    for name, module in modules.items():
        if module in blocks or is_router(module):
            around = model_around(model, name)
            reader = found[module] = readers.setdefault(around, Reader(around))
            if module in blocks:
                reader.blocks[module] = blocks[module]
    return found


def block_of(module: nn.Module) -> BlockSettings | None:
    """The settings of a known block; None for any other module."""
    model = record_of(module)
    return None if model is None else BlockSettings(module, model)
