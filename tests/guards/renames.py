"""New names for old objects: lets the guards, which use this tree's names, run on an earlier commit.

`renames.tsv` has one rename a line: the old name, a tab, the new name, both whole and both as their own tree has them.

    package.old_module                  package.new_module
    package.old_module:old              package.new_module:new               (function, class or constant; it may move)
    package.old_module:Old.member       package.new_module:New.new_member    (method, attribute, property or field)
    package.old_module:old(old=)        package.new_module:new(new=)         (argument; of a class: its constructor's)
    package.old_module:Old.member(old=) package.new_module:New.member(new=)

Empty lines and lines that begin with `#` are skipped. A line whose old name the earlier commit does not have is
ignored, so the table may hold the renames of many commits. Where the earlier commit uses the new name for something
else, its own meaning wins, and a line on stderr says so. A name that another module imports, as a package does, is
renamed there too. Not translated are members that new code overrides in a subclass, and strings but for the keys of
`with_old_keys`. Modules of `tests` are known without that prefix too, as both folders are on the path.

A process translates if `TABLE` is in its environment when `tests.guards` is imported. Nothing here imports torch.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

#: environment variable with the path of the table
TABLE = "GUARDS_RENAMES"
NAME = re.compile(r"(?P<module>\w+(?:\.\w+)*)(?::(?P<path>\w+(?:\.\w+)*))?(?:\((?P<argument>\w+)=\))?")
MISSING = object()


class Name(NamedTuple):
    """A module, the path of something in it, and an argument of that; the last two may be empty."""

    module: str
    path: str = ""
    argument: str = ""


class Rename(NamedTuple):
    old: Name
    new: Name


def read(path: Path) -> list[Rename]:
    """The renames of a table, those of `tests` also without that prefix."""
    found: list[Rename] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        matches = [NAME.fullmatch(part.strip()) for part in line.split("\t")]
        names = [Name(**match.groupdict(default="")) for match in matches if match]
        if len(matches) != 2 or len(names) != 2 or [*map(bool, names[0])] != [*map(bool, names[1])]:
            raise ValueError(f"{path}, line {number}: {line!r} must be an old name, a tab and a new name of its kind")
        found.append(Rename(*names))
        short = [name._replace(module=name.module.removeprefix("tests.")) for name in names]
        if short != names:
            found.append(Rename(*short))
    return found


def install(renames: Iterable[Rename]) -> MetaPathFinder:
    """Translate in this process, in every module that is imported from now on."""
    finder = Translator(renames)
    sys.meta_path.insert(0, finder)
    return finder


def with_old_keys(text: str) -> str:
    """The text of an expression, whose dicts of arguments have the old names as keys if this process translates."""
    translators = [finder for finder in sys.meta_path if isinstance(finder, Translator)]
    keys = {new: old for translator in translators for new, old in translator.arguments.items()}
    return re.sub(r"'(\w+)'(?=: )", lambda match: repr(keys.get(match[1], match[1])), text)


class Translator(MetaPathFinder):
    """Finds modules by their new names, and gives what is in them its new names when they are imported."""

    def __init__(self, renames: Iterable[Rename]) -> None:
        renames = [rename for rename in renames if has_module(rename.old.module)]
        self.packages = {name.module.partition(".")[0] for rename in renames for name in rename}
        self.modules = {new.module: old.module for old, new in renames if not old.path}
        self.names: dict[str, dict[str, Name]] = defaultdict(dict)  # by the module that is asked, and new name
        self.exported: dict[str, list[Name]] = defaultdict(list)  # by new name, in whatever module
        self.members: dict[str, list[Rename]] = defaultdict(list)  # by the module that has them
        self.arguments = {new.argument: old.argument for old, new in renames if old.argument}
        for rename in renames:
            old, new = rename
            if old.argument or "." in old.path:
                self.members[old.module].append(rename)
            elif old.path:
                self.exported[new.path].append(old)
                self.names[self.old_module(new.module)][new.path] = old
        for new_name, old_name in self.modules.items():
            if new_name != old_name and has_module(new_name) and has_module(old_name):
                collides(new_name)

    def old_module(self, new: str) -> str:
        """The old name of a module; its own, if it was not renamed or if both trees have it."""
        parent, _, leaf = new.rpartition(".")
        old_parent = self.old_module(parent) if parent else ""
        if old_parent == parent and has_module(new):
            return new
        old = self.modules.get(new)
        return old if old and has_module(old) else f"{old_parent}.{leaf}".lstrip(".")

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self.packages:
            return None
        old = self.old_module(fullname)
        if old != fullname:
            return ModuleSpec(fullname, Alias(old)) if has_module(old) or old in self.names else None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None and fullname in self.names:  # a new module, into which names have moved
            spec = ModuleSpec(fullname, Empty(), is_package=True)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_translate(module: ModuleType) -> None:
            execute(module)
            self.translate(module)

        loader.exec_module = execute_and_translate
        return spec

    def place_of(self, module: ModuleType, name: str) -> tuple[ModuleType, str] | None:
        """Where the old tree has what a module has by a new name: a submodule, its own, or what it imports."""
        qualified = f"{module.__name__}.{name}"
        if name.startswith("__"):
            return None
        if (old := self.names.get(module.__name__, {}).get(name)) is not None:
            there = module if old.module == module.__name__ else importlib.import_module(old.module)
            return there, old.path
        if self.old_module(qualified) != qualified:
            parent, _, leaf = importlib.import_module(qualified).__name__.rpartition(".")
            return importlib.import_module(parent), leaf
        for old in self.exported.get(name, ()):
            here = vars(module).get(old.path, MISSING)
            if here is not MISSING and here is getattr(importlib.import_module(old.module), old.path, None):
                return module, old.path
        return None

    def translate(self, module: ModuleType) -> None:
        """Give the module's names, and the members and arguments in it, their new names."""
        arguments: dict[str, dict[str, str]] = defaultdict(dict)
        for old, new in self.members[module.__name__]:
            if old.argument:
                arguments[old.path][new.argument] = old.argument
                continue
            path, _, member = old.path.rpartition(".")
            owner, new_member = found_in(module, path), new.path.rpartition(".")[2]
            if isinstance(owner, type) and member != new_member:
                add_member(owner, member, new_member)
                if member in fields_of(owner):
                    arguments[path][new_member] = member
        for path, renamed in arguments.items():
            add_arguments(module, path, renamed)
        for name, old in self.names.get(module.__name__, {}).items():
            if name != old.path and name in vars(module) and old.path in vars(sys.modules.get(old.module, Name)):
                collides(f"{module.__name__}:{name}")
        if type(module) is ModuleType:
            module.__class__ = class_of_module(self.place_of)


