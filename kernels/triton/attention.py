"""Attention over the paged cache: chunks of prefill, split decodes, and prefixes that sequences share.

After arXiv 2511.11581 (query blocks of all heads of a KV group, splits reduced by a second kernel) and
arXiv 2402.05099 (a shared prefix read once for all who share it, merged by log-sum-exp).
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchinfer.kernels.triton.fold import first_seen, fold_keys, split_tokens, store_rows


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


@triton.jit(do_not_specialize=["table_stride", "sequences", "window", "splits"])
def shared_kernel(
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
    members,  # int32 [splits, S]: sequences, those that share a split one after another
    piece_starts,  # int32 [splits, S]: where in ``members`` a piece of such a group begins
    piece_sizes,  # int32 [splits, S]: and how many sequences it has
    num_pieces,  # int32 [splits]
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
    PRECISION: tl.constexpr,
):
    """Programs (., h, s): the pieces of the groups that share split s, in turns, and KV head h."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv_head, split = tl.program_id(1), tl.program_id(2)
    pieces = tl.load(num_pieces + split)
    for piece in range(tl.program_id(0), pieces, tl.num_programs(0)):
        begin = tl.load(piece_starts + split * sequences + piece)
        count = tl.load(piece_sizes + split * sequences + piece)
        rows = tl.arange(0, M)
        valid = rows < count * GROUP
        member = begin + tl.minimum(rows // GROUP, count - 1)
        sequence = tl.load(members + split * sequences + member)
        first = tl.load(members + split * sequences + begin)
        token = tl.load(query_starts + sequence)
        context = tl.load(context_lens + sequence)
        position = context - 1
        head = kv_head * GROUP + rows % GROUP
        dims = tl.arange(0, DP)
        at = token.to(tl.int64) * HEADS + head
        query = tl.load(
            q + at[:, None] * D + dims[None, :], mask=valid[:, None] & (dims < D)[None, :], other=0.0
        )
        size = split_tokens(tl.load(context_lens + first))
        seen_from = first_seen(position, window, WINDOW)
        start = tl.maximum(split * size, tl.min(seen_from) // N * N)
        best = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        mixed = tl.zeros([M, DP], tl.float32)
        best, total, mixed = fold_keys(
            query,
            best,
            total,
            mixed,
            position,
            block_tables + first.to(tl.int64) * table_stride,
            keys + kv_head * BLOCK * D,
            values + kv_head * BLOCK * D,
            key_scales + kv_head * BLOCK,
            value_scales + kv_head * BLOCK,
            start,
            split * size + size,
            KV_HEADS * BLOCK * D,
            KV_HEADS * BLOCK,
            scale,
            soft_cap,
            window,
            D,
            DP,
            N,
            BLOCK,
            WINDOW,
            WINDOW,
            CAP,
            FP8,
            PRECISION,
        )
        store_rows(
            best,
            total,
            mixed,
            out,
            partial,
            partial_scores,
            token,
            sequence,
            head,
            # A row whose window begins later has no use for this split, and no place kept for it.
            valid & (seen_from < split * size + size),
            (seen_from // size) == (position // size),
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
