"""The expert bias: what it counts, and what it survives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mixture_of_experts import GatedExperts, HeirarchicalMoE, MoE, TopKGating
from mixture_of_experts.verify import assert_holds

DIM, EXPERTS = 6, 4


def build_layer(k: int = 2, seed: int = 0, **settings) -> MoE:
    torch.manual_seed(seed)
    gate = TopKGating(DIM, EXPERTS, k=k, expert_bias=True, **settings)
    return MoE(DIM, gate=gate, experts=GatedExperts(DIM, EXPERTS, 8))


def make_tokens(seed: int = 1) -> Tensor:
    return torch.randn(2, 9, DIM, generator=torch.Generator().manual_seed(seed))


def count_load(moe: MoE, *inputs: Tensor) -> Tensor:
    """What should be counted, found without counting: the choices before capacity."""
    with torch.no_grad():
        return torch.stack([moe.gate(x).queue_length.sum(dim=0) for x in inputs]).sum(dim=0)


def run_step(moe: nn.Module, x: Tensor) -> None:
    out, aux_loss = moe(x)
    (out.square().sum() + aux_loss).backward()


# What is counted


@pytest.mark.parametrize(
    "settings",
    [{}, {"k": 1}, {"k": 1, "normalize": True}, {"score": "sigmoid"}, {"capacity_factor_train": 0.5}],
    ids=str,
)
def test_counts_the_choices_before_capacity(settings):
    moe, x = build_layer(**settings), make_tokens()
    expected = count_load(moe, x)
    run_step(moe, x)
    assert torch.equal(moe.gate.expert_counts, expected)
    assert moe.gate.expert_counts.sum() == x.shape[0] * x.shape[1] * moe.gate.k


def test_each_forward_counts_once_in_its_first_backward():
    moe, parts = build_layer(), [make_tokens(seed) for seed in range(2)]
    loss = torch.stack([moe(part)[0].sum() for part in parts]).sum()
    assert not moe.gate.expert_counts.any()
    for _ in range(2):  # of a graph that is kept
        loss.backward(retain_graph=True)
        assert torch.equal(moe.gate.expert_counts, count_load(moe, *parts))


def test_two_levels_count_for_each_outer_expert():
    moe = HeirarchicalMoE(
        DIM,
        gate_outer=TopKGating(DIM, 3, k=1, expert_bias=True),
        gate_inner=TopKGating(DIM, EXPERTS, k=2, expert_bias=True, outer_expert_dims=(3,)),
    )
    run_step(moe, make_tokens())
    outer, inner = moe.gate_outer.expert_counts, moe.gate_inner.expert_counts
    assert outer.sum() == 18
    assert torch.equal(inner.sum(dim=-1), 2 * outer)


# A frozen router, frozen experts


@pytest.mark.parametrize("input_has_gradient", [False, True])
def test_frozen_router_counts(input_has_gradient):
    """Its experts may be training; the weights then depend on no parameter, or only on the input."""
    moe, x = build_layer(), make_tokens().requires_grad_(input_has_gradient)
    moe.gate.requires_grad_(False)
    run_step(moe, x)
    assert torch.equal(moe.gate.expert_counts, count_load(moe, x))
    assert moe.gate.w_gating.grad is None
    assert moe.experts.w1.grad.any()


# Checkpointing, compilation, function transforms


def test_counted_forwards():
    """Neither padding, nor evaluation, nor what is computed anew."""
    held = "padding", "nan_padding", "counts_eval", "inference_mode", "counts_checkpointing", "recomputation"
    assert_holds(build_layer(), *held)


@pytest.mark.filterwarnings("ignore:torch.searchsorted")  # a hint of torch's about speed under vmap
@pytest.mark.parametrize("rule", ["sign", "quantile"])
def test_function_transforms_count(rule):
    """`torch.func.grad`, and per-sample gradients by `vmap` of it."""
    moe, x = build_layer(), make_tokens()
    moe.gate.bias_rule = rule
    parameters = dict(moe.named_parameters())
    run_step(moe, x)
    expected = moe.gate.bias_counts.clone()
    moe.gate.bias_counts.zero_()

    def loss(parameters: dict, x: Tensor) -> Tensor:
        return torch.func.functional_call(moe, parameters, (x,))[0].square().sum()

    torch.func.grad(loss)(parameters, x)
    assert torch.equal(moe.gate.bias_counts, expected)
    torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x.unsqueeze(1))
    assert torch.equal(moe.gate.bias_counts, 2 * expected)


# Casts, copies, checkpoints


def train_layer() -> MoE:
    """A layer whose bias has steps that bfloat16 could not hold, and with counts under way."""
    moe = build_layer()
    moe.gate.expert_bias.copy_(1 + 1e-3 * torch.arange(1, EXPERTS + 1))
    run_step(moe, make_tokens())
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
    original = train_layer()
    assert_same_buffers(CASTS[cast](copy.deepcopy(original)), original)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_state_dict_round_trip(dtype, tmp_path):
    original = train_layer()
    torch.save(original.to(dtype).state_dict(), tmp_path / "moe.pt")
    for target in (torch.float32, torch.bfloat16):
        moe = build_layer(seed=5).to(target)
        moe.load_state_dict(torch.load(tmp_path / "moe.pt", weights_only=True), strict=True)
        assert_same_buffers(moe, original)


def test_buffers_of_a_cast_file_keep_their_dtype_when_they_are_assigned():
    state = {name: value.bfloat16() for name, value in train_layer().state_dict().items()}
    with torch.device("meta"):
        moe = build_layer()
    moe.load_state_dict(state, assign=True)
    assert moe.gate.w_gating.dtype == torch.bfloat16
    assert (moe.gate.expert_bias.dtype, moe.gate.expert_counts.dtype) == (torch.float32, torch.int64)
    assert torch.equal(moe.gate.expert_bias, state["gate.expert_bias"].float())


def test_another_default_dtype():
    """A model that is built in bfloat16 outright."""
    torch.set_default_dtype(torch.bfloat16)
    moe = build_layer()
    assert moe.gate.w_gating.dtype == torch.bfloat16
    assert moe.gate.expert_bias.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_module_counts_and_moves_in_float32(dtype):
    moe, x = build_layer().to(dtype), make_tokens().to(dtype)
    for _ in range(20):
        run_step(moe, x)
        moe.gate.update_bias(1e-4)
    steps = moe.gate.expert_bias.double() / 1e-4
    assert steps.abs().max() > 10
    torch.testing.assert_close(steps, steps.round(), atol=1e-2, rtol=0)


def test_a_group_of_another_kind():
    with pytest.raises(TypeError, match=r"group must be a torch.distributed.ProcessGroup"):
        build_layer().gate.update_bias(0.1, group="world")
