"""Packed rows (`segment_ids`): each document as if it stood alone.

The reference is the batch in which each document is a row of its own, padded, with a mask.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support import strategies as make
from support.layer_variants import DIM, NUM_EXPERTS, ROUTERS, make_experts, make_layer_with_router
from support.packing import Documents, SameDraws
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mixture_of_experts import (
    ExpertChoiceGating,
    Experts,
    HeirarchicalMoE,
    MoE,
    Top2Gating,
    TopKGating,
    losses,
    ops,
)
from mixture_of_experts.dispatch.assignments import join_groups
from mixture_of_experts.dispatch.queues import find_positions_in_documents
from mixture_of_experts.gating.balance_losses import OF_EXPERT_GROUPS
from mixture_of_experts.replay import record_routing, replay_routing, save_choices
from mixture_of_experts.stats import routing_of, track_routing

TOKEN_CHOICE = [kind for kind in make.KINDS if kind != "expert_choice"]
PACKABLE = [name for name in ROUTERS if name != "ExpertChoice"]


@st.composite
def packed_ids(draw, *shape: int) -> Tensor:
    """Documents of packed rows: one after the other, or in any order; numbered from anywhere."""
    gen, count = make.make_generator(draw(make.seeds)), draw(st.sampled_from([3, 2, 4, 1, 20]))
    ids = torch.randint(count, shape, generator=gen)
    if draw(st.booleans()):
        ids = ids.sort(dim=-1).values
    names = torch.randperm(100, generator=gen)[:count] - 50
    return names[ids].to(draw(st.sampled_from([torch.int64, torch.int32])))


def weigh_all_losses(gate: Any) -> dict[str, float]:
    """A coefficient for each loss that a gate offers."""
    groups = getattr(gate, "num_groups", None)
    offered = [name for name in gate.optional_losses if groups or name not in OF_EXPERT_GROUPS]
    return {name: 0.1 * (i + 1) for i, name in enumerate(offered)}


@st.composite
def packed_layers(draw, kind: str) -> tuple[MoE, make.Router]:
    e, dim, seed = draw(make.draw_counts(kind)), draw(make.dims), draw(make.seeds)
    router = draw(make.KINDS[kind].drawn(e)).without_underflow()
    bank = draw(st.sampled_from(["ffn", "gated", "list", "routed", "enclosed"]))
    try:
        gate = router.build(dim, e, seed)
    except ValueError:
        assume(False)
    coefs = weigh_all_losses(gate)
    experts = make.Bank(bank).build(dim, e, seed)
    moe = MoE(dim, e, gate=gate, experts=experts, loss_coef=0.5, z_loss_coef=0.1, loss_coefs=coefs)
    return moe.train(draw(st.booleans())), router


def draw_side(data: Any, moe: MoE, router: make.Router, *shape: int) -> dict[str, Tensor]:
    gen, side = make.make_generator(data.draw(make.seeds)), {}
    if router.kind == "hash":
        side["token_ids"] = torch.randint(make.NUM_IDS, shape, generator=gen)
    if make.KINDS[router.kind].described_arguments and data.draw(st.integers(0, 3)) == 3:
        chosen = torch.rand(*shape, moe.num_experts, generator=gen).argsort(dim=-1)[..., : moe.gate.k]
        code = torch.randint(5, chosen.shape, generator=gen)
        given = torch.where(code == 0, -1, torch.where(code == 1, -2 - chosen, chosen))
        side["given_experts"] = given if given.shape[-1] == moe.gate.k else torch.full((*shape, moe.gate.k), -1)
    return side


def step(moe: nn.Module, x: Tensor, wanted: Tensor, mask: Tensor | None = None, **side: Tensor) -> dict[str, Tensor]:
    """Output, loss, all gradients, the moves of buffers and the numbers of statistics of a call."""
    moe = copy.deepcopy(moe)
    x = x.detach().requires_grad_()
    with track_routing(moe) as stats:
        out, aux_loss = moe(x, mask=mask, **side)
    loss = (out * wanted).sum() + aux_loss
    if loss.requires_grad:
        loss.backward()
    record = stats.last("gate")
    numbers = {f"statistics: {name}": torch.tensor(value) for name, value in record.scalars().items()}
    counts = {"requested": record.requested, "load": record.load, "groups": torch.tensor(record.groups)}
    grads = {name: weight.grad for name, weight in moe.named_parameters() if weight.grad is not None}
    return {
        "output": out.detach(),
        "loss": aux_loss.detach(),
        "input gradient": torch.zeros_like(x) if x.grad is None else x.grad,
        **{f"gradient of {name}": grad for name, grad in grads.items()},
        **{f"buffer {name}": buffer for name, buffer in moe.named_buffers()},
        **numbers,
        **counts,
    }


PER_TOKEN = ("output", "input gradient")


def assert_equals_padded_batch(moe: MoE, x: Tensor, ids: Tensor, mask: Tensor | None, **side: Tensor) -> None:
    documents, wanted = Documents(ids, mask), torch.randn(x.shape, generator=make.make_generator(0), dtype=x.dtype)
    with SameDraws(documents) as packed:
        found = step(moe, x, wanted, mask, segment_ids=ids, **side)
    padded = {name: documents.unpack(value) for name, value in side.items()}
    with SameDraws(documents, packed.draws):
        reference = step(moe, documents.unpack(x), documents.unpack(wanted), documents.mask, **padded)
    assert found.keys() == reference.keys()
    for name, value in reference.items():
        value = documents.pack(value) if name in PER_TOKEN else value
        got = found[name]
        if name == "input gradient" and mask is not None:
            got = torch.where(mask.unsqueeze(-1), got, 0)
        atol = 2e-6 if name.startswith("statistics") else make.ATOL  # they are float32
        torch.testing.assert_close(got, value, atol=atol, rtol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", TOKEN_CHOICE)
@given(data=st.data())
def test_packed_rows_equal_the_padded_batch(kind, data):
    """Outputs, all gradients, losses, statistics and counts, for every router, capacity, priority and mask."""
    moe, router = data.draw(packed_layers(kind))
    shape = data.draw(st.sampled_from([(2, 9), (1, 13), (3, 5), (2, 2, 4), (1, 1), (8,), (2, 0)]))
    ids, mask = data.draw(packed_ids(*shape)), data.draw(make.masks(*shape))
    x = make.normal(make.make_generator(data.draw(make.seeds)), *shape, moe.dim)
    side = draw_side(data, moe, router, *shape)
    assert_equals_padded_batch(moe, x, ids, mask, **side)


@pytest.mark.parametrize("name", PACKABLE)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("factor", [None, 0.7])
def test_every_router_of_the_package(name, training, factor):
    """With all losses that a router offers, each of them by name."""
    moe = make_layer_with_router(name).double().train(training)
    moe.gate.capacity_factor_train = moe.gate.capacity_factor_eval = factor
    moe.gate.min_expert_capacity = 1
    for over in ("group", "batch"):
        if name != "NoisyTopK":
            moe.gate.balance_over = over
        moe.loss_coefs = weigh_all_losses(moe.gate)
        gen = make.make_generator(3)
        x, ids = make.normal(gen, 2, 30, DIM), torch.randint(4, (2, 30), generator=gen)
        assert_equals_padded_batch(moe, x, ids, torch.rand(2, 30, generator=gen) < 0.8)
        assert_equals_padded_batch(moe, x, ids.sort(dim=-1).values, None)


@pytest.mark.parametrize("kind", make.TOKEN_CHOICE)
@given(data=st.data())
def test_packed_rows_equal_separate_documents(kind, data):
    """A document's outputs, drops and gradients are those that it has alone; the balancing loss is the mean."""
    num_experts = data.draw(make.draw_counts(kind))
    router = data.draw(make.TOKEN_CHOICE[kind](num_experts)).without_underflow()
    moe = MoE(3, num_experts, gate=router.build(3, num_experts, data.draw(make.seeds)), loss_coef=1.0)
    moe = moe.double().eval()
    ids, gen = data.draw(packed_ids(2, 9)), make.make_generator(data.draw(make.seeds))
    x, weight = (make.normal(gen, 2, 9, 3) for _ in range(2))
    documents, x = Documents(ids), x.requires_grad_()
    out, loss = moe(x, segment_ids=ids)
    alone = [moe(part.unsqueeze(0)) for part in documents.split(x)]
    parts = zip(documents.split(out), documents.split(weight), alone, strict=True)
    total, wanted = 0.0, 0.0
    for found, scale, (own, _) in parts:
        make.assert_same(found, own[0], "outputs")
        total, wanted = total + (found * scale).sum(), wanted + (own[0] * scale).sum()
    tensors = [x, *moe.parameters()]
    for got, own in zip(*(make.compute_gradients(each, tensors) for each in (total, wanted)), strict=True):
        make.assert_same(got, own, "gradients")
    if kind != "noisy" and getattr(moe.gate, "balance_over", "group") == "group":
        make.assert_same(loss, torch.stack([own for _, own in alone]).mean(), "loss")


