"""Self-checks of kernels in a process of their own, and their verdicts on disk."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support import faulty_checks, triton_interpreter

from mixture_of_experts import ops
from mixture_of_experts.dispatch import queues
from mixture_of_experts.kernels import check_process, launching, verdict_file
from mixture_of_experts.kernels.check_process import OUT_OF_MEMORY, Verdict, run_in_process
from mixture_of_experts.kernels.launching import SelfCheck
from mixture_of_experts.support.private_torch import assume_constant_result

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
NO_FAULT = partial({}.get, "fault")  # a check that can be pickled
DISABLED = "^the Triton kernels of queues are disabled "


@pytest.mark.slow
@pytest.mark.skipif(
    triton_interpreter.unsupported_reason() is not None, reason=str(triton_interpreter.unsupported_reason())
)
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("is right", None),
        ("is wrong", "in this process: their queues differ from those of torch's operators"),
        ("raises", "in this process: they raised RuntimeError: a compiler gives up$"),
        ("lacks memory", f"for calls of one kind in this process, because {OUT_OF_MEMORY}"),
        ("aborts", r"in this process: their self-check exited with status -6"),
        ("exits", r"in this process: their self-check exited with status 7"),
        ("hangs", "in this process: their self-check did not finish within 20 s"),
    ],
)
def test_faulty_kernels_end_their_own_process(monkeypatch, tmp_path, fault: str, reason: str | None):
    """The queues are right in any case, and this process launches kernels only after they have passed."""
    expert, launched, module = torch.randint(5, (2, 12)), [], ModuleType("mixture_of_experts.kernels.queueing")
    wanted = queues.queue_up(expert, None, 5, 2)
    module.queue_assignments = lambda *args: launched.append(args) or (wanted.position, wanted.length)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(check_process, "TIMEOUT_SECONDS", 20 if fault == "hangs" else 300)
    monkeypatch.setattr(queues.QUEUES_SELF_CHECK, "verdicts", {})
    file = tmp_path / "process"
    monkeypatch.setattr(queues, "_find_queue_fault", partial(faulty_checks.check_faulty_kernels, fault, str(file)))
    with ops.use("triton"), warnings.catch_warnings() if reason is None else pytest.warns(match=DISABLED + reason):
        found = queues.queue_up(expert, None, 5, 2)
    assert found.position.equal(wanted.position)
    assert found.length.equal(wanted.length)
    assert len(launched) == (reason is None)
    process = int(file.read_text())
    assert process != os.getpid()
    for _ in range(100):
        if not is_running(process):
            return
        time.sleep(0.1)
    raise AssertionError(f"the process of the check ({process}) still runs")


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_errors_outside_of_kernels_are_not_final(monkeypatch):
    """Examples are a missing device, a process that cannot be started, and one that is killed."""
    assert run_in_process(CPU, NO_FAULT) == (None, True)
    missing = "their self-check exited with status 1"
    assert run_in_process(torch.device("cuda", 99), NO_FAULT) == (missing, False)
    assert run_in_process(CPU, partial(signal.raise_signal, signal.SIGKILL)).is_final is False
    fault, is_final = run_in_process(CPU, lambda: None)  # cannot be pickled
    assert "could not be started" in str(fault)
    assert not is_final
    monkeypatch.setattr(sys, "executable", "")
    assert "could not be started" in str(run_in_process(CPU, NO_FAULT).fault)
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert "frozen" in str(run_in_process(CPU, NO_FAULT).fault)


@pytest.mark.slow
def test_checks_start_while_a_graph_is_traced(monkeypatch):
    """The inputs are fake tensors."""
    check, processes = SelfCheck("some kernels"), []
    start = check_process.run_in_process
    monkeypatch.setattr(launching, "_SELF_CHECKS", [])
    monkeypatch.setattr(check_process, "run_in_process", lambda *args: processes.append(args) or start(*args))

    @assume_constant_result
    def has_passed() -> bool:
        return check.failure_reason(CPU, "kind", NO_FAULT) is None

    compiled = torch.compile(lambda x: x + has_passed(), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(2)).tolist() == [1, 1]
    assert len(processes) == 1


@pytest.fixture
def store(monkeypatch, tmp_path) -> Path:
    """Return the folder of verdicts, for a fake card."""
    (tmp_path / "driver").write_text("570.1")
    monkeypatch.setattr(verdict_file, "DRIVER", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", None)
    monkeypatch.setattr(launching, "is_capturing_graph", lambda device: False)
    faulty_checks.use_fake_card(str(tmp_path / "driver"))
    monkeypatch.setenv("MIXTURE_OF_EXPERTS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def count_checks(monkeypatch, store) -> Callable[[Verdict], tuple[int, str | None]]:
    """Return a function that simulates a check with a given result in a new process, and returns the number of checks
    that ran and the verdict."""

    def judge(result: Verdict, kind: object = "kind") -> tuple[int, str | None]:
        calls = []
        monkeypatch.setattr(check_process, "run_in_process", lambda *args: calls.append(args) or result)
        check = SelfCheck("some kernels")
        with pytest.warns(match="some kernels are disabled") if result.fault else warnings.catch_warnings():
            verdict = check.failure_reason(CARD, kind, lambda: None)
            assert check.failure_reason(CARD, kind, lambda: None) == verdict
        return len(calls), verdict

    monkeypatch.setattr(launching, "_SELF_CHECKS", [])
    return judge


@pytest.mark.parametrize("result", [Verdict(None), Verdict("they are wrong")])
def test_verdicts_are_kept_on_disk(monkeypatch, store, count_checks, result: Verdict):
    """They are valid for the same card, driver, versions, sources and kind."""
    assert count_checks(result) == (1, result.fault)
    assert count_checks(result) == (0, result.fault)
    (file,) = store.iterdir()
    if result.fault:
        with pytest.warns(match=f"they are wrong .stored in {file}; delete it to check again"):
            SelfCheck("some kernels").failure_reason(CARD, "kind", lambda: None)
    assert count_checks(result, "another kind")[0] == 1
    for change in (
        lambda: faulty_checks.use_fake_card(str(verdict_file.DRIVER), "another card"),
        lambda: verdict_file.DRIVER.write_text("580.2"),
        lambda: monkeypatch.setattr(torch, "__version__", "9.0"),
        lambda: monkeypatch.setattr(verdict_file.importlib.metadata, "version", lambda name: "9.0"),
        lambda: monkeypatch.setattr(verdict_file, "__file__", str(store / "package" / "kernels" / "file.py")),
    ):
        change()
        assert count_checks(result)[0] == 1
        assert count_checks(result)[0] == 0
    (store / "package").mkdir()
    (store / "package" / "changed.py").write_text("")  # the sources of the patched package
    assert count_checks(result)[0] == 0
    (store / "package" / "changed.py").write_text("changed = True")
    assert count_checks(result)[0] == 1


def test_lack_of_memory_and_timeouts_are_not_kept(store, count_checks):
    for fault in (OUT_OF_MEMORY, "their self-check did not finish"):
        assert [count_checks(Verdict(fault, is_final=False))[0] for _ in range(2)] == [1, 1]
    assert not store.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\x00", b"null", b"[]", b"{}", b"3", b'["some kernels", null]', b'[["some kernels"', None, "number"],
)
def test_damaged_and_foreign_files_are_replaced(store, count_checks, content: bytes | str | None):
    assert count_checks(Verdict(None))[0] == 1
    (file,) = store.iterdir()
    key = json.loads(file.read_bytes())[:-1]
    if content is None:  # of another card
        content = json.dumps(["other kernels", *key[1:], "they are wrong"]).encode()
    file.write_bytes(json.dumps([*key, 3]).encode() if isinstance(content, str) else content)
    assert count_checks(Verdict(None)) == (1, None)
    assert count_checks(Verdict(None)) == (0, None)
    assert list(store.iterdir()) == [file]


def test_without_a_folder_each_process_checks(monkeypatch, store, count_checks):
    """Nothing is stored without a folder, in a folder that cannot be created, for an unknown driver, or for a CPU."""
    for folder in ("", str(store.parent / "driver" / "is no folder")):
        monkeypatch.setenv("MIXTURE_OF_EXPERTS_CACHE", folder)
        assert [count_checks(Verdict(None))[0] for _ in range(2)] == [1, 1]
    monkeypatch.setenv("MIXTURE_OF_EXPERTS_CACHE", str(store))
    verdict_file.DRIVER.unlink()
    assert [count_checks(Verdict(None))[0] for _ in range(2)] == [1, 1]
    verdict_file.VerdictFile(CPU, "some kernels", "kind").write(None)
    assert not store.exists()


def test_default_folder(monkeypatch, store):
    monkeypatch.delenv("MIXTURE_OF_EXPERTS_CACHE")
    monkeypatch.setenv("HOME", str(store))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    file = verdict_file.VerdictFile(CARD, "some kernels", "kind")
    assert file.path is not None
    assert file.path.parent == store / ".cache" / "mixture_of_experts"
    monkeypatch.setenv("XDG_CACHE_HOME", str(store / "other"))
    file = verdict_file.VerdictFile(CARD, "some kernels", "kind")
    assert file.path is not None
    assert file.path.parent == store / "other" / "mixture_of_experts"


@pytest.mark.slow
def test_processes_may_write_at_once(store):
    """While two processes write, each read returns one of their verdicts."""
    wrong = "they are wrong " * 1000
    file = verdict_file.VerdictFile(CARD, "some kernels", "kind")
    file.write(None)
    context = multiprocessing.get_context("spawn")
    arguments = (str(verdict_file.DRIVER), [None, wrong] * 500)
    writers = [context.Process(target=faulty_checks.write_verdicts, args=arguments) for _ in range(2)]
    for writer in writers:
        writer.start()
    found = []
    while any(writer.is_alive() for writer in writers):
        found.append(file.read())
    assert {len(verdict) for verdict in found} == {1}
    assert {verdict[0] for verdict in found} == {None, wrong}
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(list(store.iterdir())) == 1
