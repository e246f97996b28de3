"""What a layer found out in one call does not outlive a change: a layer that was called before the change computes what
a fresh one computes after it, to the last bit, and says the same of how."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from mixture_of_experts import GatedExperts, MoE, TopKGating, ops, recipes
from mixture_of_experts.gating import RouterLogits

DIM, EXPERTS = 64, 8

LAYERS: dict[str, Callable[[int], Any]] = {
    "top2": lambda hidden: MoE(DIM, EXPERTS, hidden, second_policy_train="all", second_policy_eval="all"),
    "topk": lambda hidden: MoE(DIM, gate=TopKGating(DIM, EXPERTS), experts=GatedExperts(DIM, EXPERTS, hidden)),
    "deepseek": lambda hidden: recipes.deepseek_v3(DIM, EXPERTS, hidden, k=2, num_groups=4, top_groups=2),
}


class CallKind(NamedTuple):
    shape: tuple[int, ...]
    training: bool
    hidden_dim: int


CALLS = {
    "training": CallKind((2, 24), True, 16),
    "eval": CallKind((2, 24), False, 16),
    "a token": CallKind((1, 1), False, 1024),  # so large that a decoded token has a way of its own
}


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def replace_weight(module: nn.Module, name: str) -> None:
    old = getattr(module, name)
    generator = torch.Generator().manual_seed(9)
    setattr(module, name, nn.Parameter(torch.randn(old.shape, generator=generator, dtype=old.dtype)))


def change_in_place(module: nn.Module, name: str) -> None:
    getattr(module, name).data.mul_(1.5)


def move_to_meta_and_back(layer: nn.Module) -> None:
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.to("meta").to_empty(device="cpu").load_state_dict({name: 1.5 * value for name, value in state.items()})


def scaled_hook(factor: float) -> Callable[..., Any]:
    return lambda module, args, out: factor * out


def add_weight_hook(gate: nn.Module, args: Any, routing: Any) -> Any:
    return replace(routing, weight=2 * routing.weight)


class OtherGate(TopKGating):
    """A subclass that chooses the worst."""

    def own_choices(self, tokens: Any, ranked: Tensor, probs: Tensor) -> tuple[Tensor, Tensor | None]:
        return super().own_choices(tokens, -ranked, probs)


def capped_logits(layer: Any) -> None:
    layer.gate = TopKGating(DIM, EXPERTS, logits=RouterLogits(DIM, EXPERTS, softcap=2.0))


def transposed_weights(layer: Any) -> None:
    layer.experts.w1.data = layer.experts.w1.data.mT.contiguous().mT * 2


def load_other_weights(layer: Any) -> None:
    layer.load_state_dict({name: 1.5 * value for name, value in layer.state_dict().items()})


def make_setter(path: str, value: Any) -> Callable[[Any], None]:
    """Set an attribute of a layer's part."""
    *owners, name = path.split(".")
    return lambda layer: setattr(functools.reduce(getattr, owners, layer), name, value)


def make_mode_setter(name: str, value: Any) -> Callable[[Any], Any]:
    """Set a gate's attribute of both modes."""
    return lambda layer: [setattr(layer.gate, f"{name}_{mode}", value) for mode in ("train", "eval")]


def make_hook_change(part: str, hook: Callable[..., Any]) -> Callable[[Any], Any]:
    return lambda layer: layer.get_submodule(part).register_forward_hook(hook)


