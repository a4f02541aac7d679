"""The Triton kernels against the reference operators: on a GPU, or by Triton's interpreter on the CPU.

Run by test_triton_kernels.py in a process of its own, as the interpreter is chosen before Triton is
imported, and by ``pytest tests/triton_operators.py`` where there is a GPU.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.kernels.fp8 import quantize_rows
from batchinfer.kernels.ops import AttentionBatch, KVSpec
from batchinfer.kernels.reference import ReferenceKVCache, ReferenceOperators, gumbel_noise
from batchinfer.kernels.triton.cache import TritonKVCache
from batchinfer.kernels.triton.operators import TritonOperators, load
from batchinfer.kernels.triton.sharing import find_shared
from batchinfer.kernels.triton.tiles import BLOCK, SPLIT

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
# The interpreter rounds bf16 wrongly.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else list(TOLERANCE)
FP8 = torch.float8_e4m3fn

REFERENCE = ReferenceOperators()
OPS = load()

if INTERPRETED:
    from triton.runtime import interpreter

    _convert_float = interpreter._convert_float

    def _convert_exactly(data, source, target, rounding):
        """The interpreter rounds fp32 to fp8 without the carry into the exponent; torch rounds right."""
        if target == tl.float8e4nv and source == tl.float32:
            return torch.from_numpy(np.ascontiguousarray(data)).to(FP8).view(torch.uint8).numpy()
        return _convert_float(data, source, target, rounding)

    interpreter._convert_float = _convert_exactly


def dtype_id(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def make_batch(tables: list[list[int]], contexts: list[int], queries: list[int]) -> AttentionBatch:
    """The batch of a step that computes the last ``queries`` tokens of each sequence; junk past its end."""
    width = max(len(table) for table in tables) + 1
    table = torch.full((len(tables), width), 10**6, dtype=torch.int32)
    for i, ids in enumerate(tables):
        table[i, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
    positions = [p for c, n in zip(contexts, queries, strict=True) for p in range(c - n, c)]
    slots = [
        ids[p // BLOCK] * BLOCK + p % BLOCK
        for ids, c, n in zip(tables, contexts, queries, strict=True)
        for p in range(c - n, c)
    ]
    return AttentionBatch(
        query_starts=torch.tensor(np.cumsum([0, *queries]), dtype=torch.int32, device=DEVICE),
        positions=torch.tensor(positions, device=DEVICE),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=DEVICE),
        block_tables=table.to(DEVICE),
        slots=torch.tensor(slots, device=DEVICE),
        max_query=max(queries),
        max_context=max(contexts),
    )


def random(rng: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=rng)


class Step:
    """Caches of both implementations with the same random content, and a step over them.

    The first ``shared[i]`` tokens (whole blocks) of sequence i lie in the blocks of ``parents[i]``.
    """

    def __init__(
        self,
        contexts: list[int],
        queries: list[int],
        *,
        heads: int = 4,
        kv_heads: int = 2,
        size: int = 64,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
        parents: list[int] | None = None,
        shared: list[int] | None = None,
        seed: int = 0,
    ) -> None:
        rng = torch.Generator().manual_seed(seed)
        parents, shared = parents or list(range(len(contexts))), shared or [0] * len(contexts)
        needed = [-(-c // BLOCK) for c in contexts]
        blocks = sum(needed) + 3
        ids = iter(torch.randperm(blocks, generator=rng).tolist())
        tables: list[list[int]] = []
        for i, count in enumerate(needed):
            common = tables[parents[i]][: shared[i] // BLOCK] if parents[i] < i else []
            tables.append([*common, *(next(ids) for _ in range(count - len(common)))])
        self.batch = make_batch(tables, contexts, queries)
        self.q = random(rng, sum(queries), heads, size).to(DEVICE, dtype)
        self.tolerance = max(TOLERANCE[dtype], TOLERANCE[kv_dtype or dtype] if kv_dtype != FP8 else 0.0)
        self.cache = OPS.allocate_kv(KVSpec(2, kv_heads, size, kv_dtype or dtype), blocks, DEVICE)
        wide = []
        for pages, scales in (
            (self.cache.keys, self.cache.key_scales),
            (self.cache.values, self.cache.value_scales),
        ):
            content = random(rng, *pages.shape[1:])
            if scales is None:
                pages[1].copy_(content)
                wide.append(pages.float())
            else:
                rows = quantize_rows(content.flatten(0, 2))
                pages[1].copy_(rows.values.view(pages.shape[1:]))
                scales[1].copy_(rows.scales.view(scales.shape[1:]) * 448.0)
                wide.append(pages.float() * scales[..., None] / 448.0)
        exact = torch.float32 if kv_dtype == FP8 else kv_dtype or dtype
        self.expected_cache = ReferenceKVCache(
            KVSpec(2, kv_heads, size, exact),
            BLOCK,
            blocks,
            *(pages.to(exact).transpose(2, 3).contiguous() for pages in wide),
        )

    def attend(self, window: int = 0, cap: float = 0.0) -> torch.Tensor:
        scale = self.q.shape[2] ** -0.5
        return OPS.attention(self.q, self.cache, 1, self.batch, scale, window, cap)

    def check(self, window: int = 0, cap: float = 0.0) -> torch.Tensor:
        got = self.attend(window, cap)
        scale = self.q.shape[2] ** -0.5
        expected = REFERENCE.attention(self.q, self.expected_cache, 1, self.batch, scale, window, cap)
        assert got.dtype == expected.dtype and got.shape == expected.shape
        torch.testing.assert_close(got.float(), expected.float(), atol=self.tolerance, rtol=self.tolerance)
        return got


EDGES = [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129]


@every_dtype
def test_decode_at_every_edge_of_blocks(dtype: torch.dtype) -> None:
    Step(EDGES, [1] * len(EDGES), dtype=dtype).check()


@every_dtype
def test_prefill_at_every_edge(dtype: torch.dtype) -> None:
    Step(EDGES, EDGES, dtype=dtype).check()


@every_dtype
def test_chunks_of_prefill_among_decodes(dtype: torch.dtype) -> None:
    Step([200, 33, 64, 1, 300, 96, 32], [1, 2, 64, 1, 65, 1, 31], heads=6, dtype=dtype).check()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"),
    [(2, 2, 64), (3, 1, 80), (4, 2, 96), (8, 2, 128), (8, 1, 256), (32, 1, 16), (71, 1, 64)],
)
def test_group_and_head_sizes(heads: int, kv_heads: int, size: int) -> None:
    for dtype in DTYPES:
        Step(
            [5, 33, 150, 70], [5, 1, 40, 1], heads=heads, kv_heads=kv_heads, size=size, dtype=dtype
        ).check()


@every_dtype
def test_every_edge_of_splits(dtype: torch.dtype) -> None:
    contexts = [SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT, 2 * SPLIT + 1, 3]
    Step(contexts, [1] * 6, heads=2, kv_heads=1, dtype=dtype).check()


def test_a_context_too_long_for_small_splits() -> None:
    """Beyond 32 splits they grow: in the last only one token is left."""
    Step([16384, 16385, 700], [1, 1, 1], heads=2, kv_heads=1, size=16).check()


@pytest.mark.parametrize("window", [1, 31, 33, 100, 512, 600])
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_window_and_soft_cap(window: int, cap: float) -> None:
    Step([1100, 33, 300, 1, 513], [1, 33, 170, 1, 1], heads=2, kv_heads=1, size=32).check(window, cap)


@pytest.mark.parametrize("kv_dtype", DTYPES, ids=dtype_id)
def test_cache_of_another_type(kv_dtype: torch.dtype) -> None:
    for dtype in DTYPES:
        Step([70, 200], [70, 1], heads=2, kv_heads=1, dtype=dtype, kv_dtype=kv_dtype).check()


@every_dtype
def test_fp8_cache(dtype: torch.dtype) -> None:
    step = Step([70, 200, 600, 33], [70, 1, 1, 33], heads=4, size=80, dtype=dtype, kv_dtype=FP8)
    step.check()
    step.check(window=100, cap=5.0)


SHARED_TREE = {
    "contexts": [900, 640, 523, 1100, 1300, 1030, 777, 513, 300, 1024],
    "queries": [1, 1, 1, 1, 1, 1, 9, 1, 1, 1],
    "parents": [0, 0, 0, 0, 3, 4, 0, 0, 8, 9],
    "shared": [0, 512, 512, 512, 1024, 1024, 512, 512, 0, 0],
}


@every_dtype
@pytest.mark.parametrize("window", [0, 300, 600])
def test_shared_splits(dtype: torch.dtype, window: int) -> None:
    """A tree: eight sequences share 512 tokens (one of them prefills), three of them 1024."""
    step = Step(**SHARED_TREE, heads=2, kv_heads=1, size=32, dtype=dtype)
    found = find_shared(step.batch, 3, 2)
    assert found.shared[:2].tolist() == [[1, 1, 1, 1, 1, 1, 0, 1, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]]
    assert found.num_pieces.tolist() == [4, 2, 0]
    step.check(window)


def test_more_sharers_than_a_piece_holds() -> None:
    count = 40
    contexts = [SPLIT + 1 + i for i in range(count)]
    step = Step(
        contexts,
        [1] * count,
        heads=4,
        kv_heads=1,
        size=16,
        parents=[0] * count,
        shared=[0] + [SPLIT] * (count - 1),
    )
    step.check()
    step.check(window=SPLIT + 10)


def test_an_exact_fit_is_shared() -> None:
    """Nothing follows the shared split of two whole copies: it is their only one."""
    step = Step([SPLIT, SPLIT, SPLIT + 1], [1, 1, 1], size=16, parents=[0, 0, 2], shared=[0, SPLIT, 0])
    assert find_shared(step.batch, 2, 8).shared.tolist() == [[1, 1, 0], [0, 0, 0]]
    step.check()


def test_a_batch_may_change_in_place() -> None:
    """A recorded step keeps its tensors: what is shared is found again for every first layer."""
    step = Step([600, 600, 550], [1, 1, 1], size=16, parents=[0, 0, 2], shared=[0, SPLIT, 0])
    for pages in (step.cache.keys, step.cache.values, step.expected_cache.keys, step.expected_cache.values):
        pages[0] = pages[1]
    for _ in range(2):
        got = OPS.attention(step.q, step.cache, 0, step.batch, 0.25, 0, 0.0)
        expected = REFERENCE.attention(step.q, step.expected_cache, 0, step.batch, 0.25, 0, 0.0)
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
        # The second sequence now shares with the third.
        blocks = SPLIT // BLOCK
        step.batch.block_tables[1, :blocks] = step.batch.block_tables[2, :blocks]


def test_a_token_depends_on_its_own_sequence_alone() -> None:
    """To the bit, whatever stands beside it, wherever its blocks lie."""
    alone = Step([700, 90], [1, 40], heads=4, size=32)
    beside = Step([5, 700, 33, 1200, 90, 64], [1, 1, 20, 1, 40, 64], heads=4, size=32, seed=1)
    for target in (beside.cache.keys, beside.cache.values):
        source = alone.cache.keys if target is beside.cache.keys else alone.cache.values
        for theirs, ours in ((0, 1), (1, 4)):
            for at in range(-(-int(alone.batch.context_lens[theirs]) // BLOCK)):
                there = int(beside.batch.block_tables[ours, at])
                target[1, there] = source[1, int(alone.batch.block_tables[theirs, at])]
    beside.q[1] = alone.q[0]
    beside.q[23:63] = alone.q[1:]
    for window in (0, 120):
        one, many = alone.attend(window), beside.attend(window)
        assert torch.equal(one[0], many[1])
        assert torch.equal(one[1:], many[23:63])


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, list[int]]:
    count = draw(st.integers(1, 5))
    contexts = [
        draw(st.one_of(st.integers(1, 90), st.sampled_from([512, 520, 1100]))) for _ in range(count)
    ]
    queries = [draw(st.one_of(st.just(1), st.integers(1, min(c, 40)))) for c in contexts]
    parents = [draw(st.integers(0, i)) for i in range(count)]
    shared = [
        0
        if parent == i
        else BLOCK
        * draw(st.integers(0, min(contexts[i] - queries[i], contexts[parent] - queries[parent]) // BLOCK))
        for i, parent in enumerate(parents)
    ]
    return {"contexts": contexts, "queries": queries, "parents": parents, "shared": shared}


RANDOM_STEPS = int(os.environ.get("BATCHINFER_RANDOM_STEPS", "6"))


@settings(max_examples=RANDOM_STEPS, deadline=None, derandomize=True)
@given(
    schedule=schedules(),
    kinds=st.sampled_from([(d, k) for d in DTYPES for k in (d, FP8)]),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2), (8, 1)]),
    size=st.sampled_from([16, 24, 64]),
    window=st.sampled_from([0, 0, 5, 64, 530]),
    cap=st.sampled_from([0.0, 20.0]),
    seed=st.integers(0, 1000),
)
def test_random_mixed_steps(schedule, kinds, heads, size, window, cap, seed) -> None:
    step = Step(
        **schedule,
        heads=heads[0],
        kv_heads=heads[1],
        size=size,
        dtype=kinds[0],
        kv_dtype=kinds[1],
        seed=seed,
    )
    step.check(window, cap)


@settings(max_examples=2 * RANDOM_STEPS, deadline=None, derandomize=True)
@given(data=st.data())
def test_shared_splits_are_those_with_equal_blocks(data: st.DataObject) -> None:
    """Against a search by brute force, also where only some blocks of a split are equal."""
    count, most = data.draw(st.integers(2, 70)), data.draw(st.integers(1, 5))
    blocks = SPLIT // BLOCK
    kinds = [[list(range(100 * k, 100 * k + blocks)) for k in range(3)] for _ in range(2)]
    kinds[0].append([*range(500, 500 + blocks - 1), blocks - 1])  # ends like the first one
    tables, contexts, queries = [], [], []
    for i in range(count):
        table = [b for split in kinds for b in data.draw(st.sampled_from(split))]
        tables.append([*table, 1000 + i])
        contexts.append(
            data.draw(st.sampled_from([40, SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT, 2 * SPLIT + 5]))
        )
        queries.append(data.draw(st.sampled_from([1, 1, 1, 2])))
    batch = make_batch(tables, contexts, queries)
    found = find_shared(batch, 3, most)
    for split in range(3):
        groups: dict[tuple[int, ...], list[int]] = {}
        for i in range(count):
            if queries[i] == 1 and contexts[i] >= (split + 1) * SPLIT:
                groups.setdefault(tuple(tables[i][split * blocks : (split + 1) * blocks]), []).append(i)
        pieces = []
        for at in range(int(found.num_pieces[split])):
            start, size = int(found.piece_starts[split, at]), int(found.piece_sizes[split, at])
            assert 0 < size <= most
            pieces.append(found.members[split, start : start + size].tolist())
        shared = sorted(i for piece in pieces for i in piece)
        assert shared == found.shared[split].nonzero().flatten().tolist()
        # Sequences that only end alike may go alone; those in pieces are alike throughout.
        for piece in pieces:
            assert len({tuple(tables[i][split * blocks : (split + 1) * blocks]) for i in piece}) == 1
        by_end: dict[int, set[tuple[int, ...]]] = {}
        for key in groups:
            by_end.setdefault(key[-1], set()).add(key)
        for key, members in groups.items():
            if len(members) > 1 and len(by_end[key[-1]]) == 1:
                assert set(members) <= set(shared)
                assert sum(bool(set(piece) & set(members)) for piece in pieces) == -(-len(members) // most)


@every_dtype
@pytest.mark.parametrize(
    ("rotated", "size", "norms"), [(64, 64, False), (64, 64, True), (24, 80, True), (2, 64, False)]
)
def test_rotary_and_store(dtype: torch.dtype, rotated: int, size: int, norms: bool) -> None:
    rng = torch.Generator().manual_seed(1)
    contexts, heads, kv_heads = [1, 33, 64], 6, 2
    tables = [[9 * i + j for j in range(-(-c // BLOCK))] for i, c in enumerate(contexts)]
    batch = make_batch(tables, contexts, [1, 3, 5])
    # One token too few columns: rows of a larger tensor.
    qkv = random(rng, 9, (heads + 2 * kv_heads) * size + 8).to(DEVICE, dtype)[:, :-8]
    angle = torch.rand(64, rotated // 2, generator=rng) * 6.28
    cos_sin = torch.cat((angle.cos(), angle.sin()), 1).to(DEVICE)
    q_norm, k_norm = (torch.rand(size, generator=rng).to(DEVICE) if norms else None for _ in range(2))
    spec = KVSpec(3, kv_heads, size, dtype)
    cache = OPS.allocate_kv(spec, 30, DEVICE)
    shape = (3, 30, BLOCK, kv_heads, size)
    expected = ReferenceKVCache(
        spec, BLOCK, 30, *(torch.zeros(shape, dtype=dtype, device=DEVICE) for _ in "kv")
    )
    q = OPS.rotary_and_store(qkv, cos_sin, batch, cache, 2, heads, q_norm, k_norm, 1e-5)
    reference_q = REFERENCE.rotary_and_store(
        qkv.contiguous(), cos_sin, batch, expected, 2, heads, q_norm, k_norm, 1e-5
    )
    close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(q, reference_q, **close)
    torch.testing.assert_close(cache.keys.transpose(2, 3), expected.keys, **close)
    assert torch.equal(cache.values.transpose(2, 3), expected.values)


def test_fp8_store_keeps_the_share_of_the_largest() -> None:
    rng = torch.Generator().manual_seed(2)
    contexts, heads, kv_heads, size = [3, 40], 2, 2, 64
    batch = make_batch([[3], [0, 2]], contexts, [3, 2])
    qkv = random(rng, 5, (heads + 2 * kv_heads) * size).to(DEVICE, torch.float16)
    qkv[1] = 0.0
    qkv[2] *= 1e-3
    angle = torch.rand(64, size // 2, generator=rng) * 6.28
    cos_sin = torch.cat((angle.cos(), angle.sin()), 1).to(DEVICE)
    kept = {}
    for dtype in (FP8, torch.float16):
        cache = OPS.allocate_kv(KVSpec(1, kv_heads, size, dtype), 4, DEVICE)
        OPS.rotary_and_store(qkv, cos_sin, batch, cache, 0, heads, None, None, 1e-5)
        kept[dtype] = cache
    for pages, scales, exact in (
        (kept[FP8].keys, kept[FP8].key_scales, kept[torch.float16].keys),
        (kept[FP8].values, kept[FP8].value_scales, kept[torch.float16].values),
    ):
        rows = quantize_rows(exact.flatten(0, 3))
        assert torch.equal(scales.flatten(), exact.abs().amax(-1).float().flatten())
        share = pages.flatten(0, 3).float() * scales.flatten()[:, None] / 448.0
        # The same numbers but for a rounding of the scale, which may move one to its neighbour.
        torch.testing.assert_close(share, rows.wide(), rtol=0.13, atol=1e-9)
        assert (share - rows.wide()).abs().gt(1e-6).float().mean() < 0.01
    with_table = OPS.block_bytes(KVSpec(1, kv_heads, size, FP8)) * 4
    assert with_table == sum(
        t.nbytes for t in (kept[FP8].keys, kept[FP8].values, kept[FP8].key_scales, kept[FP8].value_scales)
    )


@every_dtype
@pytest.mark.parametrize(("rows", "size"), [(3, 1), (2, 7), (3, 576), (1, 2048), (0, 64)])
def test_norms(dtype: torch.dtype, rows: int, size: int) -> None:
    rng = torch.Generator().manual_seed(size)
    x, residual = ((random(rng, rows, size) * 3).to(DEVICE, dtype) for _ in range(2))
    weight = torch.rand(size, generator=rng).to(DEVICE)
    close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(OPS.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5), **close)
    normed, total = OPS.add_rms_norm(x, residual, weight, 1e-5)
    expected, expected_total = REFERENCE.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, expected_total)
    torch.testing.assert_close(normed, expected, **close)


def test_the_norm_of_a_part_of_wider_rows() -> None:
    x = random(torch.Generator().manual_seed(3), 4, 96).to(DEVICE)[:, :64]
    weight = torch.ones(64, device=DEVICE)
    torch.testing.assert_close(OPS.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))


@every_dtype
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 33), (2, 1536), (0, 8)])
def test_gated_activation(dtype: torch.dtype, kind: str, rows: int, size: int) -> None:
    x = (random(torch.Generator().manual_seed(3), rows, 2 * size) * 4).to(DEVICE, dtype)
    x[:1, 0] = -120.0
    got, expected = OPS.gated_activation(x, kind), REFERENCE.gated_activation(x, kind)
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match="relu"):
        OPS.gated_activation(torch.zeros(1, 2, device=DEVICE), "relu")


@pytest.mark.parametrize(
    ("vocabulary", "rows"), [(1, 6), (3, 6), (17, 12), (2048, 6), (2049, 12), (9001, 24)]
)
def test_samples_are_the_reference_ones(vocabulary: int, rows: int) -> None:
    rng = torch.Generator().manual_seed(vocabulary)
    logits = random(rng, rows, vocabulary + 5) * 4
    logits[torch.rand(rows, vocabulary + 5, generator=rng) < 0.3] = -torch.inf
    logits[:, vocabulary // 2] = 1.0
    logits[:3, -6:] = logits[:3].amax(1, keepdim=True)  # equals, of which the lowest is taken
    logits = logits.to(DEVICE)[:, :vocabulary]
    temperature = torch.tensor([0.0, 1e-3, 0.3, 1.0, 5.0, 1.0]).repeat(rows // 6).to(DEVICE)
    keys = torch.randint(0, 2**32, (rows, 2), generator=rng).to(DEVICE)
    positions = torch.randint(0, 2**20, (rows,), generator=rng).to(DEVICE)
    got = OPS.sample(logits, temperature, keys, positions)
    assert torch.equal(got, REFERENCE.sample(logits, temperature, keys, positions))


def test_flat_logits_expose_every_bit_of_the_noise() -> None:
    """With equal logits the noise alone decides, and its best two are often close."""
    rows, vocabulary = 60, 5000
    logits, temperature = torch.zeros(rows, vocabulary, device=DEVICE), torch.ones(rows, device=DEVICE)
    keys = torch.stack((torch.arange(rows), torch.full((rows,), 2**32 - 1)), 1).to(DEVICE)
    positions = torch.arange(rows, device=DEVICE) * 7
    got = OPS.sample(logits, temperature, keys, positions)
    assert torch.equal(got, gumbel_noise(keys, positions, vocabulary).argmax(-1))


def test_the_noise_decides_between_logits_that_cancel_it() -> None:
    """Each row's two tokens score the same but for 1e-9, in either order, stretches apart."""
    rows, vocabulary = 16, 5000
    keys = torch.stack((torch.arange(rows), torch.arange(rows) + 5), 1).to(DEVICE)
    positions = torch.arange(rows, device=DEVICE)
    noise = gumbel_noise(keys, positions, vocabulary)
    logits = torch.full((rows, vocabulary), -torch.inf, device=DEVICE)
    for row in range(rows):
        for token in (row, vocabulary - 1 - row):
            logits[row, token] = (10.0 - noise[row, token]).float()
    temperature = torch.ones(rows, device=DEVICE)
    got = OPS.sample(logits, temperature, keys, positions)
    assert torch.equal(got, REFERENCE.sample(logits, temperature, keys, positions))
    assert len({bool(token < 2500) for token in got}) == 2


