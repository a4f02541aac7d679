"""The roofs and utilisations, against counting position by position and against figures known elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.engine.models.registry import decoder_config
from batchinfer.engine.roof import (
    Limits,
    ModelSizes,
    RequestSizes,
    measure_limits,
    model_sizes,
    roof,
    utilization,
    work_of,
)

CONFIGS = Path(__file__).parent.parent / "engine" / "models" / "configs"
H200 = Limits(989e12, 4.8e12)


def sizes_of(name: str, weight_bytes: float = 2.0) -> ModelSizes:
    config = json.loads((CONFIGS / name / "config.json").read_text())
    return model_sizes(decoder_config(name, config), weight_bytes, 2.0)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 39), st.integers(1, 30)), min_size=1, max_size=3),
    st.lists(st.sampled_from([0, 1, 7, 25, 1000]), min_size=1, max_size=3),
)
def test_work_is_the_sum_over_positions(requests, windows) -> None:
    model = ModelSizes(3.0, 5.0, 7.0, 11.0, 13.0, tuple(windows))
    flops = kv = 0.0
    made = []
    for prompt, cached, output in requests:
        cached = min(cached, prompt - 1)
        made.append(RequestSizes(prompt, cached, output))
        flops += 5.0 * output
        for position in range(cached, prompt + output - 1):
            flops += 3.0
            for window in windows:
                seen = min(position + 1, window) if window else position + 1
                flops += 7.0 * seen
                kv += 11.0 * seen if position >= prompt else 0.0
    work = work_of(model, made)
    assert work.flops == pytest.approx(flops)
    assert work.kv_bytes == pytest.approx(kv)
    assert work.output_tokens == sum(output for _, _, output in requests)


def test_the_roof_of_a_case_counted_by_hand() -> None:
    """Qwen3-8B in bf16, 256 requests of 1024 and 1024 tokens on an H200, in microseconds a token:
    weights 12.3, context 47.2, products 29.4, attention 1.3: 11.1 thousand tokens a second."""
    model = sizes_of("Qwen3-8B")
    best = roof(model, work_of(model, [RequestSizes(1024, 0, 1024)] * 256), 256, H200)
    assert 1e6 / best.sequential == pytest.approx(12.3 + 47.2 + 29.4 + 1.3, rel=0.005)
    assert 1e6 / best.overlapped == pytest.approx(12.3 + 47.2, rel=0.005)


def test_twice_the_sequences_halve_what_each_token_pays_for_the_weights() -> None:
    """11.9 thousand need 512 requests at a time (9.4 at 87% of the bytes and 68% of the operations a
    second), whose KV of 1536 tokens on average is 116 GB."""
    model = sizes_of("Qwen3-8B")
    work = work_of(model, [RequestSizes(1024, 0, 1024)] * 512)
    assert roof(model, work, 512, H200).sequential == pytest.approx(11.9e3, rel=0.005)
    assert roof(model, work, 512, Limits(0.68 * 989e12, 0.87 * 4.8e12)).sequential == pytest.approx(
        9.4e3, rel=0.005
    )
    assert 512 * 1536 * model.kv_bytes * 36 == pytest.approx(116e9, rel=0.01)


def test_a_head_may_be_wider_than_the_layers() -> None:
    model = decoder_config("Qwen3-8B", json.loads((CONFIGS / "Qwen3-8B" / "config.json").read_text()))
    head = model.vocab_size * model.hidden_size
    assert model_sizes(model, 0.5, 2.0, 1.0).weight_bytes == 0.5 * model.layer_parameters + head
    assert model_sizes(model, 0.5, 2.0).weight_bytes == 0.5 * (model.layer_parameters + head)


def test_parameters_of_the_shipped_configurations() -> None:
    """Without embeddings where they are not the head too: 0.6, 7.6 and 7.5 billion."""
    for name, billions in (("Qwen3-0.6B", 0.596), ("Qwen3-8B", 7.57), ("Llama-3.1-8B", 7.5)):
        assert sizes_of(name).weight_bytes / 2e9 == pytest.approx(billions, rel=0.01)


def test_a_shared_prefix_is_read_once() -> None:
    model = sizes_of("Qwen3-8B")
    alone = [RequestSizes(2148, 2048, 100)] * 64
    shared = [RequestSizes(2148, 2048, 100, shared=2048)] * 64
    one, other = work_of(model, alone), work_of(model, shared)
    assert one.flops == other.flops
    per_token = model.kv_bytes * 36
    assert one.kv_bytes - other.kv_bytes == per_token * 2048 * 99 * 64
    assert other.shared_bytes == per_token * 2048
    assert roof(model, other, 64, H200).sequential > 1.5 * roof(model, one, 64, H200).sequential


def test_a_run_at_the_roof_uses_everything() -> None:
    model = sizes_of("Qwen3-0.6B")
    work = work_of(model, [RequestSizes(100, 0, 50)] * 32)
    best = roof(model, work, 32, H200)
    compute, move = utilization(model, work, 50, work.output_tokens / best.sequential, H200)
    assert compute + move == pytest.approx(1.0)
    compute, move = utilization(model, work, 50, work.output_tokens / best.overlapped, H200)
    assert max(compute, move) == pytest.approx(1.0)


def test_half_the_weight_bytes_raise_the_roof() -> None:
    bf16, fp8 = sizes_of("Qwen3-8B"), sizes_of("Qwen3-8B", 1.0)
    requests = [RequestSizes(128, 0, 128)] * 64
    assert fp8.weight_bytes * 2 == bf16.weight_bytes
    assert (
        roof(fp8, work_of(fp8, requests), 64, H200).sequential
        > roof(bf16, work_of(bf16, requests), 64, H200).sequential
    )


def test_limits_are_measured_here() -> None:
    limits = measure_limits(torch.device("cpu"), torch.float32, None)
    assert limits.flops_rate > 1e8 and limits.bytes_rate > 1e7
