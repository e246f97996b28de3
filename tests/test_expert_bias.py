"""The expert bias: what it counts, what it survives, and that it balances."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from support.parallel_workers import Workers, this_rank
from torch import Tensor, nn

from mixture_of_experts import GatedExperts, HeirarchicalMoE, MoE, TopKGating, balance_experts
from mixture_of_experts.verify import assert_holds

DIM, EXPERTS = 6, 4


def build(k: int = 2, seed: int = 0, **settings) -> MoE:
    torch.manual_seed(seed)
    gate = TopKGating(DIM, EXPERTS, k=k, expert_bias=True, **settings)
    return MoE(DIM, gate=gate, experts=GatedExperts(DIM, EXPERTS, 8))


def tokens(seed: int = 1, sequences: int = 2) -> Tensor:
    return torch.randn(sequences, 9, DIM, generator=torch.Generator().manual_seed(seed))


def load(moe: MoE, *inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """What should be counted, found without counting: the choices before capacity."""
    with torch.no_grad():
        return torch.stack([moe.gate(x, mask=mask).queued.sum(dim=0) for x in inputs]).sum(dim=0)


def step(moe: nn.Module, x: Tensor, **arguments) -> None:
    out, aux_loss = moe(x, **arguments)
    (out.square().sum() + aux_loss).backward()


# What is counted


@pytest.mark.parametrize(
    "settings",
    [{}, {"k": 1}, {"k": 1, "normalize": True}, {"score": "sigmoid"}, {"capacity_factor_train": 0.5}],
    ids=str,
)
def test_counts_the_choices_before_capacity(settings):
    moe, x = build(**settings), tokens()
    expected = load(moe, x)
    step(moe, x)
    assert torch.equal(moe.gate.expert_counts, expected)
    assert moe.gate.expert_counts.sum() == x.shape[0] * x.shape[1] * moe.gate.k


def test_counts_when_the_backward_runs():
    moe, x = build(), tokens()
    out, _ = moe(x)
    assert not moe.gate.expert_counts.any()
    out.sum().backward()
    assert moe.gate.expert_counts.any()


def test_two_forwards_before_one_backward_add_up():
    moe, parts = build(), [tokens(seed) for seed in range(2)]
    sum(moe(part)[0].sum() for part in parts).backward()
    assert torch.equal(moe.gate.expert_counts, load(moe, *parts))


def test_a_graph_kept_for_a_second_backward_counts_once():
    moe, x = build(), tokens()
    out, _ = moe(x)
    out.sum().backward(retain_graph=True)
    out.square().sum().backward()
    assert torch.equal(moe.gate.expert_counts, load(moe, x))


def test_two_levels_count_for_each_outer_expert():
    moe = HeirarchicalMoE(
        DIM,
        gate_outer=TopKGating(DIM, 3, k=1, expert_bias=True),
        gate_inner=TopKGating(DIM, EXPERTS, k=2, expert_bias=True, outer_expert_dims=(3,)),
    )
    step(moe, tokens())
    outer, inner = moe.gate_outer.expert_counts, moe.gate_inner.expert_counts
    assert outer.sum() == 18
    assert torch.equal(inner.sum(dim=-1), 2 * outer)


# A frozen router, frozen experts


@pytest.mark.parametrize("input_has_gradient", [False, True])
def test_frozen_router_counts(input_has_gradient):
    """Its experts may be training; the weights then depend on no parameter, or only on the input."""
    moe, x = build(), tokens().requires_grad_(input_has_gradient)
    moe.gate.requires_grad_(False)
    step(moe, x)
    assert torch.equal(moe.gate.expert_counts, load(moe, x))
    assert moe.gate.w_gating.grad is None
    assert moe.experts.w1.grad.any()


# Checkpointing, compilation, function transforms


def test_what_counts_and_what_does_not():
    """Neither padding, nor evaluation, nor what is computed anew."""
    held = "padding", "nan_padding", "counts_eval", "inference_mode", "counts_checkpointing", "recomputation"
    assert_holds(build(), *held)


@pytest.mark.filterwarnings("ignore:torch.searchsorted")  # a hint of torch's about speed under vmap
@pytest.mark.parametrize("rule", ["sign", "quantile"])
def test_function_transforms_count(rule):
    """`torch.func.grad`, and per-sample gradients by `vmap` of it."""
    moe, x = build(), tokens()
    moe.gate.bias_rule = rule
    parameters = dict(moe.named_parameters())
    step(moe, x)
    expected = moe.gate.bias_counts.clone()
    moe.gate.bias_counts.zero_()

    def loss(parameters: dict, x: Tensor) -> Tensor:
        return torch.func.functional_call(moe, parameters, (x,))[0].square().sum()

    torch.func.grad(loss)(parameters, x)
    assert torch.equal(moe.gate.bias_counts, expected)
    torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x.unsqueeze(1))
    assert torch.equal(moe.gate.bias_counts, 2 * expected)


# Casts, copies, checkpoints


def trained() -> MoE:
    """A layer whose bias has steps that bfloat16 could not hold, and with counts under way."""
    moe = build()
    moe.gate.expert_bias.copy_(1 + 1e-3 * torch.arange(1, EXPERTS + 1))
    step(moe, tokens())
    return moe


def assert_same_buffers(moe: MoE, original: MoE) -> None:
    for name, dtype in (("expert_bias", torch.float32), ("expert_counts", torch.int64)):
        buffer = getattr(moe.gate, name)
        assert buffer.dtype == dtype
        assert torch.equal(buffer, getattr(original.gate, name))


CASTS = {
    "bfloat16": lambda moe: moe.bfloat16(),
    "half": lambda moe: moe.half(),
    "double": lambda moe: moe.double(),
    "to dtype": lambda moe: moe.to(torch.bfloat16),
    "to device and dtype": lambda moe: moe.to("cpu", torch.bfloat16),
    "type": lambda moe: moe.type(torch.bfloat16),
    "back and forth": lambda moe: moe.bfloat16().float().half().float(),
    "deepcopy": copy.deepcopy,
    "deepcopy of a cast": lambda moe: copy.deepcopy(moe).bfloat16(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_bias_and_counts_survive(cast):
    original = trained()
    assert_same_buffers(CASTS[cast](copy.deepcopy(original)), original)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_state_dict_round_trip(dtype, tmp_path):
    original = trained()
    torch.save(original.to(dtype).state_dict(), tmp_path / "moe.pt")
    for target in (torch.float32, torch.bfloat16):
        moe = build(seed=5).to(target)
        moe.load_state_dict(torch.load(tmp_path / "moe.pt", weights_only=True), strict=True)
        assert_same_buffers(moe, original)


def test_another_default_dtype():
    """A model that is built in bfloat16 outright."""
    torch.set_default_dtype(torch.bfloat16)
    moe = build()
    assert moe.gate.w_gating.dtype == torch.bfloat16
    assert moe.gate.expert_bias.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_module_counts_and_moves_in_float32(dtype):
    moe, x = build().to(dtype), tokens().to(dtype)
    for _ in range(20):
        step(moe, x)
        moe.gate.update_bias(1e-4)
    steps = moe.gate.expert_bias.double() / 1e-4
    assert steps.abs().max() > 10
    torch.testing.assert_close(steps, steps.round(), atol=1e-2, rtol=0)


# Moving the bias


def test_update_moves_towards_the_mean_and_counts_anew():
    gate = build().gate
    gate.expert_counts.copy_(torch.tensor([5, 3, 1, 3]))  # the mean is 3
    gate.update_bias(0.25)
    assert gate.expert_bias.tolist() == [-0.25, 0.0, 0.25, 0.0]
    assert gate.expert_counts.tolist() == [0, 0, 0, 0]
    gate.update_bias(0.25)  # nothing was counted
    assert gate.expert_bias.tolist() == [-0.25, 0.0, 0.25, 0.0]


def test_update_compares_large_counts_exactly():
    gate = build().gate
    gate.expert_counts.copy_(torch.tensor([2**40 + 1, 2**40, 2**40, 2**40 - 1]))  # float32 sees four equal numbers
    gate.update_bias(1.0)
    assert gate.expert_bias.tolist() == [-1.0, 0.0, 0.0, 1.0]


def test_bias_is_for_choosing_only():
    """It changes who is chosen; the weights are those of the scores as they are."""
    moe, x = build(score="sigmoid", normalize=False), tokens()
    moe.gate.expert_bias.copy_(torch.tensor([0.0, 10.0, 0.0, 0.0]))
    routing = moe.gate(x)
    assert (routing.expert == 1).sum() == 18
    chosen_first = routing.weight[..., ::2]
    torch.testing.assert_close(chosen_first, (x @ moe.gate.w_gating).sigmoid()[..., 1])


# Two processes


def run_two() -> None:
    """What each of two processes checks."""
    rank = dist.get_rank()
    check_update_over_group(rank)
    check_a_group_of_one_waits_for_nobody(rank)


def of_rank(rank: int) -> list[Tensor]:
    """Two micro-batches; the second rank's are larger."""
    return [tokens(10 * rank + number, sequences=2 + rank) for number in range(2)]


