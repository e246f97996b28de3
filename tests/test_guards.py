"""The guards of a rebuilding: this tree's names on an earlier commit, and what counts as compared."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from guards import outcomes, renames

ROOT = Path(__file__).parent.parent

OLD = {
    "tiny/__init__.py": "from .shapes import Square, area_of\n",
    "tiny/shapes.py": """
        from dataclasses import dataclass
        from typing import NamedTuple

        MOST = 3

        class Shape:
            kind = "shape"
            def own(self, times=1):
                return self.side * times

        class Square(Shape):
            def __init__(self, side):
                self.side = side

        @dataclass(frozen=True)
        class Way:
            name: str = "plain"

        class Pair(NamedTuple):
            one: int
            two: int

        def area_of(shape, by=1):
            return MOST * shape.side**2 * by
        """,
    "tiny/ways/__init__.py": "",
    "tiny/ways/fast.py": """
        def asked_for():
            return "fast"
        """,
}
NEW = {
    "tiny/__init__.py": "from .areas import compute_area\nfrom .figures import Quad\n",
    "tiny/figures.py": """
        from dataclasses import dataclass
        from typing import NamedTuple

        MAX_SIZE = 3

        class Shape:
            family = "shape"
            def scaled(self, factor=1):
                return self.length * factor

        class Quad(Shape):
            def __init__(self, length):
                self.length = length

        @dataclass(frozen=True)
        class Implementation:
            title: str = "plain"

        class Pair(NamedTuple):
            first: int
            two: int
        """,
    "tiny/areas.py": """
        from . import figures

        def compute_area(shape, factor=1):
            return figures.MAX_SIZE * shape.length**2 * factor
        """,
    "tiny/implementations/__init__.py": "",
    "tiny/implementations/quick.py": """
        def requested():
            return "fast"
        """,
}
TABLE = """
# a comment
tiny.shapes\ttiny.figures
tiny.ways\ttiny.implementations
tiny.ways.fast\ttiny.implementations.quick
tiny.ways.fast:asked_for\ttiny.implementations.quick:requested
tiny.shapes:MOST\ttiny.figures:MAX_SIZE
tiny.shapes:area_of\ttiny.areas:compute_area
tiny.shapes:area_of(by=)\ttiny.areas:compute_area(factor=)
tiny.shapes:Square\ttiny.figures:Quad
tiny.shapes:Square(side=)\ttiny.figures:Quad(length=)
tiny.shapes:Square.side\ttiny.figures:Quad.length
tiny.shapes:Shape.kind\ttiny.figures:Shape.family
tiny.shapes:Shape.own\ttiny.figures:Shape.scaled
tiny.shapes:Shape.own(times=)\ttiny.figures:Shape.scaled(factor=)
tiny.shapes:Way\ttiny.figures:Implementation
tiny.shapes:Way.name\ttiny.figures:Implementation.title
tiny.shapes:Pair.one\ttiny.figures:Pair.first
tiny.gone\ttiny.never
tiny.gone:thing\ttiny.never:other
tiny.shapes:gone\ttiny.figures:never
tiny.shapes:Gone.member\ttiny.figures:Never.member
tiny.shapes:gone(old=)\ttiny.figures:never(new=)
tiny.shapes:area_of(gone=)\ttiny.areas:compute_area(never=)
"""
USE = """
import importlib
import tiny, tiny.areas
from tiny import Quad, compute_area, figures
from tiny.figures import MAX_SIZE, Implementation, Pair
from tiny.implementations.quick import requested
quad = Quad(length=2)
print(MAX_SIZE, quad.length, quad.family, Quad.family, quad.scaled(factor=3), quad.scaled(5))
print(compute_area(quad, factor=2), tiny.areas.compute_area(quad), tiny.Quad is figures.Quad, requested())
print(Implementation(title="x").title, Implementation().title, Pair(first=1, two=2).first, Pair(1, 2)._replace(first=7))
quad.length = 4
figures.MAX_SIZE = 10
print(compute_area(quad), importlib.import_module("tiny.implementations") is tiny.implementations)
for name in ("never", "figures.never", "shapes.Never"):
    try:
        importlib.import_module(f"tiny.{name}")
    except ImportError as error:
        print(type(error).__name__)
