"""Products with weights of 8 and of 4 bits, which are widened in registers on their way to tensor cores.

The outputs are the rows of the tile and the tokens its columns, so that a few tokens fill a narrow tile,
and the widened weights go to Hopper's ``wgmma`` from registers. Where there are too few tiles for a GPU
the inputs are split, and a second kernel adds the parts up from first to last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from batchinfer.kernels.triton.tiles import product_tile
from batchinfer.kernels.weight_only import CHUNK, Int4Linear, WeightOnlyLinear

# Outputs that one program adds up.
_SUM_WIDTH = 1024


@triton.jit
def _half(bits, zero, like):
    """``bits`` (int16, 0 to 15) less ``zero`` (int8), in the type of the tensor ``like``.

    Put behind the bits of 128 in bf16, or of 1024 in fp16, four bits are the low end of an exact number:
    one subtraction widens them, where conversions of integers are slow.
    """
    wide = zero.to(tl.float32)
    if like.dtype.element_ty == tl.bfloat16:
        result = (bits | 0x4300).to(tl.bfloat16, bitcast=True) - (wide + 128.0).to(tl.bfloat16)
    elif like.dtype.element_ty == tl.float16:
        result = (bits | 0x6400).to(tl.float16, bitcast=True) - (wide + 1024.0).to(tl.float16)
    else:
        result = bits.to(tl.float32) - wide
    return result


@triton.jit(do_not_specialize=["rows", "chunks_each"])
def product_kernel(
    x,  # [rows, inputs]
    values,  # int8 [chunks, outputs, CHUNK], or uint8 [chunks, outputs, CHUNK / 2]
    scales,  # fp32 [outputs], or bf16 [chunks, outputs]
    zeros,  # int8 [chunks, outputs]; read where INT4
    bias,  # [outputs]; read where BIAS
    out,  # [rows, outputs]; fp32 [splits, rows, outputs] where there are several splits
    x_stride,
    rows,
    outputs,
    inputs,
    chunks_each,
    N: tl.constexpr,
    M: tl.constexpr,
    CHUNK: tl.constexpr,
    INT4: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (i, j, s): N outputs of M rows, over the chunks of split s."""
    n = tl.program_id(0) * N + tl.arange(0, N)
    m = tl.program_id(1) * M + tl.arange(0, M)
    # Outputs and rows past the last read the last one's numbers, and are not stored.
    output = tl.minimum(n, outputs - 1)
    row = x + tl.minimum(m, rows - 1).to(tl.int64) * x_stride
    total = tl.zeros([N, M], tl.float32)
    first = tl.program_id(2) * chunks_each
    last = tl.minimum(first + chunks_each, tl.cdiv(inputs, CHUNK))
    for chunk in range(first, last):
        at = (chunk * outputs + output).to(tl.int64)
        if INT4:
            HALF: tl.constexpr = CHUNK // 2
            k = tl.arange(0, HALF)
            both = tl.load(values + at[:, None] * HALF + k[None, :]).to(tl.int16)
            zero = tl.load(zeros + at)[:, None]
            scale = tl.load(scales + at).to(tl.float32)
            i = chunk * CHUNK + k
            early = tl.load(row[:, None] + i[None, :], mask=(i < inputs)[None, :], other=0.0)
            late = tl.load(row[:, None] + (i + HALF)[None, :], mask=(i + HALF < inputs)[None, :], other=0.0)
            part = tl.dot(_half(both & 15, zero, x), tl.trans(early), input_precision=PRECISION)
            part = tl.dot(_half(both >> 4, zero, x), tl.trans(late), part, input_precision=PRECISION)
            total += part * scale[:, None]
        else:
            k = tl.arange(0, CHUNK)
            weight = tl.load(values + at[:, None] * CHUNK + k[None, :])
            i = chunk * CHUNK + k
            part = tl.load(row[:, None] + i[None, :], mask=(i < inputs)[None, :], other=0.0)
            total = tl.dot(weight.to(x.dtype.element_ty), tl.trans(part), total, input_precision=PRECISION)
    if not INT4:
        total *= tl.load(scales + output)[:, None]
    if BIAS:
        total += tl.load(bias + output).to(tl.float32)[:, None]
    split = tl.program_id(2).to(tl.int64) * rows
    tl.store(
        out + (split + m)[None, :] * outputs + n[:, None],
        total.to(out.dtype.element_ty),
        mask=(n < outputs)[:, None] & (m < rows)[None, :],
    )


@triton.jit(do_not_specialize=["splits"])
def sum_kernel(
    parts,  # fp32 [splits, rows, outputs]
    bias,  # [outputs]; read where BIAS
    out,  # [rows, outputs]
    outputs,
    splits,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Program (r, c): the sums of row r's stretch c of WIDTH outputs."""
    row, rows = tl.program_id(0), tl.num_programs(0)
    n = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = n < outputs
    total = tl.zeros([WIDTH], tl.float32)
    for split in range(splits):
        at = (split * rows + row).to(tl.int64) * outputs
        total += tl.load(parts + at + n, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * outputs + n, total.to(out.dtype.element_ty), mask=inside)


def multiply(
    x: torch.Tensor, weight: WeightOnlyLinear, dtype: torch.dtype, capability: tuple[int, int]
) -> torch.Tensor:
    """``x`` [T, in] times the weight's transpose, plus its bias, summed in fp32: [T, out] of ``dtype``."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, outputs = len(x), weight.out_features
    out = torch.empty(rows, outputs, dtype=dtype, device=x.device)
    if rows == 0:
        return out
    chunks = len(weight.values)
    tile = product_tile(rows, outputs, chunks, x.dtype, capability)
    parts = out
    if tile.splits > 1:
        parts = torch.empty(tile.splits, rows, outputs, dtype=torch.float32, device=x.device)
    int4 = isinstance(weight, Int4Linear)
    bias = weight.bias
    product_kernel[(-(-outputs // tile.outputs), -(-rows // tile.rows), tile.splits)](
        x,
        weight.values,
        weight.scales,
        weight.zeros if isinstance(weight, Int4Linear) else weight.values,
        out if bias is None else bias,
        parts,
        x.stride(0),
        rows,
        outputs,
        weight.in_features,
        -(-chunks // tile.splits),
        N=tile.outputs,
        M=tile.rows,
        CHUNK=CHUNK,
        INT4=int4,
        BIAS=bias is not None and tile.splits == 1,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if tile.splits > 1:
        sum_kernel[(rows, -(-outputs // _SUM_WIDTH))](
            parts,
            out if bias is None else bias,
            out,
            outputs,
            tile.splits,
            WIDTH=_SUM_WIDTH,
            BIAS=bias is not None,
            num_warps=4,
        )
    return out
