"""Attention of sequences with several queries in a step: blocks of queries over the paged cache.

A block holds the queries of all heads of a KV group (arXiv 2511.11581).
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchinfer.kernels.triton.fold import first_seen, fold_keys


@triton.jit(do_not_specialize=["table_stride", "sequences", "window"])
def prefill_kernel(
    q,  # [T, Hq, D]
    out,  # [T, Hq * D]
    keys,  # of one layer: [blocks, Hkv, BLOCK, D]
    values,
    key_scales,  # fp8 caches: fp32 [blocks, Hkv, BLOCK]
    value_scales,
    query_starts,
    context_lens,
    block_tables,
    table_stride,
    sequences,
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
    PRECISION: tl.constexpr,
):
    """Program (i, h): block i of the query tokens of the sequences with several, and KV head h.

    A sequence whose queries start at token t has its first block at t // TOKENS + its index, which
    leaves room for all; programs between the blocks of one sequence and the next have nothing to do.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TOKENS: tl.constexpr = M // GROUP
    program, kv_head = tl.program_id(0), tl.program_id(1)
    low = program * 0
    high = low + sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_starts + middle) // TOKENS + middle <= program:
            low = middle
        else:
            high = middle
    begin = tl.load(query_starts + low)
    queries = tl.load(query_starts + low + 1) - begin
    first = (program - begin // TOKENS - low) * TOKENS
    if (queries > 1) & (first < queries):
        context = tl.load(context_lens + low)
        rows = tl.arange(0, M)
        local = first + rows // GROUP
        valid = (rows < TOKENS * GROUP) & (local < queries)
        head = kv_head * GROUP + rows % GROUP
        position = context - queries + tl.minimum(local, queries - 1)
        dims = tl.arange(0, DP)
        at = (begin + local).to(tl.int64) * HEADS + head
        query = tl.load(
            q + at[:, None] * D + dims[None, :], mask=valid[:, None] & (dims < D)[None, :], other=0.0
        )
        best = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        mixed = tl.zeros([M, DP], tl.float32)
        table = block_tables + low.to(tl.int64) * table_stride
        block_stride = KV_HEADS * BLOCK * D
        scale_stride = KV_HEADS * BLOCK
        lowest = context - queries + first
        end = tl.minimum(lowest + TOKENS, context)
        start = first_seen(lowest, window, WINDOW) // N * N
        clear = start
        if not WINDOW:
            # All queries see the keys before the first query's own tile.
            clear = (lowest + 1) // N * N
            best, total, mixed = fold_keys(
                query,
                best,
                total,
                mixed,
                position,
                table,
                keys + kv_head * BLOCK * D,
                values + kv_head * BLOCK * D,
                key_scales + kv_head * BLOCK,
                value_scales + kv_head * BLOCK,
                start,
                clear,
                block_stride,
                scale_stride,
                scale,
                soft_cap,
                window,
                D,
                DP,
                N,
                BLOCK,
                False,
                WINDOW,
                CAP,
                FP8,
                PRECISION,
            )
        best, total, mixed = fold_keys(
            query,
            best,
            total,
            mixed,
            position,
            table,
            keys + kv_head * BLOCK * D,
            values + kv_head * BLOCK * D,
            key_scales + kv_head * BLOCK,
            value_scales + kv_head * BLOCK,
            clear,
            end,
            block_stride,
            scale_stride,
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
        mixed = mixed * (value_scale / tl.where(total > 0.0, total, 1.0))[:, None]
        tl.store(
            out + at[:, None] * D + dims[None, :],
            mixed.to(out.dtype.element_ty),
            mask=valid[:, None] & (dims < D)[None, :],
        )