def test_documents_do_not_share_capacity_or_balance():
    """20 and 44 tokens packed: what a layer without segment_ids gets wrong."""
    torch.manual_seed(0)
    gate = TopKGating(DIM, 8, 2, score="sigmoid", capacity_factor_train=1.0, priority="token", min_expert_capacity=1)
    moe = MoE(DIM, gate=gate, loss_coef=1.0).double()
    x, ids = torch.randn(1, 64, DIM).double(), (torch.arange(64) >= 20).long().unsqueeze(0)
    packed, loss = moe(x, segment_ids=ids)
    alone = [moe(part) for part in x.split([20, 44], dim=1)]
    torch.testing.assert_close(packed, torch.cat([out for out, _ in alone], dim=1), atol=1e-12, rtol=0)
    torch.testing.assert_close(loss, (alone[0][1] + alone[1][1]) / 2, atol=1e-12, rtol=0)
    together, loss_together = moe(x)
    assert (together - packed).abs().max() > 0.1
    assert (loss_together - loss).abs() > 1e-3


# Planted faults: each of them fails the comparison with the padded batch


def fault_one_queue(monkeypatch):
    monkeypatch.setattr(
        "mixture_of_experts.gating.base.find_positions_in_documents",
        lambda expert, sent, document, *order: find_positions_in_documents(expert, sent, document * 0, *order),
    )


