"""Record and replay: what gates chose they choose again, whatever dtype, padding, batch or recomputation."""

from __future__ import annotations

import contextlib
import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any

import numpy as np
import pytest
import torch
from support.layer_variants import DIM as PATHS_DIM
from support.layer_variants import ROUTERS, make_layer_with_router, make_top2
from support.record_helpers import assert_records_equal, count_hooks, record_forward
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint, create_selective_checkpoint_contexts

from mixture_of_experts import (
    Choices,
    ExpertChoiceGating,
    HashGating,
    HeirarchicalMoE,
    MoE,
    NoisyTopKGating,
    OutputOnly,
    TokenChoiceGate,
    Top2Gating,
    TopKGating,
    recipes,
)
from mixture_of_experts.gating import BALANCE_LOSSES, SparseMixerGating, TopPGating, logits
from mixture_of_experts.gating.balance_losses import OF_EXPERT_GROUPS
from mixture_of_experts.gating.overrides import KEEP_ROUTER_CHOICE
from mixture_of_experts.replay import RoutingRecords, record_routing, replay_routing, save_choices
from mixture_of_experts.replay import records as replay_records

DIM = 8
TIGHT = dict(capacity_factor_train=0.5, min_expert_capacity=1)
LAYERS = {
    "top-k": lambda: MoE(DIM, gate=TopKGating(DIM, 4)),
    "top-k, groups": lambda: MoE(
        DIM, gate=TopKGating(DIM, 8, score="sigmoid", num_groups=4, top_groups=2, expert_bias=True, scale=2.0)
    ),
    "top-k, capacity": lambda: MoE(DIM, gate=TopKGating(DIM, 4, priority="score", **TIGHT)),
    "top-p": lambda: MoE(DIM, gate=TopPGating(DIM, 8, 4, p=0.5, normalize=True, **TIGHT)),
    "top-p, dropless": lambda: MoE(DIM, gate=TopPGating(DIM, 8, 4, p=0.5)),
    "top-2": lambda: MoE(DIM, 4),
    "top-2, capacity": lambda: MoE(DIM, 4, second_place_loss=True, **TIGHT),
    "noisy": lambda: MoE(DIM, gate=NoisyTopKGating(DIM, 4)),
    "sparse mixer": lambda: MoE(DIM, gate=SparseMixerGating(DIM, 4, tolerance=0.3)),
}
MASK = torch.arange(6) < torch.tensor([[6], [3], [4]])


