"""The public surface: what the pages of `docs/api` show, as one line for each name.

A line has the import path, the signature with its defaults, and, for a class, a line more for each of its documented
attributes, properties and methods. `python -m tests.write` writes the snapshot that `tests/test_public_api.py` compares
with: run it in the commit that changes the surface on purpose.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "api"
SNAPSHOT = ROOT / "tests" / "public_surface.txt"
DIRECTIVE = re.compile(
    r"^\.\. (?:py:)?(?P<kind>currentmodule|automodule|autoclass|autofunction|data):: (?P<name>\S+)"
    r"(?P<options>(?:\n   :.*)*)",
    re.MULTILINE,
)


def public_names() -> dict[str, Any]:
    """Every public object by its import path, in the order of the pages."""
    found: dict[str, Any] = {}
    for page in sorted(PAGES.glob("*.md")):
        module: ModuleType = import_module("mixture_of_experts")
        for directive in DIRECTIVE.finditer(page.read_text(encoding="utf-8")):
            kind, name, options = directive.group("kind", "name", "options")
            if kind == "currentmodule":
                module = import_module(name)
            elif kind == "automodule":
                module = import_module(name)
                found |= {f"{name}.{each}": getattr(module, each) for each in list_members(module, options)}
            else:
                found[f"{module.__name__}.{name}"] = getattr(module, name)
    return found


def list_members(module: ModuleType, options: str) -> list[str]:
    """The names that `automodule` shows: those given, else `__all__`, else the documented names of the module."""
    given = re.search(r":members: (.+)", options)
    if given:
        return [name.strip() for name in given[1].split(",")]
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and getattr(value, "__doc__", None)
    ]
    return [name for name in names if not name.startswith("_") and name not in read_excluded(options)]


def list_inner_members() -> dict[str, set[str]]:
    """The members of each class that its page leaves out, by the name of the class."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in sorted(PAGES.glob("*.md")))
    classes = (each for each in DIRECTIVE.finditer(text) if each["kind"] == "autoclass")
    return {each["name"]: read_excluded(each["options"]) for each in classes}


def read_excluded(options: str) -> set[str]:
    left_out = re.search(r":exclude-members: (.+)", options)
    return {name.strip() for name in left_out[1].split(",")} if left_out else set()


def format_lines(path: str, value: Any, left_out: Collection[str] = ()) -> Iterator[str]:
    if inspect.isclass(value):
        yield f"class {path}{format_signature(value)}"
        for name in sorted(list_attributes(value).difference(left_out)):
            yield f"{path}.{name}{find_member(value, name)}"
    elif callable(value):
        yield f"def {path}{format_signature(value)}"
    else:
        keys = list(value) if isinstance(value, dict) else ""
        yield f"data {path} {keys}".rstrip()


def list_attributes(kind: type) -> set[str]:
    """The names that the reference shows of a class: documented members and attributes, fields, and `forward`."""
    fields = set(getattr(kind, "__dataclass_fields__", None) or getattr(kind, "_fields", ()))
    members = {name for name, value in vars(kind).items() if getattr(value, "__doc__", None) and format_default(value)}
    names = fields | members | {*is_documented(kind)} | ({"forward"} if issubclass(kind, nn.Module) else set())
    return {name for name in names if not name.startswith("_")}


def format_default(value: object) -> bool:
    return isinstance(value, FunctionType | property | staticmethod | classmethod)


def is_documented(kind: type) -> list[str]:
    """The names in the section "Attributes" of a docstring."""
    section = re.search(r"\nAttributes:\n((?:(?: {4}.*)?\n)+)", f"{inspect.getdoc(kind)}\n")
    lines = re.findall(r"^ {4}(\w[\w, ]*):", section[1], re.MULTILINE) if section else []
    return [name.strip() for line in lines for name in line.split(",")]


def find_member(kind: type, name: str) -> str:
    """How a member is called; "" for an attribute."""
    value = inspect.getattr_static(kind, name, None)
    value = value.__func__ if isinstance(value, staticmethod | classmethod) else value
    return format_signature(value) if isinstance(value, FunctionType) else ""


def format_signature(value: Any) -> str:
    """The parameters and their defaults, without types."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return "(...)"
    bare = [
        each.replace(
            annotation=each.empty, default=each.default if each.default is each.empty else ShownDefault(each.default)
        )
        for each in signature.parameters.values()
    ]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


class ShownDefault:
    """Has the text of a default that is the same in every process."""

    def __init__(self, value: object) -> None:
        named = inspect.isclass(value) or inspect.isroutine(value)
        self.text = f"{value.__module__}.{value.__qualname__}" if named else repr(value)  # pyright: ignore
        if " at 0x" in self.text:
            self.text = f"a {type(value).__name__}"

    def __repr__(self) -> str:
        return self.text


def list_surface() -> list[str]:
    inner = list_inner_members()
    return [
        line
        for path, value in public_names().items()
        for line in format_lines(path, value, inner.get(path.rpartition(".")[-1], ()))
    ]
