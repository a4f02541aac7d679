"""The C++ kernels against the reference operators, over edge shapes, types, levels and thread counts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cpu_levels import DTYPES, LEVELS, TOLERANCE, threads
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.kernels.cpu import build
from batchinfer.kernels.cpu.operators import CPUOperators, load
from batchinfer.kernels.ops import AttentionBatch, KernelsUnavailable, KVSpec
from batchinfer.kernels.reference import ReferenceOperators, gumbel_noise

pytestmark = pytest.mark.skipif(not LEVELS, reason="the CPU has no AVX2")

REFERENCE = ReferenceOperators()


@pytest.fixture(scope="module", params=LEVELS)
def ops(request: pytest.FixtureRequest) -> CPUOperators:
    """The operators at each level that this CPU runs."""
    return load(request.param)


def make_batch(
    tables: list[list[int]], contexts: list[int], queries: list[int], block_size: int
) -> AttentionBatch:
    """The batch of a step that computes the last ``queries`` tokens of each sequence."""
    width = max(len(table) for table in tables)
    table = torch.full((len(tables), width), -7, dtype=torch.int32)
    for i, ids in enumerate(tables):
        table[i, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
    positions = [p for c, n in zip(contexts, queries, strict=True) for p in range(c - n, c)]
    slots = [
        ids[p // block_size] * block_size + p % block_size
        for ids, c, n in zip(tables, contexts, queries, strict=True)
        for p in range(c - n, c)
    ]
    return AttentionBatch(
        query_starts=torch.tensor(np.cumsum([0, *queries]), dtype=torch.int32),
        positions=torch.tensor(positions),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        block_tables=table,
        slots=torch.tensor(slots),
        max_query=max(queries),
        max_context=max(contexts),
    )


class Step:
    """Caches of both implementations with the same random tokens, and a step over them.

    ``contexts[i]`` tokens of sequence i are stored, the last ``queries[i]`` are the step's. The first
    ``shared[i]`` tokens (whole blocks of both) are those of sequence ``parents[i]``, in its blocks.
    """

    def __init__(
        self,
        ops: CPUOperators,
        contexts: list[int],
        queries: list[int],
        *,
        heads: int,
        kv_heads: int,
        size: int,
        dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None,
        parents: list[int] | None = None,
        shared: list[int] | None = None,
        seed: int = 0,
    ) -> None:
        rng = torch.Generator().manual_seed(seed)
        parents, shared = parents or list(range(len(contexts))), shared or [0] * len(contexts)
        spec = KVSpec(2, kv_heads, size, kv_dtype or dtype)
        width = heads + 2 * kv_heads
        tokens = [torch.randn(c, width * size, generator=rng).to(dtype) for c in contexts]
        for i, (parent, count) in enumerate(zip(parents, shared, strict=True)):
            tokens[i][:count] = tokens[parent][:count]
        positions = torch.rand(max(contexts), size // 2, generator=torch.Generator().manual_seed(9)) * 6.28
        self.cos_sin = torch.cat((positions.cos(), positions.sin()), 1)
        self.q = torch.randn(sum(queries), heads, size, generator=rng).to(dtype)
        self.heads = heads
        self.caches, self.batches = {}, {}
        for one in (REFERENCE, ops):
            block = one.block_size(spec)
            needed = [-(-c // block) for c in contexts]
            ids = iter((torch.randperm(sum(needed) + 3, generator=rng)).tolist())
            tables = []
            for i, count in enumerate(needed):
                common = tables[parents[i]][: shared[i] // block] if parents[i] < i else []
                tables.append([*common, *(next(ids) for _ in range(count - len(common)))])
            cache = one.allocate_kv(spec, sum(needed) + 3, torch.device("cpu"))
            everything = make_batch(tables, contexts, contexts, block)
            self.stored = {} if one is REFERENCE else self.stored
            self.stored[one.name] = one.rotary_and_store(
                torch.cat(tokens), self.cos_sin, everything, cache, 1, heads, None, None, 1e-5
            )
            self.caches[one.name] = cache
            self.batches[one.name] = make_batch(tables, contexts, queries, block)

    def attend(
        self, one: CPUOperators | ReferenceOperators, window: int = 0, cap: float = 0.0
    ) -> torch.Tensor:
        cache, batch = self.caches[one.name], self.batches[one.name]
        return one.attention(self.q, cache, 1, batch, self.q.shape[2] ** -0.5, window, cap)

    def check(self, ops: CPUOperators, window: int = 0, cap: float = 0.0) -> torch.Tensor:
        """Close to the reference, and bit-equal with two threads."""
        with threads(1):
            result = self.attend(ops, window, cap)
        expected = self.attend(REFERENCE, window, cap)
        tolerance = max(
            TOLERANCE[self.q.dtype], TOLERANCE.get(self.caches["cpu"].spec.dtype, INT8_TOLERANCE)
        )
        assert result.dtype == expected.dtype and result.shape == expected.shape
        torch.testing.assert_close(result.float(), expected.float(), atol=tolerance, rtol=tolerance)
        with threads(2):
            assert torch.equal(result, self.attend(ops, window, cap))
        return result


CACHES = [*DTYPES, torch.int8]
# Queries and weights are rounded to 15 bits; the caches are equal.
INT8_TOLERANCE = 2e-3
EDGES = [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 160, 255, 256, 257]


@pytest.mark.parametrize("kv_dtype", CACHES)
def test_decode_at_every_edge_of_blocks_and_splits(ops: CPUOperators, kv_dtype: torch.dtype) -> None:
    dtype = torch.float32 if kv_dtype == torch.int8 else kv_dtype
    ones = [1] * len(EDGES)
    Step(ops, EDGES, ones, heads=6, kv_heads=2, size=64, dtype=dtype, kv_dtype=kv_dtype).check(ops)


@pytest.mark.parametrize("kv_dtype", CACHES)
def test_prefill_at_every_edge(ops: CPUOperators, kv_dtype: torch.dtype) -> None:
    dtype = torch.float32 if kv_dtype == torch.int8 else kv_dtype
    Step(ops, EDGES, EDGES, heads=6, kv_heads=2, size=64, dtype=dtype, kv_dtype=kv_dtype).check(ops)


@pytest.mark.parametrize("size", [2, 8, 24, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
def test_group_and_head_sizes(ops: CPUOperators, size: int, group: int) -> None:
    for dtype, kv_dtype in [*zip(DTYPES, DTYPES, strict=True), (torch.float32, torch.int8)]:
        Step(
            ops,
            [5, 33, 150],
            [5, 1, 40],
            heads=2 * group,
            kv_heads=2,
            size=size,
            dtype=dtype,
            kv_dtype=kv_dtype,
        ).check(ops)


@pytest.mark.parametrize("window", [1, 7, 32, 33, 100, 128, 1000])
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_window_and_soft_cap(ops: CPUOperators, window: int, cap: float) -> None:
    contexts, queries = [400, 33, 300, 1], [1, 33, 170, 1]
    for dtype, kv_dtype in ((torch.float32, None), (torch.bfloat16, None), (torch.float32, torch.int8)):
        step = Step(ops, contexts, queries, heads=4, kv_heads=2, size=64, dtype=dtype, kv_dtype=kv_dtype)
        step.check(ops, window, cap)


@pytest.mark.parametrize("kv_dtype", CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cache_of_another_type(ops: CPUOperators, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    step = Step(ops, [70, 200], [70, 1], heads=4, kv_heads=2, size=80, dtype=dtype, kv_dtype=kv_dtype)
    step.check(ops)


@pytest.mark.parametrize("kv_dtype", CACHES)
@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_a_value_that_is_no_number_is_seen(
    ops: CPUOperators, kv_dtype: torch.dtype, damage: float, part: str, cap: float
) -> None:
    if cap > 0 and damage == torch.inf and part != "value" and kv_dtype != torch.int8:
        pytest.skip("capped, an infinite score is a large one like another")
    batch = make_batch([[2, 1, 5, 3, 4]], [150], [150], 32)
    still = torch.cat((torch.ones(150, 32), torch.zeros(150, 32)), 1)
    for place in (20, 128):  # 128 is the first of a split
        cache = ops.allocate_kv(KVSpec(1, 1, 64, kv_dtype), 6, torch.device("cpu"))
        qkv = torch.randn(150, 3 * 64, generator=torch.Generator().manual_seed(0))
        qkv[:, 35] = 1.0  # so that an infinite key raises every score
        qkv[place, ["query", "key", "value"].index(part) * 64 + 35] = damage
        q = ops.rotary_and_store(qkv, still, batch, cache, 0, 1, None, None, 1e-5)
        for count in (1, 2):
            with threads(count):
                out = ops.attention(q, cache, 0, batch, 0.125, 0, cap)
            if part == "value":
                assert not out[place:, 35].isfinite().any()
                continue
            end = place + 1 if part == "query" else 150
            assert not out[place:end].isfinite().any()
            assert out[:place].isfinite().all() and out[end:].isfinite().all()


def test_one_long_sequence_is_split_over_threads(ops: CPUOperators) -> None:
    for queries in (1, 9):
        step = Step(ops, [3000], [queries], heads=3, kv_heads=1, size=64, dtype=torch.bfloat16)
        result = step.check(ops)
        beside = Step(
            ops,
            [3000, *[40] * 20],
            [queries] + [1] * 20,
            heads=3,
            kv_heads=1,
            size=64,
            dtype=torch.bfloat16,
        )
        beside.q[:queries] = step.q[:queries]
        # The same tokens in other blocks, among neighbours: the same bits.
        assert torch.equal(beside.check(ops)[:queries], result)


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_shared_blocks_change_no_bit(ops: CPUOperators, kv_dtype: torch.dtype) -> None:
    """A tree: 8 sequences share 512 tokens, 4 of them 768, 2 chunks of prefill among them."""
    contexts = [900, 640, 523, 800, 1000, 900, 777, 513, 300, 100]
    parents = [0, 0, 0, 0, 0, 0, 0, 0, 8, 9]
    shared = [0, 512, 512, 768, 768, 768, 512, 512, 0, 0]
    queries = [1, 1, 3, 12, 1, 1, 9, 1, 1, 100]
    step = Step(
        ops,
        contexts,
        queries,
        heads=6,
        kv_heads=2,
        size=64,
        dtype=torch.float32 if kv_dtype == torch.float32 else torch.bfloat16,
        kv_dtype=kv_dtype,
        parents=parents,
        shared=shared,
    )
    batch = step.batches["cpu"]
    for window in (0, 300, 600):
        result = step.check(ops, window)
        shared_reads, reads = ops.schedule(batch, 3).split_reads, 0
        starts = batch.query_starts.tolist()
        for i in range(len(contexts)):
            alone = AttentionBatch(
                query_starts=torch.tensor([0, queries[i]], dtype=torch.int32),
                positions=batch.positions[starts[i] : starts[i + 1]],
                context_lens=batch.context_lens[i : i + 1],
                block_tables=batch.block_tables[i : i + 1],
                slots=batch.slots[starts[i] : starts[i + 1]],
                max_query=queries[i],
                max_context=contexts[i],
            )
            q = step.q[starts[i] : starts[i + 1]]
            one = ops.attention(q, step.caches["cpu"], 1, alone, 64**-0.5, window, 0.0)
            reads += ops.schedule(alone, 3).split_reads
            assert torch.equal(one, result[starts[i] : starts[i + 1]])
        # Of 8 sequences 7 don't read the common 4 splits, of 4 then 3 not the next 2.
        assert shared_reads == reads - 7 * 4 - 3 * 2


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_mixed_steps(data: st.DataObject) -> None:
    ops = load()
    contexts = data.draw(st.lists(st.integers(1, 420), min_size=1, max_size=12))
    queries = [
        data.draw(st.one_of(st.just(1), st.integers(1, c), st.just(c)), label="queries") for c in contexts
    ]
    parents = [data.draw(st.integers(0, i)) for i in range(len(contexts))]
    shared = []
    for i, (c, n) in enumerate(zip(contexts, queries, strict=True)):
        most = min(c - n, contexts[parents[i]] - queries[parents[i]]) // 32
        shared.append(0 if parents[i] == i else 32 * data.draw(st.integers(0, most)))
    step = Step(
        ops,
        contexts,
        queries,
        heads=data.draw(st.sampled_from([1, 2, 3, 4, 8])) * 2,
        kv_heads=2,
        size=data.draw(st.sampled_from([16, 64, 80])),
        dtype=data.draw(st.sampled_from(DTYPES)),
        kv_dtype=data.draw(st.sampled_from([None, torch.int8])),
        parents=parents,
        shared=shared,
        seed=data.draw(st.integers(0, 1000)),
    )
    step.check(ops, data.draw(st.sampled_from([0, 0, 5, 64, 200])), data.draw(st.sampled_from([0.0, 20.0])))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rotated", "norms"), [(64, False), (64, True), (24, True), (2, False)])
def test_rotary_and_store(ops: CPUOperators, dtype: torch.dtype, rotated: int, norms: bool) -> None:
    """Queries match the reference; keys and values are seen through attention."""
    rng = torch.Generator().manual_seed(1)
    spec = KVSpec(3, 2, 64, dtype)
    contexts = [1, 33, 64, 20]
    qkv = torch.randn(sum(contexts), (4 + 2 * 2) * 64, generator=rng).to(dtype)
    angle = torch.rand(64, rotated // 2, generator=rng) * 6.28
    cos_sin = torch.cat((angle.cos(), angle.sin()), 1)
    q_norm, k_norm = (torch.rand(64, generator=rng) if norms else None for _ in range(2))
    results = []
    for one in (REFERENCE, ops):
        block = one.block_size(spec)
        tables = [[9 * i + j for j in range(-(-c // block))] for i, c in enumerate(contexts)]
        batch = make_batch(tables, contexts, contexts, block)
        cache = one.allocate_kv(spec, 40, torch.device("cpu"))
        q = one.rotary_and_store(qkv, cos_sin, batch, cache, 2, 4, q_norm, k_norm, 1e-5)
        results.append((q, one.attention(q, cache, 2, batch, 0.125, 0, 0.0)))
    for expected, got in zip(*results, strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 16, 64, 100, 576, 2048])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_norms(ops: CPUOperators, dtype: torch.dtype, size: int, rows: int) -> None:
    rng = torch.Generator().manual_seed(size)
    x, residual = ((torch.randn(rows, size, generator=rng) * 3).to(dtype) for _ in range(2))
    weight = torch.rand(size, generator=rng)
    got, expected = ops.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    expected, expected_total = REFERENCE.add_rms_norm(x, residual, weight, 1e-5)
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, expected_total)
    torch.testing.assert_close(normed, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 33), (50, 1536)])
def test_gated_activation(ops: CPUOperators, dtype: torch.dtype, kind: str, rows: int, size: int) -> None:
    x = (torch.randn(rows, 2 * size, generator=torch.Generator().manual_seed(3)) * 4).to(dtype)
    x[0, 0] = -120.0
    got, expected = ops.gated_activation(x, kind), REFERENCE.gated_activation(x, kind)
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_an_unknown_activation_is_named(ops: CPUOperators) -> None:
    with pytest.raises(ValueError, match="relu"):
        ops.gated_activation(torch.zeros(1, 2), "relu")


@pytest.mark.parametrize("vocabulary", [1, 3, 17, 1000, 49152])
def test_samples_are_the_reference_ones(ops: CPUOperators, vocabulary: int) -> None:
    rng = torch.Generator().manual_seed(vocabulary)
    rows = 24
    logits = torch.randn(rows, vocabulary, generator=rng) * 4
    logits[torch.rand(rows, vocabulary, generator=rng) < 0.3] = -torch.inf
    logits[:, vocabulary // 2] = 1.0
    temperature = torch.tensor([0.0, 1e-3, 0.3, 1.0, 5.0, 1.0]).repeat(4)
    keys = torch.randint(0, 2**32, (rows, 2), generator=rng)
    positions = torch.randint(0, 2**20, (rows,), generator=rng)
    with threads(2):
        got = ops.sample(logits, temperature, keys, positions)
    assert torch.equal(got, REFERENCE.sample(logits, temperature, keys, positions))


def test_flat_logits_expose_every_bit_of_the_noise(ops: CPUOperators) -> None:
    """With equal logits the noise alone decides, and its best two are often close."""
    rows, vocabulary = 300, 5000
    logits, temperature = torch.zeros(rows, vocabulary), torch.ones(rows)
    keys = torch.stack((torch.arange(rows), torch.full((rows,), 2**32 - 1)), 1)
    positions = torch.arange(rows) * 7
    expected = gumbel_noise(keys, positions, vocabulary).argmax(-1)
    assert torch.equal(ops.sample(logits, temperature, keys, positions), expected)


def test_close_scores_are_told_apart_as_in_double_precision(ops: CPUOperators) -> None:
    """Two tokens tie but for the rounding of their logits: single precision takes either."""
    rows, vocabulary = 200, 64
    keys = torch.stack((torch.arange(rows), torch.arange(rows) + 5), 1)
    positions = torch.arange(rows)
    noise = gumbel_noise(keys, positions, vocabulary)
    logits = torch.full((rows, vocabulary), -40.0)
    for token in (9, 50):
        logits[:, token] = (0.3 - noise[:, token]).float()
    temperature = torch.ones(rows)
    expected = REFERENCE.sample(logits, temperature, keys, positions)
    assert torch.equal(ops.sample(logits, temperature, keys, positions), expected)


def test_what_is_not_a_number_is_chosen_so_that_it_is_seen(ops: CPUOperators) -> None:
    logits = torch.randn(4, 999)
    logits[0, 5] = logits[1, 998] = logits[2, 500] = torch.nan
    temperature = torch.tensor([0.0, 0.0, 1.0, 0.0])
    positions = torch.zeros(4, dtype=torch.int64)
    tokens = ops.sample(logits, temperature, torch.ones(4, 2, dtype=torch.int64), positions)
    assert tokens.tolist()[:3] == [5, 998, 500] and logits[3, tokens[3]].isfinite()


def test_greedy_takes_the_lowest_of_equals(ops: CPUOperators) -> None:
    logits = torch.full((3, 1000), -1.0)
    logits[0, [17, 400, 999]] = 2.0
    logits[1, 999] = 2.0
    logits[2, :] = -torch.inf
    zeros = torch.zeros(3)
    tokens = ops.sample(logits, zeros, torch.zeros(3, 2, dtype=torch.int64), zeros.long())
    assert tokens.tolist() == [17, 999, 0]


def test_block_bytes_are_what_is_allocated(ops: CPUOperators) -> None:
    for size, dtype in ((64, torch.bfloat16), (8, torch.float32), (80, torch.float16), (72, torch.int8)):
        spec = KVSpec(3, 2, size, dtype)
        cache = ops.allocate_kv(spec, 5, torch.device("cpu"))
        assert cache.data.numel() * cache.data.element_size() == 5 * ops.block_bytes(spec)


def test_levels_come_from_the_cpu_flags() -> None:
    assert build.levels(frozenset({"sse2", "avx"})) == ()
    assert build.levels(frozenset({"avx2", "fma", "f16c"})) == ("avx2",)
    wide = frozenset(["avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"])
    assert build.levels(wide) == ("avx2", "avx512")
    assert build.levels(wide | {"avx512_bf16"}) == ("avx2", "avx512")
    assert build.levels(wide | {"avx512_bf16", "avx512_vnni"}) == ("avx2", "avx512", "avx512_bf16")


def test_no_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BATCHINFER_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelsUnavailable, match="no C\\+\\+ compiler"):
        load()
    monkeypatch.setenv("CXX", "absent-compiler -O2")
    with pytest.raises(KernelsUnavailable, match="absent-compiler"):
        load()


def test_a_failing_build_is_named_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BATCHINFER_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(KernelsUnavailable, match="false failed"):
        load()
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("BATCHINFER_CACHE", str(tmp_path / "file"))
    with pytest.raises(KernelsUnavailable, match=r"the cache \S+file can't be written"):
        load()


@pytest.mark.slow
def test_of_processes_that_need_it_at_once_one_builds(tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\nexec /usr/bin/env g++ "$@"\n')
    compiler.chmod(0o755)
    script = "from batchinfer.kernels.cpu.operators import load; load('avx2')"
    environment = {**os.environ, "BATCHINFER_CACHE": str(tmp_path / "cache"), "CXX": str(compiler)}
    running = [subprocess.Popen([sys.executable, "-P", "-c", script], env=environment) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".lock", ".so"]
    assert (tmp_path / "calls").read_text().count("-shared") == 1
