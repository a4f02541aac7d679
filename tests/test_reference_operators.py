"""The reference operators against the formulas that define them."""

from __future__ import annotations

import logging
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import batchinfer.kernels.reference as reference
from batchinfer.kernels.ops import AttentionBatch, KernelsUnavailable, KVSpec, operators_for
from batchinfer.kernels.reference import ReferenceOperators, gumbel_noise, philox

OPS = ReferenceOperators()
CPU = torch.device("cpu")


def make_batch(lengths: list[tuple[int, int]], block_size: int, num_blocks: int) -> AttentionBatch:
    """Sequences of (tokens already cached, tokens of this step), on shuffled blocks; junk past the end."""
    free = list(np.random.default_rng(0).permutation(num_blocks))
    width = max(-(-(old + new) // block_size) for old, new in lengths) + 2
    tables, slots, positions = [], [], []
    for old, new in lengths:
        blocks = [int(free.pop()) for _ in range(-(-(old + new) // block_size))]
        tables.append(blocks + [10**6] * (width - len(blocks)))
        for position in range(old, old + new):
            positions.append(position)
            slots.append(blocks[position // block_size] * block_size + position % block_size)
    starts = np.cumsum([0] + [new for _, new in lengths])
    return AttentionBatch(
        query_starts=torch.tensor(starts, dtype=torch.int32),
        positions=torch.tensor(positions),
        context_lens=torch.tensor([old + new for old, new in lengths], dtype=torch.int32),
        block_tables=torch.tensor(tables, dtype=torch.int32),
        slots=torch.tensor(slots),
        max_query=max(new for _, new in lengths),
        max_context=max(old + new for old, new in lengths),
    )


def every_slot(batch: AttentionBatch, sequence: int, block_size: int) -> list[int]:
    table, length = batch.block_tables[sequence].tolist(), int(batch.context_lens[sequence])
    return [table[p // block_size] * block_size + p % block_size for p in range(length)]


def filled_cache(spec: KVSpec, num_blocks: int) -> reference.ReferenceKVCache:
    kv = OPS.allocate_kv(spec, num_blocks, CPU)
    generator = torch.Generator().manual_seed(1)
    for pages in (kv.keys, kv.values):
        pages.copy_(torch.randn(pages.shape, generator=generator))
    return kv


def attention_by_loops(q, kv, layer, batch, scale, window, soft_cap):
    out = torch.zeros_like(q)
    group = q.shape[1] // kv.spec.num_kv_heads
    for s in range(len(batch.context_lens)):
        slots = every_slot(batch, s, kv.block_size)
        keys, values = (pages[layer].flatten(0, 1)[slots].double() for pages in (kv.keys, kv.values))
        for t in range(int(batch.query_starts[s]), int(batch.query_starts[s + 1])):
            p = int(batch.positions[t])
            first = max(0, p - window + 1) if window else 0
            for h in range(q.shape[1]):
                scores = keys[first : p + 1, h // group] @ q[t, h].double() * scale
                if soft_cap:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                out[t, h] = (scores.softmax(0) @ values[first : p + 1, h // group]).to(q.dtype)
    return out.flatten(1)


LENGTHS = [(0, 7), (40, 1), (16, 1), (15, 2), (3, 1), (0, 1), (31, 9), (20, 9), (0, 40), (64, 1)]


@pytest.mark.parametrize("window", [0, 1, 5, 16, 200])
@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
def test_attention_is_softmax_over_the_visible_positions(window: int, soft_cap: float) -> None:
    kv = filled_cache(KVSpec(2, 2, 8, torch.float32), 40)
    batch = make_batch(LENGTHS, kv.block_size, kv.num_blocks)
    q = torch.randn(int(batch.query_starts[-1]), 6, 8, generator=torch.Generator().manual_seed(2))
    got = OPS.attention(q, kv, 1, batch, 0.3, window, soft_cap)
    torch.testing.assert_close(got, attention_by_loops(q, kv, 1, batch, 0.3, window, soft_cap))


def test_attention_cut_into_portions_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    kv = filled_cache(KVSpec(1, 2, 8, torch.float32), 40)
    batch = make_batch(LENGTHS, kv.block_size, kv.num_blocks)
    q = torch.randn(int(batch.query_starts[-1]), 4, 8)
    whole = OPS.attention(q, kv, 0, batch, 0.3, 0, 0.0)
    monkeypatch.setattr(reference, "_ATTENTION_ELEMENTS", 300)
    torch.testing.assert_close(OPS.attention(q, kv, 0, batch, 0.3, 0, 0.0), whole)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), min_size=2, max_size=6), st.data())
def test_attention_of_a_sequence_does_not_depend_on_its_neighbours(
    lengths: list[tuple[int, int]], data: st.DataObject
) -> None:
    kv = filled_cache(KVSpec(1, 1, 4, torch.float32), 30)
    batch = make_batch(lengths, kv.block_size, kv.num_blocks)
    q = torch.randn(int(batch.query_starts[-1]), 2, 4)
    whole = OPS.attention(q, kv, 0, batch, 0.5, 0, 0.0)
    chosen = data.draw(st.integers(0, len(lengths) - 1))
    start, end = int(batch.query_starts[chosen]), int(batch.query_starts[chosen + 1])
    alone = AttentionBatch(
        query_starts=torch.tensor([0, end - start], dtype=torch.int32),
        positions=batch.positions[start:end],
        context_lens=batch.context_lens[chosen : chosen + 1],
        block_tables=batch.block_tables[chosen : chosen + 1],
        slots=batch.slots[start:end],
        max_query=end - start,
        max_context=int(batch.context_lens[chosen]),
    )
    torch.testing.assert_close(OPS.attention(q[start:end], kv, 0, alone, 0.5, 0, 0.0), whole[start:end])


@pytest.mark.parametrize("rotated", [8, 4])
@pytest.mark.parametrize("normed", [False, True])
def test_rotary_pairs_halves_and_stores_keys_and_values(rotated: int, normed: bool) -> None:
    kv = OPS.allocate_kv(KVSpec(2, 2, 8, torch.float32), 40, CPU)
    batch = make_batch(LENGTHS, kv.block_size, kv.num_blocks)
    total = int(batch.query_starts[-1])
    qkv = torch.randn(total, (3 + 2 + 2) * 8)
    angles = torch.rand(100, rotated // 2) * 6
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    q_norm, k_norm = (torch.rand(8), torch.rand(8)) if normed else (None, None)
    got = OPS.rotary_and_store(qkv, table, batch, kv, 1, 3, q_norm, k_norm, 1e-5)

    def expected(x: torch.Tensor, norm: torch.Tensor | None, position: int) -> torch.Tensor:
        if norm is not None:
            x = x / torch.sqrt((x * x).mean() + 1e-5) * norm
        out = x.clone()
        for i in range(rotated // 2):
            # A complex number whose parts lie half the rotated size apart, turned by its angle.
            turned = complex(x[i], x[i + rotated // 2]) * complex(
                math.cos(angles[position, i]), math.sin(angles[position, i])
            )
            out[i], out[i + rotated // 2] = turned.real, turned.imag
        return out

    heads = qkv.view(total, 7, 8)
    for t in range(0, total, 3):
        position, slot = int(batch.positions[t]), int(batch.slots[t])
        for h in range(3):
            torch.testing.assert_close(got[t, h], expected(heads[t, h], q_norm, position))
        for h in range(2):
            stored = kv.keys[1].flatten(0, 1)[slot, h]
            torch.testing.assert_close(stored, expected(heads[t, 3 + h], k_norm, position))
            torch.testing.assert_close(kv.values[1].flatten(0, 1)[slot, h], heads[t, 5 + h])
    assert not kv.keys[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_computed_in_fp32(dtype: torch.dtype) -> None:
    x, y, weight = torch.randn(5, 32).to(dtype), torch.randn(5, 32).to(dtype), torch.randn(32)

    def norm(v: torch.Tensor) -> torch.Tensor:
        wide = v.double()
        return (wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight).to(dtype)

    torch.testing.assert_close(OPS.rms_norm(x, weight, 1e-5), norm(x))
    normed, total = OPS.add_rms_norm(x, y, weight, 1e-5)
    assert torch.equal(total, x + y)
    torch.testing.assert_close(normed, norm(x + y))


def test_linear_and_gated_activation() -> None:
    x, weight, bias = torch.randn(4, 6), torch.randn(10, 6), torch.randn(10)
    packed = OPS.pack_linear(weight, bias, None)
    assert (packed.out_features, packed.in_features) == (10, 6)
    torch.testing.assert_close(OPS.linear(x, packed), x @ weight.T + bias)
    gate, up = x[:, :3], x[:, 3:]
    torch.testing.assert_close(OPS.gated_activation(x, "silu"), gate / (1 + torch.exp(-gate)) * up)
    cubic = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    torch.testing.assert_close(OPS.gated_activation(x, "gelu_tanh"), gate / 2 * (1 + cubic.tanh()) * up)


# The known answers of the Random123 library for philox4x32-10.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_published_answers(counter: str, key: str, answer: str) -> None:
    def words(text: str) -> tuple[torch.Tensor, ...]:
        return tuple(torch.tensor(int(word, 16)) for word in text.split())

    assert [int(word) for word in philox(words(counter), words(key))] == [int(w) for w in words(answer)]


def test_noise_is_drawn_from_the_word_of_its_token() -> None:
    keys, positions = torch.tensor([[1, 2], [0xFFFFFFFF, 7]]), torch.tensor([5, 900])
    noise = gumbel_noise(keys, positions, 11)
    for row in range(2):
        for token in range(11):
            counter = (positions[row], torch.tensor(token // 4), torch.tensor(0), torch.tensor(0))
            word = int(philox(counter, (keys[row, 0], keys[row, 1]))[token % 4])
            uniform = ((word >> 8) + 0.5) / 2**24
            assert noise[row, token].item() == pytest.approx(-math.log(-math.log(uniform)), abs=1e-12)


def test_sampling_is_greedy_without_temperature_and_draws_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [0.0, -1.0, -2.0]])
    monkeypatch.setattr(reference, "gumbel_noise", None)
    tokens = OPS.sample(
        logits, torch.zeros(2), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    )
    assert tokens.tolist() == [1, 0]


def test_sampling_adds_noise_to_scaled_logits_only_where_there_is_temperature() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(40, 50, generator=generator)
    logits[:, ::3] = -torch.inf
    temperature = torch.rand(40, generator=generator) * (torch.arange(40) % 3 > 0)
    keys = torch.randint(0, 2**32, (40, 2), generator=generator)
    positions = torch.randint(0, 4000, (40,), generator=generator)
    tokens = OPS.sample(logits, temperature, keys, positions)
    noise = gumbel_noise(keys, positions, 50)
    for row in range(40):
        scores = logits[row].double()
        if temperature[row] > 0:
            scores = scores / temperature[row].double() + noise[row]
        assert int(tokens[row]) == int(scores.argmax())
    assert (tokens % 3 != 0).all()
    order = torch.randperm(40, generator=generator)
    shuffled = OPS.sample(logits[order], temperature[order], keys[order], positions[order])
    assert torch.equal(shuffled, tokens[order])


def test_blocks_take_the_bytes_that_are_allocated() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        spec = KVSpec(3, 2, 8, dtype)
        kv = OPS.allocate_kv(spec, 5, CPU)
        pages = (kv.keys, kv.values, kv.key_scales, kv.value_scales)
        assert sum(page.nbytes for page in pages if page is not None) == 5 * OPS.block_bytes(spec)
    with pytest.raises(ValueError, match=r"no KV cache of torch\.float8_e4m3fn"):
        OPS.allocate_kv(KVSpec(3, 2, 8, torch.float8_e4m3fn), 5, CPU)
    with pytest.raises(ValueError, match="can't quantize weights to int2"):
        OPS.pack_linear(torch.zeros(2, 2), None, "int2")


def test_an_int8_cache_rounds_each_head_of_a_token_by_its_largest_magnitude() -> None:
    kv = OPS.allocate_kv(KVSpec(1, 2, 4, torch.int8), 3, CPU)
    batch = make_batch([(0, 1)], kv.block_size, kv.num_blocks)
    qkv = torch.tensor(
        [[0.0] * 4 + [1.0, -2.0, 0.5, 0.009] + [0.0] * 4 + [4.0, 3.0, -1.0, 127.0] + [0.1] * 4]
    )
    still = torch.cat((torch.ones(1, 2), torch.zeros(1, 2)), 1)
    OPS.rotary_and_store(qkv, still, batch, kv, 0, 1, None, None, 1e-5)
    slot = batch.slots[0]
    keys, values = (pages[0].flatten(0, 1)[slot] for pages in (kv.keys, kv.values))
    assert keys.tolist() == [[64, -127, 32, 1], [0, 0, 0, 0]]
    assert values.tolist() == [[4, 3, -1, 127], [127] * 4]
    assert kv.key_scales is not None and kv.value_scales is not None
    torch.testing.assert_close(kv.key_scales[0].flatten(0, 1)[slot, :, 0], torch.tensor([2 / 127, 0.0]))
    torch.testing.assert_close(kv.value_scales[0].flatten(0, 1)[slot, :, 0], torch.tensor([1.0, 0.1 / 127]))


def test_dispatch_falls_back_once_with_the_reason(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "batchinfer.kernels.triton.operators", None)
    with caplog.at_level(logging.WARNING):
        assert operators_for(torch.device("cuda")).name == "reference"
    assert len(caplog.records) == 1
    assert "reference operators run in place of the fast ones" in caplog.text
    with pytest.raises(KernelsUnavailable, match="triton operators need the module"):
        operators_for(torch.device("cuda"), "triton")
    assert operators_for(CPU, "reference").name == "reference"
    with pytest.raises(ValueError, match="operators is 'triton', but cpu runs auto, reference or cpu"):
        operators_for(CPU, "triton")
