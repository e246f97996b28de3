"""Every file that is written or read: no pickle runs code, and what is damaged or foreign is an error."""

from __future__ import annotations

import ast
import os
import pickle
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mixture_of_experts import MoE
from mixture_of_experts.replay import RoutingRecords

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import checkpoints as folders  # noqa: E402
from experiments import scaling, scaling_runs  # noqa: E402
from experiments.language_model import training as trainings  # noqa: E402
from experiments.language_model.corpus import load_corpus  # noqa: E402
from experiments.language_model.settings import Settings  # noqa: E402

# ---- what the sources call ----

SOURCES = [
    path for folder in ("mixture_of_experts", "examples", "experiments") for path in (ROOT / folder).rglob("*.py")
]


def list_calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """The calls of a source, by name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


#: what one process of the package says to another that it started, over a pipe
PIPES = {("check_process.py", f"pickle.{call}") for call in ("load(sys.stdin.buffer)", "dumps((device, find_fault))")}


def test_no_pickle_is_trusted():
    """By any source; some read weights."""
    weights_only = []
    for source in SOURCES:
        for name, call in list_calls(source):
            if (source.name, ast.unparse(call)) in PIPES:
                continue
            assert not re.fullmatch(r"pickle\.(load|dump)s?|pickle\.Unpickler", name), f"{source} line {call.lineno}"
            if name == "torch.load":
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                assert given.get("weights_only") == "True", f"{source} line {call.lineno}"
                weights_only.append(source)
    readers = ("mixture_of_experts/replay/records.py", "examples/checkpoints.py")
    assert {ROOT / reader for reader in (*readers, "experiments/language_model/training.py")} <= {*weights_only}


def test_no_code_of_a_model_is_trusted():
    """Without the argument transformers asks on standard input whether the code in a folder may run."""
    loads = [
        (source, call)
        for source in (*SOURCES, *(ROOT / "benchmarks").rglob("*.py"))
        for name, call in list_calls(source)
        if re.fullmatch(r"(\w+\.)?Auto\w+\.from_pretrained", name)
    ]
    assert len(loads) > 5
    for source, call in loads:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        trusted = "trusted" if source.name == "loader.py" else "False"  # there it is the caller's, False by default
        assert given.get("trust_remote_code") == trusted, f"{source} line {call.lineno}"


# ---- files that are damaged, foreign, or made to do harm ----


class MaliciousPickle:
    """Unpickled without care, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def truncate_file(path: Path) -> None:
    """Take away its second half."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": truncate_file,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no checkpoint"),
    "foreign": lambda path: torch.save(nn.Linear(2, 2).state_dict(), path),
    "harmful": lambda path: torch.save(MaliciousPickle(path.parent / "harm"), path),
}
TINY = Settings(
    **dict(models=("moe",), router="top2", num_experts=2, dim=8, width=8, layers=1, heads=2, context=8, batch_size=2),
    **dict(steps=4, eval_every=4, eval_windows=2),
)


@pytest.fixture(scope="module")
def make_corpus() -> Any:
    return load_corpus([ROOT / "LICENSE"])


@pytest.mark.parametrize("damage", DAMAGE)
def test_checkpoint_of_the_example(make_corpus: Any, tmp_path: Path, damage: str):
    trainings.Training(TINY, make_corpus, tmp_path).run(stop_at=1)
    path = tmp_path / trainings.CHECKPOINT
    DAMAGE[damage](path)
    data, training = path.read_bytes(), trainings.Training(TINY, make_corpus, tmp_path)
    before = clone_state(training.trainees[0].model.state_dict())
    for call in (training.load, training.refuse_to_overwrite):
        with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged, .*--resume"):
            call()
    assert_same(training.trainees[0].model.state_dict(), before)
    assert (training.step, path.read_bytes()) == (0, data)
    assert not (tmp_path / "harm").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_corrupt_file_errors_name_the_file(tmp_path: Path):
    """A hundred that were cut anywhere, and a hundred with other bytes; some of these load, with other numbers."""
    draw, choices = random.Random(0), [torch.randint(0, 4, (50, 2)) for _ in range(3)]
    RoutingRecords({"gate": choices}, {"gate": 4}).save(tmp_path / "records.pt")
    torch.save({key: {"w": torch.ones(30)} for key in trainings.WRITTEN}, tmp_path / "checkpoint.pt")
    for name, read in (("records.pt", RoutingRecords.load), ("checkpoint.pt", trainings.read_checkpoint)):
        path, errors = tmp_path / name, []
        whole = path.read_bytes()
        for number in range(200):
            data = bytearray(whole)
            for place in draw.sample(range(len(data)), k=3):
                data[place] = draw.randrange(256)
            path.write_bytes(data if number % 2 else whole[: draw.randrange(len(whole))])
            try:
                read(path)
            except ValueError as error:
                errors.append(str(error))
        assert len(errors) > 100
        assert all(name in error for error in errors)
        path.write_bytes(whole)
        read(path)


def clone_state(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() for name, value in state.items()}


def assert_same(state: dict[str, Any], before: dict[str, Any]) -> None:
    assert all(torch.equal(value, before[name]) for name, value in state.items())


def damage_file(path: Path, damage: str) -> None:
    """Damage a folder that `save_checkpoint` wrote: its metadata, its weights or `extra.pt`."""
    what, _, file = damage.partition(" ")
    name = {"metadata": ".metadata", "weights": "__0_0.distcp", "extra": "extra.pt"}[file]
    if what == "missing":
        (path / name).unlink()
    elif (what, file) == ("harmful", "metadata"):
        (path / name).write_bytes(pickle.dumps(MaliciousPickle(path.parent / "harm")))
    else:
        DAMAGE[what](path / name)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch 2.10 says so of itself
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    "damage",
    [f"{what} {file}" for file in ("metadata", "weights") for what in ("cut", "empty", "missing")]
    + ["text metadata", "harmful metadata", "cut extra", "harmful extra"],
)
def test_folder_of_a_distributed_checkpoint(tmp_path: Path, damage: str):
    moe = MoE(8, 4)
    optimizer = torch.optim.AdamW(moe.parameters())
    path = folders.save_checkpoint(tmp_path / "run", moe, optimizer, step=1, extra={"step": 1})
    damage_file(path, damage)
    with torch.no_grad():
        moe.experts.w1.add_(1)  # so that what is loaded is other than what is there
    before = clone_state(moe.state_dict())
    named = "." if "extra" in damage else "step-000000001 is damaged, or is no checkpoint"
    with pytest.raises(BaseException, match=named):  # torch's CheckpointException is no Exception
        folders.load_checkpoint(tmp_path / "run", moe, optimizer)
    assert_same(moe.state_dict(), before)
    assert not list(tmp_path.rglob("harm"))


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch 2.10 says so of itself
@pytest.mark.usefixtures("one_process")
def test_numbers_of_a_distributed_checkpoint_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An entry that is no tensor, which torch would unpickle."""
    moe = MoE(8, 4)
    state_of = folders.collect_state

    def with_harm(*args: Any) -> dict[str, Any]:
        return {**state_of(*args), "extra": MaliciousPickle(tmp_path / "harm")}

    optimizer = torch.optim.AdamW(moe.parameters())
    with monkeypatch.context() as patch:
        patch.setattr(folders, "collect_state", with_harm)
        folders.save_checkpoint(tmp_path / "run", moe, optimizer, step=1, extra={})
        with pytest.raises(BaseException, match=r"[Ww]eights.only"):
            folders.load_checkpoint(tmp_path / "run", moe, optimizer)
    assert not (tmp_path / "harm").exists()


def test_records_of_runs_that_were_cut_and_that_are_none(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    path.write_text((scaling.RECORDS / "scaling_0.07m.jsonl").read_text())
    base = scaling.base_settings("0.07m")
    whole = scaling_runs.Records(path, base)
    path.write_text(path.read_text()[:-20])
    records = scaling_runs.Records(path, base)
    (missing,) = whole.finished.keys() - records.finished.keys()
    records.add(missing, whole.finished[missing])
    assert scaling_runs.Records(path, base).finished == whole.finished
    path.write_text(path.read_text() + "no record\n")
    with pytest.raises(SystemExit, match=r"records\.jsonl, line \d+, is no record"):
        scaling_runs.Records(path, base)
