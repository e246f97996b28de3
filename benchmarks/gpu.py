"""The field of GPUs: first whether everybody computes the same, then times beside rivals and yardsticks.

`python -m benchmarks.first_hour --only "cases/*"` runs it. Axes: t tokens, d model dim, h hidden dim, e experts, k
choices. All experts are gated (SwiGLU), dropless, in bfloat16.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contestants import MissingError
from benchmarks.gpu_device import Device, Shape
from benchmarks.registry import qwen3_block
from benchmarks.results_file import describe_exception
from mixture_of_experts import GatedExperts, MoE, TopKGating, ops

DECODED = 8  # tokens, of as many sequences
CHECKED = 256  # rows of an expert on which contestants are compared: tiles are the highest, as where they are timed
TOLERANCE = 3e-2  # relative norm, for bfloat16
GAP = 0.05  # between the last logit chosen and the next: a router that rounds in bfloat16 may swap closer ones
IMPLEMENTATIONS = ("triton", "grouped", "batched")
RIVALS = ("transformers grouped_mm", "ScatterMoE", "SonicMoE", "Liger")
MODES = ("train", "forward", "decode")


@dataclass
class Contestant:
    """`forward(x)` gives the tokens' outputs; `computes` says whether they are the layer's."""

    forward: Callable[[Tensor], Tensor]
    parameters: list[Tensor]
    computes: bool = True
    module: nn.Module | None = None  # of its own, whose mode it goes by
    weights: list[Tensor] = field(default_factory=list)  # whose gradients are compared: w1, w3, w2, if they lie alike


def make_layer(shape: Shape, device: str | torch.device, dtype: torch.dtype) -> MoE:
    """The layer of this package, by which everybody's weights are drawn."""
    torch.manual_seed(0)
    gate = TopKGating(shape.d, shape.e, shape.k)
    with torch.device(device):
        experts = GatedExperts(shape.d, shape.e, shape.h)
    return MoE(shape.d, gate=gate, experts=experts).to(device, dtype)


def make_by_implementation(way: str) -> Callable[[Shape, MoE], Contestant]:
    def enter(shape: Shape, layer: MoE) -> Contestant:
        def forward(x: Tensor) -> Tensor:
            with ops.use(way):
                return layer(x)[0]

        experts = layer.experts
        return Contestant(forward, list(layer.parameters()), weights=[experts.w1, experts.w3, experts.w2])

    return enter


def transformers_block(shape: Shape, layer: MoE) -> Contestant:
    """Qwen3's block on torch's grouped product."""
    if importlib.util.find_spec("transformers") is None:
        raise MissingError("pip install transformers")
    experts = layer.experts
    with torch.device(experts.w1.device):
        block = qwen3_block(shape, "grouped_mm").to(experts.w1.dtype)
    gate_up = torch.cat([experts.w1, experts.w3], dim=-1).mT.contiguous()
    parts = {"gate.weight": layer.gate.w_gating.T.contiguous(), "experts.gate_up_proj": gate_up}
    block.load_state_dict(parts | {"experts.down_proj": experts.w2.mT.contiguous()})
    return Contestant(block, list(block.parameters()), module=block)


def scattermoe(shape: Shape, layer: MoE) -> Contestant:
    """ScatterMoE's gated network behind this package's router."""
    if importlib.util.find_spec("scattermoe") is None:
        raise MissingError("pip install git+https://github.com/shawntan/scattermoe")
    from scattermoe.mlp import GLUMLP  # pyright: ignore[reportMissingImports]

    experts = layer.experts
    network = GLUMLP(shape.d, shape.h, shape.e, shape.k, activation=nn.SiLU()).to(experts.w1.device, experts.w1.dtype)
    with torch.no_grad():  # it halves its product into what is multiplied, and the gate
        network.experts.weight.copy_(torch.cat([experts.w3, experts.w1], dim=-1).mT)
        network.output_experts.weight.copy_(experts.w2.mT)

    def forward(x: Tensor) -> Tensor:
        routing = layer.gate(x)
        expert, weight = (tensor.view(-1, shape.k) for tensor in (routing.expert, routing.weight))
        return network(x.flatten(0, 1), weight.to(x.dtype), expert).view(x.shape)

    return Contestant(forward, [*layer.gate.parameters(), *network.parameters()])


