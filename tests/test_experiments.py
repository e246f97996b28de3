"""The experiments are commands, as the documentation writes them; small runs find what they look for."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from experiments import clustered_patches as patches

ROOT = Path(__file__).parent.parent
PROGRAMS = [path for path in sorted((ROOT / "experiments").glob("*.py")) if "def main(" in path.read_text()]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *PROGRAMS]
COMMAND = re.compile(r"python -m experiments\.([a-z_]+)((?: (?![ #])(?:[^\n`#\\]|\\\n)*)?)")
COMMANDS = sorted({match.groups() for page in PAGES for match in COMMAND.finditer(page.read_text())})


@pytest.mark.parametrize(("program", "options"), COMMANDS)
def test_a_command_of_the_documentation_is_one(program: str, options: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It gets as far as its help: imports work, and the options before that are taken."""
    main = importlib.import_module(f"experiments.{program}").main
    with pytest.raises(SystemExit) as end:
        main([*shlex.split(options.replace("\\\n", " ")), "--help"])
    assert end.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_every_experiment_is_documented() -> None:
    assert {program for program, _ in COMMANDS} == {path.stem for path in PROGRAMS}


# ---- clustered patches: Chen et al.'s data, and what the paper says of mixtures ----


def test_samples_have_the_four_patches_of_their_cluster() -> None:
    """Projections on features and centres, by hand: the label's feature, the centre, and one other feature."""
    directions = torch.eye(patches.FEATURES)[:8].reshape(2, 4, patches.FEATURES)
    samples = patches.draw_samples(directions, 0.0, 200, torch.Generator().manual_seed(0))
    total = samples.x.reshape(200, 4, patches.FEATURES).sum(dim=1) / patches.SCALE
    feature, centre = total[:, :4], total[:, 4:8]
    rows = torch.arange(200)
    assert ((centre != 0).sum(dim=1) == 1).all()
    assert ((centre[rows, samples.cluster] >= 1) & (centre[rows, samples.cluster] <= 2)).all()
    signal = feature[rows, samples.cluster] * samples.label
    assert ((signal >= 0.5) & (signal <= 2)).all()
    assert ((feature != 0).sum(dim=1) == 2).all()
    assert set(samples.cluster.tolist()) == {0, 1, 2, 3}


@pytest.mark.slow
def test_the_command_and_what_it_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Small as it is: nonlinear experts find the clusters, linear ones do not, and one linear network is worst."""
    assert patches.main(["--seeds=0", "--samples=600", "--steps=90", f"--out={tmp_path}"]) == 0
    results = json.loads((tmp_path / "clustered_patches.json").read_text())
    accuracy = {(run["model"], run["setting"]): run["accuracy"] for run in results}
    entropy = {(run["model"], run["setting"]): run.get("entropy") for run in results}
    assert accuracy["mixture of nonlinear experts", 1] > 0.85
    assert accuracy["one linear network", 1] < 0.8
    assert entropy["mixture of nonlinear experts", 1] < 0.5 * entropy["mixture of linear experts", 1]
    assert "mixture of nonlinear experts" in capsys.readouterr().out
    assert (tmp_path / "clustered_patches.png").stat().st_size > 10_000
