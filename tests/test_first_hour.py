"""Dry runs of the first hour on a GPU, with a CPU in its place: injected faults, and made-up times whose verdict is
known.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import cpu_device

from benchmarks import (
    blocks,
    decisions,
    first_hour,
    gpu_comparison,
    gpu_contestants,
    gpu_device,
    gpu_report,
    gpu_shapes,
    gpu_tasks,
    nvidia_smi,
    requirements,
    results_file,
    tasks,
)
from benchmarks.case_results import CaseResults
from benchmarks.gpu_cases import GPUCase, draw_tokens, list_cases
from mixture_of_experts import GatedExperts, MoE, TopKGating
from mixture_of_experts.ops.triton import schedule

ROOT = Path(__file__).parent.parent
DEVICE = cpu_device.CPUDevice()
CASES = {case.name: case for case in list_cases(DEVICE.shapes())}
ENTRIES = schedule.HALF_SCHEDULES[9, 0]
PLAIN = "qwen3-30b-a3b/train"


@pytest.fixture
def shorten_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_device, "ROUNDS", 1)
    monkeypatch.setattr(gpu_device, "WARMUP", 1)


# ---- a case ----


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools:UserWarning")  # by transformers
@pytest.mark.usefixtures("shorten_rounds")
@pytest.mark.parametrize(
    "name",
    [
        PLAIN,
        *(f"readme/{mode}" for mode in ("forward", "decode", "train/zipf")),
        *(f"qwen3-30b-a3b/train/{variation}" for variation in ("pretrained", "autocast", "16-rows", "float16")),
        "qwen3-30b-a3b/decode/pretrained",
        pytest.param("readme/train/compiled", marks=pytest.mark.slow),
        pytest.param("readme/decode/reduce-overhead", marks=pytest.mark.slow),
    ],
)
def test_all_contestants_of_a_case_compute_the_same(name: str) -> None:
    """On the CPU at a small size. Contestants that need a GPU or another library are missing; none is wrong."""
    case = CASES[name]
    found = cpu_device.run_tasks(gpu_comparison.compare(case, DEVICE))
    assert list(found) == ["reference", *gpu_contestants.list_contestants(case)]
    failures = {name: failure for name, result in found.items() if (failure := tasks.find_failure(result))}
    assert not [failure for failure in failures.items() if failure[1][0] != "missing"]
    assert "NVIDIA" in failures["layer, triton"][1]
    assert {"layer", "layer, batched"} <= found.keys() - failures.keys()
    measured = CaseResults(case, found).results["layer, batched"]
    assert measured["error"] < gpu_comparison.MAX_ERRORS[case.dtype]
    assert len(measured["card"]) == len(measured["host"]) == 3


def run_with(contestant: Callable[..., gpu_contestants.Contestant], case: GPUCase, monkeypatch: Any) -> dict[str, Any]:
    monkeypatch.setattr(gpu_contestants, "CONTESTANTS", {"one": contestant})
    return cpu_device.run_tasks(gpu_comparison.compare(case, DEVICE))["one"]


@pytest.mark.usefixtures("shorten_rounds")
@pytest.mark.parametrize("fault", [1.1, float("nan")])
def test_a_wrong_output_is_not_timed(fault: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(case: GPUCase, layer: MoE, x: torch.Tensor) -> gpu_contestants.Contestant:
        return gpu_contestants.Contestant(lambda x: fault * layer(x)[0], [])

    found = run_with(wrong, CASES[PLAIN], monkeypatch)
    assert list(found) == ["wrong"]
    assert "relative error" in found["wrong"]


@pytest.mark.usefixtures("shorten_rounds")
def test_a_wrong_gradient_of_transposed_weights_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients in the layout of pretrained weights are compared too, with random gradients of the outputs."""

    def swapped(*arguments: Any) -> gpu_contestants.Contestant:
        made = gpu_contestants.build_own("auto", False, *arguments)
        arrange = made.arrange
        return replace(made, arrange=lambda *gradients: [arrange(*gradients)[i] for i in (1, 0, 2)])

    assert list(run_with(swapped, CASES[f"{PLAIN}/pretrained"], monkeypatch)) == ["wrong"]


