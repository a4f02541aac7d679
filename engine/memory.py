"""How much memory there is, and how many blocks of KV cache it makes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from batchinfer.engine.types import ModelError


@dataclass(frozen=True, slots=True)
class CacheSize:
    """A KV cache of ``num_blocks`` blocks, in which one sequence may have ``max_context`` tokens."""

    num_blocks: int
    max_context: int


def cache_size(
    *,
    available_bytes: int,
    block_bytes: int,
    block_size: int,
    max_sequences: int,
    wanted_context: int | None,
    model_context: int,
) -> CacheSize:
    """The most blocks that ``available_bytes`` hold and ``max_sequences`` full sequences can use.

    Without ``wanted_context`` the context is the model's own limit, or what fits. Raises ModelError
    when a sequence of ``wanted_context`` tokens does not fit, or is longer than the model allows.
    """
    if wanted_context is not None and not 0 < wanted_context <= model_context:
        raise ModelError(
            f"max_context is {wanted_context}, but the model takes between 1 and {model_context} tokens."
        )
    fitting = max(0, available_bytes) // block_bytes
    context = wanted_context or min(model_context, fitting * block_size)
    per_sequence = -(-context // block_size)
    if fitting < max(1, per_sequence):
        needed = max(1, per_sequence) * block_bytes
        remedy = (
            "max_context or free memory"
            if wanted_context
            else "memory use elsewhere, or raise memory_share"
        )
        raise ModelError(
            f"One sequence of {context or block_size} tokens needs {needed:,} bytes of KV cache, "
            f"but there are {max(0, available_bytes):,}; lower {remedy}."
        )
    return CacheSize(min(fitting, max_sequences * per_sequence), context)


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes that a process may take in all, and those that are left now."""

    total: int
    available: int


def host_memory(
    meminfo: Path = Path("/proc/meminfo"),
    own_cgroups: Path = Path("/proc/self/cgroup"),
    cgroup_root: Path = Path("/sys/fs/cgroup"),
) -> HostMemory:
    """The machine's memory, or less where a cgroup limits it.

    Page cache counts as available. Raises ModelError where the system does not say.
    """
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        total, available = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError) as error:
        raise ModelError("This system does not say how much memory it has; set kv_bytes.") from error
    for group in _cgroup_memory(own_cgroups, cgroup_root):
        total, available = min(total, group.total), min(available, group.available)
    return HostMemory(total, available)


def _cgroup_memory(own_cgroups: Path, root: Path) -> Iterator[HostMemory]:
    """Every limit above this process and what it leaves, for cgroups of version 1 and 2."""
    try:
        lines = own_cgroups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, usage, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        group = base / path.lstrip("/")
        # In a container the path is often the host's, and the container's own group is the root.
        for folder in (group, *group.parents):
            left = _left_in_group(folder / limit, folder / usage, folder / "memory.stat", cache)
            if left is not None:
                yield left
            if folder == base:
                break


def _left_in_group(limit: Path, usage: Path, stat: Path, cache: str) -> HostMemory | None:
    try:
        most, used = limit.read_text().strip(), int(usage.read_text())
        entries = dict(line.split(maxsplit=1) for line in stat.read_text().splitlines())
    except (OSError, ValueError):
        return None
    if most == "max":
        return None
    return HostMemory(int(most), int(most) - used + int(entries.get(cache, 0)))
