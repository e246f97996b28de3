"""Processes for the tests of expert parallelism: each started when first needed, then given one check after the other.

`Workers.run(check, ranks, ...)` has the first `ranks` processes call `check(...)` with a fresh gloo group of that size;
what they return comes back as a list, and the errors of any of them are raised. A process that died is replaced.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

TIMEOUT = 60.0  # seconds that a check's ranks wait for each other unless the check is about waiting


class RankError(AssertionError):
    """An error in a worker, with its traceback as text."""


def get_rank() -> dist.ProcessGroup | None:
    """A group of this process alone; None without processes. No other process takes part in making it."""
    if not dist.is_initialized():
        return None
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group


def gather_tensor(tensor: Any) -> Any:
    """All ranks' parts of a tensor, if it is a `DTensor`."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Workers:
    """Processes that wait for work."""

    def __init__(self) -> None:
        self._context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._runs = 0
        self._processes: dict[int, Any] = {}
        self._pipes: dict[int, Any] = {}

    def _start(self, rank: int) -> None:
        here, there = self._context.Pipe()
        process = self._context.Process(
            target=run_worker, args=(there, os.getpid(), self._stack_file(rank)), daemon=True
        )
        process.start()
        self._processes[rank], self._pipes[rank] = process, here

    def _stack_file(self, rank: int) -> Path:
        return Path(self._folder.name, f"stack{rank}")

    def _begin(self, ranks: int) -> None:
        """See that the first `ranks` processes live and have imported what takes long."""
        living = {rank for rank, process in self._processes.items() if process.is_alive()}
        new = [rank for rank in range(ranks) if rank not in living]
        for rank in new:
            self._start(rank)
        for rank in new:
            assert self._pipes[rank].recv() == "ready"

    def run(self, check: Callable, ranks: int, *args: Any, timeout: float = TIMEOUT, **kwargs: Any) -> list[Any]:
        """Results of the check on every rank; raises the errors of all of them, as one leads to others'."""
        results = self.outcomes(check, ranks, *args, timeout=timeout, **kwargs)
        errors = [f"rank {rank} of {ranks}: {r}" for rank, r in enumerate(results) if isinstance(r, RankError)]
        if errors:
            raise RankError("\n".join(errors))
        return results

    def outcomes(self, check: Callable, ranks: int, *args: Any, timeout: float = TIMEOUT, **kwargs: Any) -> list[Any]:
        """What every rank returned, or its `RankError`, also for a process that died."""
        self._begin(ranks)
        self._runs += 1
        store = os.path.join(self._folder.name, f"store{self._runs}")
        for rank in range(ranks):
            self._pipes[rank].send((check, rank, ranks, store, timeout, args, kwargs))
        return [self._result(rank, 4 * timeout + 60) for rank in range(ranks)]

    def _result(self, rank: int, patience: float) -> Any:
        pipe, process = self._pipes[rank], self._processes[rank]
        try:
            if pipe.poll(patience):
                return pipe.recv()
        except EOFError:
            process.join(10)
            return RankError("its process died")
        return RankError(f"hung for {patience} seconds\n{self._end_hung(rank)}")

    def _end_hung(self, rank: int) -> str:
        """Kill the process; returns the stacks of its threads."""
        process, stacks = self._processes[rank], self._stack_file(rank)
        os.kill(process.pid, signal.SIGUSR1)
        deadline = time.monotonic() + 5
        while not (text := stacks.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.kill()
        process.join(10)
        return text

    def stop(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.join(10)
        self._folder.cleanup()


def run_worker(pipe: Any, parent: int, stack_file: Path) -> None:
    """A worker's life. A signal has the stacks of its threads written into the file, whatever it waits for."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    importlib.import_module("support.parallel_training")
    gc.freeze()  # what is imported stays: `destroy_group` need not look at it
    with stack_file.open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        pipe.send("ready")
        serve_checks(pipe, parent)


def serve_checks(pipe: Any, parent: int) -> None:
    """Do the checks that the pipe brings, until the parent is gone."""
    while os.getppid() == parent:
        if not pipe.poll(5):
            continue
        try:
            check, rank, ranks, store, timeout, args, kwargs = pipe.recv()
        except EOFError:
            return
        pipe.send(run_check(check, rank, ranks, store, timeout, args, kwargs))


def run_check(
    check: Callable, rank: int, ranks: int, store: str, timeout: float, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Result of the check, or its error as text.

    Its group lives until the next check: another rank may still be in a collective that this one has left. (Not after
    an error, so that the others need not wait for their timeouts.)
    """
    destroy_group()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    limit = timedelta(seconds=timeout)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=limit)
        dist.barrier()  # a check may end before a slower rank has even connected
        return check(*args, **kwargs)
    except BaseException:  # pytest's own are no `Exception`
        error = traceback.format_exc()
        destroy_group()
        return RankError(error)


def destroy_group() -> None:
    """End the group, and collect the cycles in which DDP and `fully_shard` leave it.

    Left to the collector, the threads of an old group end at any time, also while the next group begins.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