class UniformGradient(torch.autograd.Function):
    """The identity, with a backward that is right only for gradients of ones (and zeros)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return (grad != 0).to(grad.dtype)


@pytest.mark.usefixtures("shorten_rounds")
def test_gradients_of_outputs_are_random(monkeypatch: pytest.MonkeyPatch) -> None:
    def uniform(case: GPUCase, layer: MoE, x: torch.Tensor) -> gpu_contestants.Contestant:
        experts: Any = layer.experts
        weights = [experts.w1, experts.w3, experts.w2]
        return gpu_contestants.Contestant(lambda x: UniformGradient.apply(layer(x)[0]), weights, weights=weights)

    assert list(run_with(uniform, CASES[PLAIN], monkeypatch)) == ["wrong"]


@pytest.mark.filterwarnings("always::UserWarning")  # as outside of the tests
@pytest.mark.usefixtures("shorten_rounds")
def test_kernels_that_are_turned_off_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed self-check, operators would be timed under the name of the kernels."""
    module: dict[str, Any] = {"__name__": "mixture_of_experts.kernels.one"}
    exec("def warn():\n import warnings\n warnings.warn('the kernels are disabled', stacklevel=1)", module)

    def disabled(case: GPUCase, layer: MoE, x: torch.Tensor) -> gpu_contestants.Contestant:
        return gpu_contestants.Contestant(lambda x: (module["warn"](), layer(x)[0])[1], [])

    assert run_with(disabled, CASES[PLAIN], monkeypatch) == {"ended": "UserWarning: the kernels are disabled"}


def test_routing_follows_the_case() -> None:
    """By Zipf's law, the first expert gets the share p of first choices. Balanced tokens choose evenly."""
    shape = replace(gpu_shapes.SHAPES[1], t=4096, d=64)
    p = 1 / sum(1 / i for i in range(1, shape.e + 1))
    gate = TopKGating(shape.d, shape.e, shape.k)
    for routing, wanted in (("zipf", p), ("balanced", 1 / shape.e)):
        x = draw_tokens(GPUCase(shape, "train", dtype="autocast", routing=routing), gate.w_gating)
        first = (x @ gate.w_gating).argmax(-1)
        assert (first == 0).float().mean().item() == pytest.approx(wanted, abs=0.03)
    assert shape.with_rows(16).mean_rows == 16


def test_cases_cover_what_decides() -> None:
    cases = list(list_cases(list(gpu_shapes.SHAPES)))
    rows = {case.shape.mean_rows for case in cases if case.mode != "decode"}
    assert rows >= {16, 64, 256, 512, 1024, 2048}
    assert {case.routing for case in cases} == {"balanced", "zipf"}
    assert {case.dtype for case in cases} == {"bfloat16", "float16", "autocast"}
    assert {case.layout for case in cases} == {"separate", "pretrained"}
    assert {(case.mode, case.compiled) for case in cases} >= {("train", "default"), ("decode", "reduce-overhead")}
    assert len({case.name for case in cases}) == len(cases)
    # compiled functions are checked with the tokens that are timed: other sizes would compile another graph
    compared = {case.shape.mean_rows for case in cases if case.compiled and case.mode != "decode"}
    assert max(compared) <= gpu_comparison.CHECKED_ROWS


def test_experts_and_router_kernels_are_chosen_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []
    monkeypatch.setattr(gpu_contestants.ops, "use", lambda *names, **options: requests.append((names, options)) or ctx)
    ctx = gpu_contestants.nullcontext()
    layer = MoE(32, gate=TopKGating(32, 4, 2), experts=GatedExperts(32, 4, 32))
    for name in ("layer", "layer, grouped", "layer, grouped, router kernels"):
        gpu_contestants.CONTESTANTS[name](CASES[PLAIN], layer, torch.randn(1, 8, 32))
    wanted = [("auto", False), ("grouped", False), ("grouped", True)]
    assert requests == [((name,), {"router_kernels": kernels}) for name, kernels in wanted]


# ---- time ----


