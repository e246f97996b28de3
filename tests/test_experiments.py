"""The experiments are commands, as the documentation writes them."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = [path for path in sorted((ROOT / "experiments").glob("*.py")) if "def main(" in path.read_text()]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *PROGRAMS]
COMMAND = re.compile(r"python -m experiments\.([a-z_]+)((?: (?![ #])(?:[^\n`#\\]|\\\n)*)?)")
COMMANDS = sorted({match.groups() for page in PAGES for match in COMMAND.finditer(page.read_text())})


@pytest.mark.parametrize(("program", "options"), COMMANDS)
def test_documented_commands_parse(program: str, options: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It gets as far as its help: imports work, and the options before that are taken."""
    main = importlib.import_module(f"experiments.{program}").main
    with pytest.raises(SystemExit) as end:
        main([*shlex.split(options.replace("\\\n", " ")), "--help"])
    assert end.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_every_experiment_is_documented() -> None:
    assert {program for program, _ in COMMANDS} == {path.stem for path in PROGRAMS}
