"""A router of one's own, the one that docs/routers.md shows: it gets everything the package's routers have."""

from __future__ import annotations

import pytest
import torch
from recipes import recipe
from torch import Tensor, nn

from mixture_of_experts import Experts, HeirarchicalMoE, MoE, TopKGating

TopPGating = recipe("A router of your own")["TopPGating"]
DIM = 6


def of_probabilities(*rows: list[float], **settings) -> tuple[nn.Module, Tensor]:
    """A gate and one group of tokens to which it gives these probabilities."""
    gate = TopPGating(len(rows), len(rows[0]), **settings).double()
    gate.w_gating.data.copy_(torch.tensor(rows, dtype=torch.float64).log())
    return gate, torch.eye(len(rows), dtype=torch.float64).unsqueeze(0)


def layer(gate: nn.Module, seed: int = 0) -> MoE:
    """A layer in float64 around a gate, its gate weights drawn wide enough to choose now one expert, now three."""
    torch.manual_seed(seed)
    moe = MoE(DIM, gate=gate, experts=Experts(DIM, gate.num_experts, 8)).double()
    nn.init.normal_(gate.w_gating)
    return moe


def two_levels(**settings) -> HeirarchicalMoE:
    torch.manual_seed(0)
    moe = HeirarchicalMoE(
        DIM,
        gate_outer=TopPGating(DIM, 3, k=2, **settings),
        gate_inner=TopPGating(DIM, 4, k=3, outer_expert_dims=(3,), **settings),
        experts=Experts(DIM, (3, 4), 8),
    ).double()
    nn.init.normal_(moe.gate_outer.w_gating)
    nn.init.normal_(moe.gate_inner.w_gating)
    return moe


LAYERS = {
    "one level": lambda **settings: layer(TopPGating(DIM, 5, k=3, **settings)),
    "two levels": two_levels,
}


def test_the_fewest_experts_that_reach_p():
    """Four tokens that a human can check: sure of one expert, of two, of none, and at p to the letter."""
    gate, tokens = of_probabilities(
        [0.7, 0.1, 0.1, 0.1],
        [0.1, 0.35, 0.2, 0.35],
        [0.25, 0.25, 0.25, 0.25],
        [0.125, 0.5, 0.25, 0.125],
        p=0.5,
        k=2,
    )
    routing = gate(tokens)
    found = [sorted(e for e in range(4) if routing.dispatch_tensor()[0, t, e].any()) for t in range(4)]
    assert found == [[0], [1, 3], [0, 1], [1]]
    weights = routing.combine_tensor()[0].sum(dim=-1)
    torch.testing.assert_close(weights[1], torch.tensor([0.0, 0.35, 0.0, 0.35], dtype=torch.float64))


def test_k_limits_the_number():
    gate, tokens = of_probabilities([0.2] * 5, p=0.99, k=3)
    assert gate(tokens).kept.sum() == 3


def test_with_p_out_of_reach_it_is_topk():
    moe, other = layer(TopPGating(DIM, 5, k=3, p=2.0)), layer(TopKGating(DIM, 5, k=3, normalize=False))
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    (out, aux_loss), (expected, expected_loss) = moe(x), other(x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(aux_loss, 3 * expected_loss)  # its loss counts every choice, TopK's is divided by k


def test_balance_loss_is_the_mean_number_of_choices_when_balanced():
    for p, number in ((0.4, 1), (0.6, 2), (0.9, 4)):
        row = torch.tensor([0.5, 0.25, 0.125, 0.125])
        gate, tokens = of_probabilities(*(row.roll(shift).tolist() for shift in range(4)), p=p)
        routing = gate(tokens)
        assert routing.kept.sum() == 4 * number
        assert routing.balance_loss.item() == pytest.approx(number)


@pytest.mark.parametrize("factor", [0.5, None])
@pytest.mark.parametrize("priority", ["choice", "token", "score"])
@pytest.mark.parametrize("kind", LAYERS)
def test_padding_makes_no_difference(kind, priority, factor):
    """Outputs, loss and gradients of padded sequences are those of the sequences without their padding."""
    moe = LAYERS[kind](capacity_factor_train=factor, min_expert_capacity=1, priority=priority)
    lengths = (7, 3, 0)
    sequences = [torch.randn(1, n, DIM, dtype=torch.float64, requires_grad=True) for n in lengths]
    padded = [
        torch.cat([s, torch.full((1, 7 - s.shape[1], DIM), torch.nan, dtype=torch.float64)], 1) for s in sequences
    ]
    mask = torch.arange(7) < torch.tensor(lengths).unsqueeze(1)
    out, aux_loss = moe(torch.cat(padded), mask=mask)
    separate = [moe(sequence) for sequence in sequences[:2]]
    wanted = [*sequences[:2], *moe.parameters()]
    found = torch.autograd.grad(out.sum() + aux_loss, wanted)
    expected_loss = sum(result.sum() for result, _ in separate) + (separate[0][1] + separate[1][1]) / 2
    expected = torch.autograd.grad(expected_loss, wanted)
    for index, (result, _) in enumerate(separate):
        torch.testing.assert_close(out[index, : lengths[index]], result[0])
    assert not out[~mask].any()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", LAYERS)
def test_capacity_limits_an_expert(kind):
    moe = LAYERS[kind](capacity_factor_train=0.5, min_expert_capacity=1)
    gate = moe.gate if kind == "one level" else moe.gate_outer
    routing = gate(torch.randn(2, 30, DIM, dtype=torch.float64))
    assert routing.capacity == int(gate.choices * 30 * 0.5 / gate.num_experts)
    load = routing.dispatch_tensor().sum(dim=(1, 3))
    assert load.max() == routing.capacity
    assert (routing.chosen & ~routing.kept).any()


@pytest.mark.parametrize("kind", LAYERS)
def test_priority_token_is_causal(kind):
    moe = LAYERS[kind](capacity_factor_train=0.4, min_expert_capacity=1, priority="token")
    x = torch.randn(1, 16, DIM, dtype=torch.float64)
    out, _ = moe(x)
    for t in range(1, 16):
        changed = torch.cat([x[:, :t], torch.randn(1, 16 - t, DIM, dtype=torch.float64)], dim=1)
        torch.testing.assert_close(moe(changed)[0][:, :t], out[:, :t])


@pytest.mark.parametrize("kind", LAYERS)
def test_the_task_trains_it(kind):
    moe = LAYERS[kind]()
    moe.loss_coef = 0.0
    out, aux_loss = moe(torch.randn(2, 9, DIM, dtype=torch.float64))
    (out.square().sum() + aux_loss).backward()
    assert all(parameter.grad.any() for parameter in moe.parameters())


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_module_routes_in_float32(kind, dtype):
    moe = LAYERS[kind]().to(dtype)
    x = torch.randn(2, 9, DIM, dtype=dtype)
    out, aux_loss = moe(x)
    gate = moe.gate if kind == "one level" else moe.gate_outer
    assert (out.dtype, aux_loss.dtype, gate(x).weight.dtype) == (dtype, torch.float32, torch.float32)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces an autograd.Function
def test_compiles_as_one_graph():
    moe = layer(TopPGating(DIM, 5, k=3, capacity_factor_train=0.8))
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(x), moe(x), strict=True):
        torch.testing.assert_close(ours, expected)
