"""Products with int8 and int4 weights: the Triton kernels against the reference, at every edge of tiles.

Run as triton_operators.py is.
"""

from __future__ import annotations

import pytest
import torch
from triton_operators import DEVICE, DTYPES, OPS, REFERENCE, TOLERANCE, random

from batchinfer.kernels.triton.tiles import product_tile
from batchinfer.kernels.weight_only import CHUNK

# Whole chunks and tiles, one less and one more, and an input row that no vector of 16 bytes divides.
SHAPES = [(64, 128), (65, 129), (1, 1), (63, 127), (130, 192), (48, 513), (200, 64)]


def check(rows: int, outputs: int, inputs: int, dtype: torch.dtype, quantize: str, biased: bool) -> None:
    rng = torch.Generator().manual_seed(rows * outputs + inputs)
    weight = random(rng, outputs, inputs).to(DEVICE, dtype)
    bias = random(rng, outputs).to(DEVICE, dtype) if biased else None
    # A part of wider rows, as a step's tensors may be.
    x = random(rng, rows, inputs + 3).to(DEVICE, dtype)[:, :inputs]
    packed = OPS.pack_linear(weight, bias, quantize)
    assert (packed.out_features, packed.in_features) == (outputs, inputs)
    expected = REFERENCE.logits(x, REFERENCE.pack_linear(weight, bias, quantize))
    # Sums of products of normally distributed numbers grow with the root of their count.
    near = 1e-6 * (inputs + 4) ** 0.5 * 8
    sums = OPS.logits(x, packed)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums, expected, atol=near, rtol=1e-5)
    got = OPS.linear(x, packed)
    assert got.dtype == dtype and got.shape == (rows, outputs)
    torch.testing.assert_close(got.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 128])
def test_products_over_edges(quantize: str, rows: int) -> None:
    for number, (outputs, inputs) in enumerate(SHAPES):
        check(rows, outputs, inputs, DTYPES[number % len(DTYPES)], quantize, number % 2 == 0)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(3, 70, 1200), (130, 40, 1100), (65, 130, 520)])
def test_inputs_in_splits(quantize: str, rows: int, outputs: int, inputs: int) -> None:
    """The last split is a short one, and its last chunk too."""
    tile = product_tile(rows, outputs, -(-inputs // CHUNK), DTYPES[-1], (9, 0))
    assert tile.splits > 1 or inputs == 520
    for biased in (False, True):
        check(rows, outputs, inputs, DTYPES[-1], quantize, biased)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_nothing_times_a_weight(quantize: str) -> None:
    packed = OPS.pack_linear(torch.ones(8, 16, device=DEVICE), None, quantize)
    assert OPS.linear(torch.ones(0, 16, device=DEVICE), packed).shape == (0, 8)


@pytest.mark.parametrize(
    ("dtype", "behind", "less"), [(torch.bfloat16, 0x4300, 128), (torch.float16, 0x6400, 1024)]
)
def test_four_bits_behind_a_power_of_two_are_widened_exactly(dtype, behind, less) -> None:
    """What the kernel computes, in torch: the interpreter multiplies no bf16."""
    bits, zeros = torch.arange(16, dtype=torch.int16)[:, None], torch.arange(16)[None, :]
    wide = (bits | behind).view(dtype) - (zeros + less).to(dtype)
    assert torch.equal(wide.float(), (bits - zeros).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
def test_tiles_cover_all_inputs_in_splits_that_few_rows_do_not_change(dtype, capability) -> None:
    for outputs in (1, 64, 576, 4096, 24576, 151936):
        for chunks in (1, 3, 5, 32, 96, 224):
            splits = {
                product_tile(rows, outputs, chunks, dtype, capability).splits for rows in (1, 16, 17, 64)
            }
            assert len(splits) == 1
            for rows in (1, 64, 65, 128, 2048):
                tile = product_tile(rows, outputs, chunks, dtype, capability)
                each = -(-chunks // tile.splits)
                assert (tile.splits - 1) * each < chunks <= tile.splits * each
                programs = tile.splits * -(-outputs // tile.outputs) * -(-rows // tile.rows)
                assert tile.splits == 1 or programs <= (528 if dtype != torch.float32 else 2 * 528)
