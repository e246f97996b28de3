"""`counted=`: tokens that are computed by their own choices, and that nothing counts.

Each router is compared with itself: at real tokens, in losses and counts with a call under a mask; at padding with a
call in which all tokens are real.
"""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import pytest
import torch
from support.layer_variants import (
    DIM,
    NUM_EXPERTS,
    ROUTERS,
    assert_all_equal,
    compute_gradients,
    make_layer_with_router,
    run_layer,
)
from torch import Tensor, nn

from mixture_of_experts import ExpertChoiceGating, HashGating, HeirarchicalMoE, MoE, TopKGating
from mixture_of_experts.gating import SparseMixerGating
from mixture_of_experts.replay import RoutingRecords, record_routing, replay_routing
from mixture_of_experts.stats import track_routing

DROPLESS = [name for name in ROUTERS if name != "ExpertChoice"]
MASK = torch.tensor([[False, False, True, True, True, True], [True, True, True, True, True, False]])


def make_layer(name: str) -> Any:
    moe = make_layer_with_router(name)
    moe.gate.capacity_factor_train = moe.gate.capacity_factor_eval = None
    moe.loss_coefs = {"balance_batch": 0.1}
    return moe


def make_tokens() -> Tensor:
    return torch.randn(*MASK.shape, DIM, generator=torch.Generator().manual_seed(1)).requires_grad_()


def read_counts(moe: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in moe.named_buffers()}


@pytest.mark.parametrize("name", DROPLESS)
def test_real_tokens_losses_and_gradients_are_those_under_a_mask(name):
    masked, x = make_layer(name), make_tokens()
    counting = copy.deepcopy(masked)
    wanted, found = run_layer(masked, x, mask=MASK), run_counted(counting, x)
    assert_close(found[0][MASK], wanted[0][MASK])
    assert_close(found[1], wanted[1])
    # gradients of what real tokens and losses give
    real = MASK.unsqueeze(-1)
    grads, wanted_grads = (
        compute_gradients(moe, x, (out * real, loss)) for moe, (out, loss) in ((counting, found), (masked, wanted))
    )
    for key, grad in wanted_grads.items():
        assert_close(grads[key], grad)
    assert_all_equal(read_counts(counting), read_counts(masked))


@pytest.mark.parametrize("name", DROPLESS)
@pytest.mark.parametrize("training", [True, False])
def test_padding_is_computed_by_its_own_choices(name, training):
    """As if all tokens were real: with the same random numbers the same outputs."""
    moe, x = make_layer(name).train(training), make_tokens()
    assert_close(run_counted(moe, x)[0], run_layer(moe, x)[0])


@pytest.mark.parametrize("name", DROPLESS)
def test_padding_never_trains_a_router(name):
    moe, x = make_layer(name), make_tokens()
    out, _ = run_counted(moe, x)
    grads = torch.autograd.grad(out[~MASK].square().sum(), list(moe.gate.parameters()), allow_unused=True)
    assert all(grad is None or not grad.any() for grad in grads)
    assert torch.autograd.grad(run_counted(moe, x)[0][~MASK].square().sum(), moe.experts.w1)[0].any()


@pytest.mark.parametrize("name", DROPLESS)
def test_routing_equals_masked_routing(name):
    """But for ids, probabilities and states at padding, which nothing reads, and the field `padding_weight`."""
    gate, x = make_layer(name).gate.eval(), make_tokens()
    torch.manual_seed(0)
    wanted = gate(x, mask=MASK)
    torch.manual_seed(0)
    found = gate(x, counted=MASK)
    assert wanted.padding_weight is None
    assert not found.padding_weight.requires_grad
    assert not found.padding_weight.unflatten(-1, (-1, gate.k))[MASK].any()
    for field in fields(wanted):
        one, other = getattr(found, field.name), getattr(wanted, field.name)
        if field.name in ("expert", "probs", "primary", "chosen", "state") and isinstance(other, Tensor):
            one, other = (part.reshape(*MASK.shape, -1)[MASK] for part in (one, other))
        if isinstance(other, Tensor) and field.name != "padding_weight":
            assert_close(one, other)
    assert found.losses.keys() == wanted.losses.keys()
    with track_routing(gate) as tracked:
        gate(x, counted=MASK)
    with track_routing(gate) as tracked_masked:
        gate(x, mask=MASK)
    assert tracked.scalars() == pytest.approx(tracked_masked.scalars(), nan_ok=True)


def run_counted(moe: Any, x: Tensor, mask: Tensor = MASK) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return moe(x, counted=mask)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_routers_with_side_inputs():
    """Token ids, and sampling one expert after the other."""
    x, ids = make_tokens(), torch.arange(12).view(2, 6)
    moe = MoE(DIM, gate=HashGating(DIM, 4, num_ids=12))
    assert_close(moe(x, token_ids=ids, counted=MASK)[0], moe(x, token_ids=ids)[0])
    moe = MoE(DIM, gate=SparseMixerGating(DIM, 4))
    assert_close(run_counted(moe, x)[0], run_layer(moe, x)[0])


def test_a_shared_expert_computes_padding_too():
    moe, x = MoE(DIM, gate=TopKGating(DIM, 4), shared_expert=nn.Linear(DIM, DIM)), make_tokens()
    assert_close(moe(x, counted=MASK)[0], moe(x)[0])
    assert not moe(x, mask=MASK)[0][~MASK].any()


def test_records_leave_padding_out_and_a_replay_lets_it_choose():
    moe, x = MoE(DIM, gate=TopKGating(DIM, NUM_EXPERTS)).eval(), make_tokens()
    with record_routing(moe) as records:
        moe(x, counted=MASK)
    assert records.lengths("gate") == [4, 5]
    others = RoutingRecords({"gate": [(record + 1) % NUM_EXPERTS for record in records["gate"]]})
    with replay_routing(moe, others), record_routing(moe) as replayed:
        out, _ = moe(x, counted=MASK)
    assert all(map(torch.equal, replayed["gate"], others["gate"]))
    assert_close(out[~MASK], moe(x)[0][~MASK])
    assert not torch.allclose(out[MASK], moe(x)[0][MASK], atol=1e-3)
    moe.gate.forced = "balanced"
    assert_close(moe(x, counted=MASK)[0][MASK], moe(x, mask=MASK)[0][MASK])


@pytest.mark.slow
def test_compiled_and_exported():
    moe, x = MoE(DIM, gate=TopKGating(DIM, 4)).eval(), make_tokens().detach()
    for traced in (
        torch.compile(moe, fullgraph=True, backend="eager"),
        torch.export.export(moe, (x,), {"counted": MASK}).module(),
    ):
        assert_close(traced(x, counted=MASK)[0], moe(x)[0])


def test_rejects_incompatible_gates():
    x = make_tokens()
    with pytest.raises(ValueError, match=r"`counted` requires a dropless gate, but .*1\.25"):
        MoE(DIM)(x, counted=MASK)
    moe = MoE(DIM, gate=TopKGating(DIM, 4))
    with pytest.raises(ValueError, match=r"`counted` cannot be combined with `mask` or `importance`"):
        moe(x, MASK, counted=MASK)
    with pytest.raises(TypeError, match="counted must be a boolean tensor"):
        moe(x, counted=MASK.long())
    with pytest.raises(ValueError, match=r"counted must have shape \(2, 6\)"):
        moe.gate(x, counted=MASK[:, :5])
    for other in (MoE(DIM, gate=ExpertChoiceGating(DIM, 4)), HeirarchicalMoE(DIM, (2, 2))):
        with pytest.raises(TypeError, match="does not support the side input 'counted'"):
            other(x, counted=MASK)