def run_model(model: nn.Module, x: Tensor, mask: Tensor | None, seed: int) -> tuple[Tensor, ...]:
    """Output, loss, and the gradients of input and weights; noise is that of the seed."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    out, aux_loss = model(x, mask)
    grads = torch.autograd.grad(out.square().sum() + aux_loss, [x, *model.parameters()], allow_unused=True)
    return out, aux_loss, *(grad for grad in grads if grad is not None)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_replay_is_exact(name, masked):
    """Outputs, losses and all gradients, whatever is drawn; then with the padding on the other side, in another order
    and of a layer whose router is another one: there the choices are those recorded, and the weights are its own."""
    torch.manual_seed(0)
    model, x, mask = LAYERS[name](), torch.randn(3, 6, DIM), MASK if masked else None
    with record_routing(model) as records:
        wanted = run_model(model, x, mask, seed=1)
    assert records.num_sequences == 3
    assert records.lengths(records.layers[-1]) == ([6, 3, 4] if mask is not None else [6, 6, 6])
    seed = 1 if name in ("noisy", "sparse mixer") else 2  # whose weights are drawn
    with replay_routing(model, records):
        torch.testing.assert_close(run_model(model, x, mask, seed), wanted, atol=1e-6, rtol=1e-5)

    order = [2, 0, 1]
    other = torch.zeros_like(x)
    moved = MASK[order].flip(-1) if mask is not None else None
    other[... if moved is None else moved] = x[order][... if mask is None else mask[order]]
    with record_routing(model) as again, replay_routing(model, records.select(order)):
        out = run_model(model, other, moved, seed)[0]
    if seed == 2:
        one, two = (out, wanted[0][order]) if mask is None else (out[moved], wanted[0][order][mask[order]])
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
    assert_records_equal(again, records.select(order))

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    with replay_routing(model, records), record_routing(model) as again:
        run_model(model, x, mask, seed=3)
    with record_routing(model) as free:
        run_model(model, x, mask, seed=3)
    assert_records_equal(again, records)
    assert any(not a.equal(b) for layer in free for a, b in zip(free[layer], records[layer], strict=True))


NAMED_LAYERS = {
    "top-k": lambda: MoE(DIM, gate=TopKGating(DIM, 8, 3, num_groups=4, top_groups=2, **TIGHT)),
    "top-p": LAYERS["top-p"],
    "noisy": lambda: MoE(DIM, gate=NoisyTopKGating(DIM, 4, **TIGHT)),
    "sparse mixer": lambda: MoE(DIM, gate=SparseMixerGating(DIM, 4, **TIGHT)),
    "top-2, all": lambda: MoE(DIM, 4, second_policy_train="all", **TIGHT),
    "top-2, none": lambda: MoE(DIM, 4, second_policy_train="none", **TIGHT),
    "top-2, threshold": lambda: MoE(DIM, 4, second_policy_train="threshold", second_threshold_train=0.3, **TIGHT),
    "top-2, random": lambda: MoE(DIM, 4, capacity_factor_train=None),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NAMED_LAYERS)
def test_losses_by_name_are_replayed(name, masked):
    """A choice that capacity dropped counts, as it did before: only what is computed falls out."""
    torch.manual_seed(0)
    model, x, mask = NAMED_LAYERS[name](), torch.randn(3, 6, DIM), MASK if masked else None
    gates = [module for module in model.modules() if isinstance(module, TokenChoiceGate)]
    names = set(BALANCE_LOSSES) - (set() if name == "top-k" else set(OF_EXPERT_GROUPS))
    model.loss_coefs, seen = dict.fromkeys(names, 0.1), []
    for gate in gates:
        gate.register_forward_hook(lambda gate, args, routing: seen.append(routing))
    with record_routing(model) as records:
        wanted = run_model(model, x, mask, seed=1)
    with replay_routing(model, records):
        again = run_model(model, x, mask, seed=1)
    assert name == "top-2, random" or any((routing.sent & ~routing.kept).any() for routing in seen)
    first, second = seen[: len(gates)], seen[len(gates) :]
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one.losses, other.losses)
        assert names <= one.losses.keys()
    torch.testing.assert_close(again, wanted, atol=1e-6, rtol=1e-5)


REPLAYED = {
    **{
        name: partial(make_layer_with_router, name) for name in ROUTERS if name != "ExpertChoice"
    },  # it has no k choices
    "Top2, policy none": lambda: MoE(PATHS_DIM, gate=make_top2("none")),
    "SparseMixer": lambda: MoE(PATHS_DIM, gate=SparseMixerGating(PATHS_DIM, 4)),
    "Hash": lambda: MoE(PATHS_DIM, gate=HashGating(PATHS_DIM, 4, num_ids=9)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", REPLAYED)
def test_a_replay_draws_as_many_random_numbers_as_the_recording(name, training):
    """Dropout after the layer is then the same, with each loss that the gate can report."""
    moe, x = REPLAYED[name]().train(training), torch.randn(3, 6, PATHS_DIM)
    side = {"token_ids": torch.randint(9, (3, 6))} if name == "Hash" else {}

    def dropped() -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        out = torch.dropout(moe(x, **side)[0], 0.5, train=True)
        return out, torch.get_rng_state()

    has_groups = getattr(moe.gate, "num_groups", None) is not None
    offered = [loss for loss in moe.gate.optional_losses if has_groups or loss not in OF_EXPERT_GROUPS]
    for loss in (None, *offered):
        moe.loss_coefs = {} if loss is None else {loss: 0.1}
        with record_routing(moe, weights=True) as records:
            wanted, state = dropped()
        with replay_routing(moe, records):
            out, state_after_replay = dropped()
        assert state_after_replay.equal(state), f"{loss}: the replay drew other random numbers"
        torch.testing.assert_close(out, wanted, msg=lambda text, loss=loss: f"{loss}: {text}")


class Model(nn.Module):
    """A small language model without attention, whose layers have 32 experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(100, 64), nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 100, bias=False))
        layers = (OutputOnly(recipes.qwen3(64, num_experts=32, hidden_dim=32, k=4)) for _ in range(4))
        self.layers = nn.ModuleList(nn.Sequential(nn.RMSNorm(64), layer) for layer in layers)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x).float().log_softmax(-1)


