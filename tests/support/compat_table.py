"""The table of tests/compat/table.md, which the tests in `compat` write and are held to.

A test marked `feature("...")` with a parameter `path` (or `router`, a name) stands for one cell of the table. When it
passes, the cell must say so; when it has shown a limitation (fixture `limit`), the cell must give that reason. With
`--write-table` the cells are written instead.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).resolve().parents[1] / "compat" / "table.md"
TABLES = ("layers", "routers")
YES, UNKNOWN = "yes", "not run"
COLUMNS = "All are: "  # the line above a table begins so
Cell = tuple[str, str, str]  # table, feature (row), column


def get_cell(item: pytest.Item) -> Cell | None:
    """The cell that a test stands for."""
    mark = item.get_closest_marker("feature")
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if mark is None:
        return None
    table, column = parameters["path"].cell if "path" in parameters else ("routers", parameters["router"])
    return table, mark.args[0], column


def read_table(text: str) -> dict[Cell, str]:
    """The cells of the document, footnotes put in their places."""
    notes = dict(re.findall(r"^\[(\d+)\] (.*)$", text, re.MULTILINE))
    cells = {}
    for table in TABLES:
        columns, _, *lines = extract_table(text, table).splitlines()
        for line in lines[2:]:
            feature, entry = (part.strip() for part in line[1:-1].split("|"))
            everywhere, *exceptions = entry.split(", but ")
            cells |= {(table, feature, column): YES for column in split_columns(columns)}
            assert everywhere == "all", f"{feature}: {everywhere!r} is neither all nor all with exceptions"
            for value, those in (exception.split(": ") for exception in exceptions):
                number = re.fullmatch(r"no \[(\d+)\]", value)
                reason = notes[number.group(1)] if number else value
                cells |= {(table, feature, column): reason for column in those.split("; ")}
    return cells


def split_columns(line: str) -> list[str]:
    return line.removeprefix(COLUMNS).removesuffix(".").split("; ")


def extract_table(text: str, name: str) -> str:
    """What stands between the marks of a table (or of the notes)."""
    return re.search(rf"<!-- table: {name} -->\n(.*?)<!-- end -->", text, re.DOTALL).group(1)


def replace_table(text: str, name: str, lines: list[str]) -> str:
    """The document with these lines between the marks."""
    head, rest = text.split(f"<!-- table: {name} -->\n")
    tail = rest.split("<!-- end -->", 1)[1]
    return "\n".join([f"{head}<!-- table: {name} -->", *lines, f"<!-- end -->{tail}"])


def write_table(text: str, cells: dict[Cell, str]) -> str:
    """The document with these cells; reasons become footnotes."""
    reasons = list(dict.fromkeys(value for value in cells.values() if value not in (YES, UNKNOWN)))
    number = {reason: index for index, reason in enumerate(reasons, start=1)}
    for table in TABLES:
        mine = {(row, column): value for (name, row, column), value in cells.items() if name == table}
        columns = list(dict.fromkeys(column for _, column in mine))
        lines = [f"{COLUMNS}{'; '.join(columns)}.", "", "| | works with |", "|---|---|"]
        for row in dict.fromkeys(row for row, _ in mine):
            values = {column: mine.get((row, column), UNKNOWN) for column in columns}
            exceptions = dict.fromkeys(value for value in values.values() if value != YES)
            entry = "all"
            for value in exceptions:
                shown = f"no [{number[value]}]" if value in number else value
                entry += f", but {shown}: {'; '.join(column for column in columns if values[column] == value)}"
            lines.append(f"| {row} | {entry} |")
        text = replace_table(text, table, lines)
    return replace_table(text, "notes", [f"[{index}] {reason}\n" for reason, index in number.items()])


class Table:
    """The plugin: reads the committed table, holds each test to its cell, collects what a run has shown."""

    def __init__(self, writes: bool) -> None:
        self.writes = writes
        self.committed = read_table(DOCUMENT.read_text())
        self.shown: dict[Cell, str] = {}

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        cell = get_cell(item)
        if cell is not None:
            item.user_properties.append(("cell", cell))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item):
        result = yield
        properties = dict(item.user_properties)
        if "cell" in properties and not self.writes:
            says, shown = self.committed.get(properties["cell"]), properties.get("limit", YES)
            if says != shown:
                pytest.fail(
                    f"{DOCUMENT.name} says {says!r} of {properties['cell'][1:]}, the test has shown {shown!r}: write "
                    'the table anew with `pytest tests/compat -m "" --write-table`'
                )
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        if "cell" not in properties:
            return
        cell = tuple(properties["cell"])
        if report.skipped:
            self.shown.setdefault(cell, self.committed.get(cell, UNKNOWN))
        elif report.when == "call" and report.passed:
            self._show(cell, properties.get("limit", YES))

    def _show(self, cell: Cell, value: str) -> None:
        if self.shown.setdefault(cell, value) != value:
            raise pytest.UsageError(f"tests of one cell disagree: {cell}: {self.shown[cell]!r} and {value!r}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.writes and not session.testsfailed and not hasattr(session.config, "workerinput"):
            text = DOCUMENT.read_text()  # another run may have written its part by now
            DOCUMENT.write_text(write_table(text, {**read_table(text), **self.shown}))


@pytest.fixture
def limit(request: pytest.FixtureRequest):
    """`limit(reason)`: the test has shown that this does not work, and why."""
    return lambda reason: request.node.user_properties.append(("limit", reason))