def fault_one_capacity(monkeypatch):
    monkeypatch.setattr(
        "mixture_of_experts.dispatch.segments.Segments.map_to_assignments",
        lambda self, values, k: torch.full_like(self.document, int(values.max())).repeat_interleave(k, dim=-1),
    )


def fault_masked_tokens_count(monkeypatch):
    from mixture_of_experts.gating import base

    find = base.find_segments
    monkeypatch.setattr(base, "find_segments", lambda ids, mask: find(ids, None))


def fault_equal_ids_of_rows_are_one_document(monkeypatch):
    from mixture_of_experts.gating import base

    def find(ids, mask):
        found = base_find(ids.reshape(1, -1), None if mask is None else mask.reshape(1, -1))
        return type(found)(found.document.view(ids.shape), found.length)

    base_find = base.find_segments
    monkeypatch.setattr(base, "find_segments", find)


def fault_batch_loss(monkeypatch):
    monkeypatch.setattr(
        "mixture_of_experts.gating.balance_losses.load_balancing_loss_over_documents",
        lambda load, probs, segments, k, group: (load.sum(0) * probs.sum(0)).sum() / probs.shape[0] ** 2 / k,
    )


def fault_runs_are_documents(monkeypatch):
    from mixture_of_experts.gating import base

    find = base.find_segments
    starts = lambda ids: torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0)).cumsum(-1)  # noqa: E731
    monkeypatch.setattr(base, "find_segments", lambda ids, mask: find(starts(ids), mask))


