"""Memory of a call's large tensors, which Linux is asked to map by huge pages.

A new page of 4 KB costs about two microseconds, so that the gradients of a layer's weights cost a third of a training
step before anything is computed. A huge page is 512 of them at once. The kernel gives them to memory that is advised so
(`madvise(2)`, where `/sys/kernel/mm/transparent_hugepage/enabled` is not `never`), as NumPy does for its large arrays.
"""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

LEAST = 4 << 20  # bytes: in less there need not be a whole huge page
_madvise = ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_HUGEPAGE") else None  # Linux alone has it


def in_huge_pages(tensor: Tensor) -> Tensor:
    """The tensor, whose memory is to be mapped by huge pages when it is first written to, if it is large."""
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    if _madvise is not None and size >= LEAST:
        begin = storage.data_ptr()
        page = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        _madvise(ctypes.c_void_p(page), ctypes.c_size_t(begin + size - page), mmap.MADV_HUGEPAGE)  # may be refused
    return tensor