class Alias(Loader):
    """Loads a module by importing it under its old name: both names are of one module."""

    def __init__(self, old: str) -> None:
        self.old = old

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.old)
        self.spec = module.__spec__  # which the import system writes over
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


class Empty(Loader):
    """Loads a module without content."""

    def exec_module(self, module: ModuleType) -> None:
        pass


def has_module(name: str) -> bool:
    """Whether there is such a module on the path. Nothing is imported."""
    path, parts = None, name.split(".")
    for i in range(len(parts)):
        spec = PathFinder.find_spec(".".join(parts[: i + 1]), path)
        if spec is None:
            return False
        path = spec.submodule_search_locations
        if path is None:
            return i + 1 == len(parts)
    return True


def class_of_module(place_of: Callable[[ModuleType, str], tuple[ModuleType, str] | None]) -> type[ModuleType]:
    """That of a module which reads and writes what it lacks where `place_of` says."""

    class Translated(ModuleType):
        def __getattr__(self, name: str) -> Any:
            place = place_of(self, name)
            if place is None or place == (self, name):
                raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
            return getattr(*place)

        def __setattr__(self, name: str, value: Any) -> None:
            place = None if name in vars(self) else place_of(self, name)
            if place is None or place == (self, name):
                super().__setattr__(name, value)
            else:
                setattr(*place, value)

    return Translated


