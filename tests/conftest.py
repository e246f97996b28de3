"""Options, marks and fixtures of the whole suite."""

import pytest
from compat_table import Table, limit  # noqa: F401  (a fixture is found where it is named)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--write-table", action="store_true", help="write docs/compatibility.md from what the tests show")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: run only with --slow")
    config.addinivalue_line("markers", "cuda: what a GPU has to show; skipped where there is none")
    config.addinivalue_line("markers", "feature(row): what a test shows in the table of docs/compatibility.md")
    config.pluginmanager.register(Table(config.getoption("--write-table")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
