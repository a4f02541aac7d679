"""Kernels that are shipped with the package, as in an image: used without a compiler, if they are ours."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from batchinfer.kernels.cpu import build
from batchinfer.kernels.ops import KernelsUnavailable

LEVELS = build.levels(build.cpu_flags())
pytestmark = pytest.mark.skipif(not LEVELS, reason="this CPU runs none of the kernels' instruction sets")

# Stands for g++: its library is an empty one of the linker's, and it notes what it was asked for.
COMPILER = """#!/bin/sh
echo "$*" >> {calls}
while [ $# -gt 1 ]; do case "$1" in -o) out="$2";; -shared) shared=1;; esac; shift; done
[ -z "$shared" ] && {{ : > "$2$1"; : > "$out"; exit 0; }}
exec g++ -shared -o "$1" -x c++ /dev/null
"""


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The empty folder in which shipped libraries are looked for; there is no compiler."""
    folder = tmp_path / "shipped"
    monkeypatch.setattr(build, "SHIPPED", folder)
    monkeypatch.setenv("BATCHINFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "absent-compiler")
    return folder


def with_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Have a compiler that is quick; returns the file of what it was asked for."""
    compiler, calls = tmp_path / "compiler", tmp_path / "calls"
    compiler.write_text(COMPILER.format(calls=calls))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    return calls


def test_every_level_is_shipped_and_needs_no_compiler_then(
    shipped: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(KernelsUnavailable, match="absent-compiler"):
        build.build()
    calls = with_compiler(monkeypatch, tmp_path)
    libraries = build.ship()
    assert sorted(libraries) == sorted(shipped.iterdir())
    assert [path.name.rpartition("-")[0] for path in libraries] == [
        f"kernels-{level}" for level in get_args(build.Level)
    ]
    linked = [line for line in calls.read_text().splitlines() if "-shared" in line]
    assert ["-mavx512bf16" in line for line in linked] == [False, False, True]
    monkeypatch.setenv("CXX", "absent-compiler")
    for level in LEVELS:
        loaded = build.build(level)
        assert Path(loaded._name).parent == shipped and f"kernels-{level}-" in loaded._name
    assert not (tmp_path / "cache").exists()


def test_what_was_shipped_for_other_sources_or_flags_is_not_used(
    shipped: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_compiler(monkeypatch, tmp_path)
    build.ship()
    monkeypatch.setenv("CXX", "absent-compiler")
    build.build(LEVELS[0])
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-DOTHER"))
    with pytest.raises(KernelsUnavailable, match="absent-compiler"):
        build.build(LEVELS[0])