FAULTS = {name: value for name, value in list(globals().items()) if name.startswith("fault_")}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, monkeypatch):
    moe = make_layer_with_router("Top2, by token").double()
    moe.gate.capacity_factor_train, moe.gate.min_expert_capacity = 0.7, 1
    gen = make.make_generator(3)
    x, ids = (
        make.normal(gen, 2, 30, DIM),
        (torch.randint(9, (2, 30), generator=gen) - 5).clamp(min=0),
    )  # of unequal lengths
    mask = torch.rand(2, 30, generator=gen) < 0.8
    assert_equals_padded_batch(moe, x, ids, mask)
    FAULTS[fault](monkeypatch)
    with pytest.raises(AssertionError):
        assert_equals_padded_batch(moe, x, ids, mask)


# Around the layer


def make_packed(n: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    gen = make.make_generator(seed)
    return make.normal(gen, 2, n, DIM), torch.randint(3, (2, n), generator=gen).sort(dim=-1).values


@pytest.mark.parametrize("factor", [None, 0.7])
@pytest.mark.parametrize("experts", ["Experts", "ExpertList", "custom"])
def test_experts_of_either_contract(experts, factor):
    """Experts that read slots compute dropless documents; with a capacity documents have no slots to read."""
    gate = Top2Gating(DIM, NUM_EXPERTS, capacity_factor_train=factor, min_expert_capacity=1, second_policy_train="all")
    moe = MoE(DIM, gate=gate, experts=make_experts(experts, NUM_EXPERTS)).double()
    x, ids = make_packed()
    if experts == "custom" and factor is not None:
        with pytest.raises(ValueError, match=r"segment_ids.* TanhExperts reads slots.*RoutedExperts.*mask="):
            moe(x, segment_ids=ids)
    else:
        assert_equals_padded_batch(moe, x, ids, None)


def make_unpackable() -> dict[str, Any]:
    experts = Experts(DIM, NUM_EXPERTS)
    return {
        "group_size=6 does not make each document a group": MoE(DIM, NUM_EXPERTS, group_size=6),
        "two levels": HeirarchicalMoE(DIM, (2, 2)),
        "ExpertChoiceGating does not support": MoE(DIM, gate=ExpertChoiceGating(DIM, NUM_EXPERTS), experts=experts),
    }


@pytest.mark.parametrize("message", make_unpackable())
def test_layers_that_cannot_pack_say_so_before_anything_changes(message):
    moe, (x, ids) = make_unpackable()[message].double(), make_packed()
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"segment_ids.*{message}.*separate.* row"):
        moe(x, segment_ids=ids)
    assert torch.get_rng_state().equal(before)


def test_segment_ids_are_checked():
    moe, (x, ids) = MoE(DIM, NUM_EXPERTS).double(), make_packed()
    with pytest.raises(ValueError, match=r"segment_ids must have shape \(2, 24"):
        moe(x, segment_ids=ids[:, :5])
    with pytest.raises(ValueError, match=r"segment_ids must have shape \(2, 24\), .* got \(2, 24, 1\)"):
        moe(x, segment_ids=ids.unsqueeze(-1))
    for wrong in (ids.double(), ids.bool()):
        with pytest.raises(TypeError, match="segment_ids must be an integer tensor, got torch"):
            moe(x, segment_ids=wrong)
    inner = TopKGating(DIM, 4, outer_expert_dims=(2,)).double()
    with pytest.raises(ValueError, match=r"cannot be combined with outer_expert_dims=\(2,\)"):
        inner(x.expand(2, *x.shape), segment_ids=ids.expand(2, *ids.shape))
    with pytest.raises(ValueError, match="cannot be combined with length="):
        moe.gate(x, segment_ids=ids, length=torch.tensor([3, 4]))


