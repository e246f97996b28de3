"""Attributes of modules that are checked whenever they are set, at construction and afterwards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn


def setting(check: Callable[..., Any], **bounds: Any) -> Any:
    """An attribute whose values are those that `check(name, value, **bounds)` returns."""
    return _Setting(partial(check, **bounds))


class _Setting:
    """It has no `__get__`: reading such an attribute costs what reading any does."""

    def __init__(self, check: Callable[[str, Any], Any]) -> None:
        self.check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __set__(self, module: nn.Module, value: Any) -> None:
        module.__dict__[self.name] = self.check(self.name, value)


class FixedShapes(nn.Module):
    """A module that knows the sizes of its parameters: none is replaced by one of another shape.

    Replaced by hand (to prune experts, to add some) they would leave the sizes that capacity is reckoned from behind.
    Casts, sharding, parametrizations and loading do not go this way, or keep shapes.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        old = self.__dict__.get("_parameters", {}).get(name)
        if isinstance(old, Tensor) and isinstance(value, Tensor) and value.shape != old.shape:
            raise ValueError(
                f"{name} of {type(self).__name__} has shape {tuple(old.shape)}, got {tuple(value.shape)}: the module's "
                "sizes go with it. For fewer or more experts build a new module of that size, copy the weights that "
                "stay, and give both gate and experts to a new layer"
            )
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "dim" not in state:  # a class of mixture-of-experts 0.2.3, of the same name
            raise ValueError(
                f"this {type(self).__name__} was pickled whole by another package, mixture-of-experts 0.2.3: load the "
                "file with that one, save module.state_dict() and load it here with load_state_dict, as "
                "docs/coming_from.md shows"
            )
        super().__setstate__(state)
