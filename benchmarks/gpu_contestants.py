"""The contestants on a GPU: the layer with each implementation, layers of other libraries, and the products alone.

All experts are gated (SwiGLU) and dropless. Contestants use the weights of one layer, except for SonicMoE.

Axes: t tokens, d model dim, h hidden dim, e experts, k choices.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contestants import MissingError
from benchmarks.gpu_cases import GPUCase
from benchmarks.gpu_shapes import MAIN_SHAPES, Shape
from benchmarks.registry import qwen3_block
from benchmarks.requirements import find_torch_conflict
from mixture_of_experts import GatedExperts, MoE, TopKGating, ops

IMPLEMENTATIONS = ("triton", "grouped", "batched")
WITH_ROUTER_KERNELS = ", router kernels"  # ends the names of contestants whose router and queues use kernels
RIVALS = ("transformers grouped_mm", "ScatterMoE", "SonicMoE", "Liger")
YARDSTICK = "products"


@dataclass
class Contestant:
    """Attributes:
    forward: maps tokens `(..., d)` to outputs of the same shape.
    parameters: the leaves for which a training step computes gradients.
    computes_layer: whether the outputs are those of the layer, and can be compared.
    module: the module whose mode matters, if it is not the layer.
    context: the context of its forward and backward, outside of compiled code.
    weights: the leaves whose gradients are compared.
    arrange: maps their gradients to those of the layer's w1, w3 and w2.
    """

    forward: Callable[[Tensor], Tensor]
    parameters: list[Tensor]
    computes_layer: bool = True
    module: nn.Module | None = None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    weights: list[Tensor] = field(default_factory=list)
    arrange: Callable[..., Sequence[Tensor]] = lambda *gradients: gradients


class PretrainedWeights(NamedTuple):
    """Weights in the layout of transformers: `(e, 2 h, d)` and `(e, d, h)`."""

    gate_up: Tensor
    down: Tensor


def make_layer(shape: Shape, device: str | torch.device, dtype: torch.dtype) -> MoE:
    """Return the layer of this package, always with the same random weights."""
    torch.manual_seed(0)
    gate = TopKGating(shape.d, shape.e, shape.k)
    with torch.device(device):
        experts = GatedExperts(shape.d, shape.e, shape.h)
    return MoE(shape.d, gate=gate, experts=experts).to(device, dtype)


def make_pretrained(layer: MoE) -> PretrainedWeights:
    """Return copies of the experts' weights in the layout of transformers."""
    experts: Any = layer.experts
    gate_up = torch.cat([experts.w1, experts.w3], dim=-1).mT.contiguous()
    return PretrainedWeights(*(w.detach().requires_grad_() for w in (gate_up, experts.w2.mT.contiguous())))


def arrange_pretrained(gate_up: Tensor, down: Tensor) -> list[Tensor]:
    """Return gradients of `PretrainedWeights` as those of w1, w3 and w2."""
    gate, up = gate_up.chunk(2, dim=1)
    return [gate.mT, up.mT, down.mT]


def check_installed(module: str, distribution: str, source: str = "") -> None:
    """Raise an error if another library cannot run here: it is not installed, or it requires another torch."""
    if conflict := find_torch_conflict(distribution, torch.__version__):
        raise MissingError(conflict)
    if importlib.util.find_spec(module) is None:
        raise MissingError(f"it is not installed: pip install {source or distribution}")


# ---- this package ----


def build_own(implementation: Any, router_kernels: bool, case: GPUCase, layer: MoE, x: Tensor) -> Contestant:
    """The layer with one implementation of the experts, and the router with kernels or with torch's operators."""
    experts: Any = layer.experts
    context = partial(ops.use, implementation, router_kernels=router_kernels)
    if case.layout == "pretrained":
        weights = make_pretrained(layer)

        def forward(x: Tensor) -> Tensor:
            return compute_pretrained(layer, weights, x)

        own = [*layer.gate.parameters(), *weights]
        made = Contestant(forward, own, context=context, weights=[*weights], arrange=arrange_pretrained)
    else:
        weights = [experts.w1, experts.w3, experts.w2]
        made = Contestant(lambda x: layer(x)[0], list(layer.parameters()), context=context, weights=weights)
    try:
        with torch.no_grad(), made.context():
            made.forward(x)
    except ValueError as reason:  # the implementation does not support such calls
        raise MissingError(str(reason)) from reason
    return made


def compute_pretrained(layer: MoE, weights: PretrainedWeights, x: Tensor) -> Tensor:
    """Compute the layer from transposed views of pretrained weights, as after a conversion without copies."""
    expert, weight = route(layer, x)
    gate_up, down = weights.gate_up.mT, weights.down.mT
    options: Any = {"activation": F.silu, "gate_up": "concatenated", "training": layer.training}
    return ops.moe_ffn(x.flatten(0, 1), expert, weight, gate_up, down, **options).view(x.shape)


