"""Writes what is made from the code: exports of routers, tables of the pages of recipes and concepts, lines of
the public surface.

    python -m tests.write

Tests hold all of it to the code. The columns of a router in tests/compat/table.md are written by the tests that fill
them: `pytest tests/compat -m "" -k NAME --write-table`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mixture_of_experts import gating
from tests.support import public_api, recipe_tables
from tests.support.strategies import KINDS

EXPORTS = Path(gating.__file__)


def with_routers(source: str) -> str:
    """The code of gating/__init__.py with an export of each router of `KINDS` that this package has."""
    routers = [kind.make for kind in KINDS.values() if isinstance(kind.make, type)]
    routers = [each for each in routers if each.__module__.startswith(gating.__name__)]
    routers = [each for each in routers if f'"{each.__name__}"' not in source]
    imports = [f"from {each.__module__} import {each.__name__}\n" for each in routers]
    for first, new in (("from ", imports), ('    "', [f'    "{each.__name__}",\n' for each in routers])):
        old = [line for line in source.splitlines(keepends=True) if line.startswith(first)]
        source = source.replace("".join(old), "".join(sorted([*old, *new])))
    return source


def write_code() -> None:
    EXPORTS.write_text(with_routers(EXPORTS.read_text(encoding="utf-8")), encoding="utf-8")


def write_pages() -> None:
    pages = {
        recipe_tables.PAGE: recipe_tables.replace_tables,
        recipe_tables.CONCEPTS: recipe_tables.replace_router_table,
    }
    for page, written in pages.items():
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
    public_api.SNAPSHOT.write_text("\n".join([*public_api.list_surface(), ""]), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["pages"]:
        write_pages()
    else:
        write_code()
        subprocess.run([sys.executable, "-m", "tests.write", "pages"], check=True)  # reads the code that was written
