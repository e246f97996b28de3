"""What a rank hears from the others when it waited in vain; `test_parallel.py` has the ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from mixture_of_experts.parallel import tell_failures
from mixture_of_experts.support import failures
from mixture_of_experts.support.failures import Entry

SECOND = timedelta(seconds=1)


class FourRanks:
    """Stands for a process group; this is rank 0."""

    def size(self) -> int:
        return 4

    def rank(self) -> int:
        return 0


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FourRanks]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [0, 1, 2, 3])
    yield FourRanks()
    dist.destroy_process_group()


def heard(group: FourRanks, *entries: Entry) -> str:
    for entry in entries:
        failures.write(entry)
    return failures.heard(group, RuntimeError("gloo"), SECOND)


def entry(rank: int, waited: bool = False, age: float = 0.0) -> Entry:
    return Entry(rank, waited, time.time() - age, f"error of {rank}")


def test_a_failure_is_named_at_once(group: FourRanks):
    begin = time.monotonic()
    assert heard(group, entry(2, waited=True), entry(3)) == "rank 3 raised error of 3"
    assert time.monotonic() - begin < 0.5


def test_who_tells_nothing_is_named(group: FourRanks):
    assert heard(group, entry(2, waited=True)).startswith("ranks 1, 3 told nothing: each of them was killed")
    assert heard(group, entry(3, waited=True)).startswith("rank 1 told nothing: it was killed")
    assert heard(group, entry(1, waited=True)).startswith("all 4 ranks waited in vain")


def test_a_failure_that_was_caught_long_ago_is_none(group: FourRanks):
    assert "rank 3 raised" not in heard(group, entry(3, age=100), entry(2, waited=True), entry(1, waited=True))


def test_an_entry_whose_writer_died_is_passed_over(group: FourRanks):
    failures.store_of_job().add(failures.JOURNAL, 1)  # its text never comes
    assert heard(group, entry(3)) == "rank 3 raised error of 3"


@pytest.mark.parametrize("problem", ["gone", "stopped"])
def test_a_store_that_is_gone_or_stopped_is_said(group: FourRanks, monkeypatch: pytest.MonkeyPatch, problem: str):
    def store() -> dist.Store:
        time.sleep(60 if problem == "stopped" else 0)
        raise dist.DistNetworkError("Connection reset by peer")

    in_time = failures.in_time
    monkeypatch.setattr(failures, "store_of_job", store)
    monkeypatch.setattr(failures, "in_time", lambda call, seconds: in_time(call, 0.1))
    said = failures.heard(group, RuntimeError("gloo"), SECOND)
    assert said.startswith("what they tell cannot be read")
    assert ("no answer" if problem == "stopped" else "Connection reset") in said


def test_what_a_rank_raises_stays_what_it_is_and_is_told_once(group: FourRanks):
    with pytest.raises(KeyError, match="lost"), tell_failures(), tell_failures():
        raise KeyError("lost")
    journal: dict[int, Entry] = {}
    failures.read(journal)
    (told,) = journal.values()
    assert (told.rank, told.waited, told.text) == (0, False, "KeyError: 'lost'")
    with pytest.raises(SystemExit), tell_failures():  # an end, and no failure
        raise SystemExit(0)
    failures.read(journal)
    assert len(journal) == 1


def test_without_process_groups_nothing_is_told():
    with pytest.raises(KeyError, match="lost"), tell_failures():
        raise KeyError("lost")
