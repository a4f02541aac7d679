"""Kernel calls that are laid out once and made again for every step, all in one go.

While operators record they compute nothing: they write down each kernel and its call, and hand out tensors
for its results. Made again for a step's rows, the calls go to threads that pass from kernel to kernel
without coming back to Python (program.cpp).
"""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from batchinfer.kernels.cpu.library import Attention, Batch, Library, Pass, Product, Program, Step
from batchinfer.kernels.cpu.pages import mapped
from batchinfer.kernels.ops import AttentionBatch, KVCache, LayersWork

_LEAST_CAPACITY = 64


class Unrecordable(Exception):
    """What is called is not a kernel of ours."""


class Arena:
    """Memory for a recording's tensors: what nobody holds any more is given out again.

    So two calls share it only if the first one's result is done with before the second is made. Both
    tensors are of one size and have all rows, so a row lies at the same place in both: rows that are
    further on in the recording than others don't write over theirs.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[mmap.mmap]] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor whose memory is taken as long as it or a view of it lives."""
        size = math.prod(shape) * dtype.itemsize
        free = self._free.setdefault(size, [])
        pages = free.pop() if free else mapped(max(1, size))
        view = memoryview(pages)
        weakref.finalize(view, free.append, pages)
        return torch.frombuffer(view, dtype=torch.uint8)[:size].view(dtype).view(shape)


@dataclass(frozen=True, slots=True)
class Calls:
    """What is written down while operators record: each kernel with a copy of its call."""

    arena: Arena = field(default_factory=Arena)
    steps: list[tuple[Any, Any]] = field(default_factory=list)

    def add(self, kernel: Any, call: ctypes.Structure) -> None:
        """One more."""
        self.steps.append((kernel, type(call).from_buffer_copy(call)))


class Recording:
    """``work``, recorded at its first call and whenever there are more rows than ever before.

    See :class:`~batchinfer.kernels.ops.RecordingOperators`.
    """

    def __init__(
        self,
        library: Library,
        recording: Callable[[Calls], AbstractContextManager[None]],
        work: LayersWork,
    ) -> None:
        """``recording`` is in which operators write calls down and compute nothing."""
        self._library = library
        self._recording = recording
        self._work = work
        self._recorded: _Recorded | None = None
        self._capacity = 0
        self._recordable = True

    def __call__(
        self, normed: torch.Tensor, residual: torch.Tensor, batch: AttentionBatch, kv: KVCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What ``work`` returns, by the calls recorded or, where it can't be recorded, by itself."""
        recorded, rows = self._recorded, len(normed)
        if self._recordable and (recorded is None or not recorded.takes(rows, kv)):
            # The memory of the one before is free before this one takes its own.
            self._recorded = recorded = None
            if rows > self._capacity:
                self._capacity = max(rows, 2 * self._capacity, _LEAST_CAPACITY)
            try:
                self._recorded = recorded = self._record(normed, batch, kv)
            except Unrecordable:
                self._recordable = False
        if recorded is None:
            return self._work(normed, residual, batch, kv)
        for given, place in zip((normed, residual), recorded.inputs, strict=True):
            place[:rows] = given
        recorded.run(self._library, batch)
        return recorded.results[0][:rows].clone(), recorded.results[1][:rows].clone()

    def _record(self, like: torch.Tensor, batch: AttentionBatch, kv: KVCache) -> _Recorded:
        calls, shape = Calls(), (self._capacity, like.shape[1])
        inputs = calls.arena.empty(shape, like.dtype), calls.arena.empty(shape, like.dtype)
        with self._recording(calls):
            results = self._work(*inputs, batch=batch, kv=kv)
        attentions = [i for i, (_, call) in enumerate(calls.steps) if isinstance(call, Attention)]
        steps = [
            Step(ctypes.cast(kernel, ctypes.c_void_p), ctypes.addressof(call))
            for kernel, call in calls.steps
        ]
        products = [call for _, call in calls.steps if isinstance(call, Product)]
        spec, made = kv.spec, (Step * len(steps))(*steps)
        stretches = torch.tensor([0, *attentions, len(steps)])
        return _Recorded(
            capacity=self._capacity,
            kv=kv,
            group=max((calls.steps[i][1].num_heads for i in attentions), default=0) // spec.num_kv_heads,
            calls=calls,
            steps=made,
            stretches=stretches,
            program=Program(
                steps=ctypes.addressof(made),
                stretches=stretches.data_ptr(),
                num_stretches=len(attentions) + 1,
                row_operations=sum(2 * call.in_features * call.out_features for call in products),
                token_bytes=2 * len(attentions) * spec.num_kv_heads * spec.head_size * spec.dtype.itemsize,
            ),
            inputs=inputs,
            results=results,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recorded:
    """The calls for up to ``capacity`` rows; ``inputs`` and ``results`` are [capacity, H].

    ``stretches`` int64: before which calls a band of rows may have to wait for others, which is where
    they read the cache; ``group`` query heads share a KV head.
    """

    capacity: int
    kv: KVCache
    group: int
    calls: Calls
    steps: ctypes.Array[Step]
    stretches: torch.Tensor
    program: Program
    inputs: tuple[torch.Tensor, torch.Tensor]
    results: tuple[torch.Tensor, torch.Tensor]

    def takes(self, rows: int, kv: KVCache) -> bool:
        """Whether the calls can be made for so many rows and with this cache."""
        return rows <= self.capacity and kv is self.kv

    def run(self, library: Library, batch: AttentionBatch) -> None:
        """Make all calls for the tokens of ``batch``."""
        sequences, _held = Batch.of(batch, self.group)
        rows = Pass(sequences, batch.positions.data_ptr(), batch.slots.data_ptr(), torch.get_num_threads())
        library.run(ctypes.byref(self.program), ctypes.byref(rows))
