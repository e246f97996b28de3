"""Stacked experts as linear layers: the same numbers, and back bit for bit."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mixture_of_experts import Experts, GatedExperts, HeirarchicalMoE, MoE, TopKGating
from mixture_of_experts.ops import ClampedSwiGLU
from mixture_of_experts.quantize import quantize_experts
from mixture_of_experts.unstack import FeedForward, UnstackedExperts, restack, unstack

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from muon import Muon

D, E, H = 16, 4, 24


def remove_experts(experts: nn.Module, *names: str) -> nn.Module:
    for name in names:
        experts.register_parameter(name, None)
    return experts


EXPERTS = {
    "plain": lambda: Experts(D, E, H),
    "biases": lambda: Experts(D, E, H, nn.ReLU, bias=True),
    "last bias alone": lambda: remove_experts(Experts(D, E, H, bias=True), "b1"),
    "gated": lambda: GatedExperts(D, E, H),
    "gated, biases": lambda: GatedExperts(D, E, H, nn.GELU, bias=True),
    "function of two": lambda: GatedExperts(D, E, H, ClampedSwiGLU, bias=True),
    "bfloat16": lambda: GatedExperts(D, E, H, dtype=torch.bfloat16),
}


def make_layer(name: str, capacity: float | None = None) -> MoE:
    torch.manual_seed(0)
    experts = EXPERTS[name]()
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=D**-0.5)
    gate = TopKGating(D, E, 2, capacity_factor_train=capacity, capacity_factor_eval=capacity)
    return MoE(D, gate=gate, experts=experts).to(experts.w1.dtype)


@pytest.mark.parametrize("capacity", [None, 0.75])
@pytest.mark.parametrize("name", EXPERTS)
def test_the_same_outputs_and_gradients(name, capacity):
    stacked, x = make_layer(name, capacity), torch.randn(2, 12, D)
    x = x.to(stacked.experts.w1.dtype)
    lists = unstack(copy.deepcopy(stacked))
    assert isinstance(lists.experts, UnstackedExperts)
    assert all(isinstance(expert, FeedForward) for expert in lists.experts)
    assert {type(m) for m in lists.experts[0].children() if list(m.parameters())} == {nn.Linear}
    assert sum(p.numel() for p in lists.parameters()) == sum(p.numel() for p in stacked.parameters())
    close = dict(atol=2e-5, rtol=1e-5) if x.dtype == torch.float32 else dict(atol=0.1, rtol=0.05)
    outs = [moe(x)[0] for moe in (stacked, lists)]
    torch.testing.assert_close(outs[1], outs[0], **close)
    for out in outs:
        out.square().sum().backward()
    grads = torch.stack([expert.w1.weight.grad.mT for expert in lists.experts])
    close = close if x.dtype == torch.float32 else dict(atol=1.0, rtol=0.1)
    torch.testing.assert_close(grads, stacked.experts.w1.grad, **close)


@pytest.mark.parametrize("name", EXPERTS)
def test_round_trip(name):
    """Class, attributes, weights, what is trained, and mode."""
    moe = make_layer(name).eval()
    moe.experts.is_transposed = True
    moe.experts.w1.requires_grad_(False)
    before, shown = {key: value.clone() for key, value in moe.state_dict().items()}, repr(moe)
    lists = unstack(moe)
    experts = list(lists.experts.children())
    assert not any(expert.w1.weight.requires_grad or expert.training for expert in experts)
    assert all(expert.w2.weight.requires_grad for expert in experts)
    lists.experts[1].w2.weight.data += 1
    copied = copy.deepcopy(lists)  # it takes along what it needs to go back
    again = restack(copied)
    assert repr(again) == shown
    assert again.experts.is_transposed
    assert [p.requires_grad for p in again.experts.parameters()][:2] == [False, True]
    one = unstack(MoE(D, E)).requires_grad_(False)
    one.experts[1].requires_grad_(True)
    assert all(parameter.requires_grad for parameter in restack(one).experts.parameters())
    before["experts.w2"][1] += 1
    assert again.state_dict().keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(again.state_dict()[key], value), key
    assert isinstance(lists.experts, UnstackedExperts)  # the other is as it was


def test_hierarchical_and_shared_layer():
    moe, x = HeirarchicalMoE(D, (2, 3), H), torch.randn(2, 12, D)
    model = nn.ModuleDict({"a": moe, "b": moe}).eval()
    torch.manual_seed(1)
    expected = moe(x)[0]
    weights = moe.experts.w1.clone()
    unstack(model)
    assert len(model["a"].experts) == 6
    assert model["b"].experts is model["a"].experts
    torch.manual_seed(1)
    torch.testing.assert_close(model["b"](x)[0], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(restack(model)["a"].experts.w1, weights)


class QuantizedExpertsStub(nn.Linear):
    pass


def test_rejects_bad_arguments():
    """Nothing is changed then."""
    with pytest.raises(ValueError, match="Linear has no stacked experts"):
        unstack(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="consists only of stacked experts"):
        unstack(Experts(D, E))
    with pytest.raises(ValueError, match="MoE has no experts created by unstack"):
        restack(make_layer("plain"))
    model = nn.ModuleList([make_layer("plain"), make_layer("gated")])
    model[1].experts.w3 = nn.Parameter(model[1].experts.w3.data)
    model[1].experts.w3.__class__ = type("Spread", (nn.Parameter,), {})
    with pytest.raises(TypeError, match=r"1.experts.w3 must be a plain .*, got Spread; unstack .* before"):
        unstack(model)
    assert isinstance(model[0].experts, Experts)
    own = type("Own", (Experts,), {"compute": lambda self, rows, num_tokens_per_expert: rows})
    model = nn.ModuleList([make_layer("plain"), MoE(D, E, experts=own(D, E).requires_grad_(False))])
    for change in (unstack, quantize_experts):
        with pytest.raises(TypeError, match=r"1.experts is a Own with a custom compute, which would be lost"):
            change(model)
    assert type(model[0].experts) is Experts
    model = unstack(nn.ModuleList([make_layer("plain"), make_layer("gated")]))
    model[1].experts[2].w3 = QuantizedExpertsStub(D, H, bias=False)
    with pytest.raises(TypeError, match=r"1.experts.2.w3 must be a plain nn.Linear, got QuantizedExpertsStub"):
        restack(model)
    assert isinstance(model[0].experts, UnstackedExperts)


def test_rejects_compiled_experts():
    """They would compute with the experts that were compiled, whatever those in their place learn."""
    for change, made in ((unstack, MoE(D, E)), (restack, unstack(MoE(D, E)))):
        made.experts = torch.compile(made.experts, backend="eager")
        kinds = [type(module) for module in made.modules()]
        with pytest.raises(ValueError, match="experts cannot be replaced because the OptimizedModule depends"):
            change(made)
        assert [type(module) for module in made.modules()] == kinds


@pytest.mark.parametrize(
    ("shape", "fused"), [((3, 16, 24), None), ((2, 2, 15, 7), None), ((7, 9), None), ((3, 26, 9), 1), ((3, 5, 8), 2)]
)
def test_muon_of_stacks(shape, fused):
    """The optimizer of `examples/muon.py` does to each matrix what Muon does: in float64 what the algorithm below
    does, and, up to its bfloat16, what torch's optimizer does."""

    def matrices(x):
        halves = [x] if fused is None else x.chunk(2, fused)
        return [matrix for half in halves for matrix in half.reshape(-1, *half.shape[-2:])]

    stack = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    start = torch.stack(matrices(stack.data.clone()))
    alone, exact = [nn.Parameter(matrix.clone()) for matrix in start], [matrix.clone() for matrix in start]
    ours = Muon([stack], lr=0.1, fused=fused)
    theirs = torch.optim.Muon(alone, lr=0.1, adjust_lr_fn="match_rms_adamw")
    means = [torch.zeros_like(matrix) for matrix in exact]
    for step in range(3):
        stack.grad = torch.randn_like(stack)
        stack.grad[0] *= step > 0  # an expert without tokens yet
        grads = matrices(stack.grad.clone())
        for matrix, grad in zip(alone, grads, strict=True):
            matrix.grad = grad.clone()
        ours.step()
        theirs.step()
        exact = [muon_step(*each, lr=0.1) for each in zip(exact, means, grads, strict=True)]
    found, torchs = torch.stack(matrices(stack.data)), torch.stack(list(alone)).detach()
    torch.testing.assert_close(found, torch.stack(exact), atol=1e-10, rtol=0)
    assert (found - torchs).norm() < 0.03 * (torchs - start).norm()