def test_the_card_sleeps_until_a_step_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is cold, and what is between the two events never waits for the host. The cache is flushed by reading,
    which leaves no dirty lines."""
    said: list[str] = []

    event = SimpleNamespace(
        record=lambda: said.append("event"), synchronize=lambda: said.append("wait"), elapsed_time=lambda other: 2.0
    )
    device = gpu_device.Device()
    device.cold_buffer = SimpleNamespace(sum=lambda: said.append("read"))  # type: ignore
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event if enable_timing else None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: said.append(f"sleep {cycles / 2.8e9 >= 1e-2}"))
    assert device.card_seconds(lambda: said.append("step"), host=1e-2) == 2e-3
    assert said == ["read", "sleep True", "event", "step", "event", "wait"]


def test_times_have_quartiles(monkeypatch: pytest.MonkeyPatch) -> None:
    card, host = iter(range(1, 100)), iter([9.0] * gpu_device.WARMUP + [0.5] * 100)
    monkeypatch.setattr(DEVICE, "card_seconds", lambda step, host: next(card), raising=False)
    monkeypatch.setattr(DEVICE, "host_seconds", lambda step: next(host), raising=False)
    found = DEVICE.time_step(lambda: None, longest=60)
    assert found == ((5.75, 10.5, 15.25), (0.5, 0.5, 0.5))  # of 1 to 20, without the warm-up


def test_peak_memory_excludes_what_was_allocated_before(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = {"now": 100, "peak": 900}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: allocated["now"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: allocated.update(peak=allocated["now"]))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: allocated["peak"])
    assert gpu_device.Device().count_peak_bytes(lambda: allocated.update(peak=350)) == 250


def test_nvidia_smi_may_be_absent_or_odd(tmp_path: Path) -> None:
    fields = ("driver_version", "power.limit")
    assert nvidia_smi.query(fields, "0", "no-such-command") == {}
    command = tmp_path / "nvidia-smi"
    for text, wanted in (
        ("echo 580.1, 700.00 W", {"driver_version": "580.1", "power.limit": "700.00 W"}),
        ("echo no devices; exit 6", {}),
        ("echo Field is not valid", {}),
    ):
        command.write_text(f"#!/bin/sh\n{text}\n")
        command.chmod(0o755)
        assert nvidia_smi.query(fields, "0", str(command)) == wanted


# ---- requirements ----


def test_first_hour_rejects_an_old_torch(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """As a rival that pins torch leaves it behind. The minimum is that of the package."""
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert first_hour.main(["--list"], DEVICE) == 2
    assert re.search(r"torch 2\.9\.1\+cu128 is too old.* need torch 2\.10 or newer", capsys.readouterr().out)
    assert f'"torch>={requirements.MIN_TORCH}"' in (ROOT / "pyproject.toml").read_text()
    for version in ("2.10.0", "2.13.0+cu130", "3.0.0a0+git1234"):
        requirements.check_torch(version)


def test_an_old_torch_is_rejected_before_the_package_is_imported() -> None:
    code = "import sys, benchmarks.first_hour; print([name for name in sys.modules if name == 'mixture_of_experts'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_rival_that_requires_another_torch_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason has both versions, whether or not the rival can be imported."""
    metadata = requirements.metadata
    required = ["numpy", "torch<=2.9.1,>=2.7.1", 'torch==1.0; extra == "old"']
    monkeypatch.setattr(metadata, "requires", lambda name: required)
    monkeypatch.setattr(metadata, "version", lambda name: "0.1.2")
    found = requirements.find_torch_conflict("sonic-moe", "2.13.0+cu130")
    assert found == "sonic-moe 0.1.2 requires torch<=2.9.1,>=2.7.1, this is torch 2.13.0+cu130"
    assert requirements.find_torch_conflict("sonic-moe", "2.9.1+cu128") is None
    result = cpu_device.run_tasks(gpu_comparison.compare(CASES[PLAIN], DEVICE))["SonicMoE"]
    assert result["missing"].startswith("sonic-moe 0.1.2 requires torch")


# ---- processes ----


