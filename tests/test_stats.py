"""Statistics of routing: right numbers, recorded once, at no cost to what is tracked."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from support import reentrant_checkpoint
from support.strategies import RecordDraws
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixture_of_experts import ExpertChoiceGating, HeirarchicalMoE, MoE, NoisyTopKGating, Routing, TopKGating
from mixture_of_experts.stats import Record, track_routing

ROOT = Path(__file__).resolve().parent.parent
DIM = 8


class Stack(nn.Module):
    """Residual layers, each optionally run by a function; returns a loss."""

    def __init__(self, *layers: nn.Module, run: Any = None):
        super().__init__()
        self.layers, self.run = nn.ModuleList(layers), run
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x, total = x * self.scale, x.new_zeros(())
        for layer in self.layers:
            out, aux_loss = layer(x, mask) if self.run is None else self.run(layer, x, mask)
            x, total = x + out, total + aux_loss
        return x.square().mean() + total


class OneExpert(nn.Module):
    """A user's gate that is no `Gate`: everything goes to expert 1, and token 0 to none."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        b, n, _ = x.shape
        token = torch.arange(n).expand(b, n)
        kept = token > 0
        zero = x.new_zeros(())
        return Routing(
            expert=torch.ones_like(token),
            kept=kept,
            weight=kept.to(x.dtype),
            probs=x.new_tensor([0.0, 1.0, 0.0]).expand(b, n, 3),
            losses={"balance": zero + 3},
            num_tokens=n,
            num_experts=3,
            capacity=None,
            k=1,
            sent=kept,
        )


def make_layers() -> dict[str, nn.Module]:
    """A layer for each router; small capacities, so that all of them drop something."""
    torch.manual_seed(0)
    tight = {"capacity_factor_train": 0.7, "min_expert_capacity": 1}
    return {
        "top2": MoE(DIM, 4, second_policy_train="all", **tight),
        "second_place": MoE(DIM, 4, second_place_loss=True, second_policy_train="threshold", **tight),
        "topk": MoE(DIM, gate=TopKGating(DIM, 4, k=3, priority="token", **tight)),
        "dropless": MoE(DIM, gate=TopKGating(DIM, 4, score="sigmoid")),
        "noisy": MoE(DIM, gate=NoisyTopKGating(DIM, 4, **tight)),
        "expert_choice": MoE(DIM, gate=ExpertChoiceGating(DIM, 4, capacity_factor=1.0)),
    }


def test_statistics_agree_in_all_outputs():
    """The page of statistics explains it, and so does `Record`."""
    names = [field.name for field in dataclasses.fields(Record)][4:]
    page = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")
    described = re.findall(r"^ *(\w+): ", str(Record.__doc__), flags=re.MULTILINE)
    assert [name for name in names if f"`{name}`" not in page or name not in described] == []


def track_once(model: nn.Module, *args: Tensor) -> dict[str, Record]:
    with track_routing(model) as stats:
        model(*args)
    return {layer: stats.last(layer) for layer in stats.layers}


def test_by_hand():
    """Four tokens, three for expert 0 that has two slots: all numbers can be checked by eye."""
    gate = TopKGating(2, 2, k=1, capacity_factor_train=1.0, min_expert_capacity=1)
    with torch.no_grad():
        gate.w_gating.copy_(math.log(3) * torch.eye(2))  # probabilities 3/4 and 1/4
    record = track_once(MoE(2, gate=gate), torch.eye(2)[[0, 0, 1, 0]].unsqueeze(0))["gate"]
    assert record.load.tolist() == [2, 1]
    assert record.requested.tolist() == [3, 1]
    assert (record.tokens, record.forwards, record.step) == (4, 1, 0)
    assert (record.dropped, record.unseen, record.unavoidable) == (0.25, 0.25, 0.0)
    assert record.imbalance == record.worst_imbalance == 1.5
    assert record.confidence == pytest.approx(0.75)
    assert record.entropy == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    # e sum f P = 2 (3/4 * 5/8 + 1/4 * 3/8); logsumexp(log 3, 0) = log 4
    assert record.losses == pytest.approx({"balance": 2 * (0.75 * 0.625 + 0.25 * 0.375), "z": math.log(4) ** 2})
    assert record.dead == []
    assert record.relative_load.tolist() == pytest.approx([4 / 3, 2 / 3])
    assert record.relative_requested.tolist() == pytest.approx([1.5, 0.5])


