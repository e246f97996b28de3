"""Expert parallelism against one process, on gloo: outputs, gradients, losses, training, checkpoints and faults.

`test_parallel_two_ranks.py` has the tests that are not slow.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support import checkpoint_recipe, parallel_recipe
from support import parallel_checkpoints as saves
from support import parallel_checks as checks
from support import parallel_edge_cases as odd
from support import parallel_faults as faults
from support import parallel_training as training
from support import parallel_transformers as hub
from support.parallel_layers import LAYERS, LAYERS_OF_MODEL
from support.parallel_workers import Workers

pytestmark = pytest.mark.slow


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


# ---- the same numbers as one process ----


@pytest.mark.parametrize("layer", LAYERS)
def test_four_ranks_are_one_process(workers: Workers, layer: str):
    workers.run(checks.check_exact, 4, layer)


@pytest.mark.parametrize("layer", LAYERS)
def test_data_and_expert_parallelism_equal_one_process(workers: Workers, layer: str):
    workers.run(checks.check_exact, 4, layer, data_parallel=2)


# ---- a dozen steps of training ----


@pytest.mark.parametrize("layout", training.LAYOUTS)
def test_training_is_that_of_one_process(workers: Workers, layout: str):
    workers.run(training.check_training, 4, layout, foreach=True)


@pytest.mark.parametrize("layout", ["expert_parallel_only", "ddp_replicas", "fsdp", "fsdp_replicas"])
def test_training_with_checkpointing_and_accumulation(workers: Workers, layout: str):
    workers.run(training.check_training, 4, layout, pieces=2, recompute=True, fused=True)


# ---- checkpoints ----


def merge_parts(parts: list[saves.State]) -> saves.State:
    """What all ranks have together; what several have must agree."""
    everything: saves.State = {}
    for part in parts:
        for name, value in part.items():
            assert torch.equal(everything.setdefault(name, value), value), name
    return everything


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated")
def test_checkpoint_loads_on_another_number_of_ranks(workers: Workers, tmp_path: Path):
    layers = LAYERS_OF_MODEL
    saved = merge_parts(workers.run(saves.save_training_state, 4, tmp_path, "expert_parallel_only", layers))
    workers.run(saves.load_training_state, 2, tmp_path, "ddp", layers, saved)
    workers.run(saves.load_training_state, 1, tmp_path, "expert_parallel_only", layers, saved)
    workers.run(saves.load_training_state, 4, tmp_path, "ddp_replicas", layers, saved)
    with default_dtype(torch.float64):
        saves.load_training_state(tmp_path, None, layers, saved)  # here, without process groups


@pytest.mark.parametrize("layout", ["fsdp", "fsdp_replicas", "fsdp_replicas_by_row"])
def test_checkpoint_of_a_sharded_model(workers: Workers, tmp_path: Path, layout: str):
    saved = merge_parts(workers.run(saves.save_training_state, 4, tmp_path, layout, LAYERS_OF_MODEL))
    workers.run(saves.load_training_state, 2, tmp_path, "expert_parallel_only", LAYERS_OF_MODEL, saved)
    workers.run(saves.load_training_state, 4, tmp_path, "fsdp_replicas", LAYERS_OF_MODEL, saved)


def test_training_goes_on_with_another_number_of_ranks(workers: Workers, tmp_path: Path):
    workers.run(saves.save_without_changes, 4, tmp_path, "fsdp_replicas")
    with default_dtype(torch.float64):
        alone = dict(training.train_single_process(steps=6)[0].named_parameters())
    for name, value in workers.run(saves.resume_training, 2, tmp_path, "ddp", 6)[0].items():
        torch.testing.assert_close(value, alone[name], rtol=0, atol=1e-9)


def test_killed_save_keeps_the_checkpoint_before(workers: Workers, tmp_path: Path):
    first, second = workers.outcomes(saves.save_and_die, 2, tmp_path, (3, 4), timeout=10)
    assert str(second) == "its process died"
    assert first != "saved"
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["step-000000003", "step-000000004.tmp"]
    workers.run(saves.save_after_a_kill, 1, tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000003", "step-000000004"]


FOLDERS = {odd.check_what_is_kept: 2, odd.check_extra_that_could_not_be_read: 2, odd.check_same_step_again: 1}


@pytest.mark.parametrize("check", FOLDERS)
def test_folder_of_checkpoints(workers: Workers, tmp_path: Path, check: Callable[[Path], None]):
    workers.run(check, FOLDERS[check], tmp_path)


@pytest.mark.parametrize("layout", ["expert_parallel_only", "ddp_replicas", "fsdp", "fsdp_replicas"])
def test_state_dict_of_one_process_loads(workers: Workers, layout: str):
    workers.run(saves.check_state_dict_of_one_process, 4, layout)


def test_foreign_rank_file_raises(workers: Workers, tmp_path: Path):
    workers.run(saves.save_local_part, 4, tmp_path)
    workers.run(saves.check_part_of_other_ranks, 2, tmp_path, 4)


def test_swapped_model_is_saved_whole(workers: Workers, tmp_path: Path):
    workers.run(hub.check_saved_model_is_whole, 2, tmp_path / "saved")


# ---- setting up, copies, collectives, gradients, bytes that are sent, compilation ----

FOUR_RANK_CHECKS = """
    refusals sharded_parameters source_rank_none meta_start group_of_gates copies norms averages balance_of_each_rank
    replay
