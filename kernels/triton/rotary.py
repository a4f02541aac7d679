"""Head norms, rotation, and the store of keys and values, in one pass over a token's projections."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _store_fp8(x, at, inside):
    """Store rows of fp32 ``x`` [heads, DP] as fp8 shares of their largest magnitude, which is returned."""
    largest = tl.max(tl.abs(x), 1)
    shares = x * (448.0 / tl.where(largest > 0.0, largest, 1.0))[:, None]
    tl.store(at, tl.minimum(tl.maximum(shares, -448.0), 448.0).to(tl.float8e4nv), mask=inside)
    return largest


@triton.jit
def _turned(
    row, norm, heads, inside, dims, partner, turning, sine, eps, D: tl.constexpr, NORM: tl.constexpr
):
    """The heads at ``row``, normed where NORM, and rotated: [heads, DP], rounded between the two."""
    x = tl.load(row + heads[:, None] * D + dims[None, :], mask=inside, other=0.0)
    y = tl.load(row + heads[:, None] * D + partner[None, :], mask=inside, other=0.0)
    if NORM:
        wide = x.to(tl.float32)
        root = tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)[:, None]
        weight = tl.load(norm + dims, mask=dims < D, other=0.0)[None, :]
        weight_y = tl.load(norm + partner, mask=dims < D, other=0.0)[None, :]
        x = (wide * root * weight).to(x.dtype)
        y = (y.to(tl.float32) * root * weight_y).to(x.dtype)
    return (x.to(tl.float32) * turning[None, :] + y.to(tl.float32) * sine[None, :]).to(x.dtype)


@triton.jit
def rotary_kernel(
    qkv,  # [T, (Hq + 2 * Hkv) * D]
    cos_sin,  # fp32 [max_context, R]
    positions,  # int64 [T]
    slots,  # int64 [T]
    q_norm,  # fp32 [D]; read where Q_NORM
    k_norm,
    q_out,  # [T, Hq, D]
    keys,  # of one layer: [blocks, Hkv, BLOCK, D]
    values,
    key_scales,  # fp32 [blocks, Hkv, BLOCK]; written where FP8
    value_scales,
    qkv_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    HP: tl.constexpr,
    KP: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    FP8: tl.constexpr,
):
    """Program (t, 0): the queries of token t; program (t, 1): its keys and values."""
    token = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, DP)
    HALF: tl.constexpr = R // 2
    # Each dimension turns with the one half of the rotated size away.
    partner = tl.where(dims < HALF, dims + HALF, tl.where(dims < R, dims - HALF, dims))
    position = tl.load(positions + token)
    turning = tl.load(
        cos_sin + position * R + tl.where(dims < HALF, dims, dims - HALF), mask=dims < R, other=1.0
    )
    sine = tl.load(
        cos_sin + position * R + HALF + tl.where(dims < HALF, dims, dims - HALF), mask=dims < R, other=0.0
    )
    sine = tl.where(dims < HALF, -sine, sine)
    row = qkv + token * qkv_stride
    if tl.program_id(1) == 0:
        q_heads = tl.arange(0, HP)
        q_inside = (q_heads < HEADS)[:, None] & (dims < D)[None, :]
        q = _turned(row, q_norm, q_heads, q_inside, dims, partner, turning, sine, eps, D, Q_NORM)
        q_at = (token * HEADS + q_heads) * D
        tl.store(q_out + q_at[:, None] + dims[None, :], q, mask=q_inside)
    else:
        heads = tl.arange(0, KP)
        inside = (heads < KV_HEADS)[:, None] & (dims < D)[None, :]
        row += HEADS * D
        k = _turned(row, k_norm, heads, inside, dims, partner, turning, sine, eps, D, K_NORM)
        v = tl.load(row + (KV_HEADS + heads)[:, None] * D + dims[None, :], mask=inside, other=0.0)
        slot = tl.load(slots + token)
        at_head = (slot // BLOCK * KV_HEADS + heads) * BLOCK + slot % BLOCK
        at = at_head[:, None] * D + dims[None, :]
        if FP8:
            largest = _store_fp8(k.to(tl.float32), keys + at, inside)
            tl.store(key_scales + at_head, largest, mask=heads < KV_HEADS)
            largest = _store_fp8(v.to(tl.float32), values + at, inside)
            tl.store(value_scales + at_head, largest, mask=heads < KV_HEADS)
        else:
            tl.store(keys + at, k.to(keys.dtype.element_ty), mask=inside)
            tl.store(values + at, v.to(values.dtype.element_ty), mask=inside)
