"""The operators on CPUs: our C++ kernels, and matrix products through oneDNN with packed weights."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from batchinfer.kernels.cpu.build import Level, cpu_flags
from batchinfer.kernels.cpu.library import (
    TYPES,
    Activation,
    Attention,
    Batch,
    Cache,
    Library,
    Norm,
    Rotary,
)
from batchinfer.kernels.cpu.onednn import Int8Linear, Linear
from batchinfer.kernels.cpu.pages import huge_pages, keep_freed_memory
from batchinfer.kernels.cpu.panels import PanelInt8Linear, PanelLinear
from batchinfer.kernels.cpu.recording import Calls, Recording, Unrecordable
from batchinfer.kernels.ops import AttentionBatch, KVCache, KVSpec, LayersWork, PackedLinear

# The tokens of a block, BLOCK in cache.h.
_BLOCK = 32

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


@dataclass(frozen=True, slots=True)
class CPUKVCache:
    """Keys and values of all layers, in the layout of cache.h: one flat tensor."""

    spec: KVSpec
    block_size: int
    num_blocks: int
    data: torch.Tensor
    _view: Cache


class Schedule:
    """What attention computes in one step, worked out once for all its layers."""

    def __init__(self, library: Library, batch: AttentionBatch, group: int) -> None:
        self.batch, self.group = batch, group
        sequences, _held = Batch.of(batch, group)
        self.address: int = library.make_schedule(ctypes.byref(sequences))
        self._library = library

    @property
    def split_reads(self) -> int:
        """How many splits of 128 tokens a KV head reads: fewer where sequences share them."""
        return int(self._library.split_reads(self.address))

    def __del__(self) -> None:
        self._library.free_schedule(self.address)


class CPUOperators:
    """See :class:`~batchinfer.kernels.ops.Operators` for the contract of every method.

    One step runs at a time: the schedule of the last batch is kept for the layers that follow.
    """

    name = "cpu"

    def __init__(self, level: Level | None = None) -> None:
        self._library = Library(level)
        keep_freed_memory()
        self._schedule: Schedule | None = None
        self._calls: Calls | None = None
        # oneDNN multiplies in the tiles of a CPU that has them, at several times the vectors' rate.
        own, flags = bool(self._library.multiplies()), cpu_flags()
        self._own_bf16, self._own_int8 = own and "amx_bf16" not in flags, own and "amx_int8" not in flags

    def block_size(self, spec: KVSpec) -> int:
        """32 tokens a block."""
        return _BLOCK

    def block_bytes(self, spec: KVSpec) -> int:
        """Bytes of one block over all layers; head sizes are padded to a multiple of 16.

        In int8 each token's key and value of a head have a scale of 4 bytes beside.
        """
        token = -(-spec.head_size // 16) * 16 * spec.dtype.itemsize + (4 if spec.dtype == torch.int8 else 0)
        return 2 * spec.num_layers * spec.num_kv_heads * token * _BLOCK

    def allocate_kv(self, spec: KVSpec, num_blocks: int, device: torch.device) -> CPUKVCache:
        """Zeroed blocks, which take memory as they are first written to: pages of a new mapping.

        Raises ValueError for a dtype or a head size that they can't hold.
        """
        if spec.dtype not in TYPES:
            raise ValueError(
                f"The cpu operators keep no KV cache of {spec.dtype}: choose kv_dtype auto, bf16 or int8; "
                "fp8 is for GPUs."
            )
        if spec.head_size % 2 or spec.head_size > 1024:
            raise ValueError(
                f"The cpu operators need an even head size up to 1024, not {spec.head_size}: "
                "choose operators reference."
            )
        data = huge_pages((num_blocks * self.block_bytes(spec) // spec.dtype.itemsize,), spec.dtype)
        view = Cache(
            data.data_ptr(),
            num_blocks,
            spec.num_layers,
            spec.num_kv_heads,
            spec.head_size,
            TYPES[spec.dtype],
        )
        return CPUKVCache(spec, _BLOCK, num_blocks, data, view)

    def pack_linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None, quantize: str | None
    ) -> PanelLinear | PanelInt8Linear | Linear | Int8Linear:
        """A packed copy; fp16, which few CPUs multiply, is kept in fp32.

        ``quantize`` "int8" rounds each row of the weight to 8 bits. ``linear`` then rounds its input
        too: our own product each 64 numbers of a row, turned, oneDNN's each row (rotated.h and
        quantize.cpp). Raises ValueError for another ``quantize``.
        """
        in_features = weight.shape[1]
        if quantize == "int8":
            if self._own_int8:
                return PanelInt8Linear.pack(self._library, weight, bias)
            return Int8Linear.pack(self._library, weight, bias)
        if quantize is not None:
            raise ValueError(
                f"The cpu operators can't quantize weights to {quantize}: choose quantize int8; "
                "int4 and fp8 are for GPUs."
            )
        if self._own_bf16 and weight.dtype == torch.bfloat16 and in_features % 2 == 0:
            return PanelLinear.pack(self._library, weight, bias)
        return Linear.pack(weight, bias)

    def linear(self, x: torch.Tensor, weight: PackedLinear) -> torch.Tensor:
        """[T, in] -> [T, out]."""
        if isinstance(weight, PanelLinear | PanelInt8Linear):
            return self._multiply(x, weight, None, x.dtype)
        assert isinstance(weight, Linear | Int8Linear)
        if self._calls is not None:
            raise Unrecordable
        return weight.apply(x)

    def gated_linear(self, x: torch.Tensor, weight: PackedLinear, kind: str) -> torch.Tensor:
        """[T, in] -> [T, out / 2], the activation in the product's own pass where that is ours."""
        if isinstance(weight, PanelLinear | PanelInt8Linear) and weight.gates and kind in _ACTIVATIONS:
            return self._multiply(x, weight, kind, x.dtype)
        return self.gated_activation(self.linear(x, weight), kind)

    def logits(self, x: torch.Tensor, weight: PackedLinear) -> torch.Tensor:
        """[n, in] -> fp32 [n, out], the sums of our own products as they are."""
        if isinstance(weight, PanelLinear | PanelInt8Linear):
            return self._multiply(x, weight, None, torch.float32)
        return self.linear(x, weight).float()

    def best_logits(
        self, x: torch.Tensor, weight: PackedLinear
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See :class:`~batchinfer.kernels.ops.BestLogitsOperator`; of our own products."""
        if not isinstance(weight, PanelLinear | PanelInt8Linear):
            return None
        x, rows = x.contiguous(), x.shape[0]
        tokens, values = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
        scratch = torch.empty(weight.scratch_bytes(rows), dtype=torch.uint8)
        call = weight.call(x, values, scratch, None)
        weight.choice(ctypes.byref(call), tokens.data_ptr(), values.data_ptr())
        return tokens, values

    def _multiply(
        self, x: torch.Tensor, weight: PanelLinear | PanelInt8Linear, kind: str | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """[T, in] -> [T, out] of ``dtype``; with the activation ``kind``, gated: [T, out / 2]."""
        x, rows = x.contiguous(), x.shape[0]
        out = self._empty((rows, weight.out_features // (1 if kind is None else 2)), dtype)
        scratch = self._empty((weight.scratch_bytes(rows),), torch.uint8)
        self._do(weight.kernel, weight.call(x, out, scratch, kind))
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Over the last dimension, in fp32 inside."""
        x = x.contiguous()
        out = self._empty(x.shape, x.dtype)
        self._norm(x, None, weight, out, eps)
        return out

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(normed, sum), written over the arguments."""
        x, residual = x.contiguous(), residual.contiguous()
        self._norm(x, residual, weight, x, eps)
        return x, residual

    def _norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        out: torch.Tensor,
        eps: float,
    ) -> None:
        size = x.shape[-1]
        call = Norm(
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            x.numel() // size,
            size,
            eps,
            TYPES[x.dtype],
            torch.get_num_threads(),
        )
        self._do(self._library.rms_norm, call)

    def rotary_and_store(
        self,
        qkv: torch.Tensor,
        cos_sin: torch.Tensor,
        batch: AttentionBatch,
        kv: KVCache,
        layer: int,
        num_heads: int,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        """Returns the rotated queries [T, Hq, D]; keys and values go to the cache."""
        assert isinstance(kv, CPUKVCache)
        qkv = qkv.contiguous()
        tokens = qkv.shape[0]
        q = self._empty((tokens, num_heads, kv.spec.head_size), qkv.dtype)
        call = Rotary(
            qkv.data_ptr(),
            q.data_ptr(),
            ctypes.addressof(kv._view),
            cos_sin.data_ptr(),
            batch.positions.data_ptr(),
            batch.slots.data_ptr(),
            None if q_norm is None else q_norm.data_ptr(),
            None if k_norm is None else k_norm.data_ptr(),
            tokens,
            cos_sin.shape[1],
            num_heads,
            layer,
            eps,
            TYPES[qkv.dtype],
            torch.get_num_threads(),
        )
        self._do(self._library.rotary_and_store, call)
        return q

    def attention(
        self,
        q: torch.Tensor,
        kv: KVCache,
        layer: int,
        batch: AttentionBatch,
        scale: float,
        window: int,
        soft_cap: float,
    ) -> torch.Tensor:
        """[T, Hq, D] -> [T, Hq * D]; blocks that sequences share are read once for all of them."""
        assert isinstance(kv, CPUKVCache)
        q = q.contiguous()
        tokens, num_heads, head_size = q.shape
        out = self._empty((tokens, num_heads * head_size), q.dtype)
        group = num_heads // kv.spec.num_kv_heads
        call = Attention(
            q.data_ptr(),
            out.data_ptr(),
            ctypes.addressof(kv._view),
            None if self._calls is not None else self.schedule(batch, group).address,
            scale,
            soft_cap,
            TYPES[q.dtype],
            layer,
            num_heads,
            window,
            torch.get_num_threads(),
        )
        self._do(self._library.attention, call)
        return out

    def schedule(self, batch: AttentionBatch, group: int) -> Schedule:
        """The schedule of ``batch`` for ``group`` query heads a KV head: made for its first layer."""
        known = self._schedule
        if known is None or known.batch is not batch or known.group != group:
            known = self._schedule = Schedule(self._library, batch, group)
        return known

    def gated_activation(self, gate_up: torch.Tensor, kind: str) -> torch.Tensor:
        """[T, 2 * I] -> [T, I]. Raises ValueError for an activation that is neither silu nor gelu_tanh."""
        if kind not in _ACTIVATIONS:
            raise ValueError(f"Unknown activation {kind!r}.")
        gate_up = gate_up.contiguous()
        rows, width = gate_up.shape
        out = self._empty((rows, width // 2), gate_up.dtype)
        call = Activation(
            gate_up.data_ptr(),
            out.data_ptr(),
            rows,
            width // 2,
            _ACTIVATIONS[kind],
            TYPES[gate_up.dtype],
            torch.get_num_threads(),
        )
        self._do(self._library.gated_activation, call)
        return out

    def sample(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        keys: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """[S, V] -> int64 [S]."""
        logits, keys = logits.contiguous(), keys.contiguous()
        tokens = torch.empty(len(logits), dtype=torch.int64)
        self._library.sample(
            logits.data_ptr(),
            temperature.data_ptr(),
            keys.data_ptr(),
            positions.data_ptr(),
            tokens.data_ptr(),
            len(logits),
            logits.shape[1],
            torch.get_num_threads(),
        )
        return tokens

    def recorded(self, work: LayersWork) -> LayersWork:
        """See :class:`~batchinfer.kernels.ops.RecordingOperators`."""
        return Recording(self._library, self.recording, work)

    @contextmanager
    def recording(self, calls: Calls) -> Iterator[None]:
        """Write kernels' calls down in ``calls`` instead of making them."""
        self._calls = calls
        try:
            yield
        finally:
            self._calls = None

    def _do(self, kernel: Any, call: ctypes.Structure) -> None:
        if self._calls is None:
            kernel(ctypes.byref(call), None)
        else:
            self._calls.add(kernel, call)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if self._calls is None:
            return torch.empty(shape, dtype=dtype)
        return self._calls.arena.empty(shape, dtype)


def load(level: Level | None = None) -> CPUOperators:
    """The operators, built at first use. Raises KernelsUnavailable, saying why they can't work here."""
    return CPUOperators(level)