"""
OTHER_MODULES = """
    unequal_sizes_are_tested experts_that_return_other_dtypes rank_with_sequences_of_no_length
    one_rank_has_no_collective
"""
CHECKS = {
    name.removeprefix("check_"): check
    for module in (checks, odd, saves)
    for name, check in vars(module).items()
    if name.startswith("check_") and check.__module__ == module.__name__ and not inspect.signature(check).parameters
}


@pytest.mark.parametrize("name", sorted(CHECKS.keys() - OTHER_MODULES.split()))
def test_on_ranks(workers: Workers, name: str):
    workers.run(CHECKS[name], 4 if name in FOUR_RANK_CHECKS.split() else 2)


def test_on_one_rank(workers: Workers):
    workers.run(checks.check_one_rank_has_no_collective, 1)


def test_gradients_of_the_sum(workers: Workers):
    workers.run(checks.check_exact, 2, "top-k, dropless", gradient="sum")
    workers.run(checks.check_exact, 4, "top2", data_parallel=2, gradient="sum")


@pytest.mark.parametrize("layer", ["top2", "top-k, deepseek", "noisy top-k", "expert choice", "two levels, mixed"])
def test_masked_tokens(workers: Workers, layer: str):
    workers.run(checks.check_exact, 4, layer, masked=True)


# ---- the recipes of the documentation ----

DOCUMENT = (Path(__file__).parent.parent / "docs" / "distributed" / "expert_parallelism.md").read_text()


@pytest.mark.parametrize("number", range(5))
def test_recipe_runs(workers: Workers, tmp_path: Path, number: int):
    layouts = re.findall(r"<!-- recipe: layout -->\n```py\n(.*?)```", DOCUMENT, re.DOTALL)
    assert len(layouts) == 5
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = checkpoint_recipe.FILE.read_text() + parallel_recipe.BEGINNING + layouts[number] + parallel_recipe.LOOP
    if "dist.broadcast(" in program:  # then replicas may begin with other numbers
        program = program.replace("torch.manual_seed(0)", "torch.manual_seed(rank)")
    norms = workers.run(checks.run_recipe, 4, program, port, tmp_path)
    assert len(set(norms)) == 1
    found = checkpoint_recipe.list_checkpoints(tmp_path / "run")
    assert [path.name for path in found] == ["step-000000001", "step-000000002"]


# ---- the example ----

EXAMPLE = (
    "--router top2 --num-experts 8 --learning-rate 0.003 --dim 16 --width 32 --layers 2 --heads 2 --context 32 "
    "--batch-size 4 --eval-windows 6 --eval-every 8 --steps 8 --checkpoint-every 4"
)


def run_example(folder: Path, *options: str, ranks: int = 1) -> str:
    """What the example printed, in so many processes."""
    root = Path(__file__).parent.parent
    launcher = ["-W", "error"] if ranks == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    script = ["-m", "experiments.train_lm", "--out", str(folder), *EXAMPLE.split(), *options]
    text = ["--text", *map(str, sorted((root / "examples").glob("*.py")))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, *launcher, *script, *text]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_example_runs_on_ranks_and_goes_on_with_another_number(tmp_path: Path):
    """Two ranks, then one, come to what one process does; every rank's load is printed."""
    printed = run_example(tmp_path / "ranks", "--expert-parallel", "2", "--stop-at", "4", ranks=2)
    loads = re.findall(r"moe: rank (\d) \(experts (\d) to (\d)\) computed ([\d.]+)%", printed)
    assert [load[:3] for load in loads] == [("0", "0", "3"), ("1", "4", "7")]
    assert abs(sum(float(load[3]) for load in loads) - 100) < 0.2
    printed = run_example(tmp_path / "ranks", "--expert-parallel", "1", "--resume")
    assert "going on after step 4" in printed
    run_example(tmp_path / "alone")
    results = [json.loads((tmp_path / name / "result.json").read_text())["results"] for name in ("ranks", "alone")]
    for together, alone in zip(*results, strict=True):
        assert abs(together["held_out_bits_per_byte"] - alone["held_out_bits_per_byte"]) < 1e-4
        assert together["total_parameters"] == alone["total_parameters"]


