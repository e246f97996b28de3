"""The bias of every gate moves once for each optimizer step, by all that was counted for it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import versions
from support.parallel_workers import Workers, get_rank
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mixture_of_experts import (
    GatedExperts,
    HeirarchicalMoE,
    MoE,
    ReLUGating,
    TopKGating,
    balance_experts,
    control_sparsity,
)
from mixture_of_experts.gating.bias_rules import RuleName
from mixture_of_experts.gating.expert_bias import StepsWithoutUpdate
from mixture_of_experts.gating.relu import INITIAL_L1_COEF
from mixture_of_experts.unstack import unstack

DIM, EXPERTS, RATE = 6, 4, 1e-2
STEPS = StepsWithoutUpdate.MAX_STEPS


class Model(nn.Module):
    """Two layers and a loss, one of them with two levels."""

    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = MoE(DIM, gate=TopKGating(DIM, EXPERTS, expert_bias=True), experts=GatedExperts(DIM, EXPERTS, 8))
        self.two = HeirarchicalMoE(
            DIM,
            gate_outer=TopKGating(DIM, 2, k=1, expert_bias=True),
            gate_inner=TopKGating(DIM, 3, expert_bias=True, outer_expert_dims=(2,)),
        )
        self.checkpointing = checkpointing

    def gates(self) -> list[Any]:
        return [self.one.gate, self.two.gate_outer, self.two.gate_inner]

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.one, self.two):
            out, _ = checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
            x = x + out
        return x.square().mean()


def make_tokens(seed: int, sequences: int = 2) -> Tensor:
    return torch.randn(sequences, 9, DIM, generator=torch.Generator().manual_seed(seed))


def find_biases(model: Model) -> list[Tensor]:
    return [gate.expert_bias.clone() for gate in model.gates()]


@pytest.mark.parametrize(
    ("rule", "accumulation", "checkpointing"),
    [("sign", 1, False), ("sign", 4, True), ("centred_sign", 1, False), ("quantile", 2, True)],
)
def test_once_for_each_step(rule, accumulation, checkpointing):
    by_hand, model = Model(), Model(checkpointing)
    for gate in by_hand.gates():
        gate.bias_rule = rule
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    balancing = balance_experts(model, optimizer, rule, rate=RATE)
    for step in range(3):
        for micro in range(accumulation):
            for each in (by_hand, model):
                each(make_tokens(10 * step + micro)).backward()
            model.eval()(make_tokens(1))  # evaluation counts nothing
            model.train()
        optimizer.step()
        for gate in by_hand.gates():
            gate.update_bias(RATE)
    torch.testing.assert_close(find_biases(model), find_biases(by_hand), atol=0, rtol=0)
    assert all(bias.any() for bias in find_biases(model))
    assert not any(gate.bias_counts.any() for gate in model.gates())
    balancing.remove()
    assert all(gate.bias_rule.bins == 0 for gate in model.gates())
    model(make_tokens(3)).backward()
    optimizer.step()
    torch.testing.assert_close(find_biases(model), find_biases(by_hand), atol=0, rtol=0)


def test_a_step_that_a_scaler_skips_moves_nothing():
    """Its choices count in the next one."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    balance_experts(model, optimizer, rate=RATE)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(make_tokens(1)) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not any(bias.any() for bias in find_biases(model))
    counted = model.one.gate.expert_counts.clone()
    assert counted.any()
    optimizer.zero_grad()
    scaler.scale(model(make_tokens(2))).backward()
    total = model.one.gate.expert_counts.clone()
    assert (total > counted).any()
    scaler.step(optimizer)
    expected = RATE * torch.sign(total.sum() - EXPERTS * total)
    torch.testing.assert_close(model.one.gate.expert_bias, expected.float())


