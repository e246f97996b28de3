"""Runs self-checks of kernels in this process, where tests plant faults that a new process would not have."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mixture_of_experts.kernels.check_process import Verdict, find_verdict


def run_here(device: torch.device, find_fault: Callable[[], str | None]) -> Verdict:
    """Replace `check_process.run_in_process`. As there, random numbers and modes of the caller do not change."""
    with torch.random.fork_rng([]), torch.inference_mode(False), torch.enable_grad():
        return find_verdict(find_fault)
