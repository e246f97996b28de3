"""The code of docs/recipes.md, as the tests of its recipes use it: what is tested is what is printed there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROUTERS = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"


def recipe(heading: str) -> dict[str, Any]:
    """Run the first Python block under a heading as a module of its own, and return its names."""
    section = ROUTERS.read_text(encoding="utf-8").split(f"# {heading}\n", maxsplit=1)[1]
    code = section.split("```python\n", maxsplit=1)[1].split("```", maxsplit=1)[0]
    module = ModuleType("recipe_" + re.sub(r"\W", "_", heading))
    sys.modules[module.__name__] = module  # a class must be found in its module for torch.compile
    exec(compile(code, f"{ROUTERS.name}, {heading}", "exec"), vars(module))
    return vars(module)
