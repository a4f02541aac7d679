"""Memory from the system: huge pages for what stays, and no giving back of what each step takes anew."""

from __future__ import annotations

import ctypes
import math
import mmap

import torch

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros of ``shape``, taken from the system page by page as they are first written to.

    A step reads more of weights and cache than small pages are looked up fast for.
    """
    pages = mapped(max(1, math.prod(shape) * dtype.itemsize))
    return torch.frombuffer(pages, dtype=dtype, count=math.prod(shape)).view(shape)


def mapped(size: int) -> mmap.mmap:
    """``size`` bytes of zeros, in huge pages where the system has them."""
    pages = mmap.mmap(-1, size)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, in this process from now on, where it can.

    A step's tensors are as large as those of the step before. Given back to the system in between, their
    pages are faulted in and zeroed again: a tenth of a step's time.
    """
    try:
        tune = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    tune(_M_MMAP_THRESHOLD, 1 << 30)
    tune(_M_TRIM_THRESHOLD, 1 << 30)
