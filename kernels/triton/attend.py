"""Launches the attention kernels of one layer of a step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from batchinfer.kernels.ops import AttentionBatch
from batchinfer.kernels.triton.cache import TritonKVCache
from batchinfer.kernels.triton.decode import decode_kernel, reduce_kernel
from batchinfer.kernels.triton.prefill import prefill_kernel
from batchinfer.kernels.triton.shared_prefix import shared_kernel
from batchinfer.kernels.triton.sharing import SharedSplits
from batchinfer.kernels.triton.tiles import (
    BLOCK,
    AttentionTile,
    decode_tile,
    num_splits,
    power_of_two,
    prefill_tile,
    shared_tile,
)


def attend(
    q: torch.Tensor,
    kv: TritonKVCache,
    layer: int,
    batch: AttentionBatch,
    scale: float,
    window: int,
    soft_cap: float,
    capability: tuple[int, int],
    shared_splits: Callable[[AttentionBatch, int, int], SharedSplits | None],
) -> torch.Tensor:
    """See ``Operators.attention``: ``q`` [T, Hq, D] to [T, Hq * D].

    Sequences with several queries go to one kernel, those with one to others, split by split; which are
    which is known on the device alone, so each kernel is launched for all and leaves out the rest.
    ``shared_splits`` of (batch, layer, sequences a program takes) tells what decodes share.
    """
    tokens, heads, size = q.shape
    spec, sequences = kv.spec, len(batch.context_lens)
    q = q.contiguous()
    out = torch.empty(tokens, heads * size, dtype=q.dtype, device=q.device)
    group = heads // spec.num_kv_heads
    shape = (size, group, q.dtype, capability)
    cache = _cache_arguments(kv, layer)
    # The largest magnitude stands for 448 in an fp8 cache.
    unit = 1.0 if kv.key_scales is None else 1.0 / 448.0
    numbers = {"scale": scale * unit, "soft_cap": soft_cap, "window": window, "value_scale": unit}
    constants = {
        "HEADS": heads,
        "KV_HEADS": spec.num_kv_heads,
        "D": size,
        "DP": power_of_two(size),
        "BLOCK": BLOCK,
        "WINDOW": window > 0,
        "CAP": soft_cap > 0.0,
        "FP8": kv.key_scales is not None,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }
    where = {
        "query_starts": batch.query_starts,
        "context_lens": batch.context_lens,
        "block_tables": batch.block_tables,
        "table_stride": batch.block_tables.stride(0),
        "sequences": sequences,
    }
    if batch.max_query > 1:
        tile = prefill_tile(*shape)
        grid = (tokens // (tile.rows // group) + sequences, spec.num_kv_heads)
        prefill_kernel[grid](
            q=q, out=out, **cache, **where, **numbers, **constants, **_tile_arguments(tile)
        )
    if batch.max_query > 1 and sequences == 1:
        return out
    splits = num_splits(batch.max_context)
    partial = torch.empty(
        (sequences, heads, splits, size) if splits > 1 else (1,), dtype=torch.float32, device=q.device
    )
    scores = torch.empty(
        (sequences, heads, splits) if splits > 1 else (1,), dtype=torch.float32, device=q.device
    )
    results = {"q": q, "out": out, "partial": partial, "partial_scores": scores, "splits": splits}
    shared = shared_tile(*shape)
    found = shared_splits(batch, layer, shared.rows // group)
    tile = decode_tile(*shape)
    decode_kernel[(sequences, spec.num_kv_heads, splits)](
        **results,
        **cache,
        **where,
        **numbers,
        **constants,
        shared=batch.context_lens if found is None else found.shared,
        SHARED=found is not None,
        **_tile_arguments(tile),
    )
    if found is not None:
        programs = -(-sequences // (shared.rows // group))
        shared_kernel[(programs, spec.num_kv_heads, splits)](
            **results,
            **cache,
            **where,
            **numbers,
            **constants,
            members=found.members,
            piece_starts=found.piece_starts,
            piece_sizes=found.piece_sizes,
            num_pieces=found.num_pieces,
            **_tile_arguments(shared),
        )
    if splits > 1:
        reduce_kernel[(sequences, heads)](
            out,
            partial,
            scores,
            batch.query_starts,
            batch.context_lens,
            splits,
            window,
            HEADS=heads,
            D=size,
            DP=power_of_two(size),
            WINDOW=window > 0,
            num_warps=1 if size <= 64 else 2,
        )
    return out


def _cache_arguments(kv: TritonKVCache, layer: int) -> dict[str, torch.Tensor]:
    keys, values = kv.keys[layer], kv.values[layer]
    return {
        "keys": keys,
        "values": values,
        "key_scales": keys if kv.key_scales is None else kv.key_scales[layer],
        "value_scales": values if kv.value_scales is None else kv.value_scales[layer],
    }


def _tile_arguments(tile: AttentionTile) -> dict[str, int]:
    return {"M": tile.rows, "N": tile.keys, "num_warps": tile.warps, "num_stages": tile.stages}