def filtered(
    logits: torch.Tensor, k: int, p: float, least: float, heat: float
) -> tuple[set[int], set[int]]:
    """What must stay of one row and what may, by sorting in fp64; equals stand or fall together."""
    scores = logits.double() / heat
    kept = scores >= scores.sort(descending=True).values[k - 1]
    chances = scores.masked_fill(~kept, -torch.inf).softmax(0)
    better = torch.stack([chances[scores > score].sum() for score in scores])
    finite = logits.isfinite()
    sets = []
    for slack in (-1e-5, 1e-5):
        stays = kept & finite & (chances >= (least - slack * least) * chances.max())
        sets.append(set((stays & ((better < p + slack) | (p >= 1.0))).nonzero().flatten().tolist()))
    return sets[0], sets[1]


def test_filters_leave_what_sorting_would() -> None:
    rng = torch.Generator().manual_seed(0)
    rows, vocabulary = 9, 900
    logits = (random(rng, rows + 1, vocabulary) * 3).round(decimals=1).to(DEVICE)
    logits[:, 5::7] = -torch.inf
    logits[4] = 2.0
    before = logits.clone()
    places = torch.tensor([0, 1, 2, 3, 4, 5, 6, 8, 9], device=DEVICE)
    heat = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 0.1, 1.0, 5.0, 1.0], device=DEVICE)
    top_k = torch.tensor([vocabulary, 5, vocabulary, 40, 3, 1, vocabulary, 700, vocabulary], device=DEVICE)
    top_p = torch.tensor([0.9, 1.0, 1.0, 0.5, 0.3, 1.0, 1e-6, 0.95, 1.0], device=DEVICE)
    min_p = torch.tensor([0.0, 0.0, 0.1, 0.05, 0.0, 0.0, 0.0, 0.01, 0.0], device=DEVICE)
    OPS.filter(logits, places, heat, top_k, top_p, min_p)
    assert torch.equal(logits[7], before[7])
    assert torch.equal(logits[9], before[9])
    for i, place in enumerate(places.tolist()):
        kept = set(logits[place].isfinite().nonzero().flatten().tolist())
        assert torch.equal(logits[place][list(kept)], before[place][list(kept)])
        must, may = filtered(
            before[place].cpu(), int(top_k[i]), float(top_p[i]), float(min_p[i]), float(heat[i])
        )
        assert must <= kept <= may, (place, len(must), len(kept), len(may))
    assert len(set(logits[6].isfinite().nonzero().flatten().tolist())) >= 1


