"""Options and fixtures of the whole suite; its marks are in pyproject.toml."""

import pytest
from support.compat_table import Table, limit  # noqa: F401  (a fixture is found where it is named)

collect_ignore = ["guards", "support"]  # commands and helpers, which have no tests


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-table", action="store_true", help="write docs/compatibility.md from what the tests show")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Table(config.getoption("--write-table")))