ALL, OF_TOPK, DEEPSEEK, TOP2 = tuple(LAYERS), ("topk", "deepseek"), ("deepseek",), ("top2",)
#: by name: what is changed, and the layers on which it can be
CHANGES: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "scale": (make_setter("gate.scale", 3.0), OF_TOPK),
    "normalize": (make_setter("gate.normalize", False), OF_TOPK),
    "eps": (make_setter("gate.eps", 0.5), OF_TOPK),
    "jitter": (make_setter("gate.jitter", 0.5), OF_TOPK),
    "score": (make_setter("gate.score", "sqrt_softplus"), OF_TOPK),
    "weigh": (make_setter("gate.weigh", "softmax"), DEEPSEEK),
    "select": (make_setter("gate.select", lambda logits, score, bias: -logits), OF_TOPK),
    "group score": (make_setter("gate.group_score", "best"), DEEPSEEK),
    "balance over": (make_setter("gate.balance_over", "batch"), OF_TOPK),
    "policy": (make_mode_setter("second_policy", "none"), TOP2),
    "no capacity": (make_mode_setter("capacity_factor", None), TOP2),
    "capacity": (make_mode_setter("capacity_factor", 0.4), ALL),
    "least capacity": (make_setter("gate.min_expert_capacity", 1), TOP2),
    "priority": (make_setter("gate.priority", "token"), TOP2),
    "forced": (make_setter("gate.forced", "balanced"), ALL),
    "expert bias": (lambda layer: layer.gate.expert_bias.copy_(torch.linspace(-1, 1, EXPERTS)), DEEPSEEK),
    "group size": (make_setter("group_size", 6), TOP2),
    "loss coefficient": (make_setter("loss_coef", 0.7), ALL),
    "z coefficient": (make_setter("z_loss_coef", 0.7), ALL),
    "named losses": (make_setter("loss_coefs", {"balance_batch": 0.7}), ALL),
    "activation": (lambda layer: setattr(layer.experts, "act", nn.ReLU()), ALL),
    "unknown activation": (lambda layer: setattr(layer.experts, "act", nn.Tanh()), ALL),
    "activation's setting": (make_setter("experts.act.approximate", "tanh"), TOP2),
    "dropout": (make_setter("experts.dropout", 0.5), ALL),
    "hook on the activation": (make_hook_change("experts.act", scaled_hook(2)), ALL),
    "hook on the experts": (make_hook_change("experts", scaled_hook(2)), ALL),
    "hook on the gate": (make_hook_change("gate", add_weight_hook), ALL),
    "hook before the gate": (
        lambda layer: layer.gate.register_forward_pre_hook(lambda gate, args: (2 * args[0],)),
        ALL,
    ),
    "hook on the shared expert": (make_hook_change("shared_expert", scaled_hook(2)), DEEPSEEK),
    "parametrized experts": (lambda each: parametrize.register_parametrization(each.experts, "w1", Doubled()), ALL),
    "parametrized router": (lambda each: parametrize.register_parametrization(each.gate, "w_gating", Doubled()), ALL),
    "another weight": (lambda layer: replace_weight(layer.experts, "w2"), ALL),
    "another router's weight": (lambda layer: replace_weight(layer.gate, "w_gating"), ALL),
    "weights in place": (lambda layer: change_in_place(layer.experts, "w1"), ALL),
    "weights as a view": (transposed_weights, ALL),
    "router's weight in place": (lambda layer: change_in_place(layer.gate, "w_gating"), ALL),
    "another gate": (lambda layer: setattr(layer, "gate", TopKGating(DIM, EXPERTS, k=3)), ALL),
    "logits of a module": (capped_logits, ALL),
    "other experts": (lambda layer: setattr(layer, "experts", GatedExperts(DIM, EXPERTS, 64)), ALL),
    "a shared expert": (lambda layer: setattr(layer, "shared_expert", nn.Linear(DIM, DIM)), ALL),
    "a gate's class": (make_setter("gate.__class__", OtherGate), OF_TOPK),
    "frozen experts": (lambda layer: layer.experts.requires_grad_(False), ALL),
    "frozen router": (lambda layer: layer.gate.requires_grad_(False), ALL),
    "loaded weights": (load_other_weights, ALL),
    "meta and back": (move_to_meta_and_back, ALL),
    "bfloat16": (lambda layer: layer.bfloat16(), ALL),
    "float64": (lambda layer: layer.double(), ALL),
    "router in float64": (lambda layer: layer.gate.double(), ALL),
    "mode of the experts": (lambda layer: layer.experts.train(not layer.experts.training), ALL),
    "mode of the gate": (lambda layer: layer.gate.train(not layer.gate.training), ALL),
}
#: contexts of the second call
AROUND: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    **{f"way {way}": lambda way=way: ops.use(way) for way in ("plain", "batched", "grouped", "cpu")},
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
}


