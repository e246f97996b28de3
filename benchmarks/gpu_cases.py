"""The cases of the comparison on a GPU, and the tokens of each.

Axes: t tokens, d model dim, h hidden dim, e experts, k choices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from benchmarks.gpu_shapes import MAIN_SHAPES, Shape

Mode = Literal["train", "forward", "decode"]
MODES: tuple[Mode, ...] = ("train", "forward", "decode")
DECODED = 8  # tokens of a decoding step, one of each sequence
POOL_FACTOR = 8  # number of tokens from which each decoded token is selected, because its choices are clear


@dataclass(frozen=True)
class GPUCase:
    """A shape and everything else on which the times of a call depend.

    Attributes:
        variation: name of what differs from the plain case of the shape and mode.
        routing: "balanced", or "zipf" if expert i is a token's first choice with a probability proportional to 1 / i.
        layout: "separate" weights of the layer, or "pretrained": transposed views of the weights of transformers, with
            gate and up projections in one tensor.
        dtype: of weights and tokens; "autocast" for float32 under autocast to bfloat16.
        compiled: mode of torch.compile, or None in eager mode.
    """

    shape: Shape
    mode: Mode
    variation: str = ""
    routing: Literal["balanced", "zipf"] = "balanced"
    layout: Literal["separate", "pretrained"] = "separate"
    dtype: Literal["bfloat16", "float16", "autocast"] = "bfloat16"
    compiled: Literal["default", "reduce-overhead"] | None = None

    @property
    def name(self) -> str:
        return "/".join(filter(None, (self.shape.name, self.mode, self.variation)))

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "autocast" else getattr(torch, self.dtype)

    @property
    def is_graph(self) -> bool:
        """Whether a step is replayed as a CUDA graph, so that only the time on the GPU counts."""
        return self.compiled == "reduce-overhead"

    @property
    def group(self) -> str:
        """The cases that share the choice of a default implementation."""
        compiled = f", {self.compiled} compilation" if self.compiled else ""
        return f"{self.mode}, {self.dtype}{compiled}"


def list_cases(shapes: list[Shape]) -> Iterator[GPUCase]:
    """Yield all cases, in the order of their importance. Only the main shapes have decoding and variations."""
    for shape in shapes:
        is_main = shape.name in MAIN_SHAPES
        for mode in MODES if is_main else MODES[:2]:
            yield GPUCase(shape if mode != "decode" else replace(shape, t=DECODED), mode)
        if is_main:
            yield from list_variations(shape, all_of_them=shape.name == MAIN_SHAPES[0])


def list_variations(shape: Shape, all_of_them: bool) -> Iterator[GPUCase]:
    """Yield cases of a shape that differ from its plain cases in one property each."""
    train, decode = GPUCase(shape, "train"), GPUCase(replace(shape, t=DECODED), "decode")
    yield GPUCase(shape.with_rows(16), "train", "16-rows")
    if all_of_them:
        yield GPUCase(shape.with_rows(64), "train", "64-rows")
        yield GPUCase(shape.with_rows(16), "forward", "16-rows")
    yield replace(train, variation="zipf", routing="zipf")
    yield replace(train, variation="compiled", compiled="default", shape=shape.with_rows(256))
    yield replace(decode, variation="reduce-overhead", compiled="reduce-overhead")
    if all_of_them:
        yield replace(train, variation="pretrained", layout="pretrained")
        yield replace(decode, variation="pretrained", layout="pretrained")
        yield replace(train, variation="autocast", dtype="autocast")
        yield replace(train, variation="float16", dtype="float16")


# ---- tokens ----


@torch.no_grad()
def draw_tokens(case: GPUCase, w_gating: Tensor) -> Tensor:
    """Return the tokens of a call: `(1, t, d)`, or `(t, 1, d)` in decoding.

    Args:
        w_gating: `(d, e)`, the weight of the router.
    """
    torch.manual_seed(1)
    t = case.shape.t * (POOL_FACTOR if case.mode == "decode" else 1)
    x = torch.randn(t, case.shape.d, device=w_gating.device)
    if case.routing == "zipf":
        x = set_logits(x, w_gating.float(), draw_zipf_logits(t, case.shape.e, x.device))
    x = x.to(w_gating.dtype)
    if case.mode == "decode":
        clearest = compute_logit_gaps(x, w_gating, case.shape.k).topk(case.shape.t).indices
        return x[clearest].unsqueeze(1)
    return x.unsqueeze(0)


def draw_zipf_logits(t: int, e: int, device: torch.device) -> Tensor:
    """Return logits `(t, e)` whose k largest are k draws without replacement, with probabilities proportional to 1 /
    i."""
    gumbel = -torch.empty(t, e, device=device).exponential_().log()
    logits = gumbel - torch.arange(1, e + 1, device=device).log()
    return logits - logits.mean(-1, keepdim=True)


def set_logits(x: Tensor, w: Tensor, logits: Tensor) -> Tensor:
    """Return the tokens `(t, d)` nearest to x whose product with `w` `(d, e)` is `logits` `(t, e)`, for e <= d."""
    return x + (logits - x @ w) @ torch.linalg.pinv(w)


def compute_logit_gaps(x: Tensor, w_gating: Tensor, k: int) -> Tensor:
    """Return `(t,)`: by how much the last logit that each token `(t, d)` chooses exceeds the next one."""
    if k == w_gating.shape[-1]:
        return torch.full((x.shape[0],), torch.inf, device=x.device)
    best = (x.float() @ w_gating.float()).topk(k + 1).values
    return best[:, -2] - best[:, -1]