def test_two_dtypes_disagree_and_replay_brings_them_together():
    """A rollout in bfloat16, trained in float32: 14 of 800 choices differ, log-probabilities by up to 0.24; with its
    choices by 0.017, which is what the rounding of products makes."""
    torch.manual_seed(0)
    trainer = Model().eval()
    rollout, tokens = copy.deepcopy(trainer).bfloat16(), torch.randint(100, (4, 50))
    with torch.no_grad():
        with record_routing(rollout) as records:
            wanted = rollout(tokens)
        with record_routing(trainer) as own:
            free = trainer(tokens)
        with replay_routing(trainer, records):
            replayed = trainer(tokens)
    choices = (
        [set(row) for of in each.values() for record in of for row in record.tolist()] for each in (own, records)
    )
    flipped = sum(one != other for one, other in zip(*choices, strict=True))
    assert 5 <= flipped <= 40
    assert float((free - wanted).abs().max()) > 0.1
    assert float((replayed - wanted).abs().max()) < 0.03


class DeepModel(nn.Module):
    """A layer within a model."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = MoE(DIM, gate=TopKGating(DIM, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x)[0]


@torch.no_grad()
def replace_router(moe: nn.Module) -> Any:
    """A copy whose routers differ by noise, as another engine's do."""
    other = copy.deepcopy(moe)
    for name, parameter in other.named_parameters():
        if "gate" in name:
            parameter += 0.1 * torch.randn_like(parameter)
    return other


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_with_weights_the_routers_part_of_a_difference_is_zero(name, masked):
    """To the bit, with capacity, chance and padding. A copy with another router gives the same outputs, and so the same
    log-probabilities; with choices alone it does not."""
    torch.manual_seed(0)
    moe, x, mask = LAYERS[name](), torch.randn(3, 6, DIM), MASK if masked else None
    other = replace_router(moe)
    with record_routing(moe, weights=True) as records:
        wanted = run_model(moe, x, mask, seed=1)
    assert [w.shape for w in records.weights[records.layers[0]]] == [r.shape for r in records[records.layers[0]]]
    with replay_routing(other, records), record_routing(other, weights=True) as again:
        replayed = run_model(other, x, mask, seed=2)
    assert replayed[0].equal(wanted[0])
    assert all(a.equal(b) for a, b in zip(*(each.weights[each.layers[0]] for each in (again, records)), strict=True))
    with replay_routing(other, RoutingRecords(records)):
        assert not run_model(other, x, mask, seed=2)[0].equal(wanted[0])
    with replay_routing(moe, records):  # the same weights: the same gradients, of the router too
        assert all(one.equal(same) for one, same in zip(run_model(moe, x, mask, seed=1), wanted, strict=True))


def test_weights_are_selected_saved_and_masked(tmp_path):
    torch.manual_seed(0)
    moe, x = MoE(DIM, gate=TopKGating(DIM, 4)), torch.randn(2, 6, DIM)
    with record_routing(moe, weights=True) as records:
        wanted = moe(x)[0]
    records.select([1, 0], [2, 6]).save(tmp_path / "records")
    loaded = RoutingRecords.load(tmp_path / "records")
    assert [len(weight) for weight in loaded.weights["gate"]] == [2, 6]
    assert loaded.weights["gate"][1].equal(records.weights["gate"][0])
    other = replace_router(moe)
    with replay_routing(other, loaded, beyond="choose"):
        out = other(x.flip(0))[0]
    assert out[1].equal(wanted[0])
    assert out[0, :2].equal(wanted[1, :2])
    torch.testing.assert_close(out[0, 2:], other(x[1:, 2:])[0][0])
    assert record_forward(moe, x).weights is None


def test_rejects_mismatched_weights():
    expert, weight = {"gate": [torch.tensor([[0, 1]])]}, torch.rand(1, 2)
    for wrong, error, said in (
        (
            {"gate": [weight[:, :1]]},
            ValueError,
            r"`weights` to have the same shapes as the choices, .*'gate': .*1, 2.*, but got",
        ),
        ({"gate": [weight.long()]}, ValueError, r"weights\['gate'\] to be a list of dense tensors of floating point"),
        ({"gate": []}, ValueError, "expected `weights` to have the same shapes"),
        ({"other": [weight]}, ValueError, "expected `weights` to have the same shapes"),
        ([weight], TypeError, "expected weights to be a dict"),
        ({"gate": None}, ValueError, r"expected weights\['gate'\] to be a list of dense tensors"),
        ({"gate": weight.tolist()}, ValueError, r"expected weights\['gate'\] to be a list of dense tensors"),
    ):
        with pytest.raises(error, match=said):
            RoutingRecords(expert, weights=wrong)  # type: ignore[arg-type]
    moe = MoE(DIM, gate=TopKGating(DIM, 4))
    with pytest.raises(ValueError, match=r"given_weights must be a floating-point tensor of shape \(1, 1, 2\)"):
        moe.gate(torch.randn(1, 1, DIM), given_weights=torch.ones(1, 1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="weights must be True or False"):
        record_routing(moe, weights="yes").__enter__()  # type: ignore[arg-type]


def test_rejects_wrong_argument_types_before_forward():
    moe = MoE(DIM, gate=TopKGating(DIM, 4))
    for records in (None, {"gate": [torch.tensor([[0, 1]])]}):
        with pytest.raises(TypeError, match="records to be RoutingRecords, as yielded by record_routing, but got a"):
            replay_routing(moe, records).__enter__()  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"`gates` argument of record_routing to be a list of gate names or modules, but got 0"
    ):
        record_routing(moe, gates=0).__enter__()  # type: ignore[arg-type]


