"""Attributes of modules that are checked whenever they are set, at construction and afterwards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn


class _Setting(NamedTuple):
    check: Callable[[str, Any], Any]


def setting(check: Callable[..., Any], **bounds: Any) -> Any:
    """An attribute of a `CheckedModule` whose values are those that `check(name, value, **bounds)` returns."""
    return _Setting(partial(check, **bounds))


class CheckedModule(nn.Module):
    """A module with settings, which are checked when they are set, and sizes, which never change.

    Reading a setting costs what reading any attribute does.
    """

    #: attributes that parameters have their shapes by: they are set once
    sizes: ClassVar[tuple[str, ...]] = ()
    _settings: ClassVar[dict[str, _Setting]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = {name: value for name, value in vars(cls).items() if isinstance(value, _Setting)}
        inherited = (base.__dict__.get("_settings", {}) for base in reversed(cls.__mro__[1:]))
        cls._settings = {name: value for settings in (*inherited, own) for name, value in settings.items()}
        for name in own:  # an attribute that nobody has set is none
            delattr(cls, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._settings:
            self.__dict__[name] = self._settings[name].check(name, value)
        elif isinstance(value, nn.Module | nn.Parameter) and hasattr(getattr(type(self), name, None), "__set__"):
            object.__setattr__(self, name, value)  # torch would register it, and leave the attribute as it is
        elif name in self.sizes and name in self.__dict__ and self.__dict__[name] != value:
            raise ValueError(
                f"{name} of {type(self).__name__} is {self.__dict__[name]!r} and cannot become {value!r}, as its "
                "parameters have their shapes by it: build a new module of that size"
            )
        else:
            super().__setattr__(name, value)


class FixedShapes(CheckedModule):
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