def muon_step(weight: torch.Tensor, mean: torch.Tensor, grad: torch.Tensor, lr: float) -> torch.Tensor:
    """One matrix after a step of Muon (Jordan et al. 2024) with Nesterov momentum 0.95, decay 0.1, and the scale of
    arXiv 2502.16982, section 2.2; `mean` is updated in place."""
    mean.add_(0.05 * (grad - mean))
    y = 0.05 * grad + 0.95 * mean
    y = y / max(float(y.norm()), 1e-7)
    for _ in range(5):
        y = 3.4445 * y - 4.7750 * y @ y.T @ y + 2.0315 * y @ y.T @ y @ y.T @ y
    return (1 - 0.1 * lr) * weight - lr * 0.2 * max(weight.shape) ** 0.5 * y


def test_torchao():
    """It passes over stacks in silence, and takes what `unstack` makes of them."""
    ao = pytest.importorskip("torchao.quantization")
    moe, x = make_layer("gated").eval(), torch.randn(2, 12, D)
    before = moe(x)[0]
    ao.quantize_(moe, ao.Int8WeightOnlyConfig())
    assert torch.equal(moe(x)[0], before)
    ao.quantize_(unstack(moe), ao.Int8WeightOnlyConfig())
    found = moe(x)[0]
    assert 0 < (found - before).norm() < 0.02 * before.norm()
    with pytest.raises(TypeError, match=r"must be a plain nn.Linear"):
        restack(moe)