def compute_results(layer: Any, kind: CallKind, x: Tensor) -> dict[str, Tensor]:
    """Output, auxiliary loss and gradients of a call."""
    torch.manual_seed(7)
    x = x.clone().to(next(layer.experts.parameters()).dtype).requires_grad_(kind.training)
    with contextlib.nullcontext() if kind.training else torch.no_grad():
        out, aux_loss = layer(x)
    found = {"out": out, "aux_loss": aux_loss}
    if kind.training and out.requires_grad:
        (out.square().sum() + aux_loss.to(out.dtype)).backward()
        grads = {"x": x.grad} | {name: parameter.grad for name, parameter in layer.named_parameters()}
        found |= {f"gradient of {name}": grad for name, grad in grads.items() if grad is not None}
    found |= {f"buffer {name}": buffer for name, buffer in layer.named_buffers()}
    local = {name: value.to_local() if isinstance(value, DTensor) else value for name, value in found.items()}
    return {name: value.detach().clone() for name, value in local.items()}


@functools.cache
def build_layer(name: str, kind: CallKind) -> Any:
    torch.manual_seed(3)
    return LAYERS[name](kind.hidden_dim).train(kind.training)


def build_inputs(name: str, kind: CallKind) -> Any:
    return copy.deepcopy(build_layer(name, kind))


def warm_up_layer(name: str, kind: CallKind, x: Tensor) -> Any:
    """A layer after two calls, with its gradients and buffers as they were before."""
    layer = build_inputs(name, kind)
    state = copy.deepcopy(layer.state_dict())
    for _ in range(2):
        compute_results(layer, kind, x)
    layer.zero_grad(set_to_none=True)
    layer.load_state_dict(state)
    return layer


def make_inputs(kind: CallKind) -> Tensor:
    return torch.randn(*kind.shape, DIM, generator=torch.Generator().manual_seed(4))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True, msg=f"{name} is of another call")


@functools.cache
def before_any_change(layer: str, kind: CallKind) -> dict[str, Tensor]:
    return compute_results(build_inputs(layer, kind), kind, make_inputs(kind))


def check_change(change: Callable[[Any], Any], layer: str, kind: CallKind) -> bool:
    """Hold the call after a change to that of a fresh layer; returns whether the change changes a bit."""
    x = make_inputs(kind)
    called, fresh = warm_up_layer(layer, kind, x), build_inputs(layer, kind)
    before = before_any_change(layer, kind)
    for each in (called, fresh):
        torch.manual_seed(5)
        with torch.no_grad():
            change(each)
    found, expected = compute_results(called, kind, x), compute_results(fresh, kind, x)
    assert_equal(found, expected)
    return found.keys() != before.keys() or any(not torch.equal(found[name], before[name]) for name in before)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_take_effect_in_next_call(change):
    apply, layers = CHANGES[change]
    seen = [check_change(apply, layer, kind) for layer in layers for kind in CALLS.values()]
    assert any(seen)  # where no bit changes, nothing is shown of the change


def test_fsdp2_takes_effect_in_next_call(one_process):
    for layer, kind in itertools.product(LAYERS, CALLS.values()):
        check_change(fully_shard, layer, kind)


@pytest.mark.parametrize("around", AROUND)
def test_contexts_take_effect_in_next_call(around):
    for layer, kind in itertools.product(LAYERS, CALLS.values()):
        x = make_inputs(kind)
        called, fresh, never = warm_up_layer(layer, kind, x), build_inputs(layer, kind), build_inputs(layer, kind)
        with AROUND[around]():
            found = compute_results(called, kind, x)
        with AROUND[around]():
            assert_equal(found, compute_results(fresh, kind, x))
        called.load_state_dict(never.state_dict())
        called.zero_grad(set_to_none=True)
        assert_equal(compute_results(called, kind, x), compute_results(never, kind, x))
