"""Functions and classes to copy from a page of the documentation, as objects."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"


def recipe(page: str, definition: str) -> dict[str, Any]:
    """The names that the Python block of a page with this line defines, without the example at its end.

    Args:
        page: file name in `docs`.
        definition: beginning of a line, as "class Muon".
    """
    pattern = rf"^```python\n([^`]*?^{re.escape(definition)}.*?)^moe = "
    (code,) = re.findall(pattern, (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, page, "exec"), names)
    return names