def test_dense_tensors_of_packed_rows():
    (x, ids), moe = make_packed(), MoE(DIM, NUM_EXPERTS).double()
    with pytest.raises(ValueError, match=r"packed rows \(segment_ids\) with a limited capacity .* no dense tensors"):
        moe.gate(x, segment_ids=ids).combine_tensor()
    gate = TopKGating(DIM, NUM_EXPERTS).double()  # dropless: the slots of a row are as without documents
    assert gate(x, segment_ids=ids).combine_tensor().equal(gate(x).combine_tensor())


class SummingGate(TopKGating):
    """A gate that sums its probabilities over rows by itself."""

    def balance_of_scores(self, tokens, score, probs, expert, chosen):
        return self.balance(expert, chosen, probs.sum(dim=-2), tokens.length)


def test_a_gate_of_ones_own_that_sums_over_rows_is_found():
    (x, ids), gate = make_packed(), SummingGate(DIM, NUM_EXPERTS).double()
    gate(x)
    with pytest.raises(ValueError, match=r"lengths .* rows are packed \(segment_ids\), call balance_loss"):
        gate(x, segment_ids=ids)


@pytest.mark.parametrize("name", ["TopK, expert bias", "Top2, policy all", "ReLU"])
def test_computed_padding_in_packed_rows(name):
    """`counted=`: padding is computed, and changes neither losses nor counts of the documents."""
    moe, (x, ids) = make_layer_with_router(name).double(), make_packed()
    moe.gate.capacity_factor_train, mask = None, torch.rand(ids.shape, generator=make.make_generator(5)) < 0.7
    masked, counted = copy.deepcopy(moe), copy.deepcopy(moe)
    wanted, loss = masked(x, mask, segment_ids=ids)
    out, found = counted(x, counted=mask, segment_ids=ids)
    torch.testing.assert_close(out[mask], wanted[mask], atol=1e-12, rtol=0)
    torch.testing.assert_close(found, loss, atol=1e-12, rtol=0)
    assert out[~mask].any()
    for each in (out, wanted):
        each[mask].sum().backward()
    for (name, buffer), other in zip(masked.named_buffers(), counted.buffers(), strict=True):
        assert buffer.equal(other), name


def test_ordinary_calls_have_no_documents():
    x, _ = make_packed()
    gate = TopKGating(DIM, NUM_EXPERTS, capacity_factor_train=1.0).double()
    assert gate.read(x).segments is None
    assert gate(x).segments is None


