"""The fake engine, which also notes when each token was decoded, in a file named after its supervisor."""

from __future__ import annotations

import os
import time
from pathlib import Path

from fake_engine import FakeEngine

from batchinfer.engine.config import EngineConfig


class _Timed:
    """A log whose lines begin with the time, in nanoseconds of the machine's monotonic clock."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")

    def write(self, line: str) -> None:
        self._file.write(f"{time.perf_counter_ns()} {line}")

    def flush(self) -> None:
        self._file.flush()


def engine(config: EngineConfig) -> FakeEngine:
    """The factory."""
    made = FakeEngine(config)
    made._log = _Timed(Path(os.environ["CHAOS_LOGS"]) / f"{os.getppid()}.log")  # type: ignore[assignment]
    return made