def run_faulty(fault: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """Run a case in processes, in which ScatterMoE has a fault. Return the report and the results."""
    command = [sys.executable, cpu_device.__file__, "--fault", fault, "ScatterMoE"]
    done = subprocess.run(
        [*command, "--only", f"cases/{PLAIN}", "--folder", str(folder)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    path = gpu_tasks.get_path(folder, f"cases/{PLAIN}", cpu_device.MACHINE)
    stored = results_file.read(path, cpu_device.MACHINE)
    assert stored.complete
    return (folder / "report.md").read_text(), stored.found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("illegal access", "the device failed: RuntimeError: CUDA error: an illegal memory access was encountered"),
        ("hang", "nothing was stored for "),
        ("crash", "its process ended with 7"),
        ("raises", "AssertionError: expected the 3rd argument to be contiguous"),
        ("wrong", "its relative error is "),
    ],
)
def test_only_the_faulty_contestant_is_blamed(fault: str, reason: str, tmp_path: Path) -> None:
    """Contestants after it are measured all the same, and the report names the fault."""
    report, found = run_faulty(fault, tmp_path)
    case = CaseResults(CASES[PLAIN], found)
    assert case.unmeasured_reason("ScatterMoE").startswith(reason)
    assert list(found) == ["reference", *case.contestants]
    failures = {name: tasks.find_failure(result) for name, result in found.items()}
    blamed = [name for name, failure in failures.items() if failure and failure[0] != "missing"]
    assert blamed == ["ScatterMoE"]
    assert {name for name, failure in failures.items() if failure is None} >= {"layer", "layer, batched", "products"}
    assert f"cases/{PLAIN}, ScatterMoE: {'wrong' if fault == 'wrong' else 'failed'}: {reason}" in report
    assert "can go" not in report
    assert "as the default" not in report


def test_a_failure_is_attributed_to_the_task_that_caused_it() -> None:
    """Also if the task itself has returned: nothing else may run in a process whose device has failed."""
    device = cpu_device.FailingDevice()
    assert tasks.run_isolated(tasks.Task("one", lambda: 1, 1.0), device) == (1, False)
    task = tasks.Task("two", lambda: cpu_device.fail_asynchronously(device), 1.0)
    result, is_lost = tasks.run_isolated(task, device)
    assert is_lost
    assert result["ended"].startswith("the device failed: RuntimeError: CUDA error: an illegal memory access")
    with pytest.raises(RuntimeError, match="illegal"):
        device.shapes()


CHILD = f"""
import os, subprocess, sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from benchmarks import tasks
from support import cpu_device

tasks.MIN_LIMIT, tasks.LIMIT_FACTOR = 6, 0

def make_tasks():
    for name, compute in (
        ("one", lambda: 1),
        ("raises", lambda: 1 / 0),
        ("crash", lambda: os._exit(7)),
        ("hang", lambda: subprocess.run(["sleep", "600"])),
        ("last", lambda: 2),
    ):
        yield tasks.Task(name, compute, 1.0)

path = Path(sys.argv[4]) / "no-card.tests.jsonl"
tasks.run_tasks(make_tasks(), path, cpu_device.MACHINE, cpu_device.CPUDevice())
"""


@pytest.mark.slow
def test_first_hour_resumes(tmp_path: Path, capsys) -> None:
    """A task that raises, ends its process or hangs is reported, and the others run. A complete piece is not run
    again."""
    child = tmp_path / "child.py"
    child.write_text(CHILD)
    assert first_hour.run_all(tmp_path, "tests", DEVICE, [sys.executable, str(child)]) == []
    described = (tmp_path / "report.md").read_text()
    for said in (
        "- tests, raises: failed: ZeroDivisionError",
        "- crash: not measured (its process ended with 7)",
        "- hang: not measured (nothing was stored for 6 seconds)\n- last: 2",
        "## Not run\n\nchecks/default, cases/",
    ):
        assert said in described
    capsys.readouterr()
    assert first_hour.run_all(tmp_path, "tests", DEVICE, ["false"]) == []
    assert not capsys.readouterr().out


def test_a_process_without_progress_is_not_repeated(tmp_path: Path, capsys) -> None:
    assert first_hour.run_all(tmp_path, "tests", DEVICE, ["false"]) == ["tests"]
    assert "its process ended with 1" in capsys.readouterr().out


def test_results_survive_a_torn_or_corrupt_line(tmp_path: Path) -> None:
    path, machine = tmp_path / "piece.jsonl", cpu_device.MACHINE
    for damage in (b'{"name": "two", "res', b"\x00\x00\n" + b'{"name": "three", "result": 3}\n'):
        path.unlink(missing_ok=True)
        listed = [tasks.Task(name, lambda: 1, 1.0) for name in ("one", "two")]
        tasks.run_tasks((task for task in listed[:1]), path, machine, DEVICE)
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:-1]) + damage)
        assert results_file.read(path, machine).found == {"one": 1}
        tasks.run_tasks((task for task in listed), path, machine, DEVICE)
        stored = results_file.read(path, machine)
        assert stored.found == {"one": 1, "two": 1}
        assert stored.complete
    with pytest.raises(results_file.OtherMachineError, match="but this machine is"):
        results_file.read(path, machine | {"torch": "2.99"})


