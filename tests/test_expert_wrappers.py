"""Experts around others, by numbers that a person can check, and on every path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn.utils import prune

from mixture_of_experts import (
    ExpertChoiceGating,
    Experts,
    GatedExperts,
    HeirarchicalMoE,
    MoE,
    RoutedExperts,
    TopKGating,
)
from mixture_of_experts.quantize import quantize_experts
from mixture_of_experts.wrappers import (
    GatedSharedExpert,
    InputWeightedExperts,
    LatentExperts,
    NormedExperts,
    Scale,
    Shift,
    ZeroComputationExperts,
)


class ScaledExperts(RoutedExperts):
    """Expert i multiplies by i + 1, then adds 1."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def compute(self, rows: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        stops = num_tokens_per_expert.cumsum(0)
        factor = torch.searchsorted(stops, torch.arange(len(rows)), right=True) + 1
        return rows * factor.unsqueeze(-1) + 1


def make_layer(experts: nn.Module, logits: list[float], k: int = 1, **settings) -> MoE:
    """Of width 1, where the token 1 has these logits."""
    gate = TopKGating(1, len(logits), k, **settings)
    gate.w_gating.data.copy_(torch.tensor([logits]))
    return MoE(1, gate=gate, experts=experts)


ONE = torch.ones(1, 1, 1)


def test_between_modules():
    """The token 1 times 2 is 2; expert 1 makes 2 * 2 + 1 of it; the token beside makes 6; minus 0.5."""
    shift = Shift(1)
    assert shift.bias.item() == 0
    shift.bias.data.fill_(-0.5)
    moe = make_layer(
        LatentExperts(ScaledExperts(2), before=Scale(2.0), beside=nn.Identity(), after=shift),
        [0.0, 9.0],
        score="sigmoid",
    )
    assert moe(ONE)[0].item() == pytest.approx(5 * torch.tensor(9.0).sigmoid().item() + 1 - 0.5, abs=1e-5)


def test_identity_and_nothing_are_ids_behind_the_experts():
    """Ids 0, 1 compute, 2 is the token itself, 3 nothing; a choice of weight 1 each."""
    experts = ZeroComputationExperts(ScaledExperts(2), num_identity=1, num_zero=1)
    assert experts.num_experts == 4
    for chosen, expected in ((0, 2.0), (1, 3.0), (2, 1.0), (3, 0.0)):
        logits = [0.0] * 4
        logits[chosen] = 50.0
        assert make_layer(experts, logits)(ONE)[0].item() == pytest.approx(expected, abs=1e-5)


def test_weights_on_inputs_or_outputs():
    """Half of the token through x + 1 is 1.5; half of what it makes of the token is 1."""
    for experts, expected in ((InputWeightedExperts(ScaledExperts(1)), 1.5), (ScaledExperts(1), 1.0)):
        assert make_layer(experts, [0.0], score="sigmoid")(ONE)[0].item() == expected


def test_a_norm_before_the_weights():
    """3 becomes 1 by its root mean square; it weighs a half."""
    experts = NormedExperts(ScaledExperts(1), nn.RMSNorm(1, eps=0.0))
    assert make_layer(experts, [0.0], score="sigmoid")(2 * ONE)[0].item() == pytest.approx(0.5)


def test_a_gate_of_each_token():
    shared = GatedSharedExpert(nn.Identity(), nn.Linear(1, 1, bias=False))
    shared.gate.weight.data.fill_(0.0)
    assert shared(ONE).item() == 0.5


D, E = 6, 4
WRAPPERS: dict[str, Callable[[int], Any]] = {  # of e experts
    "none": lambda e: Experts(D, e, 5),
    "latent": lambda e: LatentExperts(Experts(3, e, 5), before=nn.Linear(D, 3), after=nn.Linear(3, D)),
    "identity": lambda e: ZeroComputationExperts(Experts(D, e - 2, 5), num_identity=1, num_zero=1),
    "input": lambda e: InputWeightedExperts(Experts(D, e, 5)),
    "norm": lambda e: NormedExperts(Experts(D, e, 5), nn.RMSNorm(D)),
    "two": lambda e: InputWeightedExperts(NormedExperts(Experts(D, e, 5), nn.RMSNorm(D))),
    "nested": lambda e: ZeroComputationExperts(InputWeightedExperts(Experts(D, e - 1, 5)), num_identity=1),
}
GATES = {
    "dropless": lambda: TopKGating(D, E, 2),
    "capacity": lambda: TopKGating(D, E, 2, capacity_factor_train=0.5, min_expert_capacity=1),
    "expert choice": lambda: ExpertChoiceGating(D, E),
}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_masks_empty_inputs_and_every_weight_is_trained(wrapper, gate):
    torch.manual_seed(0)
    moe = MoE(D, gate=GATES[gate](), experts=WRAPPERS[wrapper](E))
    x, mask = torch.randn(2, 9, D), torch.arange(9) < torch.tensor([[9], [5]])
    out, aux_loss = moe(x, mask=mask)
    assert not out[~mask].any()
    torch.testing.assert_close(out[1, :5], moe(x[1:, :5])[0][0])
    (out.square().sum() + aux_loss).backward()
    assert all(p.grad is not None and p.grad.any() for p in moe.parameters())
    assert moe(torch.randn(2, 0, D))[0].shape == (2, 0, D)
    assert moe(torch.randn(0, 3, D))[0].shape == (0, 3, D)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_compiled_in_one_graph(wrapper):
    torch.compiler.reset()
    moe, x = MoE(D, gate=TopKGating(D, E, 2), experts=WRAPPERS[wrapper](E)), torch.randn(2, 9, D)
    torch.testing.assert_close(torch.compile(moe, fullgraph=True, backend="aot_eager")(x)[0], moe(x)[0])
    torch.compiler.reset()


