"""Defines modules whose attributes are checked whenever they are set, both during construction and later."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn


class _CheckedSetting(NamedTuple):
    check: Callable[[str, Any], Any]


def checked_setting(check: Callable[..., Any], **bounds: Any) -> Any:
    """Declare a checked attribute of a `CheckedModule`. Setting the attribute stores the result of
    `check(name, value, **bounds)`."""
    return _CheckedSetting(partial(check, **bounds))


class CheckedModule(nn.Module):
    """A module that checks its settings whenever they are set and does not allow its sizes to change."""

    #: attributes that determine parameter shapes and can be set only once
    shape_attributes: ClassVar[tuple[str, ...]] = ()
    _settings: ClassVar[dict[str, _CheckedSetting]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = {name: value for name, value in vars(cls).items() if isinstance(value, _CheckedSetting)}
        inherited = (base.__dict__.get("_settings", {}) for base in reversed(cls.__mro__[1:]))
        cls._settings = {name: value for settings in (*inherited, own) for name, value in settings.items()}
        for name in own:  # until attributes are set, reading them must raise AttributeError
            delattr(cls, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._settings:
            self.__dict__[name] = self._settings[name].check(name, value)
        elif isinstance(value, nn.Module | nn.Parameter) and hasattr(getattr(type(self), name, None), "__set__"):
            object.__setattr__(self, name, value)  # torch would register the value without calling the property
        elif name in self.shape_attributes and name in self.__dict__ and self.__dict__[name] != value:
            raise ValueError(
                f"cannot change {name} of {type(self).__name__} from {self.__dict__[name]!r} to {value!r}, because it "
                "determines the shapes of parameters; construct a new module of that size"
            )
        else:
            super().__setattr__(name, value)


class FixedShapeModule(CheckedModule):
    """A module whose parameters can only be replaced with parameters of the same shape.

    Replacing parameters to prune or add experts would not update the module's sizes, from which the capacity is
    computed. Casting, sharding, parametrizing and loading parameters are supported, because these operations preserve
    shapes or do not set attributes.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        old = self.__dict__.get("_parameters", {}).get(name)
        if isinstance(old, Tensor) and isinstance(value, Tensor) and value.shape != old.shape:
            raise ValueError(
                f"{name} of {type(self).__name__} must keep its shape {tuple(old.shape)}, got {tuple(value.shape)}. To "
                "change the number of experts, construct a new module of that size, copy the remaining weights, and "
                "pass both gate and experts to a new layer"
            )
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """Return the constructor arguments and settings that differ from their defaults. Modules are omitted, because
        they are shown as children."""
        defaults: dict[str, Any] = {}
        for cls in reversed(type(self).__mro__):  # the base class closest to the root defines the default
            for name, parameter in inspect.signature(cls.__init__).parameters.items():
                defaults.setdefault(name, parameter.default)
        for name in self._settings:
            defaults.setdefault(name, None)
        shown = []
        for name, default in defaults.items():
            value = None if isinstance(getattr(type(self), name, None), property) else getattr(self, name, None)
            value = True if isinstance(value, Tensor) else value  # the argument was passed as a flag
            if not (value is None or isinstance(value, nn.Module) or value == default):
                shown.append(f"{name}={getattr(value, '__qualname__', None) or repr(value)}")
        return ", ".join(shown)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # a state without "dim" comes from the class of this name in mixture-of-experts 0.2.3
        if "dim" not in state:
            raise ValueError(
                f"this {type(self).__name__} was pickled as a whole module by another package, mixture-of-experts "
                "0.2.3. Load the file with that package, save module.state_dict(), and load it here with "
                "load_state_dict, as shown in docs/migration.md"
            )
        super().__setstate__(state)
