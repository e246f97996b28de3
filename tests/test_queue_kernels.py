"""What the kernels of queues are asked and checked for. Loops stand in for them: `test_triton.py` runs the kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from support.checks_in_this_process import run_here
from torch import Tensor

from mixture_of_experts.dispatch import queues
from mixture_of_experts.dispatch.queues import PRIORITIES, Queues, queue_up
from mixture_of_experts.kernels import check_process, launching

Kernel = Callable[..., tuple[Tensor, Tensor]]


def queue_by_loop(
    expert: Tensor, chosen: Tensor | None, order: Tensor | None, num_experts: int, k: int, by_choice: bool
) -> tuple[Tensor, Tensor]:
    """What the operator of this name returns, by a loop."""
    (r, a), found = expert.shape, expert.tolist()
    position, length = [[0] * a for _ in range(r)], [[0] * num_experts for _ in range(r)]
    for i in range(r):
        tokens = range(a // k) if order is None else order[i].tolist()
        line = [token * k + choice for choice in range(k) for token in tokens] if by_choice else range(a)
        queues_up = [True] * a if chosen is None else chosen[i].tolist()
        for j in filter(queues_up.__getitem__, line):
            position[i][j] = length[i][found[i][j]]
            length[i][found[i][j]] += 1
    return torch.tensor(position).view(r, a), torch.tensor(length)


@pytest.fixture
def use_stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Kernel], list[tuple]]:
    """Takes the place of the kernels, on a device that has some; returns the calls."""

    def take_place(kernel: Kernel = queue_by_loop) -> list[tuple]:
        calls, module = [], ModuleType("mixture_of_experts.kernels.queueing")
        module.queue_assignments = lambda *args: calls.append(args) or kernel(*args)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(queues, "can_launch_kernels", lambda device: True)
        monkeypatch.setattr(queues.QUEUES_SELF_CHECK, "verdicts", {})
        monkeypatch.setattr(check_process, "run_in_process", run_here)
        return calls

    return take_place


def make_choices(shape: tuple[int, ...] = (2, 3, 7), k: int = 2, e: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Experts `(..., n k)`, which of them are chosen, and scores `(..., n)`."""
    torch.manual_seed(0)
    expert = torch.randint(e, (*shape[:-1], shape[-1] * k))
    return expert, torch.rand(expert.shape) < 0.6, torch.rand(shape)


def assert_same(found: Queues, wanted: Queues, chosen: Tensor | None) -> bool:
    differs = found.position != wanted.position
    return found.length.equal(wanted.length) and not (differs if chosen is None else differs & chosen).any()


@pytest.mark.parametrize("some", [False, True], ids=["all chosen", "some chosen"])
@pytest.mark.parametrize("priority", PRIORITIES)
@pytest.mark.parametrize("shape", [(2, 3, 7), (4,)], ids=["groups of routers", "no groups"])
def test_kernels_queue_as_operators_do(use_stand_in, shape, priority, some):
    expert, chosen, score = make_choices(shape)
    chosen = chosen if some else None
    wanted = queue_up(expert, chosen, 5, 2, priority, score)
    calls = use_stand_in()
    found = queue_up(expert, chosen, 5, 2, priority, score)
    assert assert_same(found, wanted, chosen)
    assert (found.position.shape, found.length.shape) == (expert.shape, (*expert.shape[:-1], 5))
    assert len(calls) == 3 + 1  # of the check before the first call, and the call
    queue_up(expert, chosen, 5, 2, priority, score)
    assert len(calls) == 5
    asked = [given for *_, given in calls[:3]], [given[1] is None for given in calls[:3]]
    assert asked == ([False, True, True], [True, False, False])
    assert [given[2] is None for given in calls[:3]] == [True, True, False]


def test_calls_not_queued_by_kernels(use_stand_in):
    calls = use_stand_in()
    assert queue_up(torch.zeros(2, 0, dtype=torch.int64), None, 3, 1).length.tolist() == [[0] * 3] * 2
    found = queue_up(torch.tensor([[1, 1]]), None, queues.MAX_KERNEL_EXPERTS + 1, 1)
    assert found.position.tolist() == [[0, 1]]
    assert not calls
    queue_up(torch.tensor([[1, 1]]), None, queues.MAX_KERNEL_EXPERTS, 1)
    assert calls


def arrive_late(*args) -> tuple[Tensor, Tensor]:
    position, length = queue_by_loop(*args)
    return position + 1, length


def fail_once_more(*args) -> tuple[Tensor, Tensor]:
    position, length = queue_by_loop(*args)
    length[-1, -1] += 1
    return position, length


def give_up(*args) -> tuple[Tensor, Tensor]:
    raise RuntimeError("a compiler gives up")


@pytest.mark.parametrize(
    "wrong",
    [
        arrive_late,
        fail_once_more,
        give_up,
        lambda expert, chosen, *rest: queue_by_loop(expert, None, *rest),
        lambda expert, chosen, order, *rest: queue_by_loop(expert, chosen, None, *rest),
        lambda *args: queue_by_loop(*args[:-1], False),
        lambda *args: queue_by_loop(*args[:-1], True),
    ],
    ids=["positions", "lengths", "raises", "all chosen", "no order", "by token", "by choice"],
)
def test_wrong_kernels_are_disabled(use_stand_in, wrong: Kernel):
    expert, chosen, score = make_choices()
    wanted = queue_up(expert, chosen, 5, 2, "score", score)
    calls = use_stand_in(wrong)
    with pytest.warns(UserWarning, match="^the Triton kernels of queues are disabled in this process: the"):
        assert assert_same(queue_up(expert, chosen, 5, 2, "score", score), wanted, chosen)
    number = len(calls)
    assert assert_same(queue_up(expert, chosen, 5, 2, "score", score), wanted, chosen)
    assert len(calls) == number <= 3


class CheckedMeanwhile(str):
    """A verdict during whose reading another thread adds one."""

    check: launching.SelfCheck

    def __eq__(self, other: object) -> bool:
        self.check.verdicts[len(self.check.verdicts)] = None
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_threads_may_check_kernels_at_once(monkeypatch):
    check = launching.SelfCheck("some kernels")
    monkeypatch.setattr(launching, "_SELF_CHECKS", [check])
    no_memory = CheckedMeanwhile(launching.OUT_OF_MEMORY)
    no_memory.check = check
    check.verdicts = {"first": no_memory, "second": None}
    monkeypatch.setattr(check_process, "run_in_process", run_here)
    cpu = torch.device("cpu")
    assert check.failure_reason(cpu, "third", lambda: None) is None
    launching.clear_out_of_memory_verdicts()
    assert {"second", (cpu, "third")} <= check.verdicts.keys()
    assert "first" not in check.verdicts