def test_two_levels():
    """A flat row of wrapped experts is no grid; experts in a latent space may be one."""
    out, _ = HeirarchicalMoE(D, (2, 2), experts=WRAPPERS["latent"]((2, 2)))(torch.randn(2, 9, D))
    assert out.shape == (2, 9, D)


@pytest.mark.parametrize("kind", ["input", "norm", "two"])
def test_inner_experts_are_called_if_something_changes_their_weights(kind):
    """Pruning, FSDP2 and offloading change weights in hooks, or in a `forward` of the instance."""
    moe, x = MoE(D, gate=TopKGating(D, E, k=2), experts=WRAPPERS[kind](E)), torch.randn(2, 9, D)
    mask, calls = torch.rand(2, 9) < 0.7, []
    experts = moe.experts.experts.experts if kind == "two" else moe.experts.experts
    expected = moe(x, mask=mask)[0]
    handle = experts.register_forward_pre_hook(lambda *_: calls.append("hook"))
    torch.testing.assert_close(moe(x, mask=mask)[0], expected)
    handle.remove()
    forward = experts.forward
    experts.forward = lambda *args: (calls.append("forward"), forward(*args))[1]
    torch.testing.assert_close(moe(x, mask=mask)[0], expected)
    assert calls == ["hook", "forward"]
    del experts.forward
    prune.l1_unstructured(experts, "w1", amount=0.5)
    before = moe(x)[0]
    with torch.no_grad():
        experts.w1_orig.neg_()
    assert not torch.allclose(moe(x)[0], before)


@pytest.mark.parametrize("wrapped", [lambda e: NormedExperts(e, nn.RMSNorm(3)), InputWeightedExperts])
def test_outputs_have_the_width_of_the_experts_inside(wrapped):
    moe = MoE(D, gate=TopKGating(D, E), experts=wrapped(Experts(D, E, 5, dim_out=3)))
    assert moe(torch.randn(2, 9, D))[0].shape == (2, 9, 3)


@pytest.mark.parametrize("gate", [TopKGating(D, E + 1), ExpertChoiceGating(D, E + 1)])
@pytest.mark.parametrize(
    "build",
    [
        lambda: LatentExperts(Experts(D, E + 1, 5), after=nn.Linear(D, 3)),
        lambda: LatentExperts(Experts(D, E + 1, 5, dim_out=3)),
        lambda: LatentExperts(Experts(D, E + 1, 5), after=nn.Sequential(nn.Linear(D, 3)), dim_out=3),
        lambda: ZeroComputationExperts(Experts(D, E, 5, dim_out=3), num_zero=1),
    ],
    ids=["after", "none after", "told", "zero"],
)
def test_outputs_of_another_width(build, gate):
    experts = build()
    assert experts.dim_out == 3
    assert MoE(D, gate=gate, experts=experts)(torch.randn(2, 9, D))[0].shape == (2, 9, 3)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("inner", ["none", "input", "two", "latent", "nested"])
