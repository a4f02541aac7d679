"""Whole engines on the Triton kernels and on the reference operators write the same tokens.

Run as triton_operators.py is, which also mends the interpreter's rounding to fp8.
"""

from __future__ import annotations

import torch
from fake_runner import FakeTokenizer
from triton_operators import DEVICE, OPS

from batchinfer.engine.config import EngineConfig
from batchinfer.engine.engine import Engine
from batchinfer.engine.models.decoder import Decoder, DecoderConfig
from batchinfer.engine.models.layers import LayerConfig, RopeConfig
from batchinfer.engine.runner import TorchRunner
from batchinfer.engine.types import Completion, SamplingParams, StepCosts
from batchinfer.engine.weights import DummyCheckpoint, WeightReader
from batchinfer.kernels.ops import Operators
from batchinfer.kernels.reference import ReferenceOperators


class Weights(DummyCheckpoint):
    """Larger than the dummy's own, so that logits differ clearly."""

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = super().read(name, shape)
        return tensor if len(shape) == 1 else tensor * 12


def config(layers: tuple[LayerConfig, ...], context: int, soft_cap: float = 0.0) -> DecoderConfig:
    return DecoderConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=FakeTokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_heads=4,
        num_kv_heads=2,
        head_size=16,
        layers=layers,
        max_context=context,
        rms_eps=1e-5,
        activation="silu",
        attention_scale=0.25,
        attention_soft_cap=soft_cap,
        qk_norms=True,
    )


ROPE = RopeConfig(1000.0, 16)


def complete(
    ops: Operators,
    model: DecoderConfig,
    prompts: list[tuple[int, ...]],
    sampling: list[SamplingParams],
    *,
    quantize: str | None = None,
    kv_dtype: torch.dtype = torch.float32,
    chunk: int = 64,
) -> list[Completion]:
    decoder = Decoder(
        model, WeightReader("m", Weights(), torch.float32, DEVICE), ops, model.max_context, quantize
    )
    spec = model.kv_spec(kv_dtype)
    blocks = 4 * model.max_context // ops.block_size(spec)
    runner = TorchRunner(
        decoder,
        ops,
        ops.allocate_kv(spec, blocks, DEVICE),
        max_rows=8,
        max_context=model.max_context,
        eos_token_ids=(),
        costs=StepCosts(1, 1, 1, 1, 1, 1, 1),
    )
    settings = EngineConfig(model="m", max_sequences=8, max_batch_tokens=chunk)
    with Engine.from_parts(settings, runner, FakeTokenizer()) as engine:
        return engine.generate(prompts, sampling)


def prompt(length: int, seed: int) -> tuple[int, ...]:
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(1, FakeTokenizer.vocab_size, (length,), generator=rng).tolist())


def same(one: list[Completion], other: list[Completion]) -> None:
    assert [c.token_ids for c in one] == [c.token_ids for c in other]
    assert len({tuple(c.token_ids) for c in one}) > 1


def test_chunks_decodes_and_sampling() -> None:
    model = config((LayerConfig(0, ROPE), LayerConfig(24, ROPE)), 128, soft_cap=20.0)
    prompts = [prompt(n, n) for n in (1, 31, 32, 33, 70)]
    sampling = [
        SamplingParams(
            max_tokens=5, temperature=temperature, top_k=k, ignore_eos=True, repetition_penalty=penalty
        )
        for temperature, k, penalty in (
            (0.0, 0, 1.0),
            (1.0, 0, 1.0),
            (0.7, 5, 1.3),
            (0.0, 0, 1.0),
            (2.0, 0, 1.0),
        )
    ]
    same(complete(OPS, model, prompts, sampling), complete(ReferenceOperators(), model, prompts, sampling))


def test_a_long_prefix_that_all_share() -> None:
    """Found in the prefix cache by the later ones, then read by all in one go."""
    model = config((LayerConfig(0, ROPE),), 640)
    prefix = prompt(520, 0)
    prompts = [prefix + prompt(n, n) for n in (3, 9, 40)]
    sampling = [SamplingParams(max_tokens=4, ignore_eos=True, temperature=t) for t in (0.0, 0.0, 1.0)]
    results = [complete(ops, model, prompts, sampling, chunk=600) for ops in (OPS, ReferenceOperators())]
    same(*results)
    assert sum(c.cached_tokens for c in results[0]) == 2 * 512


def test_fp8_cache_and_products() -> None:
    """Rounded that coarsely tokens may differ; most of the first ones don't."""
    model = config((LayerConfig(0, ROPE), LayerConfig(0, ROPE)), 64)
    prompts = [prompt(n, n) for n in range(3, 11)]
    sampling = [SamplingParams(max_tokens=1, ignore_eos=True)] * len(prompts)
    got = complete(OPS, model, prompts, sampling, quantize="fp8", kv_dtype=torch.float8_e4m3fn)
    for quantize in (None, "fp8"):
        expected = complete(ReferenceOperators(), model, prompts, sampling, quantize=quantize)
        assert sum(a.token_ids == b.token_ids for a, b in zip(expected, got, strict=True)) >= 5
