"""Which decodes of a step read the same blocks, found on the device so that the host never waits.

A split is shared by the sequences whose tables name the same blocks in it. That finds trees of prefixes
of any shape: what some of the sequences share is one split's matter, and the next split has its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from batchinfer.kernels.ops import AttentionBatch
from batchinfer.kernels.triton.fold import split_tokens
from batchinfer.kernels.triton.tiles import BLOCK

# Sequences that one program looks at: the lanes of a warp.
_CHUNK = 32


@dataclass(frozen=True, slots=True)
class SharedSplits:
    """Groups of sequences by split, cut into pieces that one program takes.

    ``shared`` int32 [splits, S]: whether a group has the sequence. ``members`` int32 [splits, S]: the
    sequences, group after group. ``piece_starts`` and ``piece_sizes`` int32 [splits, S]: parts of
    ``members``, the first ``num_pieces`` int32 [splits] of them, in any order.
    """

    shared: torch.Tensor
    members: torch.Tensor
    piece_starts: torch.Tensor
    piece_sizes: torch.Tensor
    num_pieces: torch.Tensor


@triton.jit
def _last_block(sequence, split, sequences, query_starts, context_lens, block_tables, table_stride, BLOCK):
    """The last block of a split, or -1 for a sequence that does not decode or ends before; blocks."""
    real = sequence < sequences
    begin = tl.load(query_starts + sequence, mask=real, other=0)
    queries = tl.load(query_starts + sequence + 1, mask=real, other=0) - begin
    context = tl.load(context_lens + sequence, mask=real, other=0)
    blocks = split_tokens(context) // BLOCK
    covered = real & (queries == 1) & ((split + 1) * blocks * BLOCK <= context)
    at = sequence.to(tl.int64) * table_stride + (split + 1) * blocks - 1
    return tl.load(block_tables + at, mask=covered, other=-1), blocks


@triton.jit(do_not_specialize=["table_stride", "sequences"])
def leaders_kernel(
    leaders,  # int32 [splits, S]
    query_starts,
    context_lens,
    block_tables,
    table_stride,
    sequences,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program (s, c): of each sequence of chunk c the first that shares split s with it, -1 if none may."""
    split, chunk = tl.program_id(0), tl.program_id(1)
    mine = chunk * CHUNK + tl.arange(0, CHUNK)
    key, blocks = _last_block(
        mine, split, sequences, query_starts, context_lens, block_tables, table_stride, BLOCK
    )
    leader = mine
    for start in range(0, (chunk + 1) * CHUNK, CHUNK):
        other = start + tl.arange(0, CHUNK)
        found, _ = _last_block(
            other, split, sequences, query_starts, context_lens, block_tables, table_stride, BLOCK
        )
        same = (found[None, :] == key[:, None]) & (other[None, :] <= mine[:, None])
        leader = tl.minimum(leader, tl.min(tl.where(same, other[None, :], 1 << 30), 1))
    # Equal last blocks nearly always mean equal splits; where they don't, the sequence goes alone.
    leader = tl.where(key >= 0, leader, mine)
    equal = key == key
    row, led = mine.to(tl.int64) * table_stride, leader.to(tl.int64) * table_stride
    for i in range(tl.max(blocks)):
        look = (key >= 0) & (i < blocks)
        at = split * blocks + i
        own = tl.load(block_tables + row + at, mask=look, other=0)
        equal = equal & (own == tl.load(block_tables + led + at, mask=look, other=0))
    leader = tl.where(equal, leader, mine)
    tl.store(leaders + split * sequences + mine, tl.where(key >= 0, leader, -1), mask=mine < sequences)


@triton.jit(do_not_specialize=["sequences"])
def pieces_kernel(
    leaders,
    shared,
    members,
    piece_starts,
    piece_sizes,
    num_pieces,
    sequences,
    MOST: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program (s, c): places of the sequences of chunk c among the members of split s, and the pieces
    (of up to MOST sequences) that begin with one of them."""
    split, chunk = tl.program_id(0), tl.program_id(1)
    mine = chunk * CHUNK + tl.arange(0, CHUNK)
    row = split * sequences
    leader = tl.load(leaders + row + mine, mask=mine < sequences, other=-1)
    size, rank, before = tl.zeros_like(mine), tl.zeros_like(mine), tl.zeros_like(mine)
    for start in range(0, sequences, CHUNK):
        other = start + tl.arange(0, CHUNK)
        found = tl.load(leaders + row + other, mask=other < sequences, other=-1)
        same = found[None, :] == leader[:, None]
        size += tl.sum(same.to(tl.int32), 1)
        rank += tl.sum((same & (other[None, :] < mine[:, None])).to(tl.int32), 1)
        ahead = (found[None, :] >= 0) & (found[None, :] < leader[:, None])
        before += tl.sum(ahead.to(tl.int32), 1)
    grouped = (leader >= 0) & (size > 1)
    tl.store(shared + row + mine, grouped.to(tl.int32), mask=mine < sequences)
    tl.store(members + row + before + rank, mine, mask=grouped)
    begins = grouped & (rank % MOST == 0)
    piece = tl.atomic_add(num_pieces + split + tl.zeros_like(mine), 1, mask=begins)
    tl.store(piece_starts + row + piece, before + rank, mask=begins)
    tl.store(piece_sizes + row + piece, tl.minimum(size - rank, MOST), mask=begins)


def find_shared(batch: AttentionBatch, splits: int, most: int) -> SharedSplits:
    """The shared splits among the first ``splits`` of a batch, in pieces of up to ``most`` sequences."""
    sequences, device = len(batch.context_lens), batch.context_lens.device
    made = torch.zeros(5, splits, sequences, dtype=torch.int32, device=device)
    leaders, shared, members, piece_starts, piece_sizes = made.unbind()
    num_pieces = torch.zeros(splits, dtype=torch.int32, device=device)
    grid = (splits, -(-sequences // _CHUNK))
    leaders_kernel[grid](
        leaders,
        batch.query_starts,
        batch.context_lens,
        batch.block_tables,
        batch.block_tables.stride(0),
        sequences,
        BLOCK=BLOCK,
        CHUNK=_CHUNK,
        num_warps=4,
    )
    pieces_kernel[grid](
        leaders,
        shared,
        members,
        piece_starts,
        piece_sizes,
        num_pieces,
        sequences,
        MOST=most,
        CHUNK=_CHUNK,
        num_warps=1,
    )
    return SharedSplits(shared, members, piece_starts, piece_sizes, num_pieces)
