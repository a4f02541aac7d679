"""The kernels' C functions and structures, as their sources declare them."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from batchinfer.kernels.cpu.build import Level, build
from batchinfer.kernels.ops import AttentionBatch

# The element types' codes in vector.h.
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


class Cache(ctypes.Structure):
    """The KV cache, in the layout of cache.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int64),
        ("num_layers", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_size", ctypes.c_int32),
        ("type", ctypes.c_int32),
    )


class Batch(ctypes.Structure):
    """A step's sequences, of which schedule.h makes its tiles."""

    _fields_ = (
        ("query_starts", ctypes.c_void_p),
        ("context_lens", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("max_blocks", ctypes.c_int64),
        ("sequences", ctypes.c_int32),
        ("group", ctypes.c_int32),
    )

    @classmethod
    def of(cls, batch: AttentionBatch, group: int) -> tuple[Batch, tuple[torch.Tensor, ...]]:
        """``batch`` with ``group`` query heads a KV head, and the tensors to hold while it is read."""
        starts, contexts = batch.query_starts.contiguous(), batch.context_lens.contiguous()
        tables = batch.block_tables.contiguous()
        addresses = starts.data_ptr(), contexts.data_ptr(), tables.data_ptr()
        return cls(*addresses, tables.shape[1], len(contexts), group), (starts, contexts, tables)


class Norm(ctypes.Structure):
    """A norm, of a sum where there is a residual: elementwise.cpp."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("type", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


class Activation(ctypes.Structure):
    """A gated activation: elementwise.cpp."""

    _fields_ = (
        ("gate_up", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("gelu", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


class Rotary(ctypes.Structure):
    """Rotary embedding and the store into the cache: elementwise.cpp."""

    _fields_ = (
        ("qkv", ctypes.c_void_p),
        ("q", ctypes.c_void_p),
        ("kv", ctypes.c_void_p),  # a Cache's address
        ("cos_sin", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("rotated", ctypes.c_int64),
        ("num_heads", ctypes.c_int32),
        ("layer", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("type", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


class Attention(ctypes.Structure):
    """One layer's attention: attention.cpp's Call."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("kv", ctypes.c_void_p),  # a Cache's address
        ("schedule", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("type", ctypes.c_int32),
        ("layer", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


class Product(ctypes.Structure):
    """A product and what becomes of it: linear.cpp's Call."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("panels", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("x_type", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


class Step(ctypes.Structure):
    """A kernel and its call: program.cpp."""

    _fields_ = (("kernel", ctypes.c_void_p), ("call", ctypes.c_void_p))


class Program(ctypes.Structure):
    """Calls in order: program.cpp."""

    _fields_ = (
        ("steps", ctypes.c_void_p),  # a row of Steps' address
        ("stretches", ctypes.c_void_p),
        ("num_stretches", ctypes.c_int64),
        ("row_operations", ctypes.c_int64),
        ("token_bytes", ctypes.c_int64),
    )


class Pass(ctypes.Structure):
    """The rows that a program's calls are made for: program.cpp."""

    _fields_ = (
        ("batch", Batch),
        ("positions", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("threads", ctypes.c_int32),
    )


_Address, _Int, _Long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64

# Result and arguments of each function, as its C++ source declares them.
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "make_schedule": (_Address, (ctypes.POINTER(Batch),)),
    "free_schedule": (None, (_Address,)),
    "split_reads": (_Long, (_Address,)),
    "attention": (None, (ctypes.POINTER(Attention), _Address)),
    "rotary_and_store": (None, (ctypes.POINTER(Rotary), _Address)),
    "rms_norm": (None, (ctypes.POINTER(Norm), _Address)),
    "gated_activation": (None, (ctypes.POINTER(Activation), _Address)),
    "multiplies": (_Int, ()),
    "linear": (None, (ctypes.POINTER(Product), _Address)),
    "linear_int8": (None, (ctypes.POINTER(Product), _Address)),
    "choose": (None, (ctypes.POINTER(Product), _Address, _Address)),
    "choose_int8": (None, (ctypes.POINTER(Product), _Address, _Address)),
    "most_rests": (_Long, (_Long,)),
    "quantize_rows": (None, (_Int, *[_Address] * 5, _Long, _Long, _Int, _Int)),
    "finish_rows": (None, (_Int, *[_Address] * 8, _Long, _Long, _Long, _Int)),
    "run": (_Long, (ctypes.POINTER(Program), ctypes.POINTER(Pass))),
    "sample": (None, (*[_Address] * 5, _Long, _Long, _Int)),
}


class Library:
    """The kernels' functions, by their C names less the prefix."""

    def __init__(self, level: Level | None) -> None:
        library = build(level)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, f"batchinfer_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)
