"""Many calls of one model, made by one thread and by several: each has to give the same bits."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from mixture_of_experts import collect_aux
from mixture_of_experts.stats import track_routing
from mixture_of_experts.whole_model.aux_losses import AuxLosses
from mixture_of_experts.whole_model.call_stack import CALL_STACKS

Call = Callable[[AuxLosses], list[Tensor]]
NUM_THREADS = 8


@contextmanager
def switch_threads_often() -> Iterator[None]:
    """Python's threads take turns after a microsecond instead of 5 milliseconds."""
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-6)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        torch.set_num_threads(threads)


def run_in_threads(work: Callable[[int], None], threads: int) -> None:
    """All at once; what one of them raises is raised."""
    start = threading.Barrier(threads)

    def begin(number: int) -> None:
        start.wait(60)
        work(number)

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(begin, number) for number in range(threads)]:
            future.result()


def read_counts(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers() if name.endswith("expert_counts")}


def check_threads(model: nn.Module, calls: Sequence[Call], rounds: int) -> None:
    """Every call, made `rounds` times by eight threads among the others, gives what one thread gets of it, results and
    gradients bit by bit. What is counted of all of them is `rounds` times that of one thread.

    Each thread has a context of `collect_aux` of its own, which its calls are given.
    """
    with switch_threads_often():
        with collect_aux(model) as aux:
            for call in calls:
                call(aux)  # caches are filled, warnings given
            start = read_counts(model)
            with track_routing(model) as alone:
                expected = [call(aux) for call in calls]
        of_one_round = {name: value - start[name] for name, value in read_counts(model).items()}
        start, step, wrong = read_counts(model), threading.Barrier(NUM_THREADS), []

        def work(first: int) -> None:
            torch.set_num_threads(1)
            step.wait(60)
            with collect_aux(model) as aux:  # hooks come and go while no forward runs
                step.wait(60)
                for index in range(first, rounds * len(calls), NUM_THREADS):
                    which = (index // NUM_THREADS + first) % len(calls)
                    for i, (one, other) in enumerate(zip(calls[which](aux), expected[which], strict=True)):
                        if not torch.equal(one, other):
                            wrong.append((which, i))
                step.wait(600)
            assert not CALL_STACKS.calls, "a call is under way that has ended"

        def work_or_stop_all(first: int) -> None:
            try:
                work(first)
            except threading.BrokenBarrierError:
                pass  # another one raises
            except BaseException:
                step.abort()
                raise

        most = rounds * max(alone.total(layer).forwards for layer in alone.layers)
        with track_routing(model, keep=most) as together, ThreadPoolExecutor(NUM_THREADS) as pool:
            for future in [pool.submit(work_or_stop_all, first) for first in range(NUM_THREADS)]:
                future.result()
    assert not wrong, f"{len(wrong)} results differ, the first ones (call, result): {wrong[:10]}"
    for name, value in read_counts(model).items():
        assert torch.equal(value - start[name], rounds * of_one_round[name])
    for layer in alone.layers:
        one, other = alone.total(layer), together.total(layer)
        assert (other.forwards, other.tokens) == (rounds * one.forwards, rounds * one.tokens)
        assert torch.equal(rounds * one.load, other.load)
        assert torch.equal(rounds * one.requested, other.requested)
        assert other.losses == pytest.approx(one.losses)
