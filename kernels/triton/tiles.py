"""Sizes of the tiles that each GPU's shared memory holds, chosen ahead: nothing is tuned at work."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Tokens of a block of the KV cache.
BLOCK = 32

# A context is cut into splits of this many tokens, and of more where that would make too many. Only its
# own length decides, so a token's result does not depend on its neighbours.
SPLIT = 512
MAX_SPLITS = 32

# Programs that keep a large GPU of 132 multiprocessors busy with products of narrow weights.
_FEW_ROWS_PROGRAMS = 528
_MANY_ROWS_PROGRAMS = 132

# Shared memory that one program may take, in bytes, by compute capability.
SHARED_MEMORY = {(8, 0): 163 * 1024, (8, 9): 99 * 1024, (9, 0): 227 * 1024}


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """``rows`` queries (of all heads of a KV group) meet ``keys`` keys at a time."""

    rows: int
    keys: int
    warps: int
    stages: int


def power_of_two(value: int) -> int:
    """The least power of two that is not below ``value``."""
    return 1 << (value - 1).bit_length()


def num_splits(max_context: int) -> int:
    """The most splits of a context of up to ``max_context`` tokens."""
    return min(MAX_SPLITS, -(-max_context // SPLIT))


def prefill_tile(
    head_size: int, group: int, dtype: torch.dtype, capability: tuple[int, int]
) -> AttentionTile:
    """For sequences with several queries in the step, where products limit."""
    wide = power_of_two(head_size) > 128
    if dtype == torch.float32:
        return AttentionTile(max(32, power_of_two(group)), 32, 8 if wide else 4, 1)
    if capability < (9, 0):
        rows = max(64, power_of_two(group))
        return AttentionTile(rows, 32 if wide else 64, 8 if wide else 4, 2)
    rows = max(64 if wide else 128, power_of_two(group))
    return AttentionTile(rows, 64, 8, 2)


def decode_tile(
    head_size: int, group: int, dtype: torch.dtype, capability: tuple[int, int]
) -> AttentionTile:
    """For one query a sequence, where reading the cache limits: deep pipelines of narrow tiles."""
    wide = power_of_two(head_size) > 128
    rows = max(16, power_of_two(group))
    if dtype == torch.float32:
        return AttentionTile(rows, 32, 4, 1)
    if capability == (8, 9):
        return AttentionTile(rows, 32 if wide else 64, 4, 2)
    return AttentionTile(rows, 64, 4, 2 if wide else 3)


def shared_tile(
    head_size: int, group: int, dtype: torch.dtype, capability: tuple[int, int]
) -> AttentionTile:
    """For one query each of several sequences that read the same blocks."""
    wide = power_of_two(head_size) > 128
    warps = 8 if wide else 4
    if dtype == torch.float32:
        return AttentionTile(max(32, power_of_two(group)), 32, warps, 1)
    rows = max(64, power_of_two(group))
    return AttentionTile(rows, 32 if wide and capability < (9, 0) else 64, warps, 2)


def row_warps(width: int) -> int:
    """Warps of a program that holds ``width`` values of one row."""
    return 4 if width <= 4096 else 8 if width <= 8192 else 16


@dataclass(frozen=True, slots=True)
class ProductTile:
    """``outputs`` of a weight meet ``rows`` of activations; ``splits`` programs share the inputs."""

    outputs: int
    rows: int
    warps: int
    stages: int
    splits: int


def product_tile(
    rows: int, outputs: int, chunks: int, dtype: torch.dtype, capability: tuple[int, int]
) -> ProductTile:
    """For weights of 8 or 4 bits with inputs of ``chunks`` chunks.

    Up to 64 rows reading the weights limits: small tiles, so many programs on a multiprocessor that a
    few hundred are wanted. Beyond them products do. A split has four chunks at least. Among up to 64 rows
    their number changes no split.
    """
    few = rows <= 64
    size = max(16, power_of_two(rows)) if few else 128
    if dtype == torch.float32:
        size = min(size, 32)
    wanted = _FEW_ROWS_PROGRAMS if few else _MANY_ROWS_PROGRAMS
    tall = 64 if few else 128
    programs = -(-outputs // tall) * (1 if few else -(-rows // size))
    splits = max(1, min(wanted // programs, chunks // 4))
    # As many as have chunks: seven chunks in splits of two are four.
    splits = -(-chunks // -(-chunks // splits))
    if dtype == torch.float32:
        return ProductTile(tall, size, 4, 1, splits)
    if few:
        return ProductTile(tall, size, 4, 4 if size <= 32 else 3, splits)
    return ProductTile(tall, size, 8, 2 if capability == (8, 9) else 3, splits)
