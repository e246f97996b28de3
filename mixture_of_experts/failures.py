"""What a rank says when it fails, so that the others can say why they waited in vain.

Nothing is written while all goes well. A rank that fails adds an entry to a journal in the store through which the
processes of the job found each other, and so does one that waited in vain. The error of the latter then names the rank
that failed and its error; or, if none tells of a failure, the ranks that tell nothing at all.
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

from mixture_of_experts.private_torch import default_timeout, store_of_job

JOURNAL = "mixture_of_experts.failures"
LONGEST = 400  # characters of an error that are told
MOST = 8  # ranks that an error names
#: what errors of a collective say whose other ranks did not come; gloo's have no type of their own
IN_VAIN = re.compile(r"gloo|NCCL|Timed out waiting|Connection (closed|reset|refused)")


AnyError = TypeVar("AnyError", bound=BaseException)


class Entry(NamedTuple):
    """What a rank told: that it failed, or (`waited`) that it waited in vain for others."""

    rank: int  # in the whole job
    waited: bool
    time: float
    text: str


@contextmanager
def tell_failures() -> Iterator[None]:
    """Around a training loop, on every rank: whatever raises on one rank, the errors of the others name it.

    A rank that raises tells the others so. They fail when they have waited in vain for it: at the timeout of the
    process group, or at once when its process has ended. Their error then is a RuntimeError that says which rank failed
    with what error; or, if that rank could not say anything (it is stuck, or was killed), which ranks told nothing.
    Layers whose experts are spread over ranks do this by themselves, but only know what happens in them.

    It costs nothing before something fails: what is told goes through the store by which the processes found each
    other. Without process groups it does nothing.

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
    """`tell_failures`, where the ranks of a process group wait for each other; None: all ranks."""
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
    """The error of a rank for which others did not come, after it has heard what they tell.

    Args:
        what: what it could not do.
        error: that of the collective.
        group: whose ranks were waited for.
        timeout: how long they wait for each other. A part of it is given to those that are about to tell something.
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
    """Add to the journal that this rank failed; where that cannot be done, the others will find it silent."""
    entry = Entry(dist.get_rank(), waited, time.time(), summary(error))
    in_time(lambda: write(entry), seconds=10)
    known_to_all(error)


def known_to_all(error: AnyError) -> AnyError:
    """The error, marked: the other ranks know of it, or have raised it themselves."""
    error.__dict__["known_to_all_ranks"] = True
    return error


def is_known_to_all(error: BaseException) -> bool:
    return error.__dict__.get("known_to_all_ranks", False)


def summary(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def heard(group: dist.ProcessGroup, error: Exception, timeout: timedelta) -> str:
    """What the other ranks tell, in a sentence; it is waited for, but not long."""
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
            f"what they tell cannot be read ({problem}). It was kept by the process to which the ranks connected, rank "
            "0 unless torchrun started them: it has ended or is stopped"
        )
    silent = silent_among(group, entries)
    if not silent:
        return (
            f"all {group.size()} ranks waited in vain: look at their network, and for differences between their calls"
        )
    names = ", ".join(map(str, silent[:MOST])) + (f" and {len(silent) - MOST} more" if len(silent) > MOST else "")
    one = len(silent) == 1
    return (
        f"rank{'' if one else 's'} {names} told nothing: {'it' if one else 'each of them'} was killed, is stuck, or is "
        "not yet where the others wait"
    )


def listen(group: dist.ProcessGroup, journal: dict[int, Entry], patience: float, timeout: timedelta) -> None:
    """Read the journal, until it says enough or patience is over."""
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
    """The failures that can have kept a rank waiting: not those of long ago, which were caught."""
    since = time.time() - 2 * timeout.total_seconds() - 5
    return [entry for entry in entries if not entry.waited and entry.time > since]


def silent_among(group: dist.ProcessGroup, entries: list[Entry]) -> list[int]:
    """The other ranks, those of them that have told nothing."""
    heard_of = {dist.get_rank(), *(entry.rank for entry in entries)}
    return [rank for rank in dist.get_process_group_ranks(group) if rank not in heard_of]


def write(entry: Entry) -> None:
    store = store_of_job()
    number = store.add(JOURNAL, 1)
    store.set(f"{JOURNAL}/{number}", f"{entry.rank} {int(entry.waited)} {entry.time} {entry.text}")


def read(journal: dict[int, Entry]) -> None:
    """Add the entries by number that are new; one whose writer has not finished it is passed over."""
    store = store_of_job()
    for number in range(1, store.add(JOURNAL, 0) + 1):
        if number not in journal and store.check([f"{JOURNAL}/{number}"]):
            rank, waited, written, text = store.get(f"{JOURNAL}/{number}").decode().split(" ", 3)
            journal[number] = Entry(int(rank), waited == "1", float(written), text)


def in_time(call: Callable[[], None], seconds: float) -> str | None:
    """Do it in a thread, as a store whose process is stopped answers never; what went wrong, if anything did."""
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
