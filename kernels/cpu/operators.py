"""The operators on CPUs: our C++ kernels, and matrix products through oneDNN with packed weights."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass
from typing import Any

import torch

from batchinfer.kernels.cpu.build import Level, build, cpu_flags
from batchinfer.kernels.ops import AttentionBatch, KVCache, KVSpec, PackedLinear

# The tokens of a block, BLOCK in cache.h.
_BLOCK = 32

# The element types' codes in vector.h.
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


class _Cache(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int64),
        ("num_layers", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_size", ctypes.c_int32),
        ("type", ctypes.c_int32),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("query_starts", ctypes.c_void_p),
        ("context_lens", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("max_blocks", ctypes.c_int64),
        ("sequences", ctypes.c_int32),
        ("group", ctypes.c_int32),
    )


class _Rotary(ctypes.Structure):
    _fields_ = (
        ("cos_sin", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("rotated", ctypes.c_int64),
        ("num_heads", ctypes.c_int32),
        ("layer", ctypes.c_int32),
        ("eps", ctypes.c_float),
    )


class _Attention(ctypes.Structure):
    _fields_ = (
        ("q", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("kv", ctypes.POINTER(_Cache)),
        ("schedule", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("type", ctypes.c_int32),
        ("layer", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


_Address, _Int, _Long, _Float = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_CacheAt = ctypes.POINTER(_Cache)

# Result and arguments of each function, as its C++ source declares them.
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "make_schedule": (_Address, (ctypes.POINTER(_Batch),)),
    "free_schedule": (None, (_Address,)),
    "split_reads": (_Long, (_Address,)),
    "attention": (None, (ctypes.POINTER(_Attention),)),
    "rotary_and_store": (None, (_Int, _Address, _Address, ctypes.POINTER(_Rotary), _CacheAt, _Int)),
    "rms_norm": (None, (_Int, *[_Address] * 5, _Long, _Long, _Float, _Int)),
    "gated_activation": (None, (_Int, _Address, _Address, _Long, _Long, _Int, _Int)),
    "most_rests": (_Long, (_Long,)),
    "quantize_rows": (None, (_Int, *[_Address] * 5, _Long, _Long, _Int, _Int)),
    "finish_rows": (None, (_Int, *[_Address] * 8, _Long, _Long, _Long, _Int)),
    "sample": (None, (*[_Address] * 5, _Long, _Long, _Int)),
}


class _Library:
    """The kernels' functions, by their C names less the prefix."""

    def __init__(self, level: Level | None) -> None:
        library = build(level)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, f"batchinfer_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


@dataclass(frozen=True, slots=True)
class CPUKVCache:
    """Keys and values of all layers, in the layout of cache.h: one flat tensor."""

    spec: KVSpec
    block_size: int
    num_blocks: int
    data: torch.Tensor
    _view: _Cache


@dataclass(frozen=True, slots=True)
class CPULinear:
    """A weight packed by oneDNN (``packed``) or as it is; computed in ``dtype``."""

    out_features: int
    in_features: int
    weight: torch.Tensor
    bias: torch.Tensor | None
    dtype: torch.dtype
    packed: bool


@dataclass(frozen=True, slots=True)
class Int8Linear:
    """A weight in int8 with a scale for each output channel.

    ``packed`` by oneDNN, and ``columns`` int8 [in, out] for the few inputs that stand out; ``scales``
    fp32 [out], ``zeros`` int32 [out], ``bias`` fp32 [out]; ``rests`` is how many inputs of a row can
    stand out.
    """

    out_features: int
    in_features: int
    packed: torch.Tensor
    columns: torch.Tensor
    rests: int
    scales: torch.Tensor
    zeros: torch.Tensor
    bias: torch.Tensor | None