@pytest.mark.parametrize("masked", [False, True])
def test_experts_with_identities_compute_as_alone(gate, inner, masked):
    """Under expert choice too: an inner module weighs inputs, or goes on with the sum of a token."""
    torch.manual_seed(0)
    made = WRAPPERS[inner](E - 2)
    experts = ZeroComputationExperts(made, num_identity=1, num_zero=1)
    moe, x = MoE(D, gate=GATES[gate](), experts=experts).double(), torch.randn(2, 9, D, dtype=torch.float64)
    x.requires_grad_()
    mask = torch.arange(9) < torch.tensor([[9], [5]]) if masked else None
    weight = moe.gate(x, mask=mask).combine_tensor().sum(-1)

    def plain(experts: Any, weight: Tensor) -> Tensor:
        """`(b, n, d)`, one expert and one token after the other."""
        out = []
        for token, weights in zip(x.flatten(0, 1), weight.flatten(0, 1), strict=True):
            out.append(sum((of_one(experts, i, token, w) for i, w in enumerate(weights)), torch.zeros(D).double()))
        return torch.stack(out).view(x.shape)

    def of_one(experts: Any, i: int, token: Tensor, weight: Tensor) -> Tensor:
        if weight == 0:
            return torch.zeros_like(token)
        if isinstance(experts, InputWeightedExperts):
            return of_one(experts.experts, i, weight * token, torch.ones_like(weight))
        if isinstance(experts, NormedExperts):
            return weight * experts.norm(of_one(experts.experts, i, token, torch.ones_like(weight)))
        if isinstance(experts, ZeroComputationExperts):
            if i < experts.num_inner_experts:
                return of_one(experts.experts, i, token, weight)
            identity = i < experts.num_inner_experts + experts.num_identity
            return weight * token if identity else torch.zeros_like(token)
        return weight * (experts.act(token @ experts.w1[i]) @ experts.w2[i])

    if isinstance(made, LatentExperts):
        assert made.before is not None
        assert made.after is not None
        computing = weight[..., : E - 2]
        inside = made.before(x).unsqueeze(-2).unsqueeze(-2) @ made.experts.w1
        each = (made.experts.act(inside) @ made.experts.w2).squeeze(-2)
        whole = made.after((computing.unsqueeze(-1) * each).sum(-2))
        whole = torch.where((computing != 0).any(-1, keepdim=True), whole, 0)
        wanted = whole + plain(experts, weight * (torch.arange(E) >= E - 2))
    else:
        wanted = plain(experts, weight)
    out, _ = moe(x, mask)
    torch.testing.assert_close(out, wanted)
    inputs = [x, *moe.parameters()]
    ours, theirs = (
        torch.autograd.grad(value.square().sum(), inputs, allow_unused=True, materialize_grads=True)
        for value in (out, wanted)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("inner", ["none", "input", "norm", "latent"])
def test_wrappers_of_inner_experts_change_nothing(gate, inner):
    torch.manual_seed(0)
    experts = ZeroComputationExperts(WRAPPERS[inner](E - 1), num_identity=1)
    moe, x = MoE(D, gate=GATES[gate](), experts=experts), torch.randn(2, 9, D)
    holders = [module for module in moe.experts.modules() if hasattr(module, "experts")]
    found = []
    for wrap in (lambda module: module, checkpoint_module):
        for holder in reversed(holders):
            holder.experts = wrap(holder.experts)
        out = moe(x)[0]
        found.append([out, *torch.autograd.grad(out.square().sum(), list(moe.parameters()), allow_unused=True)])
    torch.testing.assert_close(found[1], found[0])


def checkpoint_module(module: nn.Module) -> nn.Module:
    return checkpoint_wrapper(module, checkpoint_impl=CheckpointImpl.NO_REENTRANT)


def test_identity_experts_require_equal_width():
    with pytest.raises(ValueError, match=rf"width {D} to 3, but the 2 .*num_identity=0"):
        ZeroComputationExperts(Experts(D, E, 5, dim_out=3), num_identity=2)
    narrower = ZeroComputationExperts(NormedExperts(Experts(D, E, 5, dim_out=3), nn.RMSNorm(3)), num_identity=1)
    for gate in (TopKGating(D, E + 1), ExpertChoiceGating(D, E + 1)):
        with pytest.raises(ValueError, match=f"width {D} to 3, but the 1 "):
            MoE(D, gate=gate, experts=narrower)(torch.randn(2, 9, D))


def test_zero_cost_slots():
    """Experts 0, 1 compute their slots, 2 returns its own, 3 zeros."""
    experts, slots = ZeroComputationExperts(Experts(D, 2, 5), num_identity=1, num_zero=1), torch.randn(4, 3, D)
    assert torch.equal(experts(slots), torch.cat([experts.experts(slots[:2]), slots[2:3], torch.zeros(1, 3, D)]))


def test_rejected():
    for inner in (InputWeightedExperts(Experts(D, E)), LatentExperts(Experts(D, E), beside=nn.Identity())):
        for experts in (inner, checkpoint_module(inner), ZeroComputationExperts(inner, num_zero=1)):
            with pytest.raises(ValueError, match=r"Reverse the order so .* in InputWeightedExperts\(NormedExperts\("):
                NormedExperts(experts, nn.RMSNorm(D))  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="Reverse the order"):
                InputWeightedExperts(experts)
    with pytest.raises(TypeError, match=r"experts must be RoutedExperts with an integer .* got Linear"):
        ZeroComputationExperts(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"num_identity must be an integer .*got 1\.5"):
        ZeroComputationExperts(Experts(D, E), num_identity=1.5)


@pytest.mark.parametrize("wrapped", [*WRAPPERS, "8 bits"])
def test_tokens_are_not_copied(wrapped, monkeypatch):
    """Experts of this package return new memory, so nothing is cloned for fear that an output is the input."""
    if wrapped == "8 bits":
        moe = quantize_experts(MoE(D, gate=GATES["dropless"](), experts=GatedExperts(D, 4, 12)).requires_grad_(False))
    else:
        moe = MoE(D, gate=GATES["dropless"](), experts=WRAPPERS[wrapped](E))
    copied, clone = [], torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda self, **given: copied.append(self.shape) or clone(self, **given))
    moe(torch.randn(2, 9, D))
    assert (18, D) not in copied
