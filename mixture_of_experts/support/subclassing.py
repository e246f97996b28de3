"""Detects which methods of a package class are overridden by subclasses or by instance attributes.

Fast implementations replace the methods of a class. They also apply to subclasses that do not override the replaced
methods, such as the classes that FSDP2 and parametrizations generate for a module.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn

PACKAGE = __name__.partition(".")[0]


def find_overridden(module: Any, base: type, names: Collection[str]) -> str | None:
    """Return the first name in `names` that a module or its class overrides, or None if all names are inherited from
    `base`.

    Example:
        >>> class Base:
        ...     def decide(self): ...
        >>> class Same(Base): ...
        >>> class Other(Base):
        ...     def decide(self): ...
        >>> find_overridden(Same(), Base, ["decide"]), find_overridden(Other(), Base, ["decide"])
        (None, 'decide')
    """
    kind, attributes = type(module), module.__dict__
    for name in names:
        if name in attributes or (kind is not base and getattr(kind, name) is not getattr(base, name)):
            return name
    return None


def find_implementing_class(kind: type) -> type:
    """Return the class of this package from which `kind` inherits `implementations`, even if `kind` redefines them."""
    return next(base for base in kind.__mro__ if "implementations" in base.__dict__ and is_package_class(base))


def is_package_class(kind: type) -> bool:
    """Return whether a class is defined in this package."""
    return kind.__module__.partition(".")[0] == PACKAGE


def is_unchanged(module: nn.Module) -> bool:
    """Return whether a module computes the same results as the class of this package from which it derives.

    Methods of `nn.Module` are ignored, because FSDP2 overrides `_apply`, and other libraries' hooks set `forward` on
    the module. The only exception is a `forward` method defined in a class, because it changes the computation.
    """
    kind = type(module)
    base = next((base for base in kind.__mro__ if is_package_class(base)), None)
    if base is None or not list_members(base).isdisjoint(module.__dict__):
        return False
    return kind is base or all(getattr(kind, name) is getattr(base, name) for name in ("forward", *list_members(base)))


@cache
def list_members(kind: type) -> frozenset[str]:
    """Return the names of a class's methods and properties that `nn.Module` does not have."""
    static = {name: inspect.getattr_static(kind, name) for name in set(dir(kind)) - set(dir(nn.Module))}
    return frozenset(name for name, found in static.items() if isinstance(found, FunctionType | property))
