"""How much memory is found and how many blocks are made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.engine.memory import HostMemory, cache_size, host_memory
from batchinfer.engine.types import ModelError

GIB = 1 << 30


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def machine(tmp_path: Path, own: str) -> dict[str, Path]:
    write(tmp_path / "meminfo", f"MemTotal: {9 * GIB // 1024} kB\nMemAvailable:   {8 * GIB // 1024} kB\n")
    write(tmp_path / "cgroup", own)
    return {
        "meminfo": tmp_path / "meminfo",
        "own_cgroups": tmp_path / "cgroup",
        "cgroup_root": tmp_path / "fs",
    }


def group(folder: Path, limit: str, used: int, cache: int, version: int = 2) -> None:
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}
    limit_name, usage_name, cache_name = names.get(
        version, ("memory.max", "memory.current", "inactive_file")
    )
    write(folder / limit_name, f"{limit}\n")
    write(folder / usage_name, f"{used}\n")
    write(folder / "memory.stat", f"anon 5\n{cache_name} {cache}\n")


def test_without_limits_it_is_what_the_machine_has(tmp_path: Path) -> None:
    places = machine(tmp_path, "0::/a/b\n")
    assert host_memory(**places).available == 8 * GIB
    group(tmp_path / "fs" / "a", "max", 5, 0)
    assert host_memory(**places).available == 8 * GIB
    assert host_memory(**places).total == 9 * GIB
    (tmp_path / "cgroup").unlink()
    assert host_memory(**places).available == 8 * GIB


@pytest.mark.parametrize("folder", ["a/b", "a", ""])
def test_the_tightest_limit_above_the_process_counts(tmp_path: Path, folder: str) -> None:
    places = machine(tmp_path, "0::/a/b\n")
    group(tmp_path / "fs" / "a" / "b", str(7 * GIB), 0, 0)
    group(tmp_path / "fs" / folder, str(3 * GIB), 2 * GIB, GIB // 2)
    assert host_memory(**places) == HostMemory(3 * GIB, 3 * GIB - 2 * GIB + GIB // 2)


def test_the_first_version_of_cgroups(tmp_path: Path) -> None:
    places = machine(tmp_path, "12:cpu,cpuacct:/x\n4:memory:/docker/7\n0::/\n")
    group(tmp_path / "fs" / "memory", str(2**63 - 4096), 0, 0, version=1)
    assert host_memory(**places).available == 8 * GIB
    # Inside a container the path is the host's and only the root of the mount is there.
    group(tmp_path / "fs" / "memory", str(2 * GIB), GIB, 0, version=1)
    assert host_memory(**places).available == GIB


def test_systems_that_do_not_say_ask_for_kv_bytes(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="set kv_bytes"):
        host_memory(meminfo=tmp_path / "none")


@given(
    available=st.integers(-100, 10**7),
    block_bytes=st.integers(1, 5000),
    block_size=st.integers(1, 64),
    sequences=st.integers(1, 50),
    wanted=st.none() | st.integers(1, 3000),
    limit=st.integers(1, 3000),
)
def test_the_cache_fits_serves_one_full_sequence_and_holds_nothing_useless(
    available: int, block_bytes: int, block_size: int, sequences: int, wanted: int | None, limit: int
) -> None:
    try:
        size = cache_size(
            available_bytes=available,
            block_bytes=block_bytes,
            block_size=block_size,
            max_sequences=sequences,
            wanted_context=wanted,
            model_context=limit,
        )
    except ModelError:
        too_long = wanted is not None and wanted > limit
        needed = -(-(wanted or 1) // block_size) * block_bytes
        assert too_long or needed > available
        return
    assert size.num_blocks * block_bytes <= available
    assert size.max_context <= limit
    assert size.max_context == wanted if wanted else size.max_context >= 1
    per_sequence = -(-size.max_context // block_size)
    assert per_sequence <= size.num_blocks <= per_sequence * sequences


def test_errors_say_the_bytes_and_the_field() -> None:
    sizes = {"block_bytes": 1000, "block_size": 16, "max_sequences": 4, "model_context": 4096}
    with pytest.raises(
        ModelError, match=r"2048 tokens needs 128,000 bytes .* there are 5,000; lower max_context"
    ):
        cache_size(available_bytes=5000, wanted_context=2048, **sizes)
    with pytest.raises(ModelError, match=r"needs 1,000 bytes .* raise memory_share"):
        cache_size(available_bytes=50, wanted_context=None, **sizes)
    with pytest.raises(ModelError, match="max_context is 5000, but the model takes between 1 and 4096"):
        cache_size(available_bytes=5000, wanted_context=5000, **sizes)
