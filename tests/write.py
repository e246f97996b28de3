"""Writes what is made from the code: functions of recipes.py, tables of docs/recipes.md, lines of the public surface.

    python -m tests.write

Tests hold all of it to the code. The columns of a router in docs/compatibility.md are written by the tests that fill
them: `pytest tests/compat -m "" -k NAME --write-table`.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path

from mixture_of_experts import recipes

SOURCE = Path(recipes.__file__)


def with_functions(source: str) -> str:
    """The code of recipes.py with a function for each recipe that says what its layers do. Type checkers read it."""
    lines = [f'{name}: RecipeFunction = _function("{name}")\n' for name, model in recipes.MODELS.items() if model.says]
    source, found = re.subn(r"\n(?:\w+: RecipeFunction = .*\n)+", "\n" + "".join(lines), source)
    assert found == 1
    return source


def main() -> None:
    SOURCE.write_text(with_functions(SOURCE.read_text(encoding="utf-8")), encoding="utf-8")
    del sys.modules[recipes.__name__]
    import_module(recipes.__name__)  # as it is now
    from tests.support import public_surface, recipe_tables

    pages = {
        recipe_tables.PAGE: recipe_tables.with_tables,
        recipe_tables.CONCEPTS: recipe_tables.with_recipes_of_routers,
    }
    for page, written in pages.items():
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
    public_surface.SNAPSHOT.write_text("\n".join([*public_surface.surface(), ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
