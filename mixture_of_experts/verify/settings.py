"""Reads and restores process-wide and thread-local settings that a forward pass must not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def read_settings() -> dict[str, Any]:
    """Return the current settings, keyed by name."""
    return {
        "the grad mode": torch.is_grad_enabled(),
        "the inference mode": torch.is_inference_mode_enabled(),
        "the default dtype": torch.get_default_dtype(),
        "the default device": torch.get_default_device(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "the number of threads": torch.get_num_threads(),
    }


@contextmanager
def preserve_settings() -> Iterator[None]:
    """Context manager that undoes lasting changes to process-wide and thread-local settings, including the grad mode,
    on exit."""
    before, dtype = read_settings(), torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != before["the default device"]:
            torch.set_default_device(before["the default device"])
        torch.set_grad_enabled(before["the grad mode"])
        torch.set_autocast_enabled("cpu", before["autocast"])
        torch.use_deterministic_algorithms(before["deterministic algorithms"])
        if torch.get_num_threads() != before["the number of threads"]:
            torch.set_num_threads(before["the number of threads"])
