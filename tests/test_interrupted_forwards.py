"""Forwards that raise, are interrupted, nested or begun before: an ability gets what ended well; copies get nothing."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.concurrent_calls import run_in_threads
from support.record_helpers import count_hooks
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from mixture_of_experts import MoE, TopKGating, balance_experts, collect_aux, force_routing
from mixture_of_experts.replay import RoutingRecords, record_routing, replay_routing
from mixture_of_experts.stats import RoutingStats, track_routing
from mixture_of_experts.whole_model.aux_losses import AuxLossCollector
from mixture_of_experts.whole_model.call_stack import CALL_STACKS

DIM = 8


class Model(nn.Module):
    """Two layers; between them it does what a test asks for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (MoE(DIM, gate=TopKGating(DIM, 4, expert_bias=True)) for _ in range(2))
        self.between = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(x + self.first(x)[0])
        return x + self.second(x)[0]


@contextmanager
def run_between(model: Model, act: Callable[[], object]) -> Iterator[None]:
    handle = model.between.register_forward_hook(lambda *_: act() and None)
    try:
        yield
    finally:
        handle.remove()


def raise_error(error: type[BaseException]) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_failed_forwards_do_not_count(error):
    """Its first layer had been recorded, collected and measured."""
    model, x, other = Model(), torch.randn(1, 3, DIM), torch.randn(1, 4, DIM)
    with track_routing(model) as stats, record_routing(model) as records, collect_aux(model) as aux:
        model(x)
        with run_between(model, raise_error(error)), pytest.raises(error):
            model(torch.randn(1, 9, DIM))
        model(other)
        loss = aux.take()
    assert [record.tokens for record in stats.records("first.gate")] == [3, 4]
    assert [record.tokens for record in stats.records("second.gate")] == [3, 4]
    assert records.lengths("first.gate") == records.lengths("second.gate") == [3, 4]
    with collect_aux(model) as again:
        model(x)
        model(other)
    torch.testing.assert_close(loss, again.take())
    assert not CALL_STACKS.calls


def test_nested_forward_is_separate():
    model, x, inner, found = Model(), torch.randn(1, 3, DIM), torch.randn(1, 5, DIM), []

    def within() -> None:
        if not found:
            found.append(None)
            model(inner)

    with record_routing(model) as records, track_routing(model) as stats, run_between(model, within):
        model(x)
    assert records.lengths("first.gate") == records.lengths("second.gate") == [5, 3]  # as they end
    assert [record.tokens for record in stats.records("second.gate")] == [3, 5]


def test_rejected_call_keeps_enclosing_call(monkeypatch):
    """The inner forward is refused before it begins, and caught."""
    model, x, begins = Model(), torch.randn(1, 3, DIM), AuxLossCollector.make_call

    def refuse(*_: object) -> None:
        raise RuntimeError("refused")

    def refused() -> None:
        monkeypatch.setattr(AuxLossCollector, "make_call", refuse)
        with pytest.raises(RuntimeError, match="refused"):
            model(x)
        monkeypatch.setattr(AuxLossCollector, "make_call", begins)

    with collect_aux(model) as aux, run_between(model, refused):
        model(x)
        loss = aux.take()
    with collect_aux(model) as aux:
        model(x)
    torch.testing.assert_close(loss, aux.take())


# Threads


def test_contexts_may_be_entered_while_another_thread_runs_a_forward():
    """The half of its forward that runs within the context is left alone, and raises nothing."""
    model, x, entered, reached = Model(), torch.randn(1, 3, DIM), threading.Event(), threading.Event()

    def wait() -> None:
        if threading.current_thread() is not threading.main_thread():
            reached.set()
            assert entered.wait(60)

    with run_between(model, wait), ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: (model(x), model(x)))
        assert reached.wait(60)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with (
            track_routing(model) as stats,
            record_routing(model) as records,
            collect_aux(model) as aux,
            force_routing(model),
            balance_experts(model, optimizer),
        ):
            entered.set()
            running.result(60)
            with pytest.raises(RuntimeError, match="no auxiliary loss"):
                aux.take()
    assert records.lengths("first.gate") == []
    assert [len(stats.records(layer)) for layer in stats.layers] == [1, 1]  # statistics are of all threads