print(hasattr(figures, "never"), hasattr(Quad, "gone"))
print(Quad(**eval(tests.guards.renames.with_old_keys("{'length': 5}"))).length)
"""


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


def use(folder: Path, table: str | None, code: str = USE) -> subprocess.CompletedProcess[str]:
    """Run the code on a tree, with the names of a table if it is the earlier one."""
    (folder / "table.tsv").write_text(table or "")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    if table is not None:
        environment[renames.TABLE] = str(folder / "table.tsv")
    command = [sys.executable, "-c", "import tests.guards\n" + code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_code_in_new_names_runs_on_the_old_tree(tmp_path: Path):
    write(tmp_path / "old", OLD)
    write(tmp_path / "new", NEW)
    before, now = use(tmp_path / "old", TABLE), use(tmp_path / "new", None)
    assert now.returncode == 0, now.stderr
    assert before.returncode == 0, before.stderr
    assert before.stdout.replace("one=7", "first=7") == now.stdout  # the tuple prints its own name
    assert before.stderr == ""


def test_a_table_of_renames_that_the_old_tree_has_already_changes_nothing(tmp_path: Path):
    write(tmp_path / "new", NEW)
    before, now = use(tmp_path / "new", TABLE), use(tmp_path / "new", None)
    assert (before.stdout, before.stderr, before.returncode) == (now.stdout, "", 0)


def test_without_the_table_it_does_not(tmp_path: Path):
    write(tmp_path, OLD)
    assert "No module named 'tiny.areas'" in use(tmp_path, "").stderr
    assert use(tmp_path, "", "from tiny.shapes import MOST").returncode == 0


def test_what_the_old_tree_calls_so_stays(tmp_path: Path):
    """Old code means the old thing by a name that another thing has now; it is reported."""
    write(tmp_path, {"tiny/__init__.py": "", "tiny/a.py": "x, y = 'old x', 'old y'", "tiny/b.py": "z = 'old b'"})
    table = "tiny.a:x\ttiny.a:y\ntiny.a\ttiny.b\n"
    done = use(tmp_path, table, "from tiny import a, b\nprint(a.y, b.z)")
    assert done.stdout == "old y old b\n"
    assert "renames: tiny.a:y is something else in the earlier commit" in done.stderr
    assert "renames: tiny.b is something else in the earlier commit" in done.stderr


@pytest.mark.parametrize("line", ["a.b", "a.b\tc:d", "a:b(c=)\ta:b", "a b\tc", "a:b\tc:d\te:f"])
def test_a_line_that_is_no_rename_is_named(tmp_path: Path, line: str):
    (tmp_path / "table.tsv").write_text(f"# comment\n{line}\n")
    with pytest.raises(ValueError, match=r"table\.tsv, line 2: .* must be an old name, a tab and a new name"):
        renames.read(tmp_path / "table.tsv")


def test_the_table_of_this_tree_is_one():
    for old, new in renames.read(ROOT / "tests" / "guards" / "renames.tsv"):
        assert old != new


def test_what_could_not_be_computed_there_is_said_and_something_has_to_be(capsys: pytest.CaptureFixture[str]):
    cases = outcomes.Outcomes()
    for case in ("one", "two"):
        assert cases.compare(case, outcomes.failed(AttributeError("no 'x'")), {"out": "1"}) == []
    assert cases.compare("three", outcomes.Uncomputed("ImportError: y"), {"out": "1"}) == []
    assert cases.compare("four", {"error": "ValueError"}, {"error": "ValueError"}) == []
    assert "no case was computed on both sides" in (cases.report("bits") or "")
    said = capsys.readouterr().out
    assert "bits: 0 cases computed on both sides, 1 refused by both with ValueError, 3 not computed there:" in said
    assert "2: AttributeError: no 'x'\n        as one" in said
    assert "1: ImportError: y\n        as three" in said
    assert cases.compare("five", {"out": "1"}, {"out": "1"}) == []
    assert cases.report("bits") is None


@pytest.mark.parametrize("error", [ValueError("x"), TypeError("x"), KeyError("x")])
def test_another_error_there_is_a_difference(error: Exception):
    assert outcomes.Outcomes().compare("one", outcomes.failed(error), {"out": "1"}) == ["error", "out"]
    assert outcomes.Outcomes().compare("one", {"out": "1"}, outcomes.failed(NameError("x"))) == ["error", "out"]
