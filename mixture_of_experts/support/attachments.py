"""Manages hooks and attributes that are set on modules within a context and removed on exit.

Copies and pickles of the modules do not contain these hooks and attributes, even if they are created while the context
is active.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

ATTACHMENT_LOCK = threading.Lock()
#: attributes in which a module stores its hooks, keyed by handle id
HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


#: attributes that are set on a module while something is attached to it
INSTANCE_OVERRIDES = ("__getstate__", "__deepcopy__")
#: marks an attribute that is not set on the module itself
MISSING = object()


class Attachments(ExitStack):
    """A collection of hooks and attributes that are temporarily set on modules. The hooks and attributes are removed by
    `close()` or at the end of a `with` block.

    Other threads may run the modules at the same time. While a hook is being set or removed, torch may call it without
    the keyword arguments that it requested. Hooks must therefore have defaults for these arguments, and must do nothing
    if they are missing.
    """

    def add_forward_pre_hook(self, module: nn.Module, hook: Callable[..., Any], *, prepend: bool = False) -> None:
        """Register a forward pre-hook with the signature `(module, args, kwargs=None)`."""
        self._register_handle(module, module.register_forward_pre_hook(hook, prepend=prepend, with_kwargs=True))

    def add_forward_hook(self, module: nn.Module, hook: Callable[..., Any], **settings: bool) -> None:
        """Register a forward hook, and pass the given options to `register_forward_hook`."""
        self._register_handle(module, module.register_forward_hook(hook, **settings))

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of a module. If several contexts set the same attribute, the last context entered takes
        precedence. The contexts may exit in any order."""
        with ATTACHMENT_LOCK:
            own, before = name in vars(module), getattr(module, name, MISSING)
            setattr(module, name, value)  # this raises an error if the value is invalid
            # MISSING if only the class defines the attribute
            before = before if own or name not in vars(module) else MISSING
            get_detached_state(module).attribute_values.setdefault(name, [(None, before)]).append((self, value))
        self.callback(self._restore_attribute, module, name)

    def _register_handle(self, module: nn.Module, handle: Any) -> None:
        with ATTACHMENT_LOCK:
            get_detached_state(module).hook_ids.add(handle.id)
        self.callback(self._remove_handle, module, handle)

    def _remove_handle(self, module: nn.Module, handle: Any) -> None:
        handle.remove()
        with ATTACHMENT_LOCK:
            state = get_detached_state(module)
            state.hook_ids.discard(handle.id)
            state.remove_if_empty()

    def _restore_attribute(self, module: nn.Module, name: str) -> None:
        with ATTACHMENT_LOCK:
            state = get_detached_state(module)
            last, held = state.attribute_values[name][-1]
            values = [(owner, value) for owner, value in state.attribute_values[name] if owner is not self]
            if last is self and getattr(module, name, MISSING) is held:  # the attribute has not been overwritten since
                if values[-1][1] is MISSING:
                    delattr(module, name)
                else:
                    setattr(module, name, values[-1][1])
            if len(values) > 1:
                state.attribute_values[name] = values
            else:
                del state.attribute_values[name]
            state.remove_if_empty()


class DetachedState:
    """A temporary `__getstate__` for a module with attachments, which returns the module's state without the
    attachments.

    Copying and pickling call `__getstate__`. `__getstate__` is set on the module itself, so the module's class does not
    change. If the class defines `__deepcopy__`, as parametrized modules do, that method is called with a substitute
    object that contains the module's state without the attachments.
    """

    hook_ids: set[int]
    attribute_values: dict[str, list[tuple[Attachments | None, Any]]]

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.hook_ids = set()  # handle ids of attached hooks
        # values of each attribute: the module's own value, followed by the values set by contexts
        self.attribute_values = {}

    def __call__(self) -> dict[str, Any]:
        # before Python 3.11, not all classes define `__getstate__`
        of_class = getattr(type(self.module), "__getstate__", None)
        return self.strip_attachments(self.module.__dict__ if of_class is None else of_class(self.module))

    def strip_attachments(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of a module's state without attachments."""
        state = {name: value for name, value in state.items() if name not in INSTANCE_OVERRIDES}
        for table in HOOK_TABLES:
            if table in state:
                kept = [(key, value) for key, value in state[table].items() if key not in self.hook_ids]
                state[table] = type(state[table])(kept)
        state |= {name: values[0][1] for name, values in self.attribute_values.items() if name in state}
        return {name: value for name, value in state.items() if value is not MISSING}

    def deepcopy(self, memo: dict[int, Any]) -> Any:
        """Implement `__deepcopy__` for a module whose class defines it."""
        shadow = memo.get(id(self))
        if shadow is None:
            shadow = memo[id(self)] = object.__new__(type(self.module))  # the memo keeps `shadow` alive
            shadow.__dict__ = self.strip_attachments(self.module.__dict__)
            memo[id(self.module)] = type(self.module).__deepcopy__(shadow, memo)  # type: ignore[attr-defined]
        return memo[id(shadow)]  # a recursive call returns the copy under construction

    def remove_if_empty(self) -> None:
        if not self.hook_ids and not self.attribute_values:
            for name in INSTANCE_OVERRIDES:
                self.module.__dict__.pop(name, None)


def get_detached_state(module: nn.Module) -> DetachedState:
    state = module.__dict__.get("__getstate__")
    if not isinstance(state, DetachedState):
        state = module.__dict__["__getstate__"] = DetachedState(module)
        if hasattr(type(module), "__deepcopy__"):
            module.__dict__["__deepcopy__"] = state.deepcopy
    return state
