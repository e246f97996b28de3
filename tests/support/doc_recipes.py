"""The code of docs, as the tests of its recipes use it: what is tested is what is printed there."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs"
sys.path.insert(0, str(DOCS.parent / "examples"))
RECIPES = DOCS / "recipes.md"
PAGES = [RECIPES, DOCS / "concepts.md", DOCS / "balancing.md", DOCS / "extending.md"]


BUILDERS = {"GPT-OSS": "build_gpt_oss", "Chen 2022": "build_chen_2022"}  # of examples/custom_parts.py


def extract_recipe(heading: str) -> dict[str, Any]:
    """Run the first Python block under a heading, which one page has, as a module of its own, and return its names."""
    if heading in BUILDERS:
        names = vars(import_module("custom_parts"))
        return {**names, "moe": names[BUILDERS[heading]]()}
    texts = {page.name: page.read_text(encoding="utf-8").split(f"# {heading}\n") for page in PAGES}
    ((page, (_, section)),) = ((page, parts) for page, parts in texts.items() if len(parts) > 1)
    code = section.split("```python\n", maxsplit=1)[1].split("```", maxsplit=1)[0]
    module = ModuleType("recipe_" + re.sub(r"\W", "_", heading))
    sys.modules[module.__name__] = module  # a class must be found in its module for torch.compile
    exec(compile(code, f"{page}, {heading}", "exec"), vars(module))
    return vars(module)
