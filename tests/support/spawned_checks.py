"""Checks in a process of their own, where something is done before torch and the kernels are imported."""

from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

Checks = Callable[..., Any]


@contextmanager
def spawn_checks(load: Callable[[], None], module: str) -> Iterator[Checks]:
    """Runs functions of a module of `support`, or of the one before a dot in their names, after `load`."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=load) as process:
        yield lambda name, *args, **kwargs: process.submit(run_check, module, name, args, kwargs).result(timeout=600)


def run_check(module: str, name: str, args: Any, kwargs: Any) -> Any:
    other, _, function = name.rpartition(".")
    return getattr(importlib.import_module(f"support.{other or module}"), function)(*args, **kwargs)