def test_gate_chooses_beyond_the_record():
    """The last token of a completion, which nobody has read."""
    moe, x = MoE(DIM, gate=TopKGating(DIM, 8)), torch.randn(2, 4, DIM)
    own = record_forward(moe, x)
    given = RoutingRecords({"gate": [torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.tensor([[6, 7]])]})
    with replay_routing(moe, given, beyond="choose"), record_routing(moe) as records:
        moe(x)
    assert records["gate"][0].tolist() == [[0, 1], [2, 3], [4, 5], own["gate"][0][3].tolist()]
    assert records["gate"][1].tolist() == [[6, 7], *own["gate"][1][1:].tolist()]
    ids, hashed = torch.randint(9, (2, 4)), MoE(DIM, gate=HashGating(DIM, 8, num_ids=9))
    with replay_routing(hashed, given, beyond="choose"), record_routing(hashed) as records:
        hashed(x, token_ids=ids)
    assert records["gate"][1].tolist() == [[6, 7], *hashed.gate.experts_of_id[ids][1, 1:].tolist()]


# ---- what does not fit ----


class CustomGate(TokenChoiceGate):
    """Chooses by itself."""

    def __init__(self) -> None:
        super().__init__(DIM, 4, k=1)

    def decide(self, tokens):
        probs = tokens.x[..., :4].softmax(-1)
        return Choices(probs.argmax(-1, keepdim=True), probs.amax(-1, keepdim=True), probs, {})


def make_records(*shapes: tuple[int, int], largest: int = 0) -> RoutingRecords:
    """Every token has the experts up to `largest`, by default as many as it has choices."""
    rows = [torch.arange(k).expand(s, k) + max(0, largest - k + 1) for s, k in shapes]
    return RoutingRecords({f"{i}": [row] for i, row in enumerate(rows)})


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (make_records((4, 2), (4, 2)), r"the model has 1 gates \(gate\), but the records have 2 \(0, 1\)"),
        (make_records((4, 3)), r"'gate' \('0' in the records\) makes 2 choices per token, but the records have 3"),
        (make_records((4, 2), largest=4), "invalid records for 'gate' .*: given_experts contains 4, .* from 0 to 3"),
        (RoutingRecords({"gate": [torch.zeros(4, 2, dtype=torch.int64)]}, {"gate": 8}), "but the records have 8"),
        (make_records((3, 2)), r"sequence 0 has 4 real tokens at 'gate', but its record has 3; pass beyond="),
        (make_records((5, 2)), r"4 real tokens at 'gate', but its record has 5; truncate it with records.select\("),
        (RoutingRecords({"gate": [torch.arange(2).expand(4, 2)] * 2}), "the forward pass has 1 sequences .* have 2"),
    ],
)
def test_size_mismatch_raises_and_changes_nothing(records, message):
    moe, x = MoE(DIM, gate=TopKGating(DIM, 4)), torch.randn(1, 4, DIM)
    wanted, hooks = moe(x)[0], count_hooks(moe)
    with pytest.raises(ValueError, match=message), replay_routing(moe, records):
        moe(x)
    assert count_hooks(moe) == hooks
    assert moe(x)[0].equal(wanted)