@pytest.mark.slow
@pytest.mark.usefixtures("shorten_rounds")
@pytest.mark.parametrize("name", ["tests", "cases/qwen3-30b-a3b/decode", "decoding/readme", "small kernels"])
def test_a_piece_of_the_first_hour(name: str, tmp_path: Path) -> None:
    assert first_hour.main(["--piece", name, "--folder", str(tmp_path)], DEVICE) == 0
    stored = results_file.read(gpu_tasks.get_path(tmp_path, name, cpu_device.MACHINE), cpu_device.MACHINE)
    found, described = stored.found, gpu_report.write_report(tmp_path, DEVICE)
    assert stored.complete
    if name.startswith("cases"):
        assert f"| {name.removeprefix('cases/')} | GPU or host |" in described
        assert "NVIDIA" in found["layer, triton"]["missing"]
        assert "| layer, triton | not measured: 'triton' is requested" in described
    elif name == "tests":
        assert "exit status 5" in found["tests"]["ended"]  # no test has this name
    elif name == "decoding/readme":
        assert found["1 tokens, batched"]["graph"] > 0
        assert "NVIDIA" in found["1 tokens, triton"]["missing"]
        assert "- readme: 1 tokens not decided, triton was not measured ('triton' is requested" in described
    else:
        assert found["queueing.py: 64 assignments"]["host of operators"] > 0
        assert len(found) == 3 + 2 + 3 * 6 + 2


def test_a_check_without_enough_memory_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_out_of_memory(kind: Any, *_: Any) -> None:
        assert kind.far
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB")

    monkeypatch.setattr(gpu_tasks.self_check, "find_fault", raise_out_of_memory)
    checks = tasks.list_tasks(gpu_tasks.pieces(DEVICE)["checks/far"](DEVICE))
    assert {check.name for check in checks[1:]} == {
        f"2 choices, training, more than 2^31 elements, tiles of {entry.rows}"
        for entry in schedule.INTERPRETER_SCHEDULES
    }
    result = tasks.run_task(checks[1].compute)
    assert result == {"missing": "OutOfMemoryError: CUDA out of memory. Tried to allocate 4.00 GiB"}


class FakeH100(cpu_device.CPUDevice):
    """The pieces of an H100, which are listed but not run."""

    name = "cuda"

    def shapes(self) -> list[gpu_shapes.Shape]:
        return [gpu_shapes.shrink_to_fit(shape, 80 << 30) for shape in gpu_shapes.SHAPES]