# ---- faults: what one rank does wrong, the others are told within the timeout ----

# longer where the machine is busy, so that ranks which come late are not taken for stuck ones
LIMIT = 2.0 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)) if hasattr(os, "getloadavg") else 2.0


def parse_seconds(message: str) -> float:
    return float(re.search(r"after ([\d.]+) s", message)[1])  # type: ignore[index]


REMEDY = "torch.distributed.elastic.multiprocessing.errors"


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_one_rank_raises(workers: Workers, tmp_path: Path, where: str):
    first, odd, *others = workers.outcomes(faults.raise_on_one_rank, 4, tmp_path / "ended", where, timeout=LIMIT)
    assert "ZeroDivisionError" in odd
    assert "a rank could not exchange tokens, on rank 0 of 4: " in first
    assert parse_seconds(first) < LIMIT + 2
    for message in (first, *others):
        assert REMEDY in message, message


@pytest.mark.parametrize("how", ["left", "killed"])
def test_one_rank_ends(workers: Workers, how: str):
    outcomes = workers.outcomes(faults.exit_on_one_rank, 4, how, timeout=LIMIT)
    assert how in str(outcomes[1]) or "died" in str(outcomes[1])
    for message in (outcomes[0], *outcomes[2:]):
        assert "RuntimeError" in message
        assert REMEDY in message, message
        assert parse_seconds(message) < LIMIT + 2


@pytest.mark.parametrize(("where", "data_parallel"), [("before", 1), ("experts", 1), ("experts", 2)])
def test_one_rank_hangs(workers: Workers, tmp_path: Path, where: str, data_parallel: int):
    """Also in the groups of a mesh of two dimensions, whose timeouts stay as they were made."""
    waiting = workers.outcomes(faults.hang_one_rank, 4, tmp_path / "ended", where, data_parallel, timeout=LIMIT)[0]
    assert "Timed out waiting" in waiting
    assert "flight recorder" in waiting
    assert parse_seconds(waiting) < LIMIT + 2


FAILING = """
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
import torch
from mixture_of_experts import MoE
from mixture_of_experts.parallel import ExpertParallel, parallelize_module

@record
def main():
    dist.init_process_group("gloo")
    moe = parallelize_module(MoE(8, 4), init_device_mesh("cpu", (2,)), ExpertParallel())
    if dist.get_rank() == 1:
        raise OSError("the file is gone")
    moe(torch.ones(1, 2, 8))

main()
"""


def test_torchrun_names_the_rank_that_failed(tmp_path: Path):
    """What the error of a rank that waited in vain says."""
    program = tmp_path / "program.py"
    program.write_text(FAILING)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=False)
    cause = done.stderr.partition("Root Cause")[2]
    assert re.search(r"rank +: 1 ", cause), done.stderr
    assert "OSError: the file is gone" in cause