def check_update_over_group(rank: int) -> None:
    """By default the bias moves by the loads of both ranks, and is the same on both; losses may be of fewer ranks."""
    for group in (None, this_rank(), dist.group.WORLD):
        moe, alone, balanced = build(), build(), build()
        optimizer = torch.optim.SGD(balanced.parameters(), lr=0.0)
        balance_experts(balanced, optimizer, rate=1e-2)
        for each in (moe, balanced):
            each.gate.process_group = group
            for part in of_rank(rank):
                step(each, part)
        alone.gate.expert_counts.copy_(load(alone, *of_rank(0), *of_rank(1)))
        moe.gate.update_bias(1e-2)
        alone.gate.update_bias(1e-2, group=this_rank())
        optimizer.step()
        assert moe.gate.expert_bias.any()
        for each in (moe, balanced):
            assert torch.equal(each.gate.expert_bias, alone.gate.expert_bias)
            assert not each.gate.expert_counts.any()


def check_a_group_of_one_waits_for_nobody(rank: int) -> None:
    """The other rank never calls."""
    moe = build()
    step(moe, of_rank(rank)[0])
    if rank == 0:
        moe.gate.update_bias(1e-2, group=this_rank())
        assert moe.gate.expert_bias.any()
    dist.barrier()


@pytest.mark.slow
def test_two_processes(workers: Workers):
    """Neither ends while the other may still be in a collective: a process that does can abort."""
    workers.run(run_two, 2)


def test_a_rate_of_zero_starts_counting_anew():
    """DeepSeek-V3's schedule ends so."""
    moe = build()
    moe(tokens(0))[0].sum().backward()
    moe.gate.expert_bias.fill_(0.5)
    assert moe.gate.expert_counts.sum() > 0
    moe.gate.update_bias(0.0)
    assert (moe.gate.expert_bias == 0.5).all()
    assert not moe.gate.expert_counts.any()
    with pytest.raises(TypeError, match=r"group must be a torch.distributed.ProcessGroup"):
        moe.gate.update_bias(0.1, group="world")
