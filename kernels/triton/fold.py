"""Parts that all attention kernels share: a run of keys folded into the softmax so far, and splits.

A head's softmax is kept as its largest score (base 2), the sum of weights relative to it, and the
weighted sum of values (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135).
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchinfer.kernels.triton.tiles import MAX_SPLITS, SPLIT

_SPLIT = tl.constexpr(SPLIT)
_MAX_SPLITS = tl.constexpr(MAX_SPLITS)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def split_tokens(length):
    """Tokens of a split of contexts of ``length`` tokens: SPLIT, doubled until MAX_SPLITS are enough."""
    size = length * 0 + _SPLIT
    for _ in tl.static_range(12):
        size = tl.where(size * _MAX_SPLITS < length, size * 2, size)
    return size


@triton.jit
def fold_keys(
    q,  # [M, DP], the model's dtype
    best,  # fp32 [M]
    total,  # fp32 [M]
    mixed,  # fp32 [M, DP]
    position,  # int32 [M]: where each query stands
    table,  # the sequence's block table
    keys,  # one KV head's keys in block 0
    values,
    key_scales,  # fp8 caches: one KV head's largest magnitudes in block 0
    value_scales,
    start,  # the first key of the run, a multiple of N
    end,  # past its last key; without MASKED a multiple of N, and every query sees the whole run
    block_stride,
    scale_stride,
    scale,
    soft_cap,
    window,
    D: tl.constexpr,
    DP: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    FP8: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold the keys ``start`` .. ``end`` into (best, total, mixed)."""
    dims = tl.arange(0, DP)
    for at in range(start, end, N):
        n = at + tl.arange(0, N)
        if MASKED:
            block = tl.load(table + n // BLOCK, mask=n < end, other=0).to(tl.int64)
        else:
            block = tl.load(table + n // BLOCK).to(tl.int64)
        offsets = (block * block_stride + (n % BLOCK) * D)[:, None] + dims[None, :]
        if MASKED:
            inside = (n < end)[:, None] & (dims < D)[None, :]
            k = tl.load(keys + offsets, mask=inside, other=0.0)
            v = tl.load(values + offsets, mask=inside, other=0.0)
        elif D != DP:
            inside = (n >= 0)[:, None] & (dims < D)[None, :]
            k = tl.load(keys + offsets, mask=inside, other=0.0)
            v = tl.load(values + offsets, mask=inside, other=0.0)
        else:
            k = tl.load(keys + offsets)
            v = tl.load(values + offsets)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
        if FP8:
            at_scale = block * scale_stride + n % BLOCK
            key_scale = tl.load(key_scales + at_scale, mask=n < end, other=0.0)
            value_scale = tl.load(value_scales + at_scale, mask=n < end, other=0.0)
            scores *= key_scale[None, :]
        if CAP:
            # tanh by its exponential; soft_cap * tanh(score / soft_cap), in base 2.
            tanh = 1.0 - 2.0 / (tl.exp2(scores * (2.0 * _LOG2E * scale / soft_cap)) + 1.0)
            scores = tanh * (soft_cap * _LOG2E)
        else:
            scores *= scale * _LOG2E
        if MASKED:
            seen = n[None, :] <= position[:, None]
            if WINDOW:
                seen = seen & (n[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        # Where nothing was seen yet, any finite number keeps the differences from being NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(best - base)
        total = total * shrink + tl.sum(weights, 1)
        if FP8:
            weights *= value_scale[None, :]
        mixed = tl.dot(
            weights.to(q.dtype), v.to(q.dtype), mixed * shrink[:, None], input_precision=PRECISION
        )
        best = higher
    return best, total, mixed


@triton.jit
def first_seen(position, window, WINDOW: tl.constexpr):
    """The first position that a query at ``position`` sees."""
    return tl.maximum(position - window + 1, 0) if WINDOW else position * 0


@triton.jit
def store_rows(
    best,
    total,
    mixed,
    out,  # [T, Hq * D]
    partial,  # fp32 [S, Hq, splits, D]
    partial_scores,  # fp32 [S, Hq, splits]
    token,  # [M]
    sequence,  # [M]
    head,  # [M]
    valid,  # bool [M]
    whole,  # bool [M]: whether the row's only split is this one
    split,
    splits,
    value_scale,
    num_heads,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Normalise, then store to ``out`` where the split is the only one, else to the partial results."""
    dims = tl.arange(0, DP)
    dividing = tl.where(total > 0.0, total, 1.0)
    mixed = mixed * (value_scale / dividing)[:, None]
    scores = tl.where(total > 0.0, best + tl.log2(dividing), float("-inf"))
    inside = (dims < D)[None, :]
    at = token.to(tl.int64) * num_heads + head
    tl.store(
        out + at[:, None] * D + dims[None, :],
        mixed.to(out.dtype.element_ty),
        mask=inside & (valid & whole)[:, None],
    )
    at = (sequence.to(tl.int64) * num_heads + head) * splits + split
    part = valid & (whole == 0)
    tl.store(partial + at[:, None] * D + dims[None, :], mixed, mask=inside & part[:, None])
    tl.store(partial_scores + at, scores, mask=part)