@pytest.mark.parametrize("rule", ["sign", "quantile"])
def test_a_step_that_a_fused_optimizer_skips_moves_nothing(rule):
    """It is called, and finds out by itself."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    balance_experts(model, optimizer, rule)
    before = [parameter.clone() for parameter in model.parameters()]
    for scale, moved in ((torch.inf, False), (1.0, True)):
        (model(make_tokens(1)) * 1.0).backward()
        optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.full((), float(scale == torch.inf))
        optimizer.step()
        assert all(bias.any() == moved for bias in find_biases(model))
        assert all(gate.bias_counts.any() != moved for gate in model.gates())
        changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert any(changed) == moved


def test_stale_optimizer_warns_once():
    """It was made before `unstack`: it trains the stacks, which no layer has any more."""
    moe = MoE(8, gate=TopKGating(8, 4, expert_bias=True), experts=GatedExperts(8, 4, 6))
    old = torch.optim.SGD(moe.parameters(), lr=0.1)
    balance_experts(unstack(moe), old)
    moe(torch.randn(2, 9, 8))[0].sum().backward()
    with pytest.warns(UserWarning, match=r"but does not train experts\.0\.w1\.weight; construct the optimizer after"):
        old.step()
    old.step()  # warnings are errors


@pytest.mark.parametrize("first", [True, False])
def test_second_optimizer_does_not_warn(first):
    """One that holds views of the stacks, one matrix each, and another one for the rest."""
    moe = MoE(8, gate=TopKGating(8, 4, expert_bias=True), experts=GatedExperts(8, 4, 6))
    stacks = [p for name, p in moe.named_parameters() if name.startswith("experts.")]
    views = {stack: [nn.Parameter(matrix.mT) for matrix in stack.data] for stack in stacks}
    optimizers = torch.optim.SGD([view for of in views.values() for view in of]), torch.optim.SGD(moe.gate.parameters())
    balance_experts(moe, optimizers[first])
    moe(torch.randn(2, 9, 8))[0].sum().backward()
    for stack, of in views.items():
        for view, grad in zip(of, stack.grad, strict=True):
            view.grad = grad.mT
    for optimizer in optimizers:
        optimizer.step()
    assert moe.gate.expert_bias.any()


@pytest.mark.parametrize("names", [("quantile", "quantile"), ("centred_sign", "centred_sign"), ("quantile", "sign")])
def test_the_end_of_one_leaves_the_other(names):
    """A new optimizer, balanced anew, before the balancing of the old one is removed."""
    model, alone = Model(), Model()
    own = [gate.bias_rule for gate in model.gates()]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.0) for _ in range(2)]
    first, second = (balance_experts(model, opt, rule) for opt, rule in zip(optimizers, names, strict=True))
    first.remove()
    of_alone = torch.optim.SGD(alone.parameters(), lr=0.0)
    balance_experts(alone, of_alone, names[1])
    for each, optimizer in ((model, optimizers[1]), (alone, of_alone)):
        each(make_tokens(1)).backward()
        optimizer.step()
    assert all(bias.any() for bias in find_biases(model))
    torch.testing.assert_close(find_biases(model), find_biases(alone), atol=0, rtol=0)
    second.remove()
    assert all(gate.bias_rule is rule for gate, rule in zip(model.gates(), own, strict=True))
    assert all(gate.balanced_by is None for gate in model.gates())


def test_two_contexts_with_one_rule_move_once():
    model = Model()
    own = [gate.bias_rule for gate in model.gates()]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.0) for _ in range(2)]
    first, second = (balance_experts(model, optimizer, "quantile") for optimizer in optimizers)
    model(make_tokens(1)).backward()
    optimizers[0].step()
    assert not any(bias.any() for bias in find_biases(model))
    second.remove()
    model(make_tokens(2)).backward()
    optimizers[1].step()
    assert not any(bias.any() for bias in find_biases(model))
    optimizers[0].step()
    assert all(bias.any() for bias in find_biases(model))
    first.remove()
    assert all(gate.bias_rule is rule for gate, rule in zip(model.gates(), own, strict=True))


def test_rejects_bad_arguments():
    model, parameters = Model(), [nn.Parameter(torch.zeros(()))]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    with pytest.raises(ValueError, match=r"no gate of MoE has an expert bias; .*TopKGating"):
        balance_experts(MoE(DIM, 4), optimizer)
    with pytest.raises(ValueError, match="rule must be one of"):
        balance_experts(model, optimizer, rule="loss")
    with pytest.raises(ValueError, match="rate must be a finite number"):
        balance_experts(model, optimizer, rate=-1.0)
    in_groups = TopKGating(DIM, EXPERTS, expert_bias=True, num_groups=2, top_groups=1)
    both = nn.ModuleList([model, in_groups])
    with pytest.raises(ValueError, match=r"TopKGating: .* in 2 groups"):
        balance_experts(both, optimizer, rule="quantile")
    assert all(gate.bias_rule.bins == 0 for gate in model.gates())
    assert not optimizer._optimizer_step_post_hooks


def test_it_lasts_beyond_a_block():
    """`pop_all` hands over what ends it, as that of every `ExitStack`."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with balance_experts(model, optimizer) as balancing:
        handed = balancing.pop_all()
    assert len(optimizer._optimizer_step_post_hooks) == 1
    balancing.close()
    balancing.remove()
    assert len(optimizer._optimizer_step_post_hooks) == 1
    with handed:
        pass
    assert not optimizer._optimizer_step_post_hooks
    assert all(gate.bias_rule.bins == 0 for gate in model.gates())


# Nobody moves it