def test_gates_that_cannot_be_given_choices():
    with pytest.raises(TypeError, match=r"not support 'gate' \(ExpertChoiceGating\): its tokens do not make k choices"):
        record_routing(MoE(DIM, gate=ExpertChoiceGating(DIM, 4))).__enter__()
    for levels in (TopKGating(DIM, 4, outer_expert_dims=2), HeirarchicalMoE(DIM, (2, 3))):
        with pytest.raises(TypeError, match=r"outer_expert_dims=\(2,\), as in layers of two levels"):
            record_routing(levels).__enter__()
    moe, x = MoE(DIM, gate=CustomGate()), torch.randn(1, 4, DIM)
    records = record_forward(moe, x)
    with pytest.raises(ValueError, match=r"a CustomGate, which does not accept external .* `self.apply_overrides"):
        replay_routing(moe, records).__enter__()
    shared = nn.Sequential(moe := DeepModel(), moe)
    with pytest.raises(RuntimeError, match="ran twice in one forward"), record_routing(shared):
        shared(x)
    with pytest.raises(RuntimeError, match="ran outside a forward pass of the given module"), record_routing(shared):
        moe(x)
    records = record_forward(moe, x)
    with pytest.raises(ValueError, match=r"given_experts was passed to .* a replay"), replay_routing(moe.moe, records):
        moe.moe(x, given_experts=torch.zeros(1, 4, 2, dtype=torch.int64))


def test_threads_are_independent():
    """Their forwards are neither recorded nor replayed."""
    moe, x = MoE(DIM, gate=TopKGating(DIM, 8)), torch.randn(1, 4, DIM)
    wanted, given = moe(x)[0], RoutingRecords({"gate": [torch.tensor([[0, 1]] * 4)]})
    with ThreadPoolExecutor(1) as pool:
        with record_routing(moe) as records:
            assert pool.submit(moe, x).result()[0].equal(wanted)
        with replay_routing(moe, given):
            assert pool.submit(moe, x).result()[0].equal(wanted)
            assert not moe(x)[0].equal(wanted)
    assert records.num_sequences == 0


# ---- files, and what engines return ----


WIDE = {"uint16": (1 << 16) - 1, "uint32": (1 << 32) - 1, "int64": 1 << 32}


@pytest.mark.parametrize("dtype", WIDE)
def test_integers_of_every_width(dtype):
    """Ids that fit are read as they are; none is wrapped to another expert."""
    make = getattr(np, dtype)
    records = RoutingRecords.from_requests([np.array([[[3, 1]], [[2, 0]]], dtype=make)])
    assert records["0"][0].tolist() == [[3, 1], [2, 0]]
    moe = MoE(DIM, gate=TopKGating(DIM, 4))
    own = RoutingRecords({"gate": [torch.from_numpy(np.array([[3, 1], [2, 0]], dtype=make))]})
    for given in (records, own):
        with replay_routing(moe, given):
            moe(torch.randn(1, 2, DIM))
    wide = RoutingRecords.from_requests([np.array([[[WIDE[dtype], 1]]], dtype=make)])
    with pytest.raises(ValueError, match=f"given_experts contains {WIDE[dtype]}, .* from 0 to 3"):
        replay_routing(moe, wide).__enter__()


NO_INTEGERS = (torch.complex64, torch.bool, torch.float32, torch.uint64)
ROW, REQUEST = torch.zeros(3, 2, dtype=torch.int64), [[[0, 1]]]
NO_RECORDS = [
    ({}, "`experts` is empty"),
    ([ROW], "expected experts to be a dict that maps gates to records, but got a list"),
    ({"a": [ROW, ROW[0]]}, r"expected experts\['a'\] to be a list of dense tensors .* got tensor\(\[0, 0"),
    *(({"a": [ROW.to(dtype)]}, r"experts\['a'\] to be a list of dense tensors of integers") for dtype in NO_INTEGERS),
]
NO_REQUESTS = [
    ([], r"expected requests of shape \(tokens, layers, k\) with the same number of layers, but got \[\]"),
    ([REQUEST, [[[0, 1]] * 2]], r"with the same number of layers, but got \[1, 2\]"),
    ([REQUEST, None], r"expected request 1 to be an array of shape \(tokens, layers, k\), but got a NoneType"),
    ([REQUEST, {"routed_experts": REQUEST}], "expected request 1 to be an array .* a dict"),
    ([REQUEST, [[[0, 1], [1]]]], "expected request 1 to be an array .* a list"),
    ([[1, 2]], "expected request 0 to be an array .* a list: .* out of range"),
    ([[(1, 2)]], r"experts\['0'\] to be a list of dense tensors of integers \(tokens, k\), .* got tensor\(\[1\]\)"),
    *(([torch.ones(1, 1, 2).to(dtype)], r"experts\['0'\] to be a list .* of integers") for dtype in NO_INTEGERS),
]