@pytest.mark.parametrize("size", [16, 100, 576])
def test_rows_are_quantized_as_the_reference_does(size: int) -> None:
    """By the norm and the activation that make them, and alone."""
    ops = TritonOperators((9, 0))
    rng = torch.Generator().manual_seed(size)
    out = ops.pack_linear(random(rng, 32, 16).to(DEVICE, torch.float16), None, "fp8")
    assert out.out_features == 32 and out.in_features == 16
    x, residual = (random(rng, 5, size).to(DEVICE, torch.float16) for _ in range(2))
    x[2], residual[2] = 0.0, 0.0
    weight = torch.rand(size, generator=rng).to(DEVICE)
    for make in (
        lambda: ops.rms_norm(x, weight, 1e-5),
        lambda: ops.add_rms_norm(x, residual, weight, 1e-5)[0],
        lambda: ops.gated_activation(torch.cat((x, residual), 1), "silu"),
    ):
        made = make()
        fused = ops._fp8_rows(made)
        assert fused is ops._fp8_rows(made)
        expected = quantize_rows(made)
        for rows in (fused, ops._fp8_rows(made.clone())):
            torch.testing.assert_close(rows.scales, expected.scales, rtol=1e-6, atol=0.0)
            torch.testing.assert_close(rows.wide(), expected.wide(), rtol=0.13, atol=1e-9)
            # A GPU's quotients may differ in the last bit, which moves few numbers to their neighbours.
            moved = (rows.values.float() != expected.values.float()).float().mean()
            assert moved <= (0.0 if INTERPRETED else 0.01)