def test_accumulated_counts_warn(monkeypatch):
    monkeypatch.setattr(StepsWithoutUpdate, "MAX_FORWARDS", 5)
    gate = TopKGating(DIM, EXPERTS, expert_bias=True)

    def train(forwards: int) -> None:
        for _ in range(forwards):
            gate(make_tokens(0)).weight.sum().backward()

    train(4)
    gate.update_bias(0.0)  # it starts counting anew, and leaves the bias as it is
    assert not gate.expert_bias.any()
    with torch.no_grad():  # no training
        gate(make_tokens(0))
    train(4)
    with pytest.warns(UserWarning, match=r"bias was not updated in 5 training forward passes.* balance_experts\("):
        train(1)
    train(6)  # it warns once
    frozen = TopKGating(DIM, EXPERTS, expert_bias=True).requires_grad_(False)
    for _ in range(6):
        frozen(make_tokens(0))


@pytest.mark.parametrize(("made", "micro_batches"), [(torch.optim.SGD, 3), (torch.optim.AdamW, 1)])
def test_a_bias_that_stays_is_reported_within_a_hundred_optimizer_steps(made, micro_batches):
    """Not by forwards, of which a step of many micro-batches or recomputations has many."""
    gate = TopKGating(DIM, EXPERTS, expert_bias=True)
    optimizer = made(gate.parameters(), lr=1e-3)

    def train(steps: int) -> None:
        for _ in range(steps):
            for number in range(micro_batches):
                checkpoint(lambda x: gate(x).weight.square().sum(), make_tokens(number), use_reentrant=False).backward()
            optimizer.step()
            optimizer.zero_grad()

    train(STEPS - 1)
    gate.update_bias(0.0)
    for _ in range(2 * STEPS):  # no optimizer step
        gate(make_tokens(0)).weight.sum().backward()
    train(STEPS - 1)
    with pytest.warns(UserWarning, match=rf"bias was not updated in {STEPS} optimizer steps.* balance_experts\("):
        train(100 - (STEPS - 1))
    train(STEPS + 1)  # it warns once


# Two processes


def run_two_ranks() -> None:
    """Neither ends while the other may still be in a collective: a process that does can abort."""
    check_two_ranks("sign", RATE, None)
    check_two_ranks("sign", RATE, dist.group.WORLD)
    check_two_ranks("quantile", 1.0, get_rank())
    check_sparsity_on_two_ranks()
    if dist.get_rank() == 0:  # a group of one waits for nobody: the other rank never calls
        Model().one.gate.update_bias(RATE, get_rank())
    dist.barrier()


def check_two_ranks(rule: RuleName, rate: float, of_losses: dist.ProcessGroup | None) -> None:
    """Every micro-batch synchronised, so that DDP copies buffers before each: the counts of both ranks stay. Biases
    move by the loads of both ranks, also by hand; losses may be of fewer ranks."""
    rank, one = dist.get_rank(), get_rank()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        model, by_hand, alone = Model(), Model(), Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        balance_experts(model, optimizer, rule, rate)
        for gate in (*by_hand.gates(), *alone.gates()):
            gate.bias_rule = rule
        for gate in (*model.gates(), *by_hand.gates()):
            gate.process_group = of_losses
        parallel = DistributedDataParallel(model)
        for step in range(2):
            for micro in range(2):
                for each in (parallel, by_hand):
                    each(make_tokens(10 * step + 2 * micro + rank, sequences=2 + rank)).backward()
                for other in range(2):
                    alone(make_tokens(10 * step + 2 * micro + other, sequences=2 + other)).backward()
            with CommDebugMode() as collectives:
                optimizer.step()
            assert collectives.get_total_counts() == 1  # for all gates
            for gate, of_alone in zip(by_hand.gates(), alone.gates(), strict=True):
                gate.update_bias(rate)
                of_alone.update_bias(rate, one)
        for expected, *found in zip(find_biases(alone), find_biases(model), find_biases(by_hand), strict=True):
            assert all(bias.equal(expected) for bias in found)
            assert expected.any()


