"""The checks shared by the gates' kernels: which tensors they support, and whether their results equal those of torch's
operators."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mixture_of_experts.kernels.launching import can_launch_kernels
from mixture_of_experts.support.private_torch import is_wrapper_subclass

TOLERANCE = 1e-3  # maximum relative difference between the results of a kernel and those of torch's operators
NO_KERNEL = "the gates' kernels support only plain tensors on NVIDIA GPUs, and do not support float64"


def has_kernel(x: Tensor, *weights: Tensor) -> bool:
    """Return whether the gates' kernels support these tensors, which must be plain tensors on a single device and not
    float64."""
    tensors = (x, *weights)
    return can_launch_kernels(x.device) and not any(t.dtype == torch.float64 or is_wrapper_subclass(t) for t in tensors)


def describe_difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], atol: float) -> str | None:
    """Return a description of how a kernel's results differ from those of torch's operators, or None if they agree.

    One token is allowed to choose different experts, because its scores may be equal up to rounding.
    """
    for name, want in wanted.items():
        differ = torch.isclose(found[name], want, rtol=TOLERANCE, atol=atol, equal_nan=True).logical_not().sum()
        if differ > (want.shape[-1] if want.ndim and name != "probabilities" else 0):
            return f"their {name} differ from those of torch's operators"
    return None