def test_hooks_being_added_or_removed():
    """Torch, in another thread, then calls them without the keyword arguments that they asked for."""
    model, x = Model(), torch.randn(1, 3, DIM)
    given = [torch.tensor([[0, 1]] * 3)]
    expected = model(x)
    records = RoutingRecords({"first.gate": given, "second.gate": given})
    with track_routing(model), record_routing(model), collect_aux(model), replay_routing(model, records):
        for module in model.modules():
            module._forward_hooks_with_kwargs.clear()
            module._forward_pre_hooks_with_kwargs.clear()
        run_in_threads(lambda _: torch.testing.assert_close(model(x), expected), 1)


# Copies


CONTEXTS: dict[str, Callable[[Any], Any]] = {
    "track_routing": track_routing,
    "record_routing": record_routing,
    "collect_aux": collect_aux,
    "force_routing": force_routing,
    "balance_experts": lambda model: balance_experts(model, torch.optim.SGD(model.parameters(), lr=0.0)),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_copies_and_pickles_drop_hooks(name):
    model, x = Model(), torch.randn(1, 3, DIM)
    seen: list[int] = []
    model.second.register_forward_hook(count := CountHook(seen))
    expected = model(x)
    with CONTEXTS[name](model):
        model(x)
        copies = [copy.deepcopy(model), AveragedModel(model).module, pickle.loads(pickle.dumps(model))]
    assert not any("__getstate__" in vars(module) for module in model.modules())
    for each in copies:
        assert count_hooks(each) == count_hooks(model)  # the user's own hook is there
        torch.testing.assert_close(each(x), expected)
        assert (each.first.gate.forced, each.first.gate.balanced_by) == (None, None)
        pickle.dumps(each)
    assert count.seen is seen


class CountHook:
    def __init__(self, seen: list[int]) -> None:
        self.seen = seen

    def __call__(self, *_: object) -> None:
        self.seen.append(1)


@pytest.mark.parametrize("name", CONTEXTS)
def test_copies_of_parametrized_gate_drop_hooks(name):
    """Its class has a way of its own to be copied."""
    model, x = Model(), torch.randn(1, 3, DIM)
    parametrize.register_parametrization(model.first.gate, "w_gating", nn.Identity())
    bare = count_hooks(copy.deepcopy(model))
    with CONTEXTS[name](model):
        expected = model(x)
        made = copy.deepcopy(model)
        assert name == "force_routing" or torch.equal(made(x), expected)
    assert count_hooks(made) == count_hooks(model) == bare
    assert made.first.gate.forced is None
    assert made.first.gate is not model.first.gate
    made.first.gate.parametrizations.w_gating.original.data.zero_()
    assert model.first.gate.w_gating.any()
    assert not any("copy__" in name for module in (*made.modules(), *model.modules()) for name in vars(module))


def test_contexts_exited_out_of_order():
    """Forcing: the one that was entered last and is still open holds."""
    gate = TopKGating(DIM, 4)
    first, second = force_routing(gate, "balanced"), force_routing(gate, "random")
    first.__enter__()
    second.__enter__()
    assert gate.forced == "random"
    first.__exit__(None, None, None)
    assert gate.forced == "random"
    assert copy.deepcopy(gate).forced is None
    second.__exit__(None, None, None)
    assert gate.forced is None
    assert "__getstate__" not in vars(gate)


def test_hooks_of_contexts_exited_out_of_order():
    model, x = Model(), torch.randn(1, 3, DIM)
    first, second = track_routing(model), track_routing(model)
    stats: list[RoutingStats] = [first.__enter__(), second.__enter__()]
    first.__exit__(None, None, None)
    assert count_hooks(copy.deepcopy(model)) == 0
    model(x)
    second.__exit__(None, None, None)
    assert count_hooks(model) == 0
    assert stats[1].last("first.gate").tokens == 3