class Schedule:
    """What attention computes in one step, worked out once for all its layers."""

    def __init__(self, library: _Library, batch: AttentionBatch, group: int) -> None:
        starts, contexts = batch.query_starts.contiguous(), batch.context_lens.contiguous()
        tables = batch.block_tables.contiguous()
        view = _Batch(
            starts.data_ptr(),
            contexts.data_ptr(),
            tables.data_ptr(),
            tables.shape[1],
            len(contexts),
            group,
        )
        self.batch, self.group = batch, group
        self.address: int = library.make_schedule(ctypes.byref(view))
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
        self._library = _Library(level)
        # Without VNNI a product of bytes adds pairs in 16 bits, which 7-bit activations can't overflow.
        self._byte_limit = 127 if cpu_flags() & {"avx512_vnni", "avx_vnni"} else 63
        self._schedule: Schedule | None = None

    def block_size(self, spec: KVSpec) -> int:
        """32 tokens a block."""
        return _BLOCK

    def block_bytes(self, spec: KVSpec) -> int:
        """Bytes of one block over all layers; head sizes are padded to a multiple of 16."""
        padded = -(-spec.head_size // 16) * 16
        return 2 * spec.num_layers * spec.num_kv_heads * padded * spec.dtype.itemsize * _BLOCK

    def allocate_kv(self, spec: KVSpec, num_blocks: int, device: torch.device) -> CPUKVCache:
        """Zeroed blocks, which take memory as they are first written to: pages of a new mapping.

        Raises ValueError for a dtype that they can't hold.
        """
        if spec.dtype not in _TYPES:
            raise ValueError(f"The cpu operators keep no KV cache of {spec.dtype}.")
        if spec.head_size % 2 or spec.head_size > 1024:
            raise ValueError(f"The cpu operators need an even head size up to 1024, not {spec.head_size}.")
        # Pages of the system's are zero at their first use, where torch.zeros would write them all now.
        # Huge ones, since a step's blocks lie scattered over more small pages than are looked up fast.
        pages = mmap.mmap(-1, num_blocks * self.block_bytes(spec))
        pages.madvise(mmap.MADV_HUGEPAGE)
        data = torch.frombuffer(pages, dtype=spec.dtype)
        view = _Cache(
            data.data_ptr(),
            num_blocks,
            spec.num_layers,
            spec.num_kv_heads,
            spec.head_size,
            _TYPES[spec.dtype],
        )
        return CPUKVCache(spec, _BLOCK, num_blocks, data, view)

    def pack_linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None, quantize: str | None
    ) -> CPULinear | Int8Linear:
        """A packed copy; fp16, which few CPUs multiply, is kept in fp32.

        ``quantize`` "int8" rounds each row of the weight to 8 bits, and ``linear`` each row of its
        input. Raises ValueError for another one.
        """
        if quantize == "int8":
            return self._pack_int8(weight, bias)
        if quantize is not None:
            raise ValueError(f"the cpu operators quantize weights to int8, not to {quantize}.")
        out_features, in_features = weight.shape
        packed = bool(torch._C._has_mkldnn)
        if weight.dtype == torch.bfloat16:
            packed = packed and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        dtype = torch.float32 if weight.dtype == torch.float16 else weight.dtype
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        if packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        return CPULinear(out_features, in_features, weight, bias, dtype, packed)

    def linear(self, x: torch.Tensor, weight: PackedLinear) -> torch.Tensor:
        """[T, in] -> [T, out]."""
        if isinstance(weight, Int8Linear):
            return self._linear_int8(x, weight)
        assert isinstance(weight, CPULinear)
        y: torch.Tensor
        given = x.dtype
        if given != weight.dtype:
            x = x.to(weight.dtype)
        if weight.packed and len(x) > 0:
            y = torch.ops.mkldnn._linear_pointwise(x, weight.weight, weight.bias, "none", [], "")
        elif weight.packed:
            y = x.new_empty(0, weight.out_features)
        else:
            y = torch.nn.functional.linear(x, weight.weight, weight.bias)
        return y if y.dtype == given else y.to(given)

    def _pack_int8(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Int8Linear:
        wide = weight.float()
        scales = (wide.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        whole = (wide / scales[:, None]).round().to(torch.int8)
        return Int8Linear(
            weight.shape[0],
            weight.shape[1],
            torch.ops.onednn.qlinear_prepack(whole, None),
            whole.t().contiguous(),
            self._library.most_rests(weight.shape[1]),
            scales,
            torch.zeros(len(scales), dtype=torch.int32),
            None if bias is None else bias.float().contiguous(),
        )

    def _linear_int8(self, x: torch.Tensor, weight: Int8Linear) -> torch.Tensor:
        x = x.contiguous()
        rows, size = x.shape
        out = x.new_empty(rows, weight.out_features)
        if rows == 0:
            return out
        threads = torch.get_num_threads()
        whole = torch.empty(rows, size, dtype=torch.uint8)
        scales = torch.empty(rows)
        rests = torch.empty(rows, weight.rests, dtype=torch.int64)
        counts = torch.empty(rows, dtype=torch.int32)
        self._library.quantize_rows(
            _TYPES[x.dtype],
            x.data_ptr(),
            whole.data_ptr(),
            scales.data_ptr(),
            rests.data_ptr(),
            counts.data_ptr(),
            rows,
            size,
            self._byte_limit,
            threads,
        )
        product = torch.ops.onednn.qlinear_pointwise(
            whole,
            1.0,
            self._byte_limit + 1,
            weight.packed,
            weight.scales,
            weight.zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        self._library.finish_rows(
            _TYPES[x.dtype],
            product.data_ptr(),
            out.data_ptr(),
            scales.data_ptr(),
            rests.data_ptr(),
            counts.data_ptr(),
            weight.columns.data_ptr(),
            weight.scales.data_ptr(),
            None if weight.bias is None else weight.bias.data_ptr(),
            rows,
            weight.out_features,
            size,
            threads,
        )
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Over the last dimension, in fp32 inside."""
        x = x.contiguous()
        out = torch.empty_like(x)
        size = x.shape[-1]
        self._library.rms_norm(
            _TYPES[x.dtype],
            x.data_ptr(),
            None,
            weight.data_ptr(),
            out.data_ptr(),
            None,
            x.numel() // size,
            size,
            eps,
            torch.get_num_threads(),
        )
        return out

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(normed, sum)."""
        x, residual = x.contiguous(), residual.contiguous()
        out, total = torch.empty_like(x), torch.empty_like(x)
        size = x.shape[-1]
        self._library.rms_norm(
            _TYPES[x.dtype],
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            total.data_ptr(),
            x.numel() // size,
            size,
            eps,
            torch.get_num_threads(),
        )
        return out, total

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
        q = qkv.new_empty(len(qkv), num_heads, kv.spec.head_size)
        rotary = _Rotary(
            cos_sin.data_ptr(),
            batch.positions.data_ptr(),
            batch.slots.data_ptr(),
            None if q_norm is None else q_norm.data_ptr(),
            None if k_norm is None else k_norm.data_ptr(),
            len(qkv),
            cos_sin.shape[1],
            num_heads,
            layer,
            eps,
        )
        self._library.rotary_and_store(
            _TYPES[qkv.dtype],
            qkv.data_ptr(),
            q.data_ptr(),
            ctypes.byref(rotary),
            ctypes.byref(kv._view),
            torch.get_num_threads(),
        )
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
        out = q.new_empty(len(q), q.shape[1] * q.shape[2])
        call = _Attention(
            q.data_ptr(),
            out.data_ptr(),
            ctypes.pointer(kv._view),
            self.schedule(batch, q.shape[1] // kv.spec.num_kv_heads).address,
            scale,
            soft_cap,
            _TYPES[q.dtype],
            layer,
            q.shape[1],
            window,
            torch.get_num_threads(),
        )
        self._library.attention(ctypes.byref(call))
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
        out = gate_up.new_empty(rows, width // 2)
        self._library.gated_activation(
            _TYPES[gate_up.dtype],
            gate_up.data_ptr(),
            out.data_ptr(),
            rows,
            width // 2,
            _ACTIVATIONS[kind],
            torch.get_num_threads(),
        )
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


def load(level: Level | None = None) -> CPUOperators:
    """The operators, built at first use. Raises KernelsUnavailable, saying why they can't work here."""
    return CPUOperators(level)
