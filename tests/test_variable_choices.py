"""Routers that let the number of a token's choices vary: top-p and ReLU, against loops that follow their papers.

They are also among `ROUTERS` of `support/layer_variants.py`, over which the tests of compile, export, checkpointing,
dtypes and others run.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from support.layer_variants import run_layer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from mixture_of_experts import (
    GatedExperts,
    HeirarchicalMoE,
    MoE,
    ReLUGating,
    TopPGating,
    balance_experts,
    control_sparsity,
)
from mixture_of_experts.stats import track_routing
from mixture_of_experts.whole_model import sparsity
from mixture_of_experts.whole_model.balancing import find_rank_local_buffers

DIM, E = 6, 5


def make_layer(gate: nn.Module, **settings) -> MoE:
    torch.manual_seed(0)
    gate.reset_parameters()
    return MoE(DIM, gate=gate, experts=GatedExperts(DIM, E, 7), **settings).double()


def expert_outputs(moe: MoE, x: Tensor) -> Tensor:
    """`(..., e, d)`, every expert on every token."""
    w1, w3, w2 = moe.experts.w1, moe.experts.w3, moe.experts.w2
    tokens = x.unsqueeze(-2).unsqueeze(-2)
    return ((nn.functional.silu(tokens @ w1) * (tokens @ w3)) @ w2).squeeze(-2)


def compare_with_loop(moe: MoE, x: Tensor, mask: Tensor | None, out: Tensor, aux_loss: Tensor) -> None:
    """Outputs, loss and gradients of a layer are these."""
    found = moe(x, mask=mask)
    for ours, theirs in zip(found, (out, aux_loss), strict=True):
        torch.testing.assert_close(ours, theirs)
    weigh = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    inputs = [x, *moe.parameters()]
    ours, theirs = (
        torch.autograd.grad((o * weigh).sum() + a, inputs, allow_unused=True, materialize_grads=True)
        for o, a in (found, (out, aux_loss))
    )
    torch.testing.assert_close(ours, theirs)


def make_inputs(masked: bool) -> tuple[Tensor, Tensor | None, list[tuple[int, int]]]:
    """Tokens of two sequences, a mask, and the places of the real ones."""
    x = torch.randn(2, 9, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    real = [(b, t) for b in range(2) for t in range(9) if not masked or mask[b, t]]
    return x, mask if masked else None, real


# Top-p


def test_normalized_weights_are_those_of_the_choices_that_are_made():
    gate = TopPGating(DIM, E, k=3, normalize=True)
    weight = gate(torch.randn(2, 9, DIM)).weight.view(18, 3)
    torch.testing.assert_close(weight.sum(dim=-1), torch.ones(18))
    assert (weight == 0).any()


@pytest.mark.parametrize("k", [1, 2, 7, 64])
def test_choices_stop_where_the_sum_reaches_p(k: int):
    """With many choices, and without a table of choices by choices: that was 67 MB for 64 choices of 4,096 tokens."""
    gate = TopPGating(DIM, 64, k=k, p=0.9).double()
    torch.nn.init.normal_(gate.w_gating, std=0.3)
    x = torch.randn(1, 33, DIM, dtype=torch.float64)
    with LargestTensor() as largest:
        chosen = gate(x).sent.view(33, k)
    probs = (x[0] @ gate.w_gating.detach()).softmax(dim=-1).sort(dim=-1, descending=True).values
    for token in range(33):
        assert chosen[token].tolist() == [float(probs[token, :i].sum()) < 0.9 for i in range(k)]
    assert largest.numel <= 33 * 64


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that operators return."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


# ReLU


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("over", ["group", "batch"])
def test_relu_is_the_papers(masked: bool, over: str):
    """Sum of R_i e_i(x) with R = ReLU(x W) (equation 5); lambda times the mean of sum f_i R_i (equation 11), with
    f_i = e / (k T) times the number of tokens for which R_i is positive (equation 12)."""
    moe = make_layer(ReLUGating(DIM, E, k=E, mean_choices=2, balance_over=over), loss_coef=1.0)
    moe.gate.l1_coef.fill_(0.3)
    x, mask, real = make_inputs(masked)
    r, outputs = (x @ moe.gate.w_gating).relu(), expert_outputs(moe, x)
    out = (r.unsqueeze(-1) * outputs).sum(dim=-2)
    out = out if mask is None else torch.where(mask.unsqueeze(-1), out, 0.0)
    units = [real] if over == "batch" else [[place for place in real if place[0] == b] for b in range(2)]
    losses = []
    for unit in units:
        f = [E / (2 * len(unit)) * sum(bool(r[place][i] > 0) for place in unit) for i in range(E)]
        losses.append(sum(f[i] * r[place][i] for place in unit for i in range(E)) / len(unit))
    compare_with_loop(moe, x, mask, out, 0.3 * sum(losses) / len(losses))


def test_the_bound_leaves_the_largest_and_the_loss_counts_all():
    whole, bounded = (ReLUGating(DIM, E, k=k, mean_choices=1) for k in (E, 2))
    bounded.load_state_dict(whole.state_dict())
    x = torch.randn(2, 9, DIM)
    a, b = whole(x), bounded(x)
    best = a.weight.view(18, E).topk(2).values
    torch.testing.assert_close(b.weight.view(18, 2), best)
    assert torch.equal(a.balance_loss, b.balance_loss)
    assert (a.sent.view(18, E).sum(-1) > 2).any()


def set_loss_coef(coef: float = 1e-8) -> MoE:
    torch.manual_seed(0)
    moe = MoE(DIM, gate=ReLUGating(DIM, E, k=4, mean_choices=1.5), experts=GatedExperts(DIM, E, 7), loss_coef=1.0)
    moe.gate.l1_coef.fill_(coef)
    return moe


def find_positive(gate: nn.Module, x: Tensor) -> int:
    return int(((x @ gate.w_gating) > 0).sum())


def test_counts_and_coefficient_update():
    """More than 1.5 choices a token: times 1.2. Masked tokens, evaluation, and what has no backward do not count."""
    moe, x = set_loss_coef(), torch.randn(2, 9, DIM)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    wanted = [find_positive(moe.gate, x[mask]), 13]
    moe(x)
    checkpoint(moe, x.requires_grad_(), mask, use_reentrant=False)[0].sum().backward()
    moe.eval()(x)[0].sum().backward()
    assert moe.gate.choice_counts.tolist() == wanted
    assert wanted[0] > 1.5 * 13
    moe.gate.update_l1()
    assert moe.gate.l1_coef.item() == pytest.approx(1.2e-8)
    moe.gate.update_l1()  # nothing was counted
    assert (moe.gate.l1_coef.item(), moe.gate.choice_counts.tolist()) == (pytest.approx(1.2e-8), [0, 0])
    moe.gate.w_gating.data.mul_(0.0)  # nobody is chosen
    moe.train()(x)[0].sum().backward()
    moe.gate.update_l1(1.5)
    assert moe.gate.l1_coef.item() == pytest.approx(0.8e-8)
    assert moe.bfloat16().gate.l1_coef.dtype == torch.float32
    assert "mean_choices=1.5" in repr(moe.gate)
    moe.reset_parameters()
    assert moe.gate.l1_coef.item() == pytest.approx(1e-8)


def test_sparsity_is_controlled_over_all_layers():
    """From about half of the experts to what was aimed at, in one coefficient for both layers."""
    model = nn.Sequential(*(set_loss_coef(0.03) for _ in range(2)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    control = control_sparsity(model, optimizer)
    x = torch.randn(8, 16, DIM, generator=torch.Generator().manual_seed(1))

    def step() -> float:
        first, aux_first = model[0](x)
        out, aux_loss = model[1](first + x)
        optimizer.zero_grad()
        ((out - x.roll(1, -1)).square().mean() + aux_first + aux_loss).backward()
        optimizer.step()
        with torch.no_grad():
            return (find_positive(model[0].gate, x) + find_positive(model[1].gate, model[0](x)[0] + x)) / (2 * 128)

    before, *_, last = [step() for _ in range(50)]
    means = [step() for _ in range(20)]
    assert before > 2
    assert sum(means) / 20 == pytest.approx(1.5, abs=0.1), (before, last, means)
    assert model[0].gate.l1_coef == model[1].gate.l1_coef
    control.close()
    coef = model[0].gate.l1_coef.clone()
    step()
    assert model[0].gate.l1_coef == coef


def test_nan_tokens_do_not_count():
    moe, x = set_loss_coef(), torch.randn(2, 9, DIM)
    bad = torch.rand(2, 9) < 0.3
    moe.gate(torch.where(bad.unsqueeze(-1), torch.nan, x)).weight.sum().backward()
    assert moe.gate.choice_counts.tolist() == [find_positive(moe.gate, x[~bad]), int((~bad).sum())]


def test_unreachable_mean_choices_warns(monkeypatch: pytest.MonkeyPatch):
    """The loss has no balancing loss, so the coefficient moves nothing. It stays finite, and comes down again."""
    monkeypatch.setattr(sparsity, "CHECK_INTERVAL", 4)
    moe, x = set_loss_coef(1e2), torch.randn(4, 9, DIM)
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.01)
    control_sparsity(moe, optimizer, rate=2.0)

    def step() -> float:
        moe(x)[0].square().mean().backward()
        optimizer.step()
        return moe.gate.l1_coef.item()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [step() for _ in range(3)] == [200.0, 400.0, 800.0]
    with pytest.warns(UserWarning, match=r"mean_choices=1.5 cannot be reached: .* 1000, .* bias=True"):
        assert step() == 1000.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [step() for _ in range(3)] == [1000.0] * 3
        moe.gate.w_gating.data.zero_()
        assert step() == 500.0


def test_a_coefficient_that_shrank_for_long_grows_again():
    """In float32 it would become 0, from which no factor leads away."""
    gate = set_loss_coef().gate
    for _ in range(600):
        gate.scale_l1(1.2, torch.tensor(-1.0))
    assert gate.l1_coef.item() == pytest.approx(1e-12)
    gate.scale_l1(1.2, torch.tensor(1.0))
    assert gate.l1_coef.item() == pytest.approx(1.2e-12)


def test_errors():
    with pytest.raises(ValueError, match="mean_choices must be at most k=2, got 3"):
        ReLUGating(DIM, E, k=2, mean_choices=3)
    with pytest.raises(ValueError, match=r"p must be .*below 1.0, got 1.5"):
        TopPGating(DIM, E, k=2, p=1.5)
    with pytest.raises(ValueError, match=r"rate must be .*above 1.0, got 1"):
        set_loss_coef().gate.update_l1(1)
    with pytest.raises(TypeError, match=r"^group must be a torch.distributed.ProcessGroup"):
        set_loss_coef().gate.update_l1(group="world")
    moe = MoE(DIM, 4)
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="MoE has no ReLUGating"):
        control_sparsity(moe, optimizer)
    with pytest.raises(ValueError, match="no gate of MoE has an expert bias"):
        balance_experts(set_loss_coef(), optimizer)
    for start in (control_sparsity, balance_experts):
        with pytest.raises(TypeError, match=r"expected optimizer to be .*got MoE; pass the model first"):
            start(optimizer, moe)  # type: ignore[arg-type]


def test_the_coefficient_in_another_default_dtype():
    torch.set_default_dtype(torch.float16)
    assert set_loss_coef().gate.l1_coef.item() == pytest.approx(1e-8)


def test_counts_are_rank_local():
    """DDP would copy those of the first rank."""
    assert find_rank_local_buffers(set_loss_coef()) == {"gate.choice_counts", "gate.l1_coef"}


# Both


@pytest.mark.parametrize("kind", ["top-p", "relu"])
@pytest.mark.parametrize("factor", [None, 0.4])
def test_levels_capacity_and_statistics(kind: str, factor: float | None):
    """The mean number of choices is what the gates chose, before capacity."""
    more = {"p": 0.5} if kind == "top-p" else {"mean_choices": 1.5}
    make = {"top-p": TopPGating, "relu": ReLUGating}[kind]
    more |= {"capacity_factor_train": factor, "min_expert_capacity": 1}
    outer, inner = make(DIM, 3, k=2, **more), make(DIM, 4, k=3, outer_expert_dims=(3,), **more)
    moe, x = HeirarchicalMoE(DIM, gate_outer=outer, gate_inner=inner), torch.randn(2, 12, DIM)
    seen = []
    outer.register_forward_hook(lambda gate, args, routing: seen.append(routing))
    with track_routing(moe) as stats:
        out, aux_loss = run_layer(moe, x)
    (out.square().sum() + aux_loss).backward()
    assert all(p.grad is not None for p in moe.parameters())
    record = stats.last("gate_outer")
    assert record.choices_per_token == record.scalars()["choices_per_token"] == int(seen[0].sent.sum()) / 24
    assert 0 < record.choices_per_token < 2
    if factor is not None:
        assert not torch.equal(seen[0].sent, seen[0].kept)
