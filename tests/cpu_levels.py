"""What the tests of the CPU kernels run over: this CPU's levels, element types, numbers of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from batchinfer.kernels.cpu import build

LEVELS = build.levels(build.cpu_flags())
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the kernels with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
