"""Attention of sequences with one query in a step: split over its keys, and the splits merged.

After arXiv 2511.11581: the splits are reduced by a second kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchinfer.kernels.triton.fold import first_seen, fold_keys, split_tokens, store_rows


@triton.jit(do_not_specialize=["table_stride", "sequences", "window", "splits"])
def decode_kernel(
    q,
    out,
    partial,
    partial_scores,
    keys,
    values,
    key_scales,
    value_scales,
    query_starts,
    context_lens,
    block_tables,
    shared,  # int32 [splits, S]: splits that shared_kernel computes
    table_stride,
    sequences,
    splits,
    scale,
    soft_cap,
    window,
    value_scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    FP8: tl.constexpr,
    SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (i, h, s): split s of sequence i with its one query, and KV head h."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = tl.load(query_starts + sequence)
    queries = tl.load(query_starts + sequence + 1) - token
    context = tl.load(context_lens + sequence)
    size = split_tokens(context)
    seen_from = first_seen(context - 1, window, WINDOW)
    start = tl.maximum(split * size, seen_from // N * N)
    end = tl.minimum(split * size + size, context)
    mine = (queries == 1) & (end > seen_from) & (start < end)
    if SHARED:
        mine = mine & (tl.load(shared + split * sequences + sequence) == 0)
    if mine:
        rows = tl.arange(0, M)
        valid = rows < GROUP
        head = kv_head * GROUP + rows % GROUP
        dims = tl.arange(0, DP)
        at = token.to(tl.int64) * HEADS + head
        query = tl.load(
            q + at[:, None] * D + dims[None, :], mask=valid[:, None] & (dims < D)[None, :], other=0.0
        )
        position = tl.zeros([M], tl.int32) + context - 1
        best = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        mixed = tl.zeros([M, DP], tl.float32)
        best, total, mixed = fold_keys(
            query,
            best,
            total,
            mixed,
            position,
            block_tables + sequence.to(tl.int64) * table_stride,
            keys + kv_head * BLOCK * D,
            values + kv_head * BLOCK * D,
            key_scales + kv_head * BLOCK,
            value_scales + kv_head * BLOCK,
            start,
            end,
            KV_HEADS * BLOCK * D,
            KV_HEADS * BLOCK,
            scale,
            soft_cap,
            window,
            D,
            DP,
            N,
            BLOCK,
            True,
            WINDOW,
            CAP,
            FP8,
            PRECISION,
        )
        others = (context - 1) // size - seen_from // size
        store_rows(
            best,
            total,
            mixed,
            out,
            partial,
            partial_scores,
            rows * 0 + token,
            rows * 0 + sequence,
            head,
            valid,
            rows * 0 + others == 0,
            split,
            splits,
            value_scale,
            HEADS,
            D,
            DP,
        )


@triton.jit(do_not_specialize=["splits", "window"])
def reduce_kernel(
    out,  # [T, Hq * D]
    partial,  # fp32 [S, Hq, splits, D]
    partial_scores,  # fp32 [S, Hq, splits]
    query_starts,
    context_lens,
    splits,
    window,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Program (i, h): merge the splits of sequence i for head h, from the first to the last."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    token = tl.load(query_starts + sequence)
    queries = tl.load(query_starts + sequence + 1) - token
    context = tl.load(context_lens + sequence)
    size = split_tokens(context)
    first = first_seen(context - 1, window, WINDOW) // size
    last = (context - 1) // size
    if (queries == 1) & (last > first):
        dims = tl.arange(0, DP)
        row = (sequence.to(tl.int64) * HEADS + head) * splits
        best = tl.load(partial_scores + row + first)
        mixed = tl.load(partial + (row + first) * D + dims, mask=dims < D, other=0.0)
        total = best * 0.0 + 1.0
        for split in range(first + 1, last + 1):
            score = tl.load(partial_scores + row + split)
            part = tl.load(partial + (row + split) * D + dims, mask=dims < D, other=0.0)
            higher = tl.maximum(best, score)
            shrink, weight = tl.exp2(best - higher), tl.exp2(score - higher)
            total = total * shrink + weight
            mixed = mixed * shrink + part * weight
            best = higher
        at = (token.to(tl.int64) * HEADS + head) * D
        tl.store(out + at + dims, (mixed / total).to(out.dtype.element_ty), mask=dims < D)
