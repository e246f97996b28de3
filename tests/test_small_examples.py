"""The examples that make their own data run, and each mixture does what its example says."""

import ast
import re
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import train_table  # noqa: E402
import train_vision  # noqa: E402


def test_a_table_of_two_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    """Few steps are enough to be better than a coin; both tasks share one module of experts."""
    train_table.main(["--steps", "60", "--rows", "500", "--experts", "4", "--k", "2"])
    told = capsys.readouterr().out
    shares = [float(share) for share in re.findall(r"(?:clicks|buys) ([\d.]+)%,?", told)]
    assert len(shares) >= 4
    assert min(shares[:4]) > 60
    first, second = train_table.MultiGate(8, 4, 2).mixtures.values()
    assert first.experts is second.experts
    assert first.gate is not second.gate


def test_a_vision_transformer_of_expert_choice(capsys: pytest.CaptureFixture[str]) -> None:
    train_vision.main(["--steps", "3", "--batch", "4"])
    told = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", told)]
    assert len(losses) == 3
    assert all(0 < loss < 9 for loss in losses)
    assert len(re.findall(r"of the patches went to no expert", told)) == 2
    image, digits = train_vision.pictures(200, torch.Generator().manual_seed(0))
    seen = {int(digit): (image[digits == digit] > 0.6).sum(dim=(1, 2)).float().mean() for digit in digits.unique()}
    assert len(seen) == 10
    assert seen[8] > seen[1] + 10  # more of its pixels are on


def imported(path: Path) -> set[str]:
    """What a file imports, by the first part of its name."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_stands_alone(path: Path) -> None:
    """It is copied by itself; and the list of examples has it."""
    assert len(path.read_text(encoding="utf-8").splitlines()) < 120
    here = {place.stem for place in EXAMPLES.iterdir()}
    assert not imported(path) & here
    assert f"`{path.name}`" in (EXAMPLES / "README.md").read_text(encoding="utf-8")
