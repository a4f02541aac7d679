"""GGML's block formats: bytes of a tensor to fp32.

A quantized tensor is a row of blocks of 32 or 256 weights, each with its scales beside its codes. The
layouts are those of the GGUF specification (ggml, docs/gguf.md and ggml-quants); little-endian.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_WEIGHTS_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """How one GGML type lies in memory: ``weights`` a block, ``size`` bytes a block.

    ``unpack`` turns uint8 [blocks, size] into fp32 [blocks, weights].
    """

    name: str
    weights: int
    size: int
    unpack: Callable[[Bytes], Floats]


def dequantize(data: Bytes, form: BlockFormat) -> Floats:
    """All weights of ``data`` (uint8, whole blocks) as fp32 [n], a new array."""
    blocks = data.reshape(-1, form.size)
    weights = np.empty((len(blocks), form.weights), np.float32)
    # A few at a time: what unpacking makes on the way stays in the core's cache.
    step = _WEIGHTS_AT_ONCE // form.weights
    for start in range(0, len(blocks), step):
        part = form.unpack(blocks[start : start + step])
        weights[start : start + step] = part.reshape(-1, form.weights)
    return weights.reshape(-1)


def _half(blocks: Bytes, offset: int) -> Floats:
    """The fp16 at ``offset`` of each block: fp32 [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view(np.float16).astype(np.float32)


def _nibbles(codes: Bytes) -> Bytes:
    """Low nibbles of every byte, then the high ones: [..., n] -> [..., 2 * n]."""
    return np.concatenate((codes & 15, codes >> 4), axis=-1)


def _bits(words: Bytes, shifts: list[int], mask: int) -> Bytes:
    """``(byte >> shift) & mask`` for each shift: [blocks, n] -> [blocks, shifts, n]."""
    return (words[:, None, :] >> np.array(shifts, np.uint8)[None, :, None]) & np.uint8(mask)


def _f32(blocks: Bytes) -> Floats:
    return blocks.view(np.float32)


def _f16(blocks: Bytes) -> Floats:
    return blocks.view(np.float16).astype(np.float32)


def _bf16(blocks: Bytes) -> Floats:
    return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _q4_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _q4_1(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks, 2)


def _fifth_bits(words: Bytes) -> Bytes:
    """Bit j of a block's 32-bit word, moved to bit 4 of code j: uint8 [blocks, 4] -> [blocks, 32]."""
    return np.unpackbits(np.ascontiguousarray(words), axis=1, bitorder="little") << np.uint8(4)


def _q5_0(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return _half(blocks, 0) * (codes.astype(np.float32) - 16)


def _q5_1(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks, 0) * codes.astype(np.float32) + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _q2_k(blocks: Bytes) -> Floats:
    scales, codes = blocks[:, :16], blocks[:, 16:80]
    codes = np.concatenate(
        [_bits(half, [0, 2, 4, 6], 3) for half in (codes[:, :32], codes[:, 32:])], axis=1
    )
    scale = _half(blocks, 80) * (scales & 15).astype(np.float32)
    low = _half(blocks, 82) * (scales >> 4).astype(np.float32)
    return scale[:, :, None] * codes.reshape(-1, 16, 16).astype(np.float32) - low[:, :, None]


def _q3_k(blocks: Bytes) -> Floats:
    high, codes, packed = blocks[:, :32], blocks[:, 32:96], blocks[:, 96:108]
    codes = np.concatenate(
        [_bits(half, [0, 2, 4, 6], 3) for half in (codes[:, :32], codes[:, 32:])], axis=1
    )
    # A clear bit of the high mask means minus four.
    signed = codes.astype(np.int8) - ((_bits(high, list(range(8)), 1) ^ 1) << 2).astype(np.int8)
    upper = _bits(packed[:, 8:], [0, 2, 4, 6], 3).reshape(-1, 16)
    scales = (_nibbles(packed[:, :8]) | (upper << 4)).astype(np.int8) - 32
    scale = _half(blocks, 108) * scales.astype(np.float32)
    return scale[:, :, None] * signed.reshape(-1, 16, 16).astype(np.float32)


def _scales_and_minima(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Twelve bytes of 6-bit numbers: eight scales and eight minima, each [blocks, 8]."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate((first & 63, (third & 15) | ((first >> 6) << 4)), axis=1)
    minima = np.concatenate((second & 63, (third >> 4) | ((second >> 6) << 4)), axis=1)
    return scales, minima


def _scaled_sub_blocks(blocks: Bytes, codes: Bytes) -> Floats:
    """Codes [blocks, 8, 32] scaled by the header that Q4_K and Q5_K share."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    scale = _half(blocks, 0) * scales.astype(np.float32)
    low = _half(blocks, 2) * minima.astype(np.float32)
    return scale[:, :, None] * codes.astype(np.float32) - low[:, :, None]


def _q4_k(blocks: Bytes) -> Floats:
    return _scaled_sub_blocks(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return _scaled_sub_blocks(blocks, codes | (_bits(blocks[:, 16:48], list(range(8)), 1) << np.uint8(4)))


def _q6_k(blocks: Bytes) -> Floats:
    # Each half of 128: low nibbles of 64 bytes, then their high nibbles, under 32 bytes of upper bits.
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 8, 32)
    upper = blocks[:, 128:192]
    high = np.concatenate([_bits(half, [0, 2, 4, 6], 3) for half in (upper[:, :32], upper[:, 32:])], axis=1)
    codes = (low | (high << 4)).astype(np.int8) - 32
    scale = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return scale[:, :, None] * codes.reshape(-1, 16, 16).astype(np.float32)


# By the type number in a GGUF file's tensor table.
FORMATS: dict[int, BlockFormat] = {
    0: BlockFormat("F32", 1, 4, _f32),
    1: BlockFormat("F16", 1, 2, _f16),
    2: BlockFormat("Q4_0", 32, 18, _q4_0),
    3: BlockFormat("Q4_1", 32, 20, _q4_1),
    6: BlockFormat("Q5_0", 32, 22, _q5_0),
    7: BlockFormat("Q5_1", 32, 24, _q5_1),
    8: BlockFormat("Q8_0", 32, 34, _q8_0),
    10: BlockFormat("Q2_K", 256, 84, _q2_k),
    11: BlockFormat("Q3_K", 256, 110, _q3_k),
    12: BlockFormat("Q4_K", 256, 144, _q4_k),
    13: BlockFormat("Q5_K", 256, 176, _q5_k),
    14: BlockFormat("Q6_K", 256, 210, _q6_k),
    30: BlockFormat("BF16", 1, 2, _bf16),
}

# Names of the types that are refused, for the error's sake.
UNSUPPORTED = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