class Member:
    """An attribute by its new name: that of the old one, of the class and of its objects."""

    def __init__(self, old: str) -> None:
        self.old = old

    def __get__(self, instance: object, owner: type) -> Any:
        return getattr(owner if instance is None else instance, self.old)

    def __set__(self, instance: object, value: Any) -> None:
        setattr(instance, self.old, value)

    def __delete__(self, instance: object) -> None:
        delattr(instance, self.old)


def add_member(owner: type, old: str, new: str) -> None:
    if isinstance(inspect.getattr_static(owner, new, None), Member) or not uses(owner, old):
        return  # a base has it already, or it is not in the old tree
    if uses(owner, new):
        collides(f"{owner.__module__}:{owner.__qualname__}.{new}")
    else:
        setattr(owner, new, Member(old))


def uses(owner: type, name: str) -> bool:
    """Whether a class has a member, or its functions name one that its objects may have."""
    for base in owner.__mro__:
        functions = [getattr(member, "__func__", getattr(member, "fget", member)) for member in vars(base).values()]
        codes = [function.__code__ for function in functions if isinstance(function, FunctionType)]
        declared = vars(base).keys() | vars(base).get("__annotations__", {}).keys()
        if name in declared or any(names(name, code) for code in codes):
            return True
    return False


def names(name: str, code: CodeType) -> bool:
    """Whether code, or code in it, has this name of a global or an attribute."""
    return name in code.co_names or any(isinstance(part, CodeType) and names(name, part) for part in code.co_consts)


def add_arguments(module: ModuleType, path: str, renamed: Mapping[str, str]) -> None:
    """Let a function, or the constructor of a class, take arguments by new names too."""
    parent, _, last = path.rpartition(".")
    owner, target = found_in(module, parent), found_in(module, path)
    if isinstance(target, type):
        constructors = ("__new__", "_replace") if issubclass(target, tuple) else ("__init__",)
        places = [(target, name) for name in constructors]
    else:
        places = [(owner, last)]
    for place, name in places:
        # a method is wrapped in the class that has it, so that it stays the same one in all classes
        bases = place.__mro__ if isinstance(place, type) else (place,)
        place = next((base for base in bases if base is not None and name in vars(base)), None)
        function = vars(place)[name] if place is not None else None
        kind = type(function) if isinstance(function, staticmethod | classmethod) else None
        function = function.__func__ if kind else function
        if isinstance(function, FunctionType):
            wrapper = taking(function, renamed, always=name == "_replace")
            setattr(place, name, kind(wrapper) if kind else wrapper)


def taking(function: FunctionType, renamed: Mapping[str, str], always: bool = False) -> Callable[..., Any]:
    """The function, which takes those of the arguments that it has by their new names too."""
    has = inspect.signature(function).parameters
    old_by_new = {new: old for new, old in renamed.items() if always or (old in has and new not in has)}
    if not old_by_new:
        return function

    @wraps(function)
    def translated(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{old_by_new.get(name, name): value for name, value in kwargs.items()})

    return translated


def found_in(module: ModuleType, path: str) -> Any:
    """What is there, by attributes; None if nothing is."""
    found: Any = module
    for name in filter(None, path.split(".")):
        found = inspect.getattr_static(found, name, None)
    return found


def fields_of(owner: type) -> Iterable[str]:
    """Fields that are arguments of the constructor: those of a dataclass or a tuple with names."""
    return (*getattr(owner, "_fields", ()), *getattr(owner, "__dataclass_fields__", ()))


def collides(name: str) -> None:
    print(f"renames: {name} is something else in the earlier commit, and stays that", file=sys.stderr, flush=True)
