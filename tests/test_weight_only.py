"""int8 and int4 weights: what is stored, how far it is from the weight, and that engines take them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.engine.engine import Engine
from batchinfer.engine.types import SamplingParams
from batchinfer.kernels.reference import ReferenceOperators
from batchinfer.kernels.weight_only import CHUNK, pack_int4, pack_int8

OPS = ReferenceOperators()
SIZES = {"outputs": st.integers(1, 9), "inputs": st.integers(1, 300), "seed": st.integers(0, 10**6)}


def weight_of(outputs: int, inputs: int, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, inputs, generator=rng) * torch.rand(outputs, 1, generator=rng).exp()


@given(**SIZES)
def test_int8_moves_a_weight_by_half_a_step(outputs: int, inputs: int, seed: int) -> None:
    weight = weight_of(outputs, inputs, seed)
    packed = pack_int8(weight, None)
    assert packed.values.shape == (-(-inputs // CHUNK), outputs, CHUNK)
    assert ((packed.wide() - weight).abs() <= packed.scales[:, None] * 0.5001).all()
    torch.testing.assert_close(packed.scales, weight.abs().amax(1) / 127)
    assert not packed.values.transpose(0, 1).flatten(1)[:, inputs:].any()


@given(**SIZES)
def test_int4_moves_a_weight_by_half_a_step_and_one_at_the_ends(
    outputs: int, inputs: int, seed: int
) -> None:
    weight = weight_of(outputs, inputs, seed)
    packed = pack_int4(weight, None)
    assert packed.values.shape == (-(-inputs // CHUNK), outputs, CHUNK // 2)
    assert packed.wide().shape == weight.shape
    for number, start in enumerate(range(0, inputs, CHUNK)):
        moved = (weight - packed.wide())[:, start : start + CHUNK].abs()
        # The zero point's rounding may push the ends out of the range, by half a step more; the scale's
        # takes up to a 256th of them, which is a sixteenth of a step.
        assert (moved <= packed.scales[number, :, None].float() * 1.07).all()
        part = weight[:, start : start + CHUNK]
        inner = (part > part.amin(1, keepdim=True) * 0.9) & (part < part.amax(1, keepdim=True) * 0.9)
        assert (moved <= packed.scales[number, :, None].float() * 0.5001)[inner].all()


def test_zeros_stay_zeros_and_rows_do_not_meet() -> None:
    weight = torch.zeros(3, 200)
    weight[1] = torch.linspace(0.5, 1.5, 200)
    for pack in (pack_int8, pack_int4):
        wide = pack(weight, None).wide()
        assert not wide[[0, 2]].any()
        torch.testing.assert_close(wide[1], weight[1], atol=0.06, rtol=0.0)
        assert torch.equal(pack(weight[1:2], None).wide()[0], wide[1])


def test_rows_are_rounded_alike_however_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of(11, 140, 3)
    whole = [pack(weight, None).wide() for pack in (pack_int8, pack_int4)]
    monkeypatch.setattr("batchinfer.kernels.weight_only._ROWS", 4)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole, (pack(weight, None).wide() for pack in (pack_int8, pack_int4)), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("quantize", "most"), [("int8", 0.01), ("int4", 0.13)])
def test_a_product_is_that_of_the_rounded_weight(dtype: torch.dtype, quantize: str, most: float) -> None:
    rng = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 330, generator=rng).to(dtype) for n in (7, 48))
    bias = torch.randn(48, generator=rng).to(dtype)
    packed = OPS.pack_linear(weight, bias, quantize)
    assert (packed.out_features, packed.in_features) == (48, 330)
    exact = x.double() @ packed.wide().double().t() + bias.double()
    got = OPS.linear(x, packed)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(OPS.logits(x, packed).double(), exact, rtol=1e-4, atol=1e-4)
    plain = x.double() @ weight.double().t() + bias.double()
    assert 1e-3 < (exact - plain).norm() / plain.norm() < most


def test_an_engine_rounds_what_it_loads(tmp_path: Path) -> None:
    """int4's log-probabilities move more than int8's."""
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
    for quantize in (None, "int8", "int4"):
        with Engine(str(tmp_path), operators="reference", quantize=quantize, **settings) as engine:
            (completion,) = engine.generate("some bytes", sampling)
        found.append(torch.tensor([entry.logprob for entry in completion.prompt_logprobs[1:]]))
    int8, int4 = ((one - found[0]).abs().max() for one in found[1:])
    assert 0.0 < int8 < 0.01 and int8 < int4 < 0.2