def liger(shape: Shape, layer: MoE) -> Contestant:
    """Liger's fused experts behind this package's router."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise MissingError("pip install liger-kernel")
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction  # pyright: ignore[reportMissingImports]

    experts = layer.experts
    gate_up = torch.cat([experts.w1, experts.w3], dim=-1).mT.contiguous().detach().requires_grad_()
    down = experts.w2.mT.contiguous().detach().requires_grad_()

    def forward(x: Tensor) -> Tensor:
        routing = layer.gate(x)
        expert, weight = (tensor.view(-1, shape.k) for tensor in (routing.expert.to(torch.int32), routing.weight))
        return LigerFusedMoEFunction.apply(x.flatten(0, 1), gate_up, down, expert, weight).view(x.shape)

    return Contestant(forward, [*layer.gate.parameters(), gate_up, down])


def sonicmoe(shape: Shape, layer: MoE) -> Contestant:
    """SonicMoE's layer, with weights of its own: timed, not compared."""
    if importlib.util.find_spec("sonicmoe") is None:
        raise MissingError("pip install sonic-moe (Hopper or Blackwell)")
    import sonicmoe as package  # pyright: ignore[reportMissingImports]
    from sonicmoe.enums import ActivationType  # pyright: ignore[reportMissingImports]

    options = {"activation_function": ActivationType.SWIGLU, "add_bias": False, "std": 0.02}
    module = package.MoE(shape.e, shape.k, shape.d, shape.h, **options).to(layer.experts.w1.device, torch.bfloat16)
    return Contestant(lambda x: module(x)[0], list(module.parameters()), computes=False, module=module)


def products(shape: Shape, layer: MoE) -> Contestant:
    """The experts' products alone, every expert with as many rows."""
    w1, w3, w2 = (w.detach().requires_grad_() for w in (layer.experts.w1, layer.experts.w3, layer.experts.w2))

    def forward(x: Tensor) -> Tensor:
        each = x[..., 0].numel() * shape.k // shape.e
        if each == 0:
            raise MissingError("there are fewer rows than experts")
        rows = x.detach().flatten(0, 1).repeat(shape.k, 1)[: each * shape.e].requires_grad_(x.requires_grad)
        slots = rows.view(shape.e, each, shape.d)
        return torch.bmm(F.silu(torch.bmm(slots, w1)) * torch.bmm(slots, w3), w2)

    return Contestant(forward, [w1, w3, w2], computes=False)


CONTESTANTS: dict[str, Callable[[Shape, MoE], Contestant]] = {
    "layer": make_by_implementation("auto"),
    **{f"layer, {way}": make_by_implementation(way) for way in IMPLEMENTATIONS},
    "transformers grouped_mm": transformers_block,
    "ScatterMoE": scattermoe,
    "SonicMoE": sonicmoe,
    "Liger": liger,
    "products": products,
}


def step_of(contestant: Contestant, x: Tensor, mode: str) -> Callable[[], Any]:
    """One call, in training with all gradients."""

    @torch.no_grad()
    def forward() -> Tensor:
        return contestant.forward(x)

    def train() -> Any:
        out = contestant.forward(x)
        return torch.autograd.grad(out, [x, *contestant.parameters], torch.ones_like(out), allow_unused=True)

    return train if mode == "train" else forward


