"""The small language model: causal as a whole, and honest about parameters and text."""

import json
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import train_lm
from experiments.language_model import corpus as corpora
from experiments.language_model import training as trainings
from experiments.language_model.model import ByteLM
from experiments.language_model.routers import ROUTERS
from experiments.language_model.settings import Settings
from experiments.language_model.trainee import make_trainee

pytestmark = pytest.mark.slow

TINY = Settings(
    **dict(router="top2", num_experts=8, dim=16, width=32, layers=2, heads=2, context=32, batch_size=4),
    **dict(learning_rate=0.003, steps=12, eval_every=6, eval_windows=6),
)
TINY_OPTIONS = ["--router=top2", "--num-experts=8", "--dim=16", "--width=32", "--layers=2", "--heads=2"]
TINY_OPTIONS += ["--context=32", "--batch-size=4", "--eval-every=20", "--eval-windows=6"]


@pytest.fixture(scope="module")
def make_corpus(text_files: list[Path]) -> corpora.Corpus:
    return corpora.load_corpus(text_files)


# ---- causality ----


def make_model(router: str) -> ByteLM:
    """A small model with parameters large enough that everything acts on everything."""
    model = make_trainee("moe", replace(TINY, router=router, num_experts=32)).model.double()
    torch.nn.init.normal_(model.to_logits.weight)
    return model


def logits_before_and_after(model: ByteLM, position: int) -> list[torch.Tensor]:
    """Logits of a text, and of the same text with other bytes after `position`."""
    torch.manual_seed(0)
    text = torch.randint(256, (3, 32)).repeat_interleave(2, dim=1)[:, :32]  # repeats: experts overflow
    changed = text.clone()
    changed[:, position + 1 :] = torch.randint(256, (3, 31 - position))
    logits = []
    for version in (text, changed):
        torch.manual_seed(1)  # routers that draw numbers draw the same ones for both
        logits.append(model(version)[0])
    return logits


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("training", [True, False])
def test_no_logit_depends_on_a_later_byte(router: str, training: bool) -> None:
    model = make_model(router).train(training)
    for position in (0, 7, 20, 30):
        before, after = logits_before_and_after(model, position)
        torch.testing.assert_close(before[:, : position + 1], after[:, : position + 1], rtol=0, atol=1e-10)
        assert not torch.allclose(before[:, position + 1 :], after[:, position + 1 :])


# ---- the two models ----


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_learns(router: str, make_corpus: corpora.Corpus, tmp_path: Path) -> None:
    training = trainings.Training(
        replace(TINY, router=router, num_experts=32, steps=30, eval_every=30), make_corpus, tmp_path
    )
    training.run()
    dense, moe = (trainee.summary() for trainee in training.trainees)
    assert moe["held_out_bits_per_byte"] < 7.5
    assert moe["active_parameters"] == pytest.approx(dense["active_parameters"], rel=0.02)
    assert moe["total_parameters"] > 1.5 * dense["total_parameters"] - 2 * 256 * 16


def test_a_finished_run_reports_a_table_numbers_and_a_picture(
    text_files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*TINY_OPTIONS, "--steps=60", "--router=gshard", "--checkpoint-every=4", f"--out={tmp_path}"]
    options += ["--text", *map(str, text_files)]
    assert train_lm.main(options) == 0
    for file in ("result.json", "train_lm.png"):
        (tmp_path / file).unlink()
    assert train_lm.main(["--resume", *options]) == 0  # trains no more, only reports again
    lines = capsys.readouterr().out.splitlines()
    start = next(index for index, line in enumerate(lines) if "held-out bits/byte" in line)
    assert [line.split()[0] for line in lines[start + 2 : start + 4]] == ["dense", "mixture"]
    numbers = json.loads((tmp_path / "result.json").read_text())
    assert [entry["model"] for entry in numbers["results"]] == ["dense", "moe"]
    assert (tmp_path / "train_lm.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_run_that_is_resumed_comes_to_the_bits_of_an_undisturbed_one(
    text_files: list[Path], tmp_path: Path
) -> None:
    """SIGKILL at a random moment leaves the last checkpoint whole; nothing but times differs in the end."""
    options = [*TINY_OPTIONS, "--models=moe", "--router=gshard", "--steps=200", "--checkpoint-every=20"]
    command = [sys.executable, "-m", "experiments.train_lm", *options, "--text", *map(str, text_files), "--out"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    subprocess.run([*command, str(straight)], check=True, capture_output=True)
    process = subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (killed / trainings.CHECKPOINT).exists():
        assert process.poll() is None
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.1))
    process.kill()
    process.wait()
    left = trainings.read_checkpoint(killed / trainings.CHECKPOINT)["step"]
    assert 0 < left < 200
    assert left % 20 == 0
    subprocess.run([*command, str(killed), "--resume"], check=True, capture_output=True)
    states = [torch.load(folder / trainings.CHECKPOINT, weights_only=True) for folder in (straight, killed)]
    for state in states:
        del state["trainees"]["moe"]["history"]["seconds"]
    assert all(states[0].pop(name) == states[1].pop(name) for name in ("settings", "corpus"))
    del states[0]["rng"]["cuda"], states[1]["rng"]["cuda"]  # None
    torch.testing.assert_close(*states, rtol=0, atol=0)


# ---- text ----


def test_batches_show_every_window_once_an_epoch_and_go_on_from_a_position() -> None:
    text = torch.arange(250, dtype=torch.uint8)
    batches = corpora.Batches(text, context=9, batch_size=4, seed=0)
    assert batches.windows_per_epoch == 24  # 25 windows of 10 bytes; the last batch would be incomplete
    epoch = torch.cat([batches.next() for _ in range(6)])
    assert sorted(epoch[:, 0].tolist()) == list(range(epoch[:, 0].min(), 240 + epoch[:, 0].min(), 10))
    assert torch.equal(epoch[:, 1:], epoch[:, :-1] + 1)
    second = [batches.next() for _ in range(3)]
    later = corpora.Batches(text, context=9, batch_size=4, seed=0)
    later.position = 24 + 4
    assert torch.equal(later.next(), second[1])
    assert not torch.equal(torch.cat(second), epoch[:12])
    with pytest.raises(ValueError, match="fewer than one batch of 40"):
        corpora.Batches(text, context=9, batch_size=40, seed=0)
    with pytest.raises(ValueError, match="shorter than one window"):
        corpora.held_out_windows(text[:9], context=9, count=3)


def test_evaluation_by_hand_and_without_a_trace(make_corpus: corpora.Corpus, tmp_path: Path) -> None:
    """A new model gives every byte the same probability: 8 bits. Evaluating draws no number from training's."""
    training = trainings.Training(replace(TINY, router="gshard"), make_corpus, tmp_path)
    state = torch.get_rng_state()
    assert training.trainees[1].evaluate(training.windows) == pytest.approx(8.0, abs=1e-5)
    assert torch.equal(torch.get_rng_state(), state)