def test_first_hour_lists_an_hour_of_pieces(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """What decides most comes first. The estimates of an H100 add up to an hour."""
    monkeypatch.setattr(schedule, "get_device_capability", lambda device: (9, 0))
    assert first_hour.main(["--list"], FakeH100()) == 0
    listed = {
        line.rsplit(maxsplit=2)[0].strip(): float(line.split()[-2]) for line in capsys.readouterr().out.splitlines()
    }
    total = listed.pop("all")
    assert total == pytest.approx(sum(listed.values()), abs=len(listed))
    assert total <= 3600
    assert min(listed.values()) > gpu_tasks.START_SECONDS
    order = [
        "checks/default",
        "cases/qwen3-30b-a3b/train",
        "decoding/qwen3-30b-a3b",
        "kernels/readme",
        "cases/mixtral/train",
        "tests",
    ]
    assert sorted(order, key=list(listed).index) == order
    assert len(listed) == 1 + len(list(list_cases(FakeH100().shapes()))) + 5 + 5 + 1 + 1 + 1 + 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_first_hour_requires_a_gpu(capsys) -> None:
    assert first_hour.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().out


@pytest.mark.slow
def test_precompiled_kernels_are_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches on real tensors find all precompiled programs in Triton's cache, and no others."""
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    entry, shape = ENTRIES[0], replace(DEVICE.shapes()[0], d=64, h=64)
    step = blocks.make_step(shape, 8, DEVICE, training=True)
    launches = blocks.record_launches(step, entry)
    assert {launch.kernel for launch in launches} >= {"find_tiles_kernel", "sum_rows_kernel", "weight_grads"}
    assert blocks.compile_all(launches, (9, 0)) == []
    programs = set(tmp_path.rglob("*.cubin"))
    assert len(programs) == len({str(launch) for launch in launches})

    def launch(kernel, grid, **arguments) -> None:
        kernel.warmup(grid=grid, enable_fp_fusion=True, **arguments)

    monkeypatch.setattr(triton.runtime.driver, "_active", blocks.fake_compiler_target((9, 0)))
    for tried, more in ((entry, False), (entry._replace(down=entry.down._replace(warps=2)), True)):
        with blocks.force_schedule(launch, tried):
            step()
        assert (set(tmp_path.rglob("*.cubin")) > programs) == more


# ---- decisions ----


def make_result(card: float, host: float = 0.0, spread: float = 0.0, yardstick: float = 1e-3) -> dict[str, Any]:
    """Return a made-up result of a contestant, in microseconds."""
    card, host = 1e-6 * card, 1e-6 * host
    quartiles = [[each * (1 - spread), each, each * (1 + spread)] for each in (card, host)]
    return {
        "error": 1e-3,
        "card": quartiles[0],
        "host": quartiles[1],
        "yardstick": yardstick,
        "peak_bytes": 1 << 20,
        "state": [{}, {}],
    }


def make_found(time: Callable[[GPUCase, str], Any]) -> dict[str, dict[str, Any]]:
    """Return made-up results of all contestants in all cases."""
    return {
        f"cases/{case.name}": {"reference": {}}
        | {name: time(case, name) for name in gpu_contestants.list_contestants(case)}
        for case in CASES.values()
    }


def make_equal(case: GPUCase, name: str) -> dict[str, Any]:
    return make_result(100, 50)


def decide(found: dict[str, dict[str, Any]], title: str) -> str:
    """Return a section of the decisions."""
    text = "\n".join(decisions.lines(found, list(CASES.values()), ENTRIES))
    return text.partition(f"## {title}")[2].partition("\n## ")[0]


def test_eager_verdicts_count_the_slower_of_card_and_host() -> None:
    """60 us on the GPU take 900 us if the host needs as long, and lose to 80 and 200. As a graph, they win."""

    def time(case: GPUCase, name: str) -> dict[str, Any]:
        return make_result(60, 900) if name == "layer" else make_result(80, 200)

    verdicts = decide(make_found(time), "Default implementations")
    eager, graph = (
        re.search(rf"- {group}: (.*)", verdicts)[1] for group in ("decode, bfloat16", r"decode,.*overhead.*?")
    )
    assert "**make `layer, triton` the default**" in eager
    assert "`layer, triton` 0.22" in eager
    assert "the default stays" in graph
    assert "`layer, triton` 1.33" in graph
    winners = decide(make_found(time), "The fastest of each case")
    assert "| readme/decode | GPU or host | 0.9 (0.9–0.9) | 0.2 (0.2–0.2) layer, triton |" in winners
    assert "| readme/decode/reduce-overhead | GPU | 0.06 (0.06–0.06) | 0.06 (0.06–0.06) layer |" in winners


def test_a_difference_within_the_spread_decides_nothing() -> None:
    for spread, wanted in ((0.01, "**make `layer, grouped` the default**"), (0.2, "times vary more than they differ")):

        def time(case: GPUCase, name: str, spread: float = spread) -> dict[str, Any]:
            return make_result(90 if name == "layer, grouped" else 100, spread=spread)

        verdict = re.search("- train, bfloat16: .*", decide(make_found(time), "Default implementations"))
        assert wanted in verdict[0]


FAILURES = [
    {"ended": "the device failed: CUDA error: an illegal memory access was encountered"},
    {"ended": "nothing was stored for 90 seconds"},
    {"wrong": "its relative error is 2.0e+00"},
    {"missing": "it is not installed: pip install it"},
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: next(iter(failure)))
@pytest.mark.parametrize("name", ["layer", "layer, triton", "layer, grouped", "reference"])
def test_what_was_not_measured_is_not_lost(name: str, failure: dict[str, str]) -> None:
    """Triton loses every case but one, in which a contestant was not measured: nothing is deleted and no default
    changed because of it."""
    found = make_found(lambda case, name: make_result({"layer, triton": 200, "layer, batched": 50}.get(name, 100)))
    assert "**make `layer, batched` the default**" in decide(found, "Default implementations")
    assert "**they can go**" in decide(found, "Kernels to delete")
    (reason,) = failure.values()
    results = found["cases/qwen3-30b-a3b/train"]
    if name == "reference":
        results.clear()
    results[name] = failure
    train = decide(found, "Default implementations").splitlines()
    first = next(i for i, line in enumerate(train) if line.startswith("- train, bfloat16:"))
    if name in ("layer", "reference"):
        assert "not decided: `layer` was not measured in qwen3-30b-a3b/train (" in train[first]
        assert reason in train[first]
        assert "the default**" not in train[first]
    else:
        assert "**make `layer, batched` the default**" in train[first]
        assert f"`{name}`" not in train[first]
        assert (
            f"  - not decided for `{name}`: not measured in qwen3-30b-a3b/train ({reason}); elsewhere"
            in train[first + 1]
        )
    losers = decide(found, "Kernels to delete")
    if name in ("layer, triton", "reference"):
        assert "not decided: not measured in qwen3-30b-a3b/train (" in losers
        assert reason in losers
        assert "can go" not in losers
    elif name == "layer, grouped":
        assert "**they can go**" in losers  # another implementation was measured, and is faster
    assert (reason in decide(found, "Faults")) == ("missing" not in failure)
    assert reason in decide(found, "The fastest of each case")


def test_a_rival_that_crashes_does_not_delete_our_kernels() -> None:
    """Even if the contestants after it have no results, as if all had run in one process."""
    found = make_found(lambda case, name: make_result(80 if name == "layer, triton" else 100))
    assert "they stay" in decide(found, "Kernels to delete")
    for case in CASES.values():
        if case.mode == "train":
            results = found[f"cases/{case.name}"]
            for name in list(results)[list(results).index("layer, grouped") :]:
                del results[name]
            results["layer, triton"] = {"ended": "its process ended with 134"}
    losers = decide(found, "Kernels to delete")
    assert "not decided: not measured in qwen3-30b-a3b/train, qwen3-30b-a3b/train/16-rows, " in losers
    assert ", 512-experts/train (its process ended with 134)" in losers
    assert "can go" not in losers


def test_missing_contestants_are_kept_by_case() -> None:
    found = make_found(make_equal)
    found["cases/readme/train"]["Liger"] = {"missing": "it is not installed"}
    found["cases/readme/forward"]["Liger"] = {"ended": "its process ended with 134"}
    winners = decide(found, "The fastest of each case")
    assert "- readme/train: not measured: `Liger` (it is not installed)" in winners
    assert "- readme/forward: not measured: `Liger` (its process ended with 134)" in winners
    assert winners.count("Liger` (") == 2


def test_kernels_that_win_only_in_inference_keep_their_forward() -> None:
    def time(case: GPUCase, name: str) -> dict[str, Any]:
        return make_result((80 if case.mode == "decode" else 200) if name == "layer, triton" else 100)

    losers = decide(make_found(time), "Kernels to delete")
    assert "**those of the backward can go**. Cases in which they are the fastest: qwen3-30b-a3b/decode," in losers


def test_an_unsteady_gpu_decides_nothing() -> None:
    found = make_found(make_equal)
    found[f"cases/{PLAIN}"]["layer, grouped"] = make_result(50, yardstick=1.2e-3)
    assert "not decided for `layer, grouped`: not measured in qwen3-30b-a3b/train (the GPU was not steady" in decide(
        found, "Default implementations"
    )
    assert f"- cases/{PLAIN}, layer, grouped: the GPU was not steady" in decide(found, "Faults")
    found[f"cases/{PLAIN}"]["layer, grouped"]["state"] = [{"power.limit": "700 W"}, {}]
    found[f"cases/{PLAIN}"]["layer"]["state"] = [{"power.limit": "700 W"}, {"power.limit": "350 W"}]
    assert "- power.limit changed between contestants: 350 W, 700 W" in decide(found, "Faults")


def test_router_kernels_are_judged_with_the_same_experts() -> None:
    def time(case: GPUCase, name: str) -> dict[str, Any]:
        return make_result(100, 150 if name.endswith("router kernels") else 300)

    found = make_found(time)
    assert "- decode, bfloat16, `layer, grouped`: **faster**: 0.50x the time" in decide(found, "Kernels of routers")
    found["cases/readme/decode"]["layer, grouped"] = {"ended": "its process ended with 134"}
    judged = decide(found, "Kernels of routers")
    where = "not measured in readme/decode: `layer, grouped` (its process ended with 134)"
    assert f"- decode, bfloat16, `layer, grouped`: not decided: {where}" in judged


def test_small_kernels_and_decoding_that_were_not_measured_are_not_lost() -> None:
    slow, fast = (
        {"kernels": time, "operators": 1.0, "host of kernels": 2.0, "host of operators": 1.0} for time in (2, 0.5)
    )
    ended = {"ended": "its process ended with 134"}
    losers = decide(
        {"small kernels": {"a.py: 1": slow, "b.py: 1": slow, "b.py: 8": ended, "c.py: 1": fast, "c.py: 8": ended}},
        "Kernels to",
    )
    assert "- `a.py` **can go**" in losers
    assert (
        "- `b.py` is not decided. Its time ÷ that without it: 1 2.00, host 2.00; 8 was not measured (its process"
        in losers
    )
    assert "- `c.py` stays" in losers
    found = {f"1 tokens, {name}": {"graph": time, "rows": 1.0} for name, time in (("triton", 2), ("grouped", 1))}
    decoding = decide({"decoding/readme": found | {"1 tokens, batched": ended}}, "Decoding")
    assert "- readme: 1 tokens 2.00, batched was not measured (its process ended with 134)" in decoding
    found["1 tokens, triton"] = ended
    decoding = decide({"decoding/readme": found}, "Decoding")
    assert "1 tokens not decided, triton was not measured (its process ended with 134)" in decoding
    assert "wins up to" not in decoding


def test_a_height_of_tiles_that_was_not_measured_is_not_lost() -> None:
    """The load does not count for the schedule: with the other heights alone, it would seem that they win."""

    def row(seconds: float) -> dict[str, Any]:
        return {name: [[list(getattr(ENTRIES[0], name)), seconds]] for name in blocks.KERNELS}

    results = {f"{rows} rows, tiles of {height}": row(1e-3) for rows in (32, 64) for height in (16, 32, 64, 128)}
    assert "| 64 |" in decide({"kernels/readme": results}, "`ops/triton/schedule.py`")
    results["64 rows, tiles of 128"] = {"ended": "its process ended with 134"}
    decided = decide({"kernels/readme": results}, "`ops/triton/schedule.py`")
    assert (
        "- readme, 64 rows, tiles of 128: not measured (its process ended with 134), so this load does not" in decided
    )
    assert "| 32 |" in decided
    assert "| 64 |" not in decided


@pytest.mark.parametrize("failure", [{"ended": "AssertionError"}, {"ended": "XYZ 42"}, {"wrong": "BAD"}, {"wrong": ""}])
def test_faults_are_listed_whatever_they_say(failure: dict[str, str]) -> None:
    (reason,) = failure.values()
    found = {
        "cases/readme/train": {"Liger": failure},
        "checks/plain": {"a kind": "right", "another": "NaN", "third": failure},
    }
    faults = decide(found, "Faults")
    assert "1 of 2 checks of kernels passed." in faults
    assert "- checks/plain, another: NaN" in faults
    for place in ("cases/readme/train, Liger", "checks/plain, third"):
        assert f"- {place}: {'wrong' if 'wrong' in failure else 'failed'}: {reason}" in faults