@pytest.mark.parametrize(("records", "message"), NO_RECORDS)
def test_records_of_other_kinds(records, message):
    with pytest.raises((TypeError, ValueError), match=message):
        RoutingRecords(records)


@pytest.mark.parametrize(("requests", "message"), NO_REQUESTS)
def test_requests_of_other_kinds(requests, message):
    with pytest.raises(ValueError, match=message):
        RoutingRecords.from_requests(requests)


def test_a_file(tmp_path):
    torch.manual_seed(0)
    moe, x = LAYERS["top-p"](), torch.randn(3, 6, DIM)
    records = record_forward(moe, x, MASK)
    records.save(tmp_path / "records")
    found = RoutingRecords.load(tmp_path / "records")
    assert_records_equal(found, records)
    assert [found.num_experts(layer) for layer in found] == [8]
    assert repr(found) == "RoutingRecords(3 sequences, 1 gates)"
    with pytest.raises(FileNotFoundError):
        RoutingRecords.load(tmp_path / "nowhere")


def test_files_that_are_not_whole_or_of_another_kind(tmp_path):
    path = tmp_path / "records"
    RoutingRecords({"gate": [ROW, ROW[:1]]}, {"gate": 4}).save(path)
    whole, read = path.read_bytes(), torch.load(path, weights_only=True)
    assert len({record.untyped_storage().data_ptr() for record in read["experts"]["gate"]}) == 1
    # files outlive places of modules
    of = {"format": "mixture_of_experts.routing/2", "experts": {"gate": [ROW]}, "num_experts": {}, "weights": None}
    assert (read.keys(), read["format"]) == (of.keys(), of["format"])
    for content, said in [
        (whole[: len(whole) // 2], ""),
        (b"", ""),
        (b"no records", ""),
        ({"weight": torch.zeros(2)}, "it has no 'format'"),
        ({"format": "other"}, "expected the format .*, but got 'other'"),
        *(({name: of[name] for name in of if name != gone}, f"it has no '{gone}'") for gone in of),
        (of | {"experts": {"gate": [ROW.float()]}}, "to be a list of dense tensors of integers"),
        (of | {"weights": {"gate": [ROW[:1].float()]}}, "expected `weights` to have the same shapes"),
        (of | {"experts": {"gate": [ROW.to_sparse()]}}, "to be a list of dense tensors of integers"),
        (of | {"experts": {"gate": [ROW.to("meta")]}}, "to be a list of dense tensors of integers"),
        (of | {"num_experts": {"gate": "x"}}, r"num_experts\['gate'\] must be an integer of at least 1, got 'x'"),
        (flip_bit(path, torch.tensor([[41, 42], [43, 44]])), "the checksum of .* is wrong"),
        (nn.Linear(2, 2), ""),  # which weights_only does not build
    ]:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError, match=f"is incomplete, or was not written by RoutingRecords.save: .*{said}"):
            RoutingRecords.load(path)


def flip_bit(path: Path, row: Tensor) -> bytes:
    """A file of a record with another number in it: its zip archive is intact but for a checksum."""
    RoutingRecords({"gate": [row]}).save(path)
    content = path.read_bytes()
    at = content.index(row.numpy().tobytes())
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def test_a_file_is_replaced_when_the_new_one_is_complete(tmp_path, monkeypatch):
    """A disk may be full: the file that was there stays, and nothing else is left."""
    path, records = tmp_path / "records", RoutingRecords({"gate": [ROW]}, {"gate": 4})
    records.save(path)

    def fail(found, file):
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="no space left"):
            records.save(path)
    assert RoutingRecords.load(path)["gate"][0].equal(ROW)
    assert [file.name for file in tmp_path.iterdir()] == ["records"]
    path.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to(path)
    RoutingRecords({"gate": [ROW[:1]]}).save(link)  # the file that it leads to is replaced, not the link
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o600
    assert RoutingRecords.load(path)["gate"][0].equal(ROW[:1])


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (MoE(DIM, gate=TopKGating(DIM, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x)[0])[0]


def test_a_read_that_fails_loses_nothing(monkeypatch):
    """Memory of the CPU may be full when the second gate is read; the next read finds all."""
    model, x = TwoLayers(), torch.randn(3, 6, DIM)
    wanted = record_forward(model, x)
    tried = []

    def fails(name: str, *args: Any) -> list[Tensor]:
        tried.append(name)
        if len(tried) == 2:
            raise MemoryError("no memory")
        return joined(name, *args)

    joined = replay_records.append_forwards
    monkeypatch.setattr(replay_records, "append_forwards", fails)
    for weights in (False, True):
        tried.clear()
        with record_routing(model, weights=weights) as records:
            model(x)
        with pytest.raises(MemoryError):
            records.lengths("one.gate")
        assert_records_equal(records, wanted)
        assert [len(of) for of in records.values()] == [3, 3]
        assert not weights or all(len(of) == 3 for of in (records.weights or {}).values())


class Appended(list[Any]):
    """A list to which another thread appends what it holds once more, just after it was copied."""

    def copy(self) -> list[Any]:
        found = list(self)
        if len(self) == 1:
            self.append(self[0])
        return found


def test_what_is_recorded_during_a_read_is_kept():
    model, x = TwoLayers(), torch.randn(3, 6, DIM)
    with record_routing(model) as records:
        model(x)
    records._unread = Appended(records._unread)
    assert records.lengths("one.gate") == 3 * [6]
    assert records.num_sequences == 6
    assert_records_equal(records.select([3, 4, 5]), records.select([0, 1, 2]))


def test_two_threads_read_once(monkeypatch):
    model, x = TwoLayers(), torch.randn(3, 6, DIM)
    joined, both = replay_records.append_forwards, Barrier(2)

    def slow(*args: Any) -> list[Tensor]:
        with contextlib.suppress(BrokenBarrierError):
            both.wait(timeout=0.5)
        return joined(*args)

    with record_routing(model) as records:
        model(x)
    monkeypatch.setattr(replay_records, "append_forwards", slow)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda _: records.lengths("one.gate"), range(2)))
    assert found == [3 * [6], 3 * [6]]


