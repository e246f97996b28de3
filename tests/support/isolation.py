"""Which results become non-finite because of one token: its own, and the gradients of the experts that compute it.

Axes: t tokens of the call, e experts, r rows, p inner and q outer dimension of a weight.

Gates read finite `router_input`, so that routing does not depend on the token that is not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixture_of_experts import Experts, GatedExperts, HeirarchicalMoE, MoE, TopKGating, ops
from mixture_of_experts.ops import batched, grouped

DIM, HIDDEN, SHAPE = 16, 32, (2, 4)
BAD = {"NaN": float("nan"), "infinite": float("inf")}


def factors(factor: float | None) -> dict[str, Any]:
    return dict(capacity_factor_train=factor, capacity_factor_eval=factor, min_expert_capacity=1)


def one_level(factor: float | None, experts: nn.Module) -> MoE:
    return MoE(DIM, 4, gate=TopKGating(DIM, 4, 2, **factors(factor)), experts=experts)


def two_levels(outer: float | None, inner: float | None, k: int = 2) -> HeirarchicalMoE:
    return HeirarchicalMoE(
        DIM,
        (2, 2),
        gate_outer=TopKGating(DIM, 2, 2, **factors(outer)),
        gate_inner=TopKGating(DIM, 2, k, outer_expert_dims=(2,), **factors(inner)),
        experts=GatedExperts(DIM, (2, 2), HIDDEN),
    )


#: "filled": every token wants both experts of level one, which have slots for half of the tokens, and level two drops
#: no choice. So as many rows as there can be have a token, and half of the choices have no row
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "dropless": lambda: one_level(None, GatedExperts(DIM, 4, HIDDEN, bias=True)),
    "capacity": lambda: one_level(2.0, Experts(DIM, 4, HIDDEN, bias=True)),
    "capacity, full": lambda: one_level(0.5, Experts(DIM, 4, HIDDEN)),
    "two levels, dropless": lambda: two_levels(None, None),
    "two levels, capacity": lambda: two_levels(4.0, 4.0),
    "two levels, full": lambda: two_levels(0.5, 0.5),
    "two levels, filled": lambda: two_levels(0.5, None, k=1),
}


def grouped_mm(x: Tensor, y: Tensor, *, offs: Tensor) -> Tensor:
    """torch's grouped product. The rows past the last expert's, which a GPU does not write, are NaN."""
    starts, ends = [0, *offs.tolist()[:-1]], offs.tolist()
    if y.ndim == 2:
        return torch.stack([x[:, start:end] @ y[start:end] for start, end in zip(starts, ends, strict=True)])
    out = x.new_full((x.shape[0], y.shape[-1]), torch.nan)
    for expert, (start, end) in enumerate(zip(starts, ends, strict=True)):
        out[start:end] = x[start:end] @ y[expert]
    return out


def compute_grouped_as_on_cuda(patch: pytest.MonkeyPatch) -> None:
    """The way "grouped" computes CPU tensors as it computes CUDA tensors on an H100."""
    patch.setattr(grouped, "run", lambda call: batched.run(call, grouped.GroupedLayout))
    patch.setattr(grouped, "get_device_capability", lambda device: (9, 0))
    patch.setattr(grouped.F, "grouped_mm", grouped_mm)


class Results:
    """Outputs and gradients of a call; `of_tokens` have an entry for each token, `select_experts` for each expert."""

    def __init__(self, layer: nn.Module, way: str, x: Tensor, grad: Tensor, side: dict[str, Tensor]) -> None:
        x, side = x.clone().requires_grad_(layer.training), dict(side)
        router_input = side["router_input"] = side["router_input"].clone().requires_grad_(layer.training)
        with ops.use(way), torch.set_grad_enabled(layer.training):  # type: ignore[arg-type]
            out, _ = layer(x, **side)
            self.of_tokens, self.select_experts = {"outputs": out.detach().flatten(0, 1)}, {}
            if layer.training:
                named: dict[str, Any] = dict(layer.experts.named_parameters())  # type: ignore[union-attr]
                leaves = [x, router_input, *named.values()]
                grad_x, grad_router_input, *grads = torch.autograd.grad(out, leaves, grad)
                self.of_tokens |= {"x": grad_x.flatten(0, 1), "router_input": grad_router_input.flatten(0, 1)}
                experts = layer.experts.num_experts if isinstance(layer, MoE) else 4
                self.select_experts = {name: grad.reshape(experts, -1) for name, grad in zip(named, grads, strict=True)}


def check_isolated(
    layer: nn.Module,
    way: str,
    value: float,
    of: str,
    side: dict[str, Tensor] | None = None,
    tokens: Iterable[int] = range(SHAPE[0] * SHAPE[1]),
) -> None:
    """Check that all results of other tokens keep their bits, and that gradients of experts are finite where those of
    the definition are.

    Args:
        layer: a layer, whose training mode says whether gradients are computed.
        way: how it is computed.
        value: what a token has in the place of a number.
        of: where it has that: in "x", or in the gradient of its outputs, "grad".
        side: further inputs of the layer.
        tokens: the tokens that have it, in turn.
    """
    x, grad, router_input = torch.randn(3, *SHAPE, DIM)
    by_router, side = side is None, {"router_input": router_input, **(side or {})}
    healthy, seen = Results(layer, way, x, grad, side), set()
    for bad in tokens:
        operands = {"x": x.clone(), "grad": grad.clone()}
        operands[of].view(-1, DIM)[bad, 3] = value
        found, others = Results(layer, way, **operands, side=side), torch.arange(SHAPE[0] * SHAPE[1]) != bad
        for name, values in found.of_tokens.items():
            assert torch.equal(values[others], healthy.of_tokens[name][others]), (name, bad)
        if layer.training and by_router:
            wanted = Results(layer, "plain", **operands, side=side)
            for name, values in found.select_experts.items():
                finite, of_definition = (v.isfinite().all(dim=-1) for v in (values, wanted.select_experts[name]))
                assert torch.equal(finite, of_definition), (name, bad)
                assert torch.equal(values[finite], healthy.select_experts[name][finite]), (name, bad)
                seen |= set(finite.tolist())
    assert seen == ({True, False} if layer.training and by_router else set())
