"""Imports run one way: read from the code of the whole package, also within functions and for types only."""

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch

from mixture_of_experts import GatedExperts, MoE, TopKGating

PACKAGE = Path(__file__).resolve().parent.parent / "mixture_of_experts"

# A room is a file or a folder of the package's root; "" is the root itself. A room imports from those before it.
LAYER_ORDER = [
    "providers",
    "support",
    "kernels",
    "dispatch",
    "losses",
    "gating",
    "ops",
    "experts",
    "wrappers",
    "arguments",
    "moe",
    "recipes",
    "whole_model",
    "unstack",
    "quantize",
    "summary",
    "",
    "mixture_of_experts",  # the one module of 0.2.3
    "stats",
    "parallel",
    "replay",
    "verify",
    "huggingface",  # the others ask `providers`
]
# Names that several modules define, because the modules implement one interface.
SHARED_NAMES = {
    "implementations of gates and experts": "run unsupported_reason",
    "implementations of gates": """
        REPLACED_METHODS MAX_EXPERTS SELF_CHECK choose_by_kernel _find_fault _self_check_failure
    """,
    "classes that import the modules in which these names stand for them": "TopKGating Top2Gating",
    "networks of rows, with and without adapters": "run_network backpropagate_network",
    "formats of quantized weights": "MAX_DIRECT_ROWS pack_matrix unpack_matrix multiply_rows has_direct_matmul",
    "commands": "main",
}
MAX_ROOT_FILES = 13  # of the root: each is a public import path, or a part of `moe`
MAX_LAYERS = 13


def read_sources() -> dict[str, str]:
    """`{"gating.base": its text, ...}`; a folder's `__init__.py` is the folder, that of the package is ""."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file.read_text(encoding="utf-8")
    return found


def list_imports(module: str, text: str, modules: Mapping[str, str]) -> Iterator[str]:
    """The modules of the package that one of them imports."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = f"mixture_of_experts.{module}".rstrip(".").split(".")
            folder = any(other.startswith(f"{module}.") for other in modules) or not module
            here = package[: len(package) + folder - node.level] if node.level else []
            base = ".".join([*here, *([node.module] if node.module else [])])
            # what is imported from a folder may be a file in it
            names = [
                name if strip_package(name) in modules else base for name in (f"{base}.{a.name}" for a in node.names)
            ]
        else:
            continue
        yield from (strip_package(name) for name in names if name.split(".")[0] == "mixture_of_experts")


def strip_package(name: str) -> str:
    return name.removeprefix("mixture_of_experts").removeprefix(".")


def find_layer(module: str) -> str:
    return module.split(".")[0]


def find_wrong_imports(modules: Mapping[str, str]) -> list[str]:
    """Every import that `LAYER_ORDER` does not allow, and a circle of files if there is one."""
    wrong = []
    graph = {module: set(list_imports(module, text, modules)) for module, text in modules.items()}
    for module, imported in graph.items():
        room = find_layer(module)
        if room not in LAYER_ORDER:
            wrong.append(f"{room} has no place in the order")
            continue
        before = LAYER_ORDER[: LAYER_ORDER.index(room) + 1]
        wrong += [
            f"{module or 'the root'} imports {other or 'the root'}"
            for other in sorted(imported)
            if find_layer(other) not in before
        ]
    try:
        TopologicalSorter({module: imported - {module} for module, imported in graph.items()}).prepare()
    except CycleError as error:
        wrong.append("a circle: " + " < ".join(map(str, error.args[1])))
    return wrong


def group_by_layer(modules: Mapping[str, str]) -> list[list[str]]:
    """The rooms by floors, the lowest first: each stands above all that it imports."""
    below: dict[str, set[str]] = {room: set() for room in LAYER_ORDER}
    for module, text in modules.items():
        below[find_layer(module)] |= {find_layer(other) for other in list_imports(module, text, modules)}
    height: dict[str, int] = {}
    for room in LAYER_ORDER:
        height[room] = 1 + max((height[other] for other in below[room] - {room}), default=0)
    return [[room for room in LAYER_ORDER if height[room] == floor] for floor in range(1, max(height.values()) + 1)]


def test_imports_run_one_way():
    modules = read_sources()
    assert "moe" in set(list_imports("", modules[""], modules))
    assert find_wrong_imports(modules) == []


def list_definitions(text: str) -> set[str]:
    """The names that a module defines itself: functions, classes and constants."""
    found: set[str] = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for each in targets for name in ast.walk(each) if isinstance(name, ast.Name)}
    return {name for name in found if name.strip("_") and not name.startswith("__")}


def test_a_name_means_one_thing():
    counts = Counter(name for text in read_sources().values() for name in list_definitions(text))
    assert {name for name, count in counts.items() if count > 1} == set(" ".join(SHARED_NAMES.values()).split())


def test_package_root_is_small():
    files = [path for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= MAX_ROOT_FILES
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"} <= {*LAYER_ORDER}
    assert len(group_by_layer(read_sources())) <= MAX_LAYERS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "text", "wrong"),
    [
        ("dispatch.routing", "from mixture_of_experts.gating import Gate", "dispatch.routing imports gating"),
        ("gating.base", "def f():\n    import mixture_of_experts.moe", "gating.base imports moe"),
        ("gating.top2", "if TYPE_CHECKING:\n    from mixture_of_experts import MoE", "gating.top2 imports the root"),
        ("experts", "from .parallel import ExpertParallel", "experts imports parallel"),
        ("gating.topk", "from ..stats.records import Record", "gating.topk imports stats.records"),
        ("", "from mixture_of_experts import parallel", "the root imports parallel"),
        ("stats", "from mixture_of_experts.replay import record_routing", "stats imports replay"),
        ("verify", "from mixture_of_experts.huggingface import upcycle", "verify imports huggingface"),
        ("newroom", "", "newroom has no place in the order"),
    ],
)
def test_detects_wrong_imports(module: str, text: str, wrong: str):
    modules = read_sources()
    found = find_wrong_imports({**modules, module: modules.get(module, "") + "\n" + text})
    assert any(line.startswith(wrong) for line in found), found


def test_detects_circular_imports():
    modules = {"losses": "from mixture_of_experts import moe", "moe": "from .losses import z_loss"}
    assert find_wrong_imports(modules)[-1].startswith("a circle: ")


def test_no_two_classes_share_a_name():
    """One word means one thing: a name is of one class in the whole package."""
    owners: dict[str, list[str]] = {}
    for module, text in read_sources().items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                owners.setdefault(node.name, []).append(module)
    assert len(owners) > 50
    assert {name: modules for name, modules in owners.items() if len(modules) > 1} == {}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="code has no qualified names before Python 3.11")
def test_contributing_describes_the_forward():
    """Each function of its table is entered, in that order."""
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    described = re.findall(r"^\| `([\w/]+\.py)` `([\w.]+)` \|", text, re.MULTILINE)
    layer = MoE(16, gate=TopKGating(16, 4), experts=GatedExperts(16, 4))
    x, entered = torch.randn(2, 256, 16, requires_grad=True), []

    def watch(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            entered.append((path.relative_to(PACKAGE).as_posix(), frame.f_code.co_qualname))

    sys.setprofile(watch)
    try:
        layer(x)
    finally:
        sys.setprofile(None)
    assert len(described) > 10
    assert [each for each in dict.fromkeys(entered) if each in described] == described