def test_fp8_products_are_the_reference_ones() -> None:
    ops = TritonOperators((9, 0))
    rng = torch.Generator().manual_seed(4)
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    weight, bias = random(rng, 48, 64).to(DEVICE, dtype), random(rng, 48).to(DEVICE, dtype)
    x = random(rng, 5, 64).to(DEVICE, dtype)
    got = ops.linear(x, ops.pack_linear(weight, bias, "fp8"))
    expected = REFERENCE.linear(x, REFERENCE.pack_linear(weight, bias, "fp8"))
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def test_what_this_gpu_can_not_do_is_said() -> None:
    ampere = TritonOperators((8, 0))
    weight = torch.zeros(16, 16, device=DEVICE)
    with pytest.raises(ValueError, match=r"capability 8\.9.*choose quantize int8 or int4"):
        ampere.pack_linear(weight, None, "fp8")
    with pytest.raises(ValueError, match=r"capability 8\.9.*choose kv_dtype auto or bf16"):
        ampere.allocate_kv(KVSpec(1, 1, 16, FP8), 1, DEVICE)
    with pytest.raises(ValueError, match="int2: choose quantize int8, int4 or fp8"):
        OPS.pack_linear(weight, None, "int2")
    with pytest.raises(ValueError, match="int8: choose kv_dtype auto, bf16 or fp8"):
        OPS.allocate_kv(KVSpec(1, 1, 16, torch.int8), 1, DEVICE)


def test_block_bytes_are_what_a_block_takes() -> None:
    for dtype in (*DTYPES, FP8):
        spec = KVSpec(2, 3, 80, dtype)
        cache = OPS.allocate_kv(spec, 5, DEVICE)
        assert isinstance(cache, TritonKVCache)
        tensors = [cache.keys, cache.values, cache.key_scales, cache.value_scales]
        assert 5 * OPS.block_bytes(spec) == sum(t.nbytes for t in tensors if t is not None)
