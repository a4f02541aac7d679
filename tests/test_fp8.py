"""fp8 rows and products: how far they are from exact ones, and that engines take them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.engine.engine import Engine
from batchinfer.engine.types import SamplingParams
from batchinfer.kernels.fp8 import MOST, FP8Linear, pack_fp8, quantize_rows
from batchinfer.kernels.reference import ReferenceOperators

OPS = ReferenceOperators()


@given(st.integers(1, 5), st.integers(1, 70), st.floats(1e-6, 1e6), st.integers(0, 10**6))
def test_a_number_moves_by_at_most_a_sixteenth_or_half_of_the_least_step(rows, size, spread, seed) -> None:
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * spread
    made = quantize_rows(x)
    # Three bits of mantissa: half a step of an eighth. Below 2**-6 steps are 2**-9, in units of the scale.
    allowed = torch.maximum(x.abs() / 16, made.scales[:, None] * 2.0**-10) * 1.0001
    assert ((made.wide() - x).abs() <= allowed).all()
    assert torch.equal(made.values.float().abs().amax(1), torch.full((rows,), MOST))


def test_rows_have_scales_of_their_own_and_zeros_stay() -> None:
    x = torch.tensor([[1.0, -2.0], [0.0, 0.0], [1e-4, 3e-5]])
    made = quantize_rows(x)
    assert torch.equal(made.wide()[1], torch.zeros(2))
    torch.testing.assert_close(made.wide(), x, rtol=1 / 16, atol=0.0)
    assert torch.equal(made.wide()[0], quantize_rows(x[:1]).wide()[0])


def test_nothing_quantizes_to_nothing() -> None:
    weight = pack_fp8(torch.ones(16, 8), None)
    assert OPS.linear(torch.ones(0, 8), weight).shape == (0, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_is_that_of_the_rounded_rows(dtype: torch.dtype, biased: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 256, generator=rng).to(dtype) for n in (7, 48))
    bias = torch.randn(48, generator=rng).to(dtype) if biased else None
    packed = OPS.pack_linear(weight, bias, "fp8")
    assert isinstance(packed, FP8Linear)
    assert (packed.out_features, packed.in_features) == (48, 256)
    got = OPS.linear(x, packed)
    assert got.dtype == dtype
    exact = quantize_rows(x).wide().double() @ quantize_rows(weight).wide().double().t()
    exact = exact if bias is None else exact + bias.double()
    torch.testing.assert_close(got.double(), exact, rtol=1e-2, atol=5e-2)
    plain = OPS.linear(x, OPS.pack_linear(weight, bias, None)).double()
    # Each factor is off by up to a sixteenth, 2.2 % on average; in a sum of 256 these mostly cancel.
    error = (got.double() - plain).norm() / plain.norm()
    assert 0.01 < error < 0.06


def test_another_quantization_is_named() -> None:
    with pytest.raises(ValueError, match="int2"):
        OPS.pack_linear(torch.ones(2, 2), None, "int2")


def test_an_engine_quantizes_what_it_loads(tmp_path: Path) -> None:
    """Its log-probabilities move a little, and by no more than that."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 320,
        "max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = {"load_format": "dummy", "device": "cpu", "dtype": "fp32", "kv_bytes": 1 << 20}
    sampling = SamplingParams(max_tokens=1, ignore_eos=True, prompt_logprobs=0)
    found = []
    for quantize in (None, "fp8"):
        with Engine(str(tmp_path), operators="reference", quantize=quantize, **settings) as engine:
            (completion,) = engine.generate("some bytes", sampling)
        found.append(torch.tensor([entry.logprob for entry in completion.prompt_logprobs[1:]]))
    difference = (found[0] - found[1]).abs().max()
    assert 0.0 < difference < 0.05