def compute_reference_numbers(routing: Routing, real: Tensor) -> dict[str, object]:
    """The same numbers by loops over assignments; what is computed is read from the dense dispatch tensor."""
    dispatch = routing.dispatch_tensor().detach()
    b, n, e, _ = dispatch.shape
    requested, lost, beyond, uneven = [0] * e, 0, 0, []
    for g in range(b):
        limit = n if routing.capacity is None else routing.capacity
        limit = limit if routing.limit is None else int(routing.limit[g])
        asked = [0] * e
        for i in range(routing.expert.shape[-1]):
            if routing.sent[g, i]:
                asked[int(routing.expert[g, i])] += 1
                lost += int(routing.position[g, i]) >= limit
        requested = [sum(both) for both in zip(requested, asked, strict=True)]
        if routing.capacity is not None:
            beyond += max(0, sum(asked) - e * limit)
        uneven += [max(asked) / (sum(asked) / e)] if any(asked) else []
    tokens = [(g, t) for g in range(b) for t in range(n) if real[g, t]]
    rows = [routing.probs[g, t].tolist() for g, t in tokens]
    return {
        "load": dispatch.sum(dim=(0, 1, 3)).long().tolist(),
        "requested": requested,
        "tokens": len(tokens),
        "dropped": lost / max(sum(requested), 1),
        "unavoidable": beyond / max(sum(requested), 1),
        "imbalance": sum(uneven) / max(len(uneven), 1),
        "worst_imbalance": max(uneven, default=0),
        "unseen": sum(not dispatch[g, t].any() for g, t in tokens) / max(len(tokens), 1),
        "entropy": sum(-p * math.log(p) for row in rows for p in row if p) / max(len(tokens), 1),
        "confidence": sum(max(row) for row in rows) / max(len(tokens), 1),
    }


@pytest.mark.parametrize("name", make_layers())
@pytest.mark.parametrize("masked", [False, True])
def test_numbers_of_every_router(name: str, masked: bool):
    layer, routings = make_layers()[name], []
    x = 2 * torch.randn(3, 11, DIM)
    real = torch.rand(3, 11) < 0.7 if masked else torch.ones(3, 11, dtype=torch.bool)
    layer.gate.register_forward_hook(lambda gate, args, routing: routings.append(routing))
    record = track_once(layer, x, real if masked else None)["gate"].to_dict()
    for key, wanted in compute_reference_numbers(routings[0], real).items():
        assert record[key] == pytest.approx(wanted, rel=1e-5), key
    assert set(record["losses"]) == set(routings[0].losses)
    assert record["losses"]["balance"] == pytest.approx(routings[0].balance_loss.item(), rel=1e-5)
    assert record["dropped"] > 0 or name in ("dropless", "expert_choice")


def make_hierarchy(**more: object) -> HeirarchicalMoE:
    tight = {"capacity_factor_train": 0.8, "min_expert_capacity": 2, "second_policy_train": "all", **more}
    torch.manual_seed(1)
    return HeirarchicalMoE(DIM, (3, 4), hidden_dim=16, **tight)


