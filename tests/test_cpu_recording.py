"""Recorded layers: to the bit what the operators compute call by call, whatever the rows and threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cpu_levels import threads
from test_cpu_engine import CONFIG, CPU, FULL, decoder_of

from batchinfer.engine.models.decoder import Decoder, DecoderConfig
from batchinfer.kernels.cpu.build import cpu_flags, levels
from batchinfer.kernels.cpu.operators import CPUOperators, load
from batchinfer.kernels.cpu.recording import Arena, Recording
from batchinfer.kernels.ops import AttentionBatch, KVCache

OWN_PRODUCTS = "avx512_bf16" in levels(cpu_flags()) and "amx_bf16" not in cpu_flags()
needs_own_products = pytest.mark.skipif(not OWN_PRODUCTS, reason="oneDNN's products can't be recorded")


class Eager(CPUOperators):
    """The same operators, which record nothing."""

    recorded = None  # type: ignore[assignment]


def batch_of(queries: list[int], contexts: list[int], block: int, width: int) -> AttentionBatch:
    """Each sequence's last ``queries`` tokens of ``contexts``, its blocks one after the other."""
    tables = torch.arange(len(queries) * width, dtype=torch.int32).view(len(queries), width)
    counts = torch.tensor(queries)
    positions = torch.cat([torch.arange(c - q, c) for q, c in zip(queries, contexts, strict=True)])
    rows = torch.repeat_interleave(torch.arange(len(queries)), counts)
    return AttentionBatch(
        query_starts=torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))).int(),
        positions=positions,
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        block_tables=tables,
        slots=tables[rows, positions // block].long() * block + positions % block,
        max_query=max(queries),
        max_context=max(contexts),
    )


# Rows of every step: prompts, the same sequences' next tokens, more rows than ever, fewer again.
STEPS = (
    ([3, 1, 30], [3, 1, 30]),
    ([1, 1, 1], [4, 2, 31]),
    ([60, 1, 90, 7, 1], [64, 3, 121, 7, 1]),
    ([1], [65]),
    ([1, 1, 1, 1, 1], [65, 4, 122, 8, 2]),
)


def run(
    decoder: Decoder,
    kv: KVCache,
    last: bool,
    steps: Sequence[tuple[list[int], list[int]]] = STEPS,
    width: int = 5,
) -> list[torch.Tensor]:
    """Each step's hidden states, of all tokens or each sequence's last."""
    chance = torch.Generator().manual_seed(0)
    results = []
    for queries, contexts in steps:
        batch = batch_of(queries, contexts, kv.block_size, width)
        tokens = torch.randint(0, CONFIG.vocab_size, (sum(queries),), generator=chance)
        ends = batch.query_starts[1:].long() - 1
        results.append(decoder.forward(tokens, batch, kv, ends if last else None))
    return results


@needs_own_products
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize(
    ("config", "kv_dtype"),
    [
        (CONFIG, torch.bfloat16),
        (FULL, torch.int8),
        (replace(CONFIG, intermediate_size=100), torch.bfloat16),
    ],
    ids=["plain", "full-int8-cache", "gates-apart"],
)
def test_recorded_layers_equal_the_operators(
    config: DecoderConfig, kv_dtype: torch.dtype, quantize: str | None, last: bool
) -> None:
    answers = []
    for ops, count in ((Eager(), 1), (load(), 1), (load(), 2), (load(), 5)):
        decoder = decoder_of(ops, torch.bfloat16, config, quantize)
        assert isinstance(decoder._all, Recording) == (type(ops) is CPUOperators)
        kv = ops.allocate_kv(config.kv_spec(kv_dtype), 25, CPU)
        with threads(count):
            answers.append(run(decoder, kv, last))
    for other in answers[1:]:
        for got, expected in zip(other, answers[0], strict=True):
            assert torch.equal(got, expected)
    assert len({float(hidden.float().sum()) for hidden in answers[0]}) == len(STEPS)


def chunks(seed: int) -> list[tuple[list[int], list[int]]]:
    """Steps of 24 sequences that compute their tokens in parts of any size, about 700 rows a step."""
    chance = np.random.default_rng(seed)
    contexts = np.zeros(24, np.int64)
    steps = []
    for _ in range(3):
        parts = chance.choice([1, 5, 31, 32, 33, 70], 24)
        contexts = contexts + parts
        steps.append((parts.tolist(), contexts.tolist()))
    return steps


@needs_own_products
@pytest.mark.parametrize("seed", range(3))
def test_bands_of_rows_equal_the_operators(seed: int) -> None:
    """Also with more threads than cores, so that each may be stopped anywhere."""
    results, bands = [], []
    config = replace(CONFIG, layers=CONFIG.layers * 6)
    for ops, count in ((Eager(), 1), (load(), 2), (load(), 3), (load(), 4)):
        decoder = decoder_of(ops, torch.bfloat16, config)
        kv = ops.allocate_kv(config.kv_spec(torch.bfloat16), 24 * 7, CPU)
        made = ops._library.run

        def counted(*arguments: Any, made: Any = made) -> None:
            bands.append(made(*arguments))

        ops._library.run = counted
        with threads(count):
            results.append(run(decoder, kv, False, chunks(seed), width=7))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))
    assert min(bands) >= 6


@needs_own_products
def test_a_recording_serves_another_cache_and_another_number_of_threads() -> None:
    ops, eager = load(), Eager()
    decoders = [decoder_of(each, torch.bfloat16) for each in (ops, eager)]
    spec = CONFIG.kv_spec(torch.bfloat16)
    for count in (2, 1, 3):
        with threads(count):
            got, expected = (
                run(decoder, decoder._ops.allocate_kv(spec, 25, CPU), False) for decoder in decoders
            )
        assert all(map(torch.equal, got, expected))
    recording = decoders[0]._all
    assert isinstance(recording, Recording)
    assert recording._capacity == sum(STEPS[2][0])


@pytest.mark.skipif(not levels(cpu_flags()), reason="the CPU has no AVX2")
def test_what_cant_be_recorded_runs_call_by_call() -> None:
    """fp32 products are oneDNN's."""
    ops = load()
    decoder = decoder_of(ops, torch.float32)
    got = run(decoder, ops.allocate_kv(CONFIG.kv_spec(torch.float32), 25, CPU), False)
    eager = Eager()
    expected = run(
        decoder_of(eager, torch.float32),
        eager.allocate_kv(CONFIG.kv_spec(torch.float32), 25, CPU),
        False,
    )
    assert all(map(torch.equal, got, expected))
    assert isinstance(decoder._all, Recording)
    assert not decoder._all._recordable


def test_memory_is_given_out_again_once_nobody_holds_it() -> None:
    arena = Arena()
    first = arena.empty((4, 8), torch.bfloat16)
    view = first[1:]
    place = first.data_ptr()
    del first
    second = arena.empty((4, 8), torch.bfloat16)
    assert second.data_ptr() != place
    del view
    assert arena.empty((8, 4), torch.bfloat16).data_ptr() == place
