"""Engines on the CPU kernels: the same tokens however steps are cut, with a bf16 and an int8 cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fake_runner import FakeTokenizer

from batchinfer.engine.config import EngineConfig
from batchinfer.engine.engine import Engine
from batchinfer.engine.models.decoder import Decoder, DecoderConfig
from batchinfer.engine.models.layers import LayerConfig, RopeConfig
from batchinfer.engine.runner import TorchRunner
from batchinfer.engine.types import SamplingParams, StepCosts
from batchinfer.engine.weights import DummyCheckpoint, WeightReader
from batchinfer.kernels.cpu.build import cpu_flags, levels
from batchinfer.kernels.cpu.operators import load
from batchinfer.kernels.ops import AttentionBatch, Operators
from batchinfer.kernels.reference import ReferenceOperators

FLAGS = cpu_flags()
CPU = torch.device("cpu")
ROPE = RopeConfig(1000.0, 16)
CONFIG = DecoderConfig(
    architecture="LlamaForCausalLM",
    vocab_size=FakeTokenizer.vocab_size,
    hidden_size=64,
    intermediate_size=96,
    num_heads=6,
    num_kv_heads=2,
    head_size=16,
    layers=(LayerConfig(0, ROPE), LayerConfig(0, ROPE), LayerConfig(40, ROPE)),
    max_context=256,
    rms_eps=1e-5,
    activation="silu",
    attention_scale=0.25,
)


# All that a layer can have: norms behind its blocks and of its heads, biases, soft caps.
FULL = replace(
    CONFIG,
    post_norms=True,
    qk_norms=True,
    qkv_bias=True,
    attention_soft_cap=8.0,
    final_soft_cap=20.0,
    activation="gelu_tanh",
)


class Weights(DummyCheckpoint):
    """Larger than the dummy's own, so that logits differ clearly."""

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = super().read(name, shape)
        return tensor if len(shape) == 1 else tensor * 12


def decoder_of(
    ops: Operators, dtype: torch.dtype, config: DecoderConfig = CONFIG, quantize: str | None = None
) -> Decoder:
    return Decoder(config, WeightReader("m", Weights(), dtype, CPU), ops, config.max_context, quantize)


def engine_of(kv_dtype: torch.dtype, num_blocks: int, **settings: Any) -> Engine:
    ops = load()
    config = EngineConfig(model="m", **{"max_sequences": 32, "steps_in_flight": 1, **settings})
    kv = ops.allocate_kv(CONFIG.kv_spec(kv_dtype), num_blocks, CPU)
    runner = TorchRunner(
        decoder_of(ops, torch.bfloat16),
        ops,
        kv,
        max_rows=config.max_sequences,
        max_context=CONFIG.max_context,
        eos_token_ids=(),
        costs=StepCosts(1, 1, 1, 1, 1, 1, 1),
    )
    return Engine.from_parts(config, runner, FakeTokenizer(), lambda: 0)


@pytest.mark.skipif(
    "avx512_bf16" not in levels(FLAGS) or "amx_bf16" in FLAGS,
    reason="only our own products promise the same bits whatever the batch",
)
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8])
def test_tokens_do_not_depend_on_how_steps_are_cut(kv_dtype: torch.dtype) -> None:
    rng = np.random.default_rng(1)
    common = rng.integers(0, CONFIG.vocab_size, 80).tolist()
    prompts = [
        (*common[: 80 * (i % 3 > 0)], *rng.integers(0, CONFIG.vocab_size, 1 + 9 * i).tolist())
        for i in range(8)
    ]
    sampling = [
        SamplingParams(
            max_tokens=70, stop_token_ids=(10**6,), ignore_eos=True, temperature=float(i % 2), seed=3
        )
        for i in range(len(prompts))
    ]
    answers, preemptions = [], []
    for num_blocks, threads, settings in (
        (200, 1, {"max_sequences": 1, "prefix_cache": False}),
        (200, 2, {}),
        (200, 1, {"max_batch_tokens": 23}),
        (200, 1, {"prefix_cache": False}),
        # Too few for all: sequences are preempted and computed again.
        (8, 2, {"max_batch_tokens": 100}),
    ):
        torch.set_num_threads(threads)
        with engine_of(kv_dtype, num_blocks, **settings) as engine:
            if num_blocks < 200:
                engine._loop._scheduler._generated = 1  # expect short answers
            answers.append([answer.token_ids for answer in engine.generate(prompts, sampling)])
            preemptions.append(engine.stats.preemptions)
    torch.set_num_threads(1)
    for other in answers[1:]:
        assert other == answers[0]
    assert len(set(answers[0])) > 5
    assert preemptions[-1] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [load, ReferenceOperators])
@pytest.mark.parametrize(
    ("config", "kv_dtype"), [(CONFIG, None), (FULL, torch.int8)], ids=["plain", "full-int8"]
)
def test_of_the_last_layer_only_what_is_asked_for_is_computed(
    config: DecoderConfig, kv_dtype: torch.dtype | None, make: Any, dtype: torch.dtype
) -> None:
    if make is load and not levels(FLAGS):
        pytest.skip("the CPU has no AVX2")
    ops = make()
    decoder = decoder_of(ops, dtype, config)
    counts = [1, 40, 7, 1, 90]
    spec = config.kv_spec(kv_dtype or dtype)
    block = ops.block_size(spec)
    width = -(-max(counts) // block)
    tables = torch.arange(len(counts) * width, dtype=torch.int32).view(len(counts), width)
    positions = torch.cat([torch.arange(n) for n in counts])
    rows = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    ends = torch.tensor(counts).cumsum(0)
    batch = AttentionBatch(
        query_starts=torch.cat((torch.zeros(1, dtype=torch.int64), ends)).int(),
        positions=positions,
        context_lens=torch.tensor(counts, dtype=torch.int32),
        block_tables=tables,
        slots=tables[rows, positions // block].long() * block + positions % block,
        max_query=max(counts),
        max_context=max(counts),
    )
    tokens = torch.randint(
        0, config.vocab_size, (len(positions),), generator=torch.Generator().manual_seed(0)
    )
    caches = [ops.allocate_kv(spec, tables.numel(), CPU) for _ in range(2)]
    whole = decoder.forward(tokens, batch, caches[0])
    last = decoder.forward(tokens, batch, caches[1], ends - 1)
    close = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(last, whole[ends - 1], atol=close, rtol=close)
    # All keys and values are there: what follows is the same.
    following = AttentionBatch(
        query_starts=torch.arange(len(counts) + 1, dtype=torch.int32),
        positions=torch.tensor(counts) - 1,
        context_lens=batch.context_lens,
        block_tables=tables,
        slots=batch.slots[ends - 1],
        max_query=1,
        max_context=max(counts),
    )
    steps = [decoder.forward(tokens[ends - 1], following, cache) for cache in caches]
    assert torch.equal(*steps)
