"""A rank that fails tells the others, so that their errors can name it.

The ranks share a journal in the store through which the processes of the job found each other. A rank adds an entry
when it fails, and when it has waited for others in vain; until then nothing is written. The error of a rank that
waited in vain names the rank that failed and its error. If no entry tells of a failure, it names the silent ranks.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch.distributed as dist

from mixture_of_experts.support.private_torch import default_timeout, store_of_job

JOURNAL = "mixture_of_experts.support.failures"
LONGEST = 400  # characters of an error in an entry
MOST = 8  # ranks that an error names
#: words in the error of a collective that waited in vain; gloo's errors have no type of their own
IN_VAIN = re.compile(r"gloo|NCCL|Timed out waiting|Connection (closed|reset|refused)")


AnyError = TypeVar("AnyError", bound=BaseException)


class Entry(NamedTuple):
    """An entry of the journal: a rank failed, or (`waited`) it waited in vain for others."""

    rank: int  # in the whole job
    waited: bool
    time: float
    text: str


@contextmanager
def tell_failures() -> Iterator[None]:
    """Make every rank's error name the rank that failed first. Enter this context on every rank, around the training.

    A rank that raises inside tells the others. They wait for it in vain, until the timeout of the process group or, if
    its process has ended, only until then. They raise a RuntimeError with the number and the error of the failed rank.
    A rank that is stuck or was killed can tell nothing: then the error names the silent ranks. Layers with experts
    spread over ranks do the same without this context, but only for errors within themselves.

    It costs nothing until something fails, and does nothing without process groups.

    Example:
        >>> from mixture_of_experts.parallel import tell_failures
        >>> with tell_failures():
        ...     for batch in []:  # the training loop
        ...         pass
    """
    with telling_ranks(None):
        yield


@contextmanager
def telling_ranks(group: dist.ProcessGroup | None) -> Iterator[None]:
    """`tell_failures` for the ranks of one process group; None: all ranks."""
    try:
        yield
    except BaseException as error:
        if not dist.is_initialized() or is_known_to_all(error) or (isinstance(error, SystemExit) and not error.code):
            raise
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and IN_VAIN.search(str(error))):
            raise waited_in_vain("the other ranks were waited for in vain", error, group or every_rank()) from error
        tell(error)
        raise


def waited_in_vain(
    what: str, error: Exception, group: dist.ProcessGroup, timeout: timedelta | None = None
) -> RuntimeError:
    """Return the error to raise on a rank that waited in vain, after it has read what the others tell.

    Args:
        what: what this rank could not do.
        error: the error of the collective.
        group: the ranks that were waited for.
        timeout: how long they wait for each other; None: as the process group. It bounds the wait for late entries.
    """
    timeout = timeout or default_timeout(group)
    place, others = f"on rank {group.rank()} of {group.size()}", heard(group, error, timeout)
    return known_to_all(
        RuntimeError(f"{what}, {place}: {error}\nAnother rank has raised, is stuck or ran other layers: {others}")
    )


def every_rank() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def tell(error: BaseException, waited: bool = False) -> None:
    """Add to the journal that this rank failed, or `waited` in vain. Without an entry the others find it silent."""
    entry = Entry(dist.get_rank(), waited, time.time(), summary(error))
    in_time(lambda: write(entry), seconds=10)
    known_to_all(error)


def known_to_all(error: AnyError) -> AnyError:
    """Mark an error of which the other ranks know, or which all of them raise, and return it."""
    error.__dict__["known_to_all_ranks"] = True
    return error


def is_known_to_all(error: BaseException) -> bool:
    return error.__dict__.get("known_to_all_ranks", False)


def summary(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def heard(group: dist.ProcessGroup, error: Exception, timeout: timedelta) -> str:
    """What the other ranks tell, in a sentence. Waits at most 15 seconds for them."""
    tell(error, waited=True)
    patience = min(max(timeout.total_seconds() / 2, 1.0), 15.0)
    journal: dict[int, Entry] = {}
    problem = in_time(lambda: listen(group, journal, patience, timeout), seconds=patience + 5)
    entries = list(journal.values())
    if causes := causes_among(entries, timeout):
        shown = [f"rank {cause.rank} raised {cause.text}" for cause in causes[:MOST]]
        return "; ".join([*shown, *(["and more"] if len(causes) > MOST else [])])
    if problem is not None:
        return (
            f"what they tell cannot be read ({problem}). The process to which the ranks connected (rank 0, unless "
            "torchrun started them) kept it; that process has ended or is stopped"
        )
    silent = silent_among(group, entries)
    if not silent:
        return (
            f"all {group.size()} ranks waited in vain: check the network, and look for differences between their calls"
        )
    names = ", ".join(map(str, silent[:MOST])) + (f" and {len(silent) - MOST} more" if len(silent) > MOST else "")
    one = len(silent) == 1
    return (
        f"rank{'' if one else 's'} {names} told nothing: {'it' if one else 'each of them'} was killed, is stuck, or "
        "has not yet come to where the others wait"
    )


def listen(group: dist.ProcessGroup, journal: dict[int, Entry], patience: float, timeout: timedelta) -> None:
    """Read entries until they name a failure, no rank is silent, or `patience` seconds are over."""
    begin = time.monotonic()
    while True:
        read(journal)
        entries = list(journal.values())
        waited, silent = time.monotonic() - begin, silent_among(group, entries)
        settled = not silent or (len(silent) == 1 and waited > 0.5)
        if causes_among(entries, timeout) or settled or waited > patience:
            return
        time.sleep(0.02)


def causes_among(entries: list[Entry], timeout: timedelta) -> list[Entry]:
    """The failures that can be the cause of a wait. Older ones were caught."""
    since = time.time() - 2 * timeout.total_seconds() - 5
    return [entry for entry in entries if not entry.waited and entry.time > since]


def silent_among(group: dist.ProcessGroup, entries: list[Entry]) -> list[int]:
    """The other ranks without an entry."""
    heard_of = {dist.get_rank(), *(entry.rank for entry in entries)}
    return [rank for rank in dist.get_process_group_ranks(group) if rank not in heard_of]


def write(entry: Entry) -> None:
    store = store_of_job()
    number = store.add(JOURNAL, 1)
    store.set(f"{JOURNAL}/{number}", f"{entry.rank} {int(entry.waited)} {entry.time} {entry.text}")


def read(journal: dict[int, Entry]) -> None:
    """Add new entries to `journal`, by number; skip those that are not written to the end."""
    store = store_of_job()
    for number in range(1, store.add(JOURNAL, 0) + 1):
        if number not in journal and store.check([f"{JOURNAL}/{number}"]):
            rank, waited, written, text = store.get(f"{JOURNAL}/{number}").decode().split(" ", 3)
            journal[number] = Entry(int(rank), waited == "1", float(written), text)


def in_time(call: Callable[[], None], seconds: float) -> str | None:
    """Run `call` in a thread, for at most so many seconds: a store whose process is stopped never answers.

    Returns None, or what went wrong.
    """
    problems = ["no answer"]

    def run() -> None:
        try:
            call()
            problems.clear()
        except Exception as error:
            problems[:] = [summary(error)]

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return problems[0] if problems else None
