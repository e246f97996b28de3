"""Imports run one way: read from the code of the whole package, also within functions and for types only."""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mixture_of_experts"

# A room is a file or folder of the package. The core, from the ground up: a room imports from its own line and those
# above it. The root, "", is the last.
CORE = [
    {"private_torch", "attached"},
    {"checks", "settings", "tracing", "under_way", "model_tokens", "failures", "launching", "each_step"},
    {"routing", "queues", "queue_kernels", "losses", "groups"},
    {"gating", "plan", "decision", "dispatch", "levels"},
    {"ops"},
    {"experts"},
    {"around"},
    {"arguments"},
    {"moe"},
    {"recipes", "held", "sites"},
    {"auxiliary", "balancing", "forcing", "sparsity"},
    {""},
]
# Rooms outside import from the core, and from these others.
OUTSIDE = {
    "stats": set(),
    "plot": {"stats"},
    "summary": set(),
    "verify": {"stats"},
    "unstack": set(),
    "replay": set(),
    "parallel": set(),
    "huggingface": {"parallel", "stats"},
    "mixture_of_experts": set(),  # the one module of 0.2.3
}
HEIGHT = {room: height for height, rooms in enumerate(CORE) for room in rooms}


def sources() -> dict[str, str]:
    """`{"gating.base": its text, ...}`; a folder's `__init__.py` is the folder, that of the package is ""."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file.read_text(encoding="utf-8")
    return found


def imports(module: str, text: str, modules: Mapping[str, str]) -> Iterator[str]:
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
            names = [name if in_package(name) in modules else base for name in (f"{base}.{a.name}" for a in node.names)]
        else:
            continue
        yield from (in_package(name) for name in names if name.split(".")[0] == "mixture_of_experts")


def in_package(name: str) -> str:
    return name.removeprefix("mixture_of_experts").removeprefix(".")


def wrong_ways(modules: Mapping[str, str]) -> list[str]:
    """Every import that the tables above do not allow, and a circle of files if there is one."""
    wrong = []
    graph = {module: set(imports(module, text, modules)) for module, text in modules.items()}
    for module, imported in graph.items():
        room = module.split(".")[0]
        if room not in HEIGHT and room not in OUTSIDE:
            wrong.append(f"{room} has no place in the table")
        for other in sorted(imported):
            target = other.split(".")[0]
            if target != room and not allowed(room, target):
                wrong.append(f"{module or 'the root'} imports {other or 'the root'}")
    try:
        TopologicalSorter({module: imported - {module} for module, imported in graph.items()}).prepare()
    except CycleError as error:
        wrong.append("a circle: " + " < ".join(map(str, error.args[1])))
    return wrong


def allowed(room: str, target: str) -> bool:
    if room in OUTSIDE:
        return target in HEIGHT or target in OUTSIDE[room]
    return target in HEIGHT and HEIGHT[target] <= HEIGHT.get(room, 0)


def test_imports_run_one_way():
    modules = sources()
    assert "moe" in set(imports("", modules[""], modules))
    assert wrong_ways(modules) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "text", "wrong"),
    [
        ("routing", "from mixture_of_experts.gating import Gate", "routing imports gating"),
        ("gating.base", "def f():\n    import mixture_of_experts.moe", "gating.base imports moe"),
        ("gating.top2", "if TYPE_CHECKING:\n    from mixture_of_experts import MoE", "gating.top2 imports the root"),
        ("experts", "from .parallel import ExpertParallel", "experts imports parallel"),
        ("gating.topk", "from ..stats.records import Record", "gating.topk imports stats.records"),
        ("", "from mixture_of_experts import parallel", "the root imports parallel"),
        ("stats", "from mixture_of_experts.plot import plot_load", "stats imports plot"),
        ("newroom", "", "newroom has no place in the table"),
    ],
)
def test_an_import_the_wrong_way_is_found(module: str, text: str, wrong: str):
    modules = sources()
    found = wrong_ways({**modules, module: modules.get(module, "") + "\n" + text})
    assert any(line.startswith(wrong) for line in found), found


def test_a_circle_is_found():
    modules = {"routing": "from mixture_of_experts import losses", "losses": "from .routing import Routing"}
    (circle,) = wrong_ways(modules)
    assert circle.startswith("a circle: ")


def test_no_two_classes_share_a_name():
    """One word means one thing: a name is of one class in the whole package."""
    owners: dict[str, list[str]] = {}
    for module, text in sources().items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                owners.setdefault(node.name, []).append(module)
    assert len(owners) > 50
    assert {name: modules for name, modules in owners.items() if len(modules) > 1} == {}
