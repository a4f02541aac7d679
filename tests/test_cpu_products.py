"""Products with packed weights against the reference: shapes, types, levels, thread counts, int8."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from cpu_levels import DTYPES, LEVELS, TOLERANCE, threads

from batchinfer.kernels.cpu.operators import CPUOperators, load
from batchinfer.kernels.cpu.panels import PanelInt8Linear, PanelLinear, turned
from batchinfer.kernels.ops import KVSpec, PackedLinear
from batchinfer.kernels.reference import ReferenceOperators

pytestmark = pytest.mark.skipif(not LEVELS, reason="the CPU has no AVX2")

REFERENCE = ReferenceOperators()


@pytest.fixture(scope="module", params=LEVELS)
def ops(request: pytest.FixtureRequest) -> CPUOperators:
    """The operators at each level that this CPU runs."""
    return load(request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 5, 64])
def test_linear(ops: CPUOperators, dtype: torch.dtype, bias: bool, rows: int) -> None:
    rng = torch.Generator().manual_seed(rows)
    weight = (torch.randn(100, 72, generator=rng) / 8).to(dtype)
    offset = torch.randn(100, generator=rng).to(dtype) if bias else None
    x = torch.randn(rows, 72, generator=rng).to(dtype)
    got = ops.linear(x, ops.pack_linear(weight, offset, None))
    expected = REFERENCE.linear(x, REFERENCE.pack_linear(weight, offset, None))
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "into"), [(128, 64), (192, 72), (100, 72), (64, 76), (1, 4), (6, 10)])
def test_products_of_a_row_are_its_own(
    ops: CPUOperators, dtype: torch.dtype, out: int, into: int, quantize: str | None
) -> None:
    """Close to the reference, with and without what follows in the same pass, and for our own products
    the same bits whatever rows lie beside a row and however many threads there are."""
    rng = torch.Generator().manual_seed(out)
    weight = (torch.randn(out, into, generator=rng) / 8).to(dtype)
    bias = torch.randn(out, generator=rng).to(dtype)
    x = torch.randn(101, into, generator=rng).to(dtype)
    packed, plain = ops.pack_linear(weight, bias, quantize), REFERENCE.pack_linear(weight, bias, None)
    tolerance = TOLERANCE[dtype] if quantize is None else 0.15
    close = {"atol": tolerance, "rtol": tolerance}
    calls = [lambda x: ops.linear(x, packed), lambda x: ops.logits(x, packed)]
    expected = [REFERENCE.linear(x, plain), REFERENCE.logits(x, plain)]
    for kind in ("silu", "gelu_tanh") if out % 2 == 0 else ():
        calls.append(lambda x, kind=kind: ops.gated_linear(x, packed, kind))
        expected.append(REFERENCE.gated_linear(x, plain, kind))
    own = isinstance(packed, PanelLinear | PanelInt8Linear)
    for call, wanted in zip(calls, expected, strict=True):
        with threads(1):
            result = call(x)
        assert result.dtype == wanted.dtype
        torch.testing.assert_close(result, wanted, **close)
        assert call(x[:0]).shape == (0, wanted.shape[1])
        for count in (1, 2, 3):
            with threads(count):
                assert torch.equal(call(x), result) or not own
                for first, last in ((0, 1), (3, 10), (40, 46), (90, 101)):
                    part = call(x[first:last])
                    assert torch.equal(part, result[first:last]) or not own
                    torch.testing.assert_close(part, wanted[first:last], **close)


def test_sums_of_logits_are_not_rounded(ops: CPUOperators) -> None:
    rng = torch.Generator().manual_seed(5)
    weight, x = (torch.randn(n, 576, generator=rng).bfloat16() for n in (640, 9))
    packed = ops.pack_linear(weight, None, None)
    if isinstance(packed, PanelLinear):
        torch.testing.assert_close(
            ops.logits(x, packed), x.float() @ weight.float().T, atol=1e-3, rtol=1e-4
        )


def rounded_rows(x: torch.Tensor, packed: PackedLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` as an int8 product sees it, turned where the weight is, and the step between its values."""
    wide = x.float()
    if isinstance(packed, PanelInt8Linear):
        parts = turned(wide).view(len(x), -(-x.shape[1] // 64), 64)
        step = (parts.abs().amax(2, keepdim=True) / 127).clamp_min(1e-30)
        return ((parts / step).round() * step).flatten(1), step.amax(1) * 8
    size = torch.minimum(wide.abs().amax(1, keepdim=True), 4 * wide.square().mean(1, keepdim=True).sqrt())
    held = wide.clamp(-size, size)
    step = (size / 127).clamp_min(1e-30)
    return (held / step).round() * step + (wide - held), step


def rounded_weight(weight: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
    """``weight`` with each row rounded to 8 bits, turned where it is: times 64, as rows are over 64."""
    wide = turned(weight) * 64 if isinstance(packed, PanelInt8Linear) else weight.float()
    scale = wide.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return (wide / scale).round() * scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 5, 64])
def test_int8_linear_rounds_rows_and_keeps_what_stands_out(
    ops: CPUOperators, dtype: torch.dtype, bias: bool, rows: int
) -> None:
    rng = torch.Generator().manual_seed(rows)
    weight = (torch.randn(100, 200, generator=rng) / 8).to(dtype)
    weight[7] = 0
    offset = torch.randn(100, generator=rng).to(dtype) if bias else None
    x = (torch.randn(rows, 200, generator=rng) * torch.rand(rows, 1, generator=rng) * 9).to(dtype)
    x[:1] = 0
    x[-1:, 9] = 900.0
    x[-1:, 130] = -300.0
    packed = ops.pack_linear(weight, offset, "int8")
    got = ops.linear(x, packed)
    (whole, step), whole_weight = rounded_rows(x, packed), rounded_weight(weight, packed)
    expected = whole @ whole_weight.T + (0 if offset is None else offset.float())
    assert got.dtype == dtype
    # A value on the edge between two steps may be rounded to the other one.
    edge = step * whole_weight.abs().amax()
    assert ((got.float() - expected).abs() <= edge + TOLERANCE[dtype] * (1 + expected.abs())).all()


@pytest.mark.parametrize("inputs", [64, 576, 1000])
def test_int8_products_with_channels_that_stand_out_are_close(ops: CPUOperators, inputs: int) -> None:
    """A few channels, the same in every row, are 20 times the others: a percent is lost, or so."""
    rng = torch.Generator().manual_seed(inputs)
    weight = torch.randn(64, inputs, generator=rng).bfloat16()
    x = torch.randn(50, inputs, generator=rng)
    x[:, torch.randperm(inputs, generator=rng)[: inputs // 32]] *= 20
    x = x.bfloat16()
    exact = x.float() @ weight.float().T
    lost = ops.linear(x, ops.pack_linear(weight, None, "int8")).float() - exact
    assert lost.norm() < 0.017 * exact.norm()


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize(("rows", "into"), [(1400, 576), (70, 12000)])
def test_blocks_of_rows_change_no_bit(
    ops: CPUOperators, rows: int, into: int, quantize: str | None
) -> None:
    """More rows than a core's cache holds are multiplied block by block."""
    rng = torch.Generator().manual_seed(into)
    weight = (torch.randn(128, into, generator=rng) / into**0.5).bfloat16()
    x = torch.randn(rows, into, generator=rng).bfloat16()
    packed = ops.pack_linear(weight, None, quantize)
    with threads(2):
        result = ops.linear(x, packed)
    torch.testing.assert_close(
        result,
        REFERENCE.linear(x, REFERENCE.pack_linear(weight, None, None)),
        **({"atol": 2e-2, "rtol": 2e-2} if quantize is None else {"atol": 0.1, "rtol": 0.1}),
    )
    if isinstance(packed, PanelLinear | PanelInt8Linear):
        for first in (0, rows // 2, rows - 9):
            assert torch.equal(ops.linear(x[first : first + 9], packed), result[first : first + 9])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_int8_products_of_what_is_not_finite_are_not(ops: CPUOperators, value: float) -> None:
    """Its row alone: a damaged model is seen by its logits."""
    rng = torch.Generator().manual_seed(3)
    packed = ops.pack_linear(torch.randn(64, 128, generator=rng).bfloat16(), None, "int8")
    x = torch.randn(20, 128, generator=rng).bfloat16()
    clean = ops.logits(x, packed)
    x[7, 100] = value
    got = ops.logits(x, packed)
    assert not got[7].isfinite().any()
    others = torch.arange(20) != 7
    assert torch.equal(got[others], clean[others])


def test_other_formats_are_refused_by_name(ops: CPUOperators) -> None:
    with pytest.raises(ValueError, match="to int4: choose quantize int8"):
        ops.pack_linear(torch.zeros(4, 4), None, "int4")
    with pytest.raises(ValueError, match="choose kv_dtype auto, bf16 or int8"):
        ops.allocate_kv(KVSpec(1, 1, 16, torch.float8_e4m3fn), 1, torch.device("cpu"))
    with pytest.raises(ValueError, match="not 7: choose operators reference"):
        ops.allocate_kv(KVSpec(1, 1, 7, torch.float32), 1, torch.device("cpu"))


SMALLER_TEAM = """
import torch
from batchinfer.kernels.cpu.operators import load

torch.set_num_threads(4)
ops, rng = load(), torch.Generator().manual_seed(0)
weight = (torch.randn(192, 72, generator=rng) / 8).bfloat16()
x = torch.randn(300, 72, generator=rng).bfloat16()
for quantize, limit in ((None, 0.05), ("int8", 0.15)):
    got = ops.linear(x, ops.pack_linear(weight, None, quantize))
    assert (got.float() - x.float() @ weight.float().T).abs().max() < limit, quantize
"""


def test_a_team_of_fewer_threads_than_were_asked_for_does_everything() -> None:
    """The runtime may give fewer: then those take over what the others were to do."""
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}
    subprocess.run([sys.executable, "-P", "-c", SMALLER_TEAM], env=environment, check=True, timeout=300)


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize(("out", "into"), [(1, 64), (17, 64), (64, 128), (200, 64), (1000, 64)])
def test_the_best_logits_are_those_that_sampling_would_choose(
    ops: CPUOperators, out: int, into: int, quantize: str | None
) -> None:
    """Whatever the logits are: equal, infinite, no numbers, with rows shared by threads in any way."""
    rng = torch.Generator().manual_seed(out)
    weight = torch.randn(out, into, generator=rng).bfloat16()
    weight[out // 2 :] = weight[: out - out // 2].clone()  # each logit twice
    damage = {"none": [], "low": [-torch.inf], "high": [torch.inf], "odd": [torch.nan, torch.inf]}
    for kind, values in damage.items():
        bias = torch.zeros(out)
        for i, value in enumerate(values):
            bias[out // 3 - i :: 7] = value
        if kind == "low":
            bias[: -(-out // 2)] = -torch.inf
        packed = ops.pack_linear(weight, bias.bfloat16(), quantize)
        if not isinstance(packed, PanelLinear | PanelInt8Linear):
            assert ops.best_logits(torch.zeros(1, into).bfloat16(), packed) is None
            continue
        for rows in (0, 1, 6, 7, 65, 131):
            x = torch.randn(rows, into, generator=rng).bfloat16()
            x[rows // 2 : rows // 2 + 1] = torch.nan
            x[rows // 3 : rows // 3 + 1] = 0
            logits = ops.logits(x, packed)
            nothing = torch.zeros(rows, 2, dtype=torch.int64)
            expected = ops.sample(logits, torch.zeros(rows), nothing, nothing[:, 0])
            for count in (1, 2, 3):
                with threads(count):
                    best = ops.best_logits(x, packed)
                assert best is not None
                assert torch.equal(best[0], expected)
                values = logits.gather(1, expected[:, None])[:, 0]
                assert torch.equal(best[1].nan_to_num(9e9), values.nan_to_num(9e9))