@pytest.mark.parametrize(
    ("difference", "named"),
    [
        ("number of experts", r"differ in .*: .* on rank 0, .* on rank 1"),
        ("shapes", r"differ in experts\.w\d: \(8, .*\) torch.float64 on rank 0, .* on rank 1"),
        ("dtypes", r"differ in \S+: .*torch.float64 on rank 0, .*torch.bfloat16 on rank 1"),
        ("bias", r"differ in experts: .*bias=True\) on rank 1; stacked: .*; experts\.b1: missing on rank 0"),
        ("gradient", r"differ in gradient: mean on rank 0, sum on rank 1"),
        ("activation", r"differ in experts\.act: GELU\(.* on rank 0, ReLU\(\) on rank 1"),
        ("function", r"differ in experts\.act: GELU\(.* on rank 0, FunctionActivation\(sigmoid\) on rank 1"),
        ("z_loss_coef", r"differ in the layer: MoE\(.*z_loss_coef=0.0\) on rank 0, .*z_loss_coef=0.1\) on rank 1"),
        ("loss_coefs", r"differ in the layer: .*, .*loss_coefs=\{'balance_batch': 0.1\}\) on rank 1"),
        ("policy", r"differ in gate: .* on rank 0, .*second_policy_eval='all'\) on rank 1"),
        ("gate", r"differ in gate: Top2Gating\(.* on rank 0, TopKGating\(.* on rank 1"),
        ("k", r"differ in gate: .*k=2.* on rank 0, .*k=3.* on rank 1"),
        ("balance_over", r"differ in gate: .* on rank 0, .*balance_over='batch'.* on rank 1"),
        ("capacity", r"differ in gate: .* on rank 0, .*capacity_factor_eval=2.0.* on rank 1"),
        ("gate of one's own", r"differ in gate: .*temperature=2.0\) on rank 0, .*temperature=0.5\) on rank 1"),
        ("replicated", r"differ in stacked: \['w1', 'w2'\] on rank 0, \['w2'\] on rank 1"),
    ],
)
def test_ranks_build_different_layers(workers: Workers, difference: str, named: str):
    for message in workers.run(faults.build_different_layers, 2, difference, timeout=LIMIT):
        assert "ValueError" in message
        assert re.search(named, message), message
        assert parse_seconds(message) < LIMIT


@pytest.mark.parametrize(
    ("problem", "named"),
    [
        ("experts", "9 experts cannot be divided evenly among 4"),
        ("plan", "'ffn' does not match any submodule of ModuleDict"),
    ],
)
def test_rank_error_reaches_all_ranks(workers: Workers, problem: str, named: str):
    messages = workers.run(faults.fail_setup_on_one_rank, 4, problem, timeout=LIMIT)
    for rank, message in enumerate(messages):
        assert "ValueError" in message
        assert named in message
        assert ("setup failed on rank 1" in message) == (rank != 1)
        assert parse_seconds(message) < LIMIT


@pytest.mark.parametrize(("data_parallel", "by_name"), [(1, False), (2, False), (2, True)])
def test_one_rank_never_sets_up(workers: Workers, tmp_path: Path, data_parallel: int, by_name: bool):
    marker = tmp_path / "ended"
    first = workers.outcomes(faults.skip_setup_on_one_rank, 4, marker, data_parallel, by_name, timeout=LIMIT)[0]
    assert "could not compare its layers with those of other ranks" in first
    assert parse_seconds(first) < LIMIT + 2


@pytest.mark.parametrize(
    ("difference", "named"),
    [
        ("mode", r"slots .* rank \d sends rows|rows .* rank \d sends slots"),
        ("mode with capacity", r"in training.* rank \d .*in evaluation|in evaluation.* rank \d .*in training"),
        ("gradients", r"with gradients.* rank \d .*without gradients|without gradients.* rank \d .*with gradients"),
        ("dtype", r"torch.float32.*torch.float64|64.*32"),
    ],
)
def test_ranks_call_a_layer_differently(workers: Workers, difference: str, named: str):
    for message in workers.run(faults.call_differently, 4, difference, timeout=LIMIT):
        assert "ValueError" in message
        assert "All ranks must call the layer with the same mode" in message
        assert re.search(named, message), message
        assert parse_seconds(message) < LIMIT
