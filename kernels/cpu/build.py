"""The C++ kernels as a shared library: shipped beside their sources, else built at first use and cached.

python -m batchinfer.kernels.cpu.build      # build each level beside the sources, as an image does
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

from batchinfer.kernels.ops import KernelsUnavailable

Level = Literal["avx2", "avx512", "avx512_bf16"]
"""Instruction sets that the kernels are written for, each including those before it."""

# What /proc/cpuinfo calls the features of a level, beyond those of the level before it.
_FEATURES: dict[Level, tuple[str, ...]] = {
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    "avx512_bf16": ("avx512_bf16", "avx512_vnni"),
}
# No contraction: a * b + c must round in the same way wherever the compiler places it.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden")

# Libraries that were built with the package: machines that use them need no compiler.
SHIPPED = Path(__file__).parent / "shipped"


def cpu_flags() -> frozenset[str]:
    """What /proc/cpuinfo says that this CPU can do; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def levels(flags: frozenset[str]) -> tuple[Level, ...]:
    """The levels that a CPU with these flags can run, lowest first."""
    able: list[Level] = []
    for level, features in _FEATURES.items():
        if not flags.issuperset(features):
            break
        able.append(level)
    return tuple(able)


def cache_folder() -> Path:
    """Where built libraries are kept: BATCHINFER_CACHE, else the user's cache folder."""
    if folder := os.environ.get("BATCHINFER_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "batchinfer"


def compiler() -> list[str]:
    """The compiler's command: CXX, else the first of g++, clang++ and c++ on the path."""
    if command := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(command[0]):
            return command
        raise KernelsUnavailable(f"CXX names {command[0]}, which is not on the path.")
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise KernelsUnavailable("there is no C++ compiler; install g++ or set CXX.")


def build(level: Level | None = None) -> ctypes.CDLL:
    """The kernels' library for ``level`` (None: the best this CPU runs): the shipped one if its sources
    are ours, else the cache's, built where that lacks it.

    Of several processes that need it at once one builds and the others wait for it. Raises
    KernelsUnavailable when the CPU is too old, there is no compiler, or the build fails.
    """
    able = levels(cpu_flags())
    if not able:
        raise KernelsUnavailable(f"this CPU ({platform.machine()}) has no AVX2 with FMA.")
    level = level or able[-1]
    if level not in able:
        raise KernelsUnavailable(f"this CPU runs {', '.join(able)}, but not {level}.")
    library = _shipped(level)
    if not library.exists():
        library = _cached(level)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise KernelsUnavailable(f"the built kernels can't be loaded: {error}.") from error


def ship() -> list[Path]:
    """Build every level, whatever this CPU runs, beside the sources; returns the libraries."""
    SHIPPED.mkdir(exist_ok=True)
    libraries = []
    for level in get_args(Level):
        libraries.append(_shipped(level))
        _compile([*compiler(), *_flags(level)], libraries[-1])
    return libraries


def _shipped(level: Level) -> Path:
    return SHIPPED / f"kernels-{level}-{_digest(*_flags(level))}.so"


def _cached(level: Level) -> Path:
    """The library in the cache, built unless it is there."""
    command = [*compiler(), *_flags(level)]
    library = cache_folder() / f"kernels-{level}-{_digest(*command, _version(command[0]))}.so"
    if not library.exists():
        try:
            with _locked(library):
                if not library.exists():
                    _compile(command, library)
        except OSError as error:
            raise KernelsUnavailable(
                f"the cache {library.parent} can't be written ({error.strerror}); set BATCHINFER_CACHE."
            ) from error
    return library


def _sources(kind: str) -> list[Path]:
    return sorted(Path(__file__).parent.glob(kind))


def _digest(*parts: str) -> str:
    """Names what is built from the sources with what ``parts`` say."""
    key = hashlib.sha256()
    for part in (*parts, *(path.read_text() for path in _sources("*.cpp") + _sources("*.h"))):
        key.update(part.encode())
        key.update(b"\0")
    return key.hexdigest()[:24]


def _flags(level: Level) -> list[str]:
    return [*_FLAGS, *_target_flags(level)]


def _target_flags(level: Level) -> list[str]:
    steps = get_args(Level)[: get_args(Level).index(level) + 1]
    names = [name for step in steps for name in _FEATURES[step]]
    return [f"-m{name.replace('_', '')}" for name in names]


def _version(name: str) -> str:
    return subprocess.run([name, "--version"], capture_output=True, text=True, check=False).stdout


@contextmanager
def _locked(library: Path) -> Iterator[None]:
    """Hold the lock of ``library``; it goes with the process that holds it, however that ends."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with library.with_suffix(".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(command: list[str], library: Path) -> None:
    """Compile the sources side by side and publish the linked library at ``library``."""
    sources = _sources("*.cpp")
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as name:
        folder = Path(name)
        objects = [folder / f"{source.stem}.o" for source in sources]
        steps = [
            [*command, "-c", str(source), "-o", str(target)]
            for source, target in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for _ in pool.map(_run, steps):
                pass
        # The OpenMP runtime is the one that torch loaded, so its symbols stay open.
        _run([*command, "-shared", *map(str, objects), "-o", str(folder / "kernels.so")])
        (folder / "kernels.so").replace(library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise KernelsUnavailable(f"{command[0]} failed: {lines[0] if lines else done.returncode}.")


if __name__ == "__main__":
    for path in ship():
        print(path)