def compute_results(
    forward: Callable[[Tensor], Tensor], leaves: list[Tensor], counts: Tensor, mode: str
) -> list[Tensor]:
    """Outputs, and in training gradients of the leaves (x first), of the tokens that count: `counts` `(t, 1)`."""
    if mode != "train":
        with torch.no_grad():
            return [forward(leaves[0]).flatten(0, 1) * counts]
    out = forward(leaves[0]).flatten(0, 1) * counts
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def check(contestant: Contestant, x: Tensor, wanted: list[Tensor], counts: Tensor, mode: str) -> float | None:
    """Relative error of what is timed: of outputs, and in training of the gradients that can be compared."""
    if not contestant.computes:
        return None
    leaves = [x.detach().clone().requires_grad_(mode == "train"), *contestant.weights]
    found = compute_results(contestant.forward, leaves, counts, mode)
    errors = [(got.float() - want).norm() / want.norm() for got, want in zip(found, wanted, strict=False)]
    return float(torch.stack(errors).max())  # NaN, if one of them is


def expected(layer: MoE, shape: Shape, x: Tensor, counts: Tensor, mode: str) -> list[Tensor]:
    """`results` of the plain way in float32."""
    exact = make_layer(shape, x.device, torch.float32).train(mode == "train")
    exact.load_state_dict(layer.state_dict())
    experts, wide = exact.experts, x.detach().float().requires_grad_(mode == "train")
    with ops.use("plain"):
        return compute_results(lambda x: exact(x)[0], [wide, experts.w1, experts.w3, experts.w2], counts, mode)


@torch.no_grad()
def compute_logit_gaps(layer: MoE, x: Tensor, shape: Shape) -> Tensor:
    """`(t,)` how far the last logit that each token of `(., ., d)` chooses is from the next one."""
    if shape.k == shape.e:
        return torch.full((x[..., 0].numel(),), torch.inf, device=x.device)
    best = (x.flatten(0, 1).float() @ layer.gate.w_gating.float()).topk(shape.k + 1).values  # type: ignore[operator]
    return best[:, -2] - best[:, -1]


def tokens_of(layer: MoE, shape: Shape, mode: str, device: Device) -> tuple[Tensor, Tensor]:
    """The tokens that are timed, and those of them that are checked; in decoding those whose choices are clearest."""
    torch.manual_seed(1)
    drawn = torch.randn(1, shape.t if mode != "decode" else 8 * DECODED, shape.d, device=device.name)
    drawn = drawn.to(torch.bfloat16)
    if mode == "decode":
        x = drawn[0, compute_logit_gaps(layer, drawn, shape).topk(DECODED).indices].unsqueeze(1)
        return x, x
    return drawn.requires_grad_(mode == "train"), drawn[:, : max(CHECKED * shape.e // shape.k, 1)]


def run(shape: Shape, mode: str, device: Device) -> dict[str, Any]:
    """The record of one shape and mode."""
    layer = make_layer(shape, device.name, torch.bfloat16).train(mode == "train")
    x, checked = tokens_of(layer, shape, mode, device)
    counts = (compute_logit_gaps(layer, checked, shape) > GAP).unsqueeze(1)
    if not counts.any():
        raise MissingError("no token's choices are clear at this size: nothing is compared")
    wanted = expected(layer, shape, checked, counts, mode)
    record: dict[str, Any] = {"shape": asdict(shape), "mode": mode, "contestants": {}, "missing": {}}
    steps = {}
    for name, enter in CONTESTANTS.items():
        print(name, flush=True)  # a line is a sign of life
        try:
            contestant = enter(shape, layer)
            if contestant.module is not None:
                contestant.module.train(mode == "train")
            error = check(contestant, checked, wanted, counts, mode)
            if error is not None and not error < TOLERANCE:
                raise AssertionError(f"BAD_ARGUMENTS: its relative error is {error:.1e}")
        except Exception as reason:  # errors of Triton derive from nothing else, and rivals assert
            record["missing"][name] = describe_exception(reason)
            continue
        steps[name] = step_of(contestant, x, mode)
        record["contestants"][name] = {"error": error}
    del wanted
    for name, found in zip(steps, device.time_steps(*steps.values(), longest=10), strict=True):
        if isinstance(found, dict):
            record["missing"][name] = found["ended"]
            del record["contestants"][name]
        else:
            record["contestants"][name] |= {"median_s": found[0], "host_s": found[1]}
    return record
