"""Attention of decodes to keys that several sequences share: read once for all of them.

After arXiv 2402.05099; the results are merged with the other splits by log-sum-exp.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchinfer.kernels.triton.fold import first_seen, fold_keys, split_tokens, store_rows


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
