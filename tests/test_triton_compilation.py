"""The Triton kernels compile ahead of time, without a GPU, and fit into every target's shared memory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent.parent / "benchmarks" / "gpu"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    try:
        import compile_kernels
    finally:
        sys.path.remove(str(FOLDER))
    return compile_kernels


def check(rows: Sequence[object]) -> None:
    assert rows
    for row in rows:
        assert row.shared_bytes <= row.limit_bytes, row
        if row.kernel in ("prefill", "decode", "shared", "product") and "fp32" not in row.shape:
            assert "mma" in row.instructions, row


def test_a_model_in_bf16(tool: ModuleType) -> None:
    rows = tool.compile_shape("Qwen3-0.6B", "sm_90")
    check(rows)
    names = {row.kernel for row in rows}
    assert names == {
        "norm",
        "rotary",
        "leaders",
        "pieces",
        "prefill",
        "decode",
        "shared",
        "reduce",
        "activation",
        "bound",
        "filter",
        "choose",
    }
    assert any("wgmma" in row.instructions for row in rows if row.kernel == "prefill")


def test_narrow_weights_meet_tensor_cores(tool: ModuleType) -> None:
    """Also those of a few rows, whose tile of 16 tokens is a Hopper product's smaller side."""
    rows = tool.compile_shape("Qwen3-8B int4", "sm_90")
    check(rows)
    assert {row.kernel for row in rows} == {"product", "sum"}
    products = [row for row in rows if row.kernel == "product"]
    assert {"M=16", "M=64", "M=128"} <= {part for row in products for part in row.tile.split()}
    assert all("wgmma" in row.instructions and row.spills == 0 for row in products)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("Qwen3-0.6B", "sm_80"),
        ("Gemma-2-9B fp8", "sm_89"),
        ("256 fp32", "sm_89"),
        ("Qwen3-8B int8", "sm_89"),
    ],
)
def test_the_largest_tiles_fit(tool: ModuleType, name: str, target: str) -> None:
    """Beside what the command compiles: all shapes for all targets, in minutes."""
    check(tool.compile_shape(name, target))


def test_fp8_is_left_out_where_a_gpu_has_none(tool: ModuleType) -> None:
    assert tool.compile_shape("Qwen3-8B fp8", "sm_80") == []


def test_a_kernel_too_large_fails_the_command(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = tool.Compiled("a", "sm_89", "decode", "M=16", 4, 102_400, 101_376, 64, 0, "")
    monkeypatch.setattr(tool, "compile_shape", lambda name, target: [row])
    assert tool.main(["--shapes", "Qwen3-8B", "--targets", "sm_89"]) == 1
    said = capsys.readouterr()
    assert "| decode | M=16 | 4 | 102,400 |" in said.out
    assert said.err.strip() == ("decode of a takes 102,400 bytes of shared memory, but sm_89 has 101,376.")
