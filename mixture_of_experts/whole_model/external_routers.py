"""Reads and replaces the outputs of routers from other libraries, as described by their providers.

Axes: b (sequences), n (tokens per sequence), t (tokens), e (experts), k (choices per token).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mixture_of_experts.gating.choices import top_choices
from mixture_of_experts.gating.steps import SCORES
from mixture_of_experts.whole_model.router_discovery import RouterHandle


def read_router_output(router: RouterHandle, output: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Extract the logits `(t, e)` or `(b, n, e)`, the weights `(..., k)` and the experts `(..., k)` from an external
    router's output.
    """
    external: Any = router.external
    returns = external.returns
    parts = zip(returns, output if isinstance(output, tuple) else (output,), strict=False)
    found = {name: part.detach() for name, part in parts if isinstance(part, Tensor)}
    logits = found["probs"].log() if "probs" in found else found.get("logits")
    if logits is not None and logits.ndim > 1 and logits.shape[-1] == external.num_experts:
        weight = found.get("weights")
        expert = found.get("experts") if "experts" in returns else top_choices(logits, external.k)
        if "weights" not in returns and expert is not None and expert.shape[:-1] == logits.shape[:-1]:
            weight = SCORES[external.score](logits.float()).gather(-1, expert)
        if weight is not None and expert is not None and weight.shape == expert.shape:
            if external.zero_weight_expert is not None:
                expert = expert.where(weight != 0, external.zero_weight_expert)
            return logits, weight, expert
    raise TypeError(
        f"{router.class_name} must return ({', '.join(filter(None, returns))}) for flattened tokens so that its "
        "choices can be read"
    )


def replace_result(router: RouterHandle, output: tuple[Any, ...], name: str, value: Tensor) -> tuple[Any, ...]:
    """Return an external router's `output` with the named result replaced by `value`."""
    external: Any = router.external
    position = external.returns.index(name)
    return (*output[:position], value, *output[position + 1 :])
