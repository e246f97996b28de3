"""Importing the package changes nothing of `transformers` and PEFT: what was there is there, and is the same."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHILD = """
import importlib, pathlib, re, sys
import mixture_of_experts

folder = pathlib.Path(mixture_of_experts.__file__).parent
text = "".join(file.read_text() for file in folder.rglob("*.py"))
for name in sorted({*re.findall(r"^ *from ((?:transformers|peft)[.\\w]*) import", text, re.M)}):
    importlib.import_module(name)  # so that what they register themselves is there before


def entries():
    'Every attribute of modules and classes, and every entry of their tables (registries too), by its place.'
    found = {}
    for path, module in list(sys.modules.items()):
        if path.split(".")[0] not in ("transformers", "peft"):
            continue
        for name, value in list(vars(module).items()):
            found[path, name] = value
            if isinstance(value, type) and value.__module__ == path:
                found |= {(path, name, own): part for own, part in list(vars(value).items())}
                value = vars(value).get("_global_mapping")  # of the registries of transformers
            own = getattr(value, "__dict__", {})
            for table in (value, own.get("_extra_content"), own.get("_local_mapping")):
                if type(table) is dict:
                    found |= {(path, name, "entry", repr(key)): part for key, part in list(table.items())}
    return found


before = entries()
import mixture_of_experts.huggingface
after = entries()
constants = (int, float, str, bool, type(None))
same = lambda one, other: one is other or (isinstance(one, constants) and one == other)
changed = [place for place, value in before.items() if place not in after or not same(value, after[place])]
added = [place for place in after if place not in before and place[-1].strip("'") == "mixture_of_experts"]
print(len(before), "places;", "changed:", *changed)
print("added:", *sorted({place[1] for place in added}))
"""


@pytest.mark.slow
def test_import_has_no_side_effects():
    """All registries, methods and functions; names of our own are new."""
    found = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True).stdout
    places, added = found.strip().splitlines()[-2:]
    assert int(places.split()[0]) > 50_000
    assert places.endswith("changed:"), places
    auto = {"AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING", "CONFIG_MAPPING"}
    assert {*added.split()[1:]} == {*auto, "EPImplementationInterface", "ExpertsInterface", "ParallelInterface"}
