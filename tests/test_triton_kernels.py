"""The Triton kernels, run by Triton's interpreter: chosen before Triton is imported, so elsewhere.

What is tested stands in triton_operators.py and triton_model.py, which also run on a GPU as they are.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TESTS = Path(__file__).parent


def interpret(*arguments: str, **environment: str) -> None:
    """Run pytest with the interpreter; fails with its output."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", *arguments],
        cwd=TESTS.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    print(done.stdout[-20000:])
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_operators_are_those_of_the_reference() -> None:
    interpret(str(TESTS / "triton_operators.py"), str(TESTS / "triton_weight_only.py"))


def test_a_model_writes_the_tokens_of_the_reference() -> None:
    interpret(str(TESTS / "triton_model.py"))


@pytest.mark.slow
def test_many_random_steps() -> None:
    interpret(
        str(TESTS / "triton_operators.py"),
        "-k",
        "random_mixed or equal_blocks",
        BATCHINFER_RANDOM_STEPS="60",
    )


@pytest.mark.gpu
@pytest.mark.parametrize("file", ["triton_operators.py", "triton_weight_only.py", "triton_model.py"])
def test_the_same_on_a_gpu(file: str) -> None:
    assert pytest.main(["-q", "-p", "no:cacheprovider", str(TESTS / file)]) == 0