def test_arrays_of_engines():
    """Of numpy, in the dtype of the engine; what was not recorded is chosen."""
    torch.manual_seed(0)
    model = nn.Sequential(DeepModel(), DeepModel())
    x = torch.randn(2, 4, DIM)
    with record_routing(model) as records:
        out = model(x)
    arrays = [torch.stack(gates, dim=1).numpy() for gates in zip(*records.values(), strict=True)]  # int16 (s, l, k)
    for dtype in ("int16", "uint8", "int32"):
        with replay_routing(model, RoutingRecords.from_requests([array.astype(dtype) for array in arrays])):
            torch.testing.assert_close(model(x), out)
    arrays[0][3] = -1
    unread = RoutingRecords.from_requests(arrays)
    assert unread["0"][0][3].tolist() == [KEEP_ROUTER_CHOICE, KEEP_ROUTER_CHOICE]
    assert unread["0"][0].dtype == torch.int16
    with replay_routing(model, unread):
        torch.testing.assert_close(model(x), out)


def test_weights_of_engines():
    """Of another router; where the engine recorded no choice, the gate weighs as well."""
    torch.manual_seed(0)
    moe, x = MoE(DIM, gate=TopKGating(DIM, 4)), torch.randn(2, 4, DIM)
    with record_routing(moe, weights=True) as records:
        out, _ = moe(x)
    experts, weights = ([of.unsqueeze(1).numpy() for of in kept["gate"]] for kept in (records, records.weights))
    nn.init.normal_(moe.gate.w_gating)
    free, _ = moe(x)
    experts[1][3], weights[1][3] = -1, 0.0
    with replay_routing(moe, RoutingRecords.from_requests(experts, weights=weights)):
        found, _ = moe(x)
    torch.testing.assert_close(found.view(8, DIM), torch.cat([out.view(8, DIM)[:7], free.view(8, DIM)[7:]]))
    assert not torch.allclose(free[0], out[0], atol=1e-2)
    with pytest.raises(ValueError, match=r"shapes as the choices, .*\(4, 2\), \(4, 2\)\]}, but got .*\[\(4, 2\)\]}"):
        RoutingRecords.from_requests(experts, weights=weights[:1])
    with pytest.raises(ValueError, match=r"expected weights\['0'\] to be a list of dense tensors of floating point"):
        RoutingRecords.from_requests(experts, weights=experts)


def test_rejects_missing_records():
    records = RoutingRecords({"a": [ROW], "b": [ROW[:, :1]]})
    assert records.select([0, 0], tokens=[1, 4]).lengths("a") == [1, 3]
    with pytest.raises(IndexError, match="no sequence 1; there are 1"):
        records.select([1])
    for wrong in ([1, 2], [-1]):
        with pytest.raises(ValueError, match=r"`tokens` to be 1 nonnegative integers, one per sequence, but got \["):
            records.select([0], tokens=wrong)
    for wrong in ({"a": [ROW], "b": [ROW, ROW]}, {"a": [ROW, ROW[:, :1]]}):
        with pytest.raises(ValueError, match=r"the same number of sequences, and .* a gate to have the same k"):
            RoutingRecords(wrong)
    with pytest.raises(KeyError, match="no gate 'c'; the gates are 'a', 'b'"):
        records["c"]


