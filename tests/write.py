"""Writes what is made from the code: the snapshot of the public surface, and the tables of docs/recipes.md.

    python -m tests.write

Tests hold both to the code. The columns of a router in docs/compatibility.md are written by the tests that fill them:
`pytest tests/compat -m "" -k NAME --write-table`.
"""

from tests.support import public_surface, recipe_tables


def main() -> None:
    public_surface.SNAPSHOT.write_text("\n".join([*public_surface.surface(), ""]), encoding="utf-8")
    page = recipe_tables.PAGE
    page.write_text(recipe_tables.with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