def check_sparsity_on_two_ranks() -> None:
    """Rank 0 makes more choices than the mean, rank 1 fewer: the coefficient is that of one process with all tokens."""
    rank, ends = dist.get_rank(), []
    for group, parts in ((None, [rank]), (get_rank(), [0, 1])):
        torch.manual_seed(0)
        layers = [MoE(DIM, gate=ReLUGating(DIM, EXPERTS, 4, mean_choices=2.5, bias=True)) for _ in range(2)]
        model = nn.ModuleList(layers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        control_sparsity(model, optimizer, group=group)
        for part in parts:
            for layer in layers:
                nn.init.constant_(layer.gate.b_gating, 9.0 if part == 0 else -9.0)
                layer(make_tokens(part, sequences=2 + part))[0].sum().backward()
        with CommDebugMode() as collectives:
            optimizer.step()
        assert collectives.get_total_counts() == (group is None)
        ends.append([layer.gate.l1_coef for layer in layers])
        assert not any(layer.gate.choice_counts.any() for layer in layers)
    assert ends[0] == ends[1]
    assert (ends[0][0] < INITIAL_L1_COEF).item()


@pytest.mark.slow
def test_two_processes(workers: Workers):
    workers.run(run_two_ranks, 2)


def relu_layer() -> MoE:
    torch.manual_seed(0)
    return MoE(DIM, gate=ReLUGating(DIM, EXPERTS, 4, mean_choices=2.5, bias=True), loss_coef=1.0)


class Loss(nn.Module):
    """The loss of a layer, and of a second one of which a rank may have no tokens."""

    def __init__(self, layer: nn.Module, other: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.other = layer, other

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        out = x.mean() if skip else sum(part.square().sum() for part in self.layer(x))
        return out if self.other is None else out + self.other(x).sum()  # type: ignore[return-value]


class Reentrant(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return checkpoint(self.layer, x.requires_grad_(), use_reentrant=True)  # type: ignore[return-value]


def train_by_hand(kind: str, model: nn.Module, gate: Any, alone: nn.Module, of_alone: Any) -> None:
    """Two steps of three micro-batches each. Every one is synchronised, and an evaluation follows it. The gate counts
    what its twin outside of DDP counts, and moves as one process with all tokens."""
    rank, one = dist.get_rank(), get_rank()
    for step in range(2):
        for micro in range(3):
            seed = 20 * step + 2 * micro
            model(make_tokens(seed + rank, sequences=2 + rank)).backward()
            with torch.no_grad():
                model.eval()(make_tokens(1))
            model.train()
            for other in range(2):
                alone(make_tokens(seed + other, sequences=2 + other)).backward()
        if kind == "relu":
            own, total, move = gate.choice_counts, of_alone.choice_counts, "update_l1"
        else:
            own, total, move = gate.bias_counts, of_alone.bias_counts, "update_bias"
        counts = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(counts, own)
        assert (counts[0] + counts[1]).equal(total)
        assert not counts[0].equal(counts[1])
        getattr(gate, move)(1.5)
        getattr(of_alone, move)(1.5, one)
        moved = "l1_coef" if kind == "relu" else "expert_bias"
        assert getattr(gate, moved).equal(getattr(of_alone, moved))


def run_by_hand(kind: str, how: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of torch.compile
        warnings.filterwarnings("ignore", message="Dynamo does not know how to trace")
        for _ in range(2 if "compiled" in how else 1):  # a second DDP, which the graph of the first one fits
            layer, alone = (relu_layer() if kind == "relu" else Model().one for _ in range(2))
            if kind != "relu":
                layer.gate.bias_rule = alone.gate.bias_rule = kind
            inner = Loss(Reentrant(layer) if how == "reentrant" else layer)
            if how == "compiled":
                inner.compile(backend="aot_eager", fullgraph=True)
                inner(make_tokens(0))  # its graph knows no DDP
            parallel: Any = DistributedDataParallel(inner)
            if how == "compiled around":
                parallel = torch.compile(parallel, backend="aot_eager")
            train_by_hand(kind, parallel, layer.gate, Loss(alone), alone.gate)
    dist.barrier()


BY_HAND = [
    ("sign", "eager"),
    ("quantile", "eager"),
    ("relu", "eager"),
    ("sign", "reentrant"),
    ("sign", "compiled"),
    ("relu", "compiled around"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "how"), BY_HAND)
def test_counts_are_a_ranks_own_in_ddp(kind: str, how: str, workers: Workers):
    """DDP copies the buffers of the first rank before each synchronised forward."""
    if "compiled" in how and versions.TORCH < (2, 13):
        pytest.skip("gates in graphs of an earlier torch leave DDP as it is, and warn")
    workers.run(run_by_hand, 2, kind, how)


def run_where_ranks_may_differ() -> None:
    """Rank 1 has no token of the layer in its first forward. Excluding the counts on one rank alone would make the
    ranks copy different buffers, and hang."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        model = Loss(Model().one, nn.Linear(DIM, 1))
        parallel = DistributedDataParallel(model, find_unused_parameters=True)
        first = dist.get_rank() == 0
        for step in range(3):
            skip = step == 0 and not first
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                loss = parallel(make_tokens(step), skip=skip)
            found = [str(each.message) for each in caught if "copies layer.gate.expert_counts" in str(each.message)]
            assert bool(found) is not skip
            assert all("balance_experts(" in message for message in found)
            loss.backward()
    dist.barrier()


@pytest.mark.slow
def test_counts_that_ddp_copies_are_warned_of(workers: Workers):
    workers.run(run_where_ranks_may_differ, 2)