# ---- recomputation ----


class Checkpointed(nn.Module):
    """A layer that a backward runs again."""

    def __init__(self, moe: Any, **settings: Any) -> None:
        super().__init__()
        self.moe, self.settings = moe, {"use_reentrant": False, **settings}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return checkpoint(self.moe, x, mask, **self.settings)  # type: ignore[return-value]


def test_replays_in_recomputation():
    torch.manual_seed(0)
    moe, x = LAYERS["top-2, capacity"](), torch.randn(3, 6, DIM)
    model = Checkpointed(moe)
    with record_routing(model) as records:
        wanted = run_model(model, x, MASK, seed=1)
    assert records.num_sequences == 3
    with replay_routing(model, records):
        torch.testing.assert_close(run_model(model, x, MASK, seed=2), wanted, atol=1e-6, rtol=1e-5)
        late = model(x.requires_grad_(), MASK)[0].sum()
    with pytest.raises(RuntimeError, match=r"recomputes 'moe.gate' after replay_routing has exited"):
        late.backward()
    with torch.no_grad(), replay_routing(model.eval(), records), replay_routing(other := copy.deepcopy(moe), records):
        torch.testing.assert_close(model(x, MASK), other(x, MASK))
    model.train().settings["use_reentrant"] = True
    with pytest.raises(RuntimeError, match="use_reentrant=False"), replay_routing(model, records):
        model(x, MASK)


CHOOSING = {
    **{name: LAYERS[name] for name in ("top-k, groups", "top-k, capacity", "top-2, capacity", "noisy", "sparse mixer")},
    "threshold": lambda: MoE(DIM, gate=Top2Gating(DIM, 4, second_policy_train="threshold")),
    "two levels": lambda: HeirarchicalMoE(DIM, (2, 3), **TIGHT),
}


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("name", CHOOSING)
def test_choices_are_saved_for_a_recomputation(name, saved, monkeypatch):
    """A router whose product differs from run to run, as on some cards: by the policy choices are made once, without it
    some are made otherwise the second time."""
    torch.manual_seed(0)
    generator, product = torch.Generator().manual_seed(1), logits._differentiable

    def differs(*arguments: Any) -> Tensor:
        result = product(*arguments)
        return result + 0.3 * torch.randn(result.shape, generator=generator)

    monkeypatch.setattr(logits, "_differentiable", differs)
    contexts = dict(context_fn=partial(create_selective_checkpoint_contexts, save_choices)) if saved else {}
    model, chosen = Checkpointed(CHOOSING[name](), **contexts), []
    for gate in (module for module in model.modules() if isinstance(module, TokenChoiceGate)):
        gate.register_forward_hook(lambda gate, args, routing: chosen.append((routing.expert, routing.kept)))
    out, aux_loss = model(torch.randn(3, 32, DIM, requires_grad=True))
    # without it torch may see that other choices have other shapes, and raise when they were made
    with contextlib.nullcontext() if saved else contextlib.suppress(CheckpointError):
        (out.square().sum() + aux_loss).backward()
    first, again = chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]
    same = [one.equal(other) for a, b in zip(first, again, strict=True) for one, other in zip(a, b, strict=True)]
    assert all(same) if saved else not all(same)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["layer", "model"])
def test_rejects_graphs_compiled_before_context(part):
    """They have no hooks: nothing would be recorded or replayed. A layer's own hooks run, so that it is replayed."""
    torch.compiler.reset()
    model, x = DeepModel(), torch.randn(1, 4, DIM)
    with record_routing(model) as records:
        expected = model(x)
    (model if part == "model" else model.moe).compile(backend="eager")
    model(x)
    message = r"the hooks report that the forward pass ran .*torch\.compiler\.reset\(\)"
    with record_routing(model) as found, pytest.raises(RuntimeError, match=message):
        model(x)
    assert found.lengths("moe.gate") == []
    with replay_routing(model, records):
        if part == "layer":
            torch.testing.assert_close(model(x), expected)
        else:
            with pytest.raises(RuntimeError, match=message):
                model(x)
    torch.compiler.reset()
    assert_records_equal(record_forward(model, x), records)
    torch.compiler.reset()