def route(layer: MoE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the choices of the layer's router and their weights, both `(t, k)`."""
    routing, tokens = layer.gate(x), x[..., 0].numel()
    return routing.expert.view(tokens, -1), routing.weight.view(tokens, -1)


# ---- other libraries ----


def build_transformers(case: GPUCase, layer: MoE, x: Tensor) -> Contestant:
    """Qwen3's block with torch's grouped matmul."""
    check_installed("transformers", "transformers")
    weights = make_pretrained(layer)
    with torch.device(x.device):
        block = qwen3_block(case.shape, "grouped_mm").to(case.weight_dtype)
    gate: Any = layer.gate
    parts = {"gate.weight": gate.w_gating.T.contiguous(), "experts.gate_up_proj": weights.gate_up}
    block.load_state_dict(parts | {"experts.down_proj": weights.down})
    experts: Any = block.experts
    own = [experts.gate_up_proj, experts.down_proj]
    return Contestant(block, list(block.parameters()), module=block, weights=own, arrange=arrange_pretrained)


def build_scattermoe(case: GPUCase, layer: MoE, x: Tensor) -> Contestant:
    """ScatterMoE's gated network after this package's router."""
    check_installed("scattermoe", "scattermoe", "git+https://github.com/shawntan/scattermoe")
    from scattermoe.mlp import GLUMLP  # pyright: ignore[reportMissingImports]

    experts: Any = layer.experts
    shape = case.shape
    network = GLUMLP(shape.d, shape.h, shape.e, shape.k, activation=nn.SiLU()).to(x.device, case.weight_dtype)
    with torch.no_grad():  # the first half of its product is the up projection, the second half the gate
        network.experts.weight.copy_(torch.cat([experts.w3, experts.w1], dim=-1).mT)
        network.output_experts.weight.copy_(experts.w2.mT)

    def forward(x: Tensor) -> Tensor:
        expert, weight = route(layer, x)
        return network(x.flatten(0, 1), weight.to(x.dtype), expert).view(x.shape)

    return Contestant(forward, [*layer.gate.parameters(), *network.parameters()])


def build_liger(case: GPUCase, layer: MoE, x: Tensor) -> Contestant:
    """Liger's fused experts after this package's router."""
    check_installed("liger_kernel", "liger-kernel")
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction  # pyright: ignore[reportMissingImports]

    weights = make_pretrained(layer)

    def forward(x: Tensor) -> Tensor:
        expert, weight = route(layer, x)
        return LigerFusedMoEFunction.apply(x.flatten(0, 1), *weights, expert.to(torch.int32), weight).view(x.shape)

    own = [*layer.gate.parameters(), *weights]
    return Contestant(forward, own, weights=[*weights], arrange=arrange_pretrained)


def build_sonicmoe(case: GPUCase, layer: MoE, x: Tensor) -> Contestant:
    """SonicMoE's layer with weights of its own, so it is timed but not compared."""
    if case.routing != "balanced" or case.dtype != "bfloat16":
        raise MissingError("it is timed with its own weights: only with balanced routing, in bfloat16")
    check_installed("sonicmoe", "sonic-moe", "sonic-moe, once a release accepts this torch (0.1.2 requires <= 2.9.1)")
    import sonicmoe as package  # pyright: ignore[reportMissingImports]
    from sonicmoe.enums import ActivationType  # pyright: ignore[reportMissingImports]

    options = {"activation_function": ActivationType.SWIGLU, "add_bias": False, "std": 0.02}
    shape = case.shape
    module = package.MoE(shape.e, shape.k, shape.d, shape.h, **options).to(x.device, torch.bfloat16)
    return Contestant(lambda x: module(x)[0], list(module.parameters()), computes_layer=False, module=module)


def build_products(case: GPUCase, layer: MoE, x: Tensor) -> Contestant:
    """The experts' products alone, with an equal number of rows for each expert."""
    experts: Any = layer.experts
    w1, w3, w2 = (w.detach().requires_grad_() for w in (experts.w1, experts.w3, experts.w2))
    shape = case.shape

    def forward(x: Tensor) -> Tensor:
        each = x[..., 0].numel() * shape.k // shape.e
        if each == 0:
            raise MissingError("there are fewer rows than experts")
        rows = x.detach().flatten(0, 1).repeat(shape.k, 1)[: each * shape.e].requires_grad_(x.requires_grad)
        slots = rows.view(shape.e, each, shape.d)
        return torch.bmm(F.silu(torch.bmm(slots, w1)) * torch.bmm(slots, w3), w2)

    return Contestant(forward, [w1, w3, w2], computes_layer=False)


Builder = Callable[[GPUCase, MoE, Tensor], Contestant]
_NAMES = {"layer": "auto", **{f"layer, {name}": name for name in IMPLEMENTATIONS}}
OWN: dict[str, Builder] = {name: partial(build_own, selected, False) for name, selected in _NAMES.items()}
OWN_WITH_ROUTER_KERNELS: dict[str, Builder] = {
    f"{name}{WITH_ROUTER_KERNELS}": partial(build_own, selected, True) for name, selected in _NAMES.items()
}
CONTESTANTS: dict[str, Builder] = {
    **OWN,
    **OWN_WITH_ROUTER_KERNELS,
    "transformers grouped_mm": build_transformers,
    "ScatterMoE": build_scattermoe,
    "SonicMoE": build_sonicmoe,
    "Liger": build_liger,
    YARDSTICK: build_products,
}


def list_contestants(case: GPUCase) -> list[str]:
    """Return the names of all contestants in a case.

    Kernels of routers and queues are compared with torch's operators in the plain cases of the main shapes. Compiled
    code does not launch them.
    """
    both_routers = not case.variation and case.shape.name in MAIN_SHAPES
    names = [name for name in CONTESTANTS if both_routers or name not in OWN_WITH_ROUTER_KERNELS]
    return [name for name in names if case.compiled is None or name not in (YARDSTICK, "SonicMoE")]