@pytest.mark.parametrize("implementation", ["plain", "grouped", "batched", "cpu"])
def test_every_implementation_of_experts_keeps_the_dropped_choices_dropped(implementation):
    gate = TopKGating(DIM, NUM_EXPERTS, capacity_factor_train=0.6, min_expert_capacity=1)
    moe, (x, ids) = MoE(DIM, gate=gate, loss_coef=1.0), make_packed()
    x = x.float()
    assert not (routing := gate(x, segment_ids=ids)).kept.all()
    assert routing_of(moe, x, segment_ids=ids)["gate"].kept.equal(routing.kept)
    assert join_groups(routing).routing is None
    with ops.use(implementation):
        out = moe(x, segment_ids=ids)[0]
    documents = Documents(ids)
    padded = moe(documents.unpack(x), documents.mask)[0]
    torch.testing.assert_close(out, documents.pack(padded), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TopK, jitter, by score", "Top2, by token", "TopK, expert bias"])
@pytest.mark.parametrize("factor", [None, 0.7])
def test_compiled_at_dynamic_lengths_without_a_graph_break(name, factor):
    moe = make_layer_with_router(name).double()
    moe.gate.capacity_factor_train, moe.gate.min_expert_capacity = factor, 1
    if hasattr(moe.gate, "jitter"):
        moe.gate.jitter = 0.0
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(moe, backend=counter, fullgraph=True, dynamic=True)
    frames = set()
    for n in (24, 40, 33):
        x, ids = make_packed(n, seed=n)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        results = [run(each, segment_ids=ids) for run, each in zip((compiled, moe), inputs, strict=True)]
        grads = [
            torch.autograd.grad(out.square().sum() + loss, [each, *moe.parameters()], allow_unused=True)
            for (out, loss), each in zip(results, inputs, strict=True)
        ]
        torch.testing.assert_close(results[0], results[1], atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(grads[0], grads[1], atol=1e-10, rtol=1e-10)
        frames.add(counter.frame_count)
    assert len(frames) == 1  # no other length is compiled again


class PackedCall(nn.Module):
    """A layer called with packed rows."""

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor, segment_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.moe(x, segment_ids=segment_ids)


EXPORTED_SIZES = [(2, 12), (1, 7), (3, 31), (3, 3), (1, 1)]


def make_exported(priority: str, factor: float | None, experts: str = "Experts") -> nn.Module:
    settings = dict(capacity_factor_eval=factor, min_expert_capacity=1, priority=priority)
    gate = TopKGating(DIM, NUM_EXPERTS, 2, **settings)  # pyright: ignore[reportArgumentType]
    return PackedCall(MoE(DIM, gate=gate, experts=make_experts(experts, NUM_EXPERTS), loss_coef=1.0)).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("priority", "factor", "experts"),
    [("choice", 0.7, "Experts"), ("token", None, "Experts"), ("score", 0.7, "ExpertList")],
)
def test_exported_at_dynamic_lengths(priority, factor, experts):
    """No size of the graph depends on the number of documents, and their capacities are computed in it."""
    moe, shape = make_exported(priority, factor, experts), dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    x, ids = torch.randn(2, 12, DIM), torch.randint(3, (2, 12))
    program = torch.export.export(moe, (x, ids), dynamic_shapes=(shape, shape)).module()
    for b, n in EXPORTED_SIZES:
        for count in (3, 1, n):
            x, ids = torch.randn(b, n, DIM), torch.randint(count, (b, n))
            torch.testing.assert_close(program(x, ids), moe(x, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # in the exporter
@pytest.mark.parametrize(
    ("priority", "factor", "dynamic"),
    [("choice", None, True), ("token", 0.7, False), ("score", 0.7, True)],
)
def test_onnxruntime_computes_packed_rows(priority, factor, dynamic, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    moe, sizes = make_exported(priority, factor), EXPORTED_SIZES if dynamic else EXPORTED_SIZES[:1]
    shape = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC) if dynamic else None
    example = torch.randn(2, 12, DIM), torch.randint(3, (2, 12))
    with torch.no_grad():
        program: Any = torch.onnx.export(
            moe, example, dynamo=True, optimize=False, dynamic_shapes=shape and (shape, shape), verbose=False
        )
    program.save(tmp_path / "layer.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx", options)
    names = [each.name for each in session.get_inputs()]
    for b, n in sizes:
        for count in (3, 1, n):
            inputs = torch.randn(b, n, DIM), torch.randint(count, (b, n))
            found = session.run(None, dict(zip(names, (each.numpy() for each in inputs), strict=True)))
            wanted = [each.detach() for each in moe(*inputs)]
            torch.testing.assert_close([torch.tensor(each) for each in found], wanted, atol=1e-5, rtol=1e-5)


# Records


@pytest.mark.parametrize("factor", [None, 0.7])
@pytest.mark.parametrize("masked", [False, True])
def test_records_of_packed_rows_are_those_of_the_padded_batch(factor, masked):
    """Each document is a sequence, in the order of first tokens; records of either batch replay in the other."""
    gate = TopKGating(DIM, NUM_EXPERTS, capacity_factor_train=factor, min_expert_capacity=1)
    moe, gen = MoE(DIM, gate=gate).double(), make.make_generator(2)
    x, ids = make.normal(gen, 2, 15, DIM), torch.randint(3, (2, 15), generator=gen)
    mask = torch.rand(2, 15, generator=gen) < 0.8 if masked else None
    documents = Documents(ids, mask)
    with record_routing(moe, weights=True) as records:
        out, _ = moe(x, mask, segment_ids=ids)
    with record_routing(moe, weights=True) as wanted:
        moe(documents.unpack(x), documents.mask)
    for found, expected in zip(records["gate"], wanted["gate"], strict=True):
        assert found.equal(expected)
    other = copy.deepcopy(moe)
    nn.init.normal_(other.gate.w_gating)
    assert not other(x, mask, segment_ids=ids)[0].equal(out)
    for each in (records, wanted):
        with replay_routing(other, each):
            torch.testing.assert_close(other(x, mask, segment_ids=ids)[0], out, atol=1e-12, rtol=0)
    with replay_routing(other, records):
        padded = other(documents.unpack(x), documents.mask)[0]
    torch.testing.assert_close(documents.pack(padded), out, atol=1e-12, rtol=0)
    with (
        replay_routing(other, records),
        pytest.raises(ValueError, match=rf"has 2 sequences .* have {len(documents.places)}"),
    ):
        other(x, mask, segment_ids=ids * 0)


def test_choices_that_are_saved_for_a_recomputation_are_used():
    moe, (x, ids) = make_layer_with_router("Top2, policy random").double(), make_packed()
    moe.gate.capacity_factor_train, moe.gate.min_expert_capacity = 0.7, 1
    contexts = partial(create_selective_checkpoint_contexts, save_choices)
    results = []
    for run in (moe, partial(checkpoint, moe, use_reentrant=False, context_fn=contexts)):
        torch.manual_seed(1)
        inputs = x.clone().requires_grad_()
        out, loss = run(inputs, segment_ids=ids)
        results.append((out, loss, *torch.autograd.grad(out.sum() + loss, [inputs, *moe.parameters()])))
    torch.testing.assert_close(results[0], results[1], atol=1e-12, rtol=0)


class OwnLoss(TopKGating):
    """Computes a loss over rows, which in packed rows are not the groups."""

    def balance_of_scores(self, tokens, score, probs, expert, chosen):
        proxy = probs.sum(dim=-2)
        return losses.load_balancing_loss_from_choices(expert, chosen, proxy, tokens.length, self.k)


class OwnBalance(TopKGating):
    def balance(self, *args, **kwargs):
        return super().balance(*args, **kwargs) * 2


class OwnCapacity(TopKGating):
    def capacity(self, tokens):
        return 2, None


@pytest.mark.parametrize("gate", [OwnLoss, OwnBalance])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_gate_whose_loss_knows_rows_alone_raises(gate, rows):
    """With one row too, where the shapes of its tensors fit those of the documents."""
    moe, x = MoE(8, gate=gate(8, 4)), torch.randn(rows, 6, 8)
    assert moe(x)[1].isfinite()
    with pytest.raises(ValueError, match="balance_loss"):
        moe(x, segment_ids=torch.tensor([[0, 0, 1, 1, 1, 2]] * rows))


def test_a_capacity_without_limits_is_that_of_each_document():
    moe, x = MoE(8, gate=OwnCapacity(8, 4), loss_coef=0.0).double(), torch.randn(1, 8, 8, dtype=torch.float64)
    packed, _ = moe(x, segment_ids=torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]))
    for part in (slice(0, 3), slice(3, 8)):
        torch.testing.assert_close(packed[:, part], moe(x[:, part])[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int32])
def test_integer_dtypes_of_ids(dtype):
    moe, x, mask = MoE(8, gate=TopKGating(8, 4)), torch.randn(1, 5, 8), torch.tensor([[True, True, False, True, True]])
    ids = torch.tensor([[3, 3, 3, 9, 9]])
    assert moe(x, mask, segment_ids=ids.to(dtype))[0].equal(moe(x, mask, segment_ids=ids)[0])


def test_explain_call_names_the_gate_of_a_packed_call():
    moe, x = MoE(8, gate=TopKGating(8, 4)), torch.randn(1, 4, 8)
    explanation = ops.explain_call(moe, x, segment_ids=torch.tensor([[0, 0, 1, 1]]))
    assert [gate.implementation for gate in explanation.gates] == ["operators"]
