"""A process in which Triton's kernels run on CPU tensors, by its interpreter.

There `load` has run before the kernels were imported. Fresh memory is NaN (of integers the largest), so that what a
kernel leaves unwritten is seen.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os


def unsupported_reason() -> str | None:
    """Why there can be no interpreter here; None if there can."""
    if not importlib.util.find_spec("triton"):
        return "triton is not installed"
    version = importlib.metadata.version("triton")
    if tuple(map(int, version.split(".")[:2])) < (3, 7):
        return f"the interpreter of Triton {version} reads numbers in a way that NumPy has given up"
    return None


def load_interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are made
    patch_interpreter()
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # which fills fresh memory


def patch_interpreter() -> None:
    """Let `tl.dot` multiply bfloat16 numbers: the interpreter multiplies their bits as integers (seen in Triton 3.7.1
    and 3.9.0). It also truncates float32 to bfloat16 where hardware rounds: allow twice the rounding."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def value(handle):
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data.astype(np.float32) if handle.dtype.scalar == tl.float16 else handle.data

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(value(a), value(b), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
