"""Routers of the MoE models in `transformers`, read as if they were gates. Nothing of that package is imported.

Such a router returns `(logits, weights, experts)` of flattened tokens. Which of them are padding, and where a sequence
ends, is read from what the model around it is given.

Axes: b sequences, n tokens of a sequence, e experts, k choices of a token.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_experts import losses
from mixture_of_experts.queues import Length
from mixture_of_experts.routing import Routing

ROUTER = re.compile(r"Top[kK]Router$")
READ = ("attention_mask", "input_ids", "inputs_embeds")


def is_router(module: nn.Module) -> bool:
    """Whether it is one of these routers, by its package, its name and its sizes."""
    kind = type(module)
    sized = isinstance(getattr(module, "top_k", None), int) and isinstance(getattr(module, "num_experts", None), int)
    return kind.__module__.startswith("transformers.") and ROUTER.search(kind.__name__) is not None and sized


class Reader:
    """Reads the output of one router.

    Args:
        model: the nearest module around the router that is given an attention mask, or the outermost.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = list(inspect.signature(model.forward).parameters)
        self.tokens: tuple[int, ...] | None = None  # (b, n)
        self.mask: Tensor | None = None  # (b, n) bool

    def see(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of the model."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        mask, ids, embeds = (given.get(name) for name in READ)
        self.tokens = tuple(ids.shape) if ids is not None else None if embeds is None else tuple(embeds.shape[:-1])
        self.mask = None
        if mask is not None and mask.ndim == 2 and self.tokens is not None:  # that of a static cache has four
            self.mask = mask[:, -self.tokens[-1] :].bool()

    def routing(self, router: nn.Module, output: Any) -> Routing:
        """What a router returned, as a decision without a capacity."""
        logits, weight, expert = checked(router, output)
        (t, e), k = logits.shape, expert.shape[-1]
        b, n = self.tokens if self.tokens is not None and self.tokens[0] * self.tokens[1] == t else (1, t)
        real = self.mask if self.mask is not None and tuple(self.mask.shape) == (b, n) else None
        logits, expert = logits.float().view(b, n, e), expert.reshape(b, n * k).to(torch.int64)
        if hasattr(router, "e_score_correction_bias"):
            scores = logits.sigmoid()
            probs = scores / scores.sum(dim=-1, keepdim=True)
        else:
            probs = logits.softmax(dim=-1)
        kept = torch.ones_like(expert, dtype=torch.bool) if real is None else real.repeat_interleave(k, dim=-1)
        kept = kept & (expert < e)  # those of other ranks are not
        expert = torch.where(kept, expert, 0)
        load = expert.new_zeros(b, e).scatter_add(-1, expert, kept.to(torch.int64))
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
            capacity=None,
            k=k,
            chosen=kept,
            real=real,
        )


def checked(router: nn.Module, output: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `(t, e)`, weights and experts `(t, k)`."""
    if isinstance(output, tuple) and len(output) == 3 and all(isinstance(part, Tensor) for part in output):
        logits, weight, expert = (part.detach() for part in output)
        if logits.ndim == 2 and weight.shape == expert.shape and not expert.is_floating_point():
            return logits, weight, expert
    raise TypeError(
        f"{type(router).__name__} does not return (logits, weights, experts) of flattened tokens: it cannot be tracked"
    )


def find_readers(model: nn.Module) -> dict[nn.Module, Reader]:
    """A reader for every such router of a model; those of one model around share it."""
    around: dict[str, Reader] = {}
    found: dict[nn.Module, Reader] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if is_router(module):
            path = model_around(modules, name)
            found[module] = around.setdefault(path, Reader(modules[path]))
    return found


def model_around(modules: Mapping[str, nn.Module], name: str) -> str:
    """The path of the nearest module above a name whose forward takes token ids and a mask; else the root's."""
    while name:
        name = name.rpartition(".")[0]
        if {"attention_mask", "input_ids"} <= inspect.signature(modules[name].forward).parameters.keys():
            return name
    return ""