def test_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes")
    moe, x = unstack(make_layer("gated").eval()), torch.randn(2, 12, D)
    before = moe(x)[0]
    for expert in moe.experts.children():
        for name in ("w1", "w2", "w3"):
            linear = getattr(expert, name)
            sizes = linear.in_features, linear.out_features
            four = bnb.nn.Linear4bit(*sizes, bias=False, quant_type="nf4", compute_dtype=torch.float32)
            four.load_state_dict(linear.state_dict())
            setattr(expert, name, four.to("cpu"))
    found = moe(x)[0]
    assert 0 < (found - before).norm() < 0.5 * before.norm()


# Hooks, and what else is set on the experts that are replaced


def frozen(layer: MoE) -> MoE:
    layer.experts.requires_grad_(False)
    return layer


REPLACED: dict[str, Any] = {
    "unstack": unstack,
    "restack": lambda moe: restack(unstack(moe)),
    "quantize_experts": lambda moe: quantize_experts(frozen(moe)),
}


@pytest.mark.parametrize("name", REPLACED)
def test_hooks_go_on(name):
    """They are called in the same order as before, and their handles remove them."""
    moe, x, called = MoE(16, 4, second_policy_train="all"), torch.randn(1, 10, 16, requires_grad=True), []

    def note(what: str) -> Any:
        def hook(*args: Any, **kwargs: Any) -> None:
            called.append((what, len(args)))

        return hook

    experts = moe.experts
    handles = [
        experts.register_forward_pre_hook(note("before")),
        experts.register_forward_pre_hook(note("before, by keyword"), with_kwargs=True),
        experts.register_forward_hook(note("after")),
        experts.register_forward_hook(note("after, by keyword"), with_kwargs=True),
        experts.register_forward_hook(note("first after"), prepend=True),
        experts.register_forward_hook(note("after an error"), always_call=True),
        experts.register_full_backward_pre_hook(note("before the backward")),
        experts.register_full_backward_hook(note("after the backward")),
    ]
    moe(x)[0].sum().backward()
    wanted = called.copy()
    assert len(wanted) == len(handles)
    called.clear()
    REPLACED[name](moe)
    assert moe.experts is not experts
    moe(x)[0].sum().backward()
    assert called == wanted
    called.clear()
    for handle in handles:
        handle.remove()
    moe(x)[0].sum().backward()
    assert not called


def state_hook(*args: Any) -> None: ...


LOST: dict[str, Any] = {
    "forward": lambda experts: setattr(experts, "forward", experts.forward),
    "compute": lambda experts: setattr(experts, "compute", experts.compute),
    "is compiled": lambda experts: experts.compile(backend="eager"),
    "state dict hook": lambda experts: experts.register_state_dict_post_hook(state_hook),
    "state dict pre": lambda experts: experts.register_state_dict_pre_hook(state_hook),
    "load pre": lambda experts: experts.register_load_state_dict_pre_hook(state_hook),
    "load post": lambda experts: experts.register_load_state_dict_post_hook(state_hook),
}


@pytest.mark.parametrize("what", LOST)
@pytest.mark.parametrize("name", REPLACED)
def test_what_would_be_lost_is_refused_before_anything_changes(name, what):
    model = nn.ModuleList([frozen(MoE(16, 4)), frozen(MoE(16, 4))])
    if name == "restack":
        unstack(model)
    before = [layer.experts for layer in model]  # type: ignore[union-attr]
    LOST[what](before[1])
    kind = TypeError if what in ("forward", "compute") else ValueError
    words = {"forward": "custom forward", "compute": "custom compute", "is compiled": "is compiled"}
    with pytest.raises(kind, match=rf"^1\.experts .*{words.get(what, 'state-dict hooks')}"):
        {**REPLACED, "restack": restack, "quantize_experts": quantize_experts}[name](model)
    assert all(layer.experts is experts for layer, experts in zip(model, before, strict=True))  # type: ignore[union-attr]
