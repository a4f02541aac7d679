"""Norms and gated activations of one row a program, each also quantized to fp8 where asked."""

from __future__ import annotations

import triton
import triton.language as tl

# The largest number of e4m3.
FP8_MOST = tl.constexpr(448.0)


@triton.jit
def quantize_row(x, quantized, scales, row, size, columns):
    """Store fp32 ``x`` as fp8 times one scale, its largest magnitude over 448."""
    most = tl.max(tl.abs(x), 0)
    scale = tl.maximum(most / FP8_MOST, 1e-12)
    whole = tl.minimum(tl.maximum(x / scale, -FP8_MOST), FP8_MOST)
    tl.store(quantized + row.to(tl.int64) * size + columns, whole.to(tl.float8e4nv), mask=columns < size)
    tl.store(scales + row, scale)


@triton.jit
def norm_kernel(
    x,  # [rows, size]
    residual,  # the same; read where ADD
    weight,  # fp32 [size]
    out,
    total,  # written where ADD
    quantized,  # fp8 [rows, size]; written where QUANTIZE, with scales fp32 [rows]
    scales,
    x_stride,
    size,
    eps,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    """x, or x + residual, over its root mean square, times weight."""
    row = tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    inside = columns < size
    at = row.to(tl.int64) * size + columns
    value = tl.load(x + row.to(tl.int64) * x_stride + columns, mask=inside, other=0.0)
    if ADD:
        other = tl.load(residual + at, mask=inside, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(value.dtype)
        tl.store(total + at, value, mask=inside)
    wide = value.to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    wide *= tl.load(weight + columns, mask=inside, other=0.0)
    normed = wide.to(out.dtype.element_ty)
    tl.store(out + at, normed, mask=inside)
    if QUANTIZE:
        quantize_row(normed.to(tl.float32), quantized, scales, row, size, columns)


@triton.jit
def activation_kernel(
    gate_up,  # [rows, 2 * size]
    out,  # [rows, size]
    quantized,
    scales,
    stride,
    size,
    WIDTH: tl.constexpr,
    GELU: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    """act(gate) * up, the activation rounded as the reference rounds it."""
    row = tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    inside = columns < size
    at = gate_up + row.to(tl.int64) * stride + columns
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + size, mask=inside, other=0.0)
    turned = gate
    if GELU:
        # 0.5 * (1 + tanh(y)) is the logistic function of 2 * y.
        turned = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    active = (gate / (1.0 + tl.exp(-turned))).to(up.dtype)
    result = (active.to(tl.float32) * up.to(tl.float32)).to(up.dtype)
    tl.store(out + row.to(tl.int64) * size + columns, result, mask=inside)
    if QUANTIZE:
        quantize_row(result.to(tl.float32), quantized, scales, row, size, columns)


@triton.jit
def quantize_kernel(x, quantized, scales, stride, size, WIDTH: tl.constexpr):
    """Rows to fp8, each with its scale."""
    row = tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    value = tl.load(x + row.to(tl.int64) * stride + columns, mask=columns < size, other=0.0)
    quantize_row(value.to(tl.float32), quantized, scales, row, size, columns)