@pytest.mark.parametrize("group_size", [None, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_hierarchy(group_size: int | None, masked: bool):
    """The second level's load is that of the layer's experts; its tokens are the choices that level one hands on."""
    layer = make_hierarchy(group_size=group_size)
    x = torch.randn(2, 12, DIM)
    real = torch.rand(2, 12) < 0.8 if masked else torch.ones(2, 12, dtype=torch.bool)
    described: list[tuple[Tensor, Tensor]] = []
    layer.gate_inner.register_forward_hook(
        lambda gate, args, kwargs, routing: described.append((kwargs["importance"] > 0, routing.kept)), with_kwargs=True
    )
    outer, inner = track_once(layer, x, real if masked else None).values()
    ((slots, kept),) = described
    assert outer.tokens == int(real.sum())
    assert inner.load.shape == (3, 4)
    # every choice that level one kept is a token of level two, and its experts are that outer expert's
    handed_on = slots.sum(dim=(1, 2))
    assert handed_on.tolist() == outer.load.tolist()
    assert inner.tokens == int(outer.load.sum())
    assert inner.load.sum(dim=1).tolist() == kept.sum(dim=(1, 2)).tolist()
    assert (inner.requested.sum(dim=1) >= handed_on).all()
    lost = slots & ~kept.unflatten(-1, (-1, 2)).any(dim=-1)
    assert inner.unseen == pytest.approx(int(lost.sum()) / inner.tokens)
    assert 0 < inner.confidence <= 1
    assert inner.entropy <= math.log(4)
    assert 0 < inner.dropped < 1 or masked
    assert 1 <= inner.imbalance <= inner.worst_imbalance


@pytest.mark.parametrize("name", [*make_layers(), "hierarchy"])
@pytest.mark.parametrize("case", ["empty", "masked"])
def test_nothing_to_count_is_zero(name: str, case: str):
    layer = make_hierarchy() if name == "hierarchy" else make_layers()[name]
    x = torch.randn(2, 0 if case == "empty" else 5, DIM)
    mask = torch.zeros(2, 5, dtype=torch.bool) if case == "masked" else None
    for record in track_once(layer, x, mask).values():
        assert record.tokens == record.dropped == record.unseen == record.entropy == record.confidence == 0
        assert record.unavoidable == record.imbalance == record.worst_imbalance == 0
        assert not record.load.any()
        assert not record.relative_load.any()
        json.dumps(record.to_dict(), allow_nan=False)


def test_custom_gate():
    moe = MoE(DIM, 3, gate=OneExpert())
    with track_routing(nn.Sequential(moe)) as stats, pytest.raises(RuntimeError, match="outside a forward pass"):
        moe(torch.randn(2, 5, DIM))
    assert stats.layers == ("0.gate",)
    record = track_once(moe, torch.randn(2, 5, DIM))["gate"]
    assert record.load.tolist() == [0, 8, 0]
    assert (record.dead, record.unseen) == ([0, 2], 0.2)
    assert record.losses == {"balance": 3.0, "z": 0.0}  # a gate that names no parts


# Recorded once


def train_model(model: nn.Module, steps: int = 2) -> list[Tensor]:
    """Forwards and backwards on seeded data; the gradients."""
    gen = torch.Generator().manual_seed(5)
    model.zero_grad()
    for _ in range(steps):
        model(torch.randn(2, 10, DIM, generator=gen)).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def make_stack(run: Any = None) -> Stack:
    two_levels = make_hierarchy()  # seeds what follows, too
    gate = TopKGating(DIM, 4, k=2, capacity_factor_train=0.7, min_expert_capacity=1)
    return Stack(two_levels, MoE(DIM, gate=gate), run=run)


@pytest.mark.slow
def test_compiled_before_context_raises():
    """A graph that was traced without the hooks never calls them: that must not look like a model without load."""
    torch.compiler.reset()
    moe = MoE(DIM, 4)
    compiled = torch.compile(moe, backend="aot_eager")
    compiled(torch.randn(1, 5, DIM))
    with track_routing(compiled) as stats:
        compiled(torch.randn(1, 5, DIM))
        for read in (stats.step, stats.summary, stats.scalars, lambda: stats.last("gate")):
            with pytest.raises(RuntimeError, match=r"torch\.compiler\.reset"):
                read()
    torch.compiler.reset()
    with track_routing(compiled) as stats:
        compiled(torch.randn(1, 5, DIM))
    assert stats.last("gate").tokens == 5


CHECKPOINTS = {
    "torch": partial(checkpoint, use_reentrant=False),
    "reentrant": partial(checkpoint, use_reentrant=True),
    "another": reentrant_checkpoint.checkpoint,  # as DeepSpeed's
}


@pytest.mark.parametrize("how", CHECKPOINTS)
@pytest.mark.parametrize("around", ["model", "layer"])
def test_a_recomputation_does_not_count(how: str, around: str):
    """Of the tracked model, or within it."""
    model = make_stack(CHECKPOINTS[how] if around == "layer" else None)
    x = torch.randn(1, 4, DIM, requires_grad=True)
    with track_routing(model) as stats:
        for _ in range(2):
            out = model(x) if around == "layer" else CHECKPOINTS[how](model, x)
            out.sum().backward()
    assert [record.forwards for record in stats.records("layers.1.gate")] == [1, 1]


# Nothing left behind, nothing disturbed


def test_results_and_random_numbers_are_the_same():
    outcomes = []
    for tracked in (False, True):
        torch.manual_seed(2)
        model = Stack(MoE(DIM, 4), make_hierarchy(second_policy_train="random"))
        with RecordDraws() as draws, track_routing(model) if tracked else nullcontext():
            gradients = train_model(model)
        outcomes.append((len(draws.values), torch.rand(()), *gradients))
    for one, other in zip(*outcomes, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_only_the_last_forwards_are_kept():
    moe = MoE(DIM, 4)
    with track_routing(moe, keep=3) as stats:
        for length in range(1, 9):
            moe(torch.randn(1, length, DIM))
            expected = list(range(max(1, length - 2), length + 1))
            records = stats.records("gate")
            assert [record.tokens for record in records] == expected
            assert [record.step for record in records] == [tokens - 1 for tokens in expected]
    assert stats.total("gate").tokens == 6 + 7 + 8
    assert stats.total("gate").forwards == 3


def test_steps_join_forwards():
    """Gradient accumulation: all forwards between two calls of `step()` are one record."""
    moe, whole = MoE(DIM, gate=TopKGating(DIM, 4)), torch.randn(4, 6, DIM)
    with track_routing(moe, keep=5) as stats:
        for _ in range(3):
            for part in whole.split(2):
                moe(part)
            stats.step()
    assert [record.step for record in stats.records("gate")] == [1, 2]  # of step 0 one forward is forgotten
    one = track_once(moe, whole)["gate"]
    for record in stats.records("gate"):
        assert record.forwards == 2
        assert record.load.tolist() == one.load.tolist()
        assert record.entropy == pytest.approx(one.entropy)
        assert record.losses == pytest.approx(one.losses)


def test_layer_called_twice_has_one_record_per_forward():
    moe = MoE(DIM, 4)
    model = Stack(moe, moe)
    with track_routing(model) as stats:
        for _ in range(2):
            model(torch.randn(1, 6, DIM))
    records = stats.records("layers.0.gate")
    assert [(record.step, record.forwards, record.tokens) for record in records] == [(0, 2, 12), (1, 2, 12)]


def test_record_modes():
    moe, counted = MoE(DIM, 4), {}
    for when in ("training", "eval", "always"):
        with track_routing(moe, when=when) as stats:
            for training in (True, False, True):
                moe.train(training)
                moe(torch.randn(1, 6, DIM))
        counted[when] = [record.step for record in stats.records("gate")]
    assert counted == {"training": [0, 1], "eval": [0], "always": [0, 1, 2]}


def test_modes_of_autograd():
    """Recording begins in inference mode and goes on outside of it."""
    moe = MoE(DIM, 4)
    with track_routing(moe) as stats:
        for context in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
            with context:
                moe(torch.randn(1, 6, DIM))
    assert stats.total("gate").forwards == 3
    with torch.inference_mode(), track_routing(moe) as stats:
        moe(torch.randn(1, 6, DIM))
        with torch.inference_mode(False):
            moe(torch.randn(1, 6, DIM))
    assert stats.total("gate").forwards == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype, default: torch.dtype):
    torch.set_default_dtype(default)
    record = track_once(MoE(DIM, 4).to(dtype), torch.randn(2, 8, DIM, dtype=dtype))["gate"]
    assert record.tokens == 16
    assert 0 < record.entropy <= math.log(4)


# Reading


@pytest.fixture(scope="module")
def make_stats():
    model = make_stack()
    with track_routing(model) as stats:
        train_model(model, steps=3)
    return stats


def test_summary(make_stats):
    header, rule, *lines = make_stats.summary().splitlines()[:5]
    assert len(lines) == 3
    ends = [match.end() for match in re.finditer(r"-+", rule)]
    for line in (header, *lines):  # aligned: every column but the last ends where its rule ends
        assert all(len(line) > end and line[end] == " " and line[end - 1] != " " for end in ends[1:-1])
    assert lines[1].split()[:4] == [
        "layers.0.gate_inner",
        "3x4",
        "3",
        str(make_stats.total("layers.0.gate_inner").tokens),
    ]
    assert header.split()[:4] == ["gate", "experts", "forwards", "tokens"]


def make_crowded_tokens(tokens: int) -> tuple[MoE, Tensor]:
    """A layer of four experts with two slots each, and for each a group of tokens that all go to it."""
    gate = TopKGating(4, 4, k=1, capacity_factor_train=1.0, min_expert_capacity=1)
    with torch.no_grad():
        gate.w_gating.copy_(10 * torch.eye(4))
    return MoE(4, gate=gate), torch.eye(4).unsqueeze(1).expand(-1, tokens, -1)


def test_sequences_that_crowd_on_different_experts_are_seen():
    """Over all groups the load is perfectly balanced, and three quarters are dropped."""
    moe, x = make_crowded_tokens(tokens=8)
    with track_routing(moe) as stats:
        moe(x)
    record = stats.last("gate")
    assert record.relative_requested.tolist() == record.relative_load.tolist() == [1.0] * 4
    assert (record.dropped, record.unavoidable) == (0.75, 0.0)
    assert (record.imbalance, record.worst_imbalance) == (4.0, 4.0)
    header, _, line, warning = stats.summary().splitlines()
    start = header.index("in a group")
    assert line[start : start + 10] == "4.00, 4.00"
    assert warning.startswith("warning: gate dropped 75% of its choices; with a balanced load it would have dropped 0%")
    assert "has 4.0 times its share" in warning


def test_worst_step_is_reported():
    moe, x = make_crowded_tokens(tokens=1)
    with track_routing(moe) as stats:
        moe(x)
        for one in x[1:]:
            moe(one[None])
        moe(x[:1])
    assert stats.total("gate").relative_requested.tolist() == [1.0] * 4
    assert "4.00 at 1 " in stats.summary()  # the first of the worst


def test_no_warning_of_drops_that_no_router_could_avoid():
    """Every token sends two choices, for which there are 1.25 slots."""
    moe = MoE(DIM, 4, second_policy_train="all")
    with track_routing(moe) as stats:
        moe(torch.randn(2, 256, DIM))
    total = stats.total("gate")
    assert total.unavoidable == 0.375 <= total.dropped
    assert "warning" not in stats.summary()


def test_the_remedy_is_what_balances_the_gate():
    """A coefficient of a loss does not move an expert bias."""
    moe = MoE(DIM, 4, gate=TopKGating(DIM, 4, k=1, expert_bias=True, capacity_factor_train=1.0))
    moe.gate.expert_bias[3] = 100.0
    with track_routing(moe) as stats:
        moe(torch.randn(2, 256, DIM))
    dropped, requested = stats.summary().splitlines()[-2:]
    assert dropped.endswith("Increase the rate of balance_experts, the capacity factor or group_size")
    assert requested.endswith("update its expert bias with balance_experts, or increase the rate if you already do")
    assert "loss_coef" not in stats.summary()


def test_json_lines(make_stats, tmp_path: Path):
    make_stats.to_jsonl(tmp_path / "routing.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "routing.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [line["layer"] for line in lines[:3]] == list(make_stats.layers)
    record = make_stats.records("layers.0.gate_inner")[0]
    assert lines[1] == json.loads(json.dumps(record.to_dict(), allow_nan=False))
    assert lines[1]["load"] == record.load.tolist()
    assert sum(line["tokens"] for line in lines if line["layer"] == "layers.1.gate") == 3 * 20


def test_scalars_are_those_of_the_last_step(make_stats):
    scalars = make_stats.scalars()
    last = make_stats.last("layers.1.gate")
    assert scalars["layers.1.gate/dropped"] == last.dropped
    assert scalars["layers.1.gate/loss/balance"] == last.losses["balance"]
    assert scalars["layers.1.gate/max_load"] == pytest.approx(float(last.load.max() / last.load.double().mean()))
    assert all(isinstance(value, int | float) for value in scalars.values())


def test_the_documented_lines_for_a_logger(make_stats):
    page = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")
    (lines,) = [block for block in re.findall(r"```py\n(.*?)```", page, re.DOTALL) if "writer" in block]
    writer = Mock()
    exec(lines, {"writer": writer, "stats": make_stats, "step": 7})
    assert [added.args for added in writer.add_scalar.mock_calls] == [
        (name, value, 7) for name, value in make_stats.scalars().items()
    ]


# Errors


def test_errors():
    moe = MoE(DIM, 4)
    for model, settings, message in (
        (nn.Linear(2, 2), {}, "Linear has no gate"),
        (moe, {"keep": 0}, "keep must be .*at least 1, got 0"),
        (moe, {"when": "train"}, "when must be one of 'always'"),
    ):
        with pytest.raises(ValueError, match=message):
            track_routing(model, **settings).__enter__()
    with track_routing(moe) as stats:
        with pytest.raises(RuntimeError, match="no forward pass of a gate was recorded"):
            stats.summary()
        moe(torch.randn(1, 4, DIM))
    with pytest.raises(KeyError, match="no gate named 'gates'; the gates are 'gate'"):
        stats.records("gates")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda stats: pickle.loads(pickle.dumps(stats))])
def test_a_copy_has_the_records_and_no_model(copied):
    """A worker process can return its statistics: they read the same, and the model is not part of them."""
    model = Stack(MoE(DIM, 4), MoE(DIM, 4))
    with track_routing(model) as stats:
        for _ in range(3):
            model(torch.randn(2, 10, DIM))
            stats.step()
        other = copied(stats)
        model(torch.randn(2, 10, DIM))  # the copy does not record
    assert other.layers == stats.layers
    assert [len(other.records(layer)) for layer in other.layers] == [3, 3]
    for layer in stats.layers:
        for one, same in zip(stats.records(layer), other.records(layer), strict=False):
            assert one.to_dict() == same.to_dict()
    other.step()
    assert "gate" in other.summary()
    found = [value for ring in other._buffers.values() for value in vars(ring).values()]
    assert not any(hasattr(value, "gate") or isinstance(value, nn.Module) for value in found)


def test_gate_without_forward():
    model = nn.ModuleDict({"used": MoE(DIM, 4), "unused": MoE(DIM, 4)})
    model.forward = lambda x: model["used"](x)
    with track_routing(model) as stats:
        model(torch.randn(1, 4, DIM))
    *known, rest = stats.summary().splitlines()[-1].split(maxsplit=3)
    assert (known, {*rest.split()}) == (["unused.gate", "4", "0"], {"-"})
    assert stats.records("unused.gate") == []
    assert not any(name.startswith("unused") for name in stats.scalars())
    with pytest.raises(RuntimeError, match=r"no forward pass of 'unused.gate' was recorded"):
        stats.last("unused.gate")


class Layers(nn.Module):
    """Calls its layers one after the other, and fails afterwards if `error` is set."""

    def __init__(self, *layers: MoE) -> None:
        super().__init__()
        self.layers, self.error = nn.ModuleList(layers), None

    def forward(self, x: Tensor) -> None:
        for layer in self.layers:
            layer(x)
        if self.error is not None:
            raise self.error


def test_each_loss_is_averaged_over_the_forwards_that_report_it():
    gate, x, reported = TopKGating(8, 4), torch.randn(3, 5, 8), []
    gate.register_forward_hook(lambda _, __, routing: reported.append({k: v.item() for k, v in routing.losses.items()}))
    plain, batch, score = (
        MoE(8, gate=gate, loss_coefs=coefs) for coefs in ({}, {"balance_batch": 1}, {"balance_score": 1})
    )
    for layers in ((plain, batch), (batch, plain), (batch, score)):
        reported.clear()
        model = Layers(*layers)
        with track_routing(model) as stats:
            model(x)
        names = {name for losses in reported for name in losses}
        values = {name: [losses[name] for losses in reported if name in losses] for name in names}
        assert stats.last("layers.0.gate").losses == pytest.approx({k: sum(v) / len(v) for k, v in values.items()})
    with track_routing(batch) as stats:
        batch(x)
        before = stats.records("gate")[0].losses
        batch.loss_coefs = {"balance_score": 0.1}
        batch(x)
    assert stats.records("gate")[0].losses == before
    assert stats.records("gate")[1].losses.keys() == {"balance", "z", "balance_score"}


def test_only_failed_forwards(tmp_path):
    model = Layers(MoE(8, 4))
    model.error = MemoryError()
    with track_routing(model) as stats, pytest.raises(MemoryError):
        model(torch.randn(1, 3, 8))
    for read in (stats.plot, partial(stats.report, tmp_path / "report.html"), partial(stats.last, "layers.0.gate")):
        with pytest.raises(RuntimeError, match="no forward pass of a gate was recorded"):
            read()


def test_an_incomplete_step_is_reported():
    moe = MoE(8, 4)
    with track_routing(moe, keep=4) as stats:
        for _ in range(10):
            moe(torch.randn(1, 3, 8))
        stats.step()
        with pytest.warns(UserWarning, match="step 0 of 'gate' may be incomplete.*larger keep than 4"):
            assert stats.last("gate").forwards == 5


def test_too_many_losses():
    moe, more = MoE(DIM, 3, gate=OneExpert()), {f"part {i}": torch.zeros(()) for i in range(12)}
    moe.gate.register_forward_hook(lambda gate, args, routing: routing.losses.update(more))
    with track_routing(moe), pytest.raises(ValueError, match="14 losses, but at most 12"):
        moe(torch.randn(1, 4, DIM))


@pytest.mark.parametrize("by_steps", [False, True])
def test_steps_of_a_long_run_are_told_apart(by_steps):
    """float32 has no whole numbers between 2^24 and 2^24 + 2."""
    moe, x, start = MoE(dim=8, num_experts=4), torch.randn(2, 16, 8), 1 << 24
    with track_routing(moe) as stats:
        stats._buffers["gate"].clock.fill_(start)
        for number in range(4):
            moe(x[:, : 4 + number])
            if by_steps:
                stats.step()
    records = stats.records("gate")
    assert [record.step - records[0].step for record in records] == [0, 1, 2, 3]
    assert records[0].step == (start if by_steps else start + 1)
    assert [record.tokens for record in records] == [8, 10, 12, 14]
