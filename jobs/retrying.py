"""A store whose transient errors are tried again, with growing and jittered pauses."""

from __future__ import annotations

import builtins
import random
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from batchinfer.connectors.types import ObjectInfo, ObjectStore, TransientStorageError
from batchinfer.jobs.clock import Clock

Result = TypeVar("Result")

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 10.0


class RetryingStore:
    """An ObjectStore that tries each call up to ``attempts`` times: 6 pause for 3 seconds in all, 12 for
    a minute.

    ``create_exclusive`` is tried again as well; its False then no longer tells a lost race from a
    lost reply, so its caller compares nonces (:meth:`JobFolder.create`).
    """

    def __init__(self, store: ObjectStore, clock: Clock, jitter: random.Random, attempts: int) -> None:
        self.root = store.root
        self._store = store
        self._clock = clock
        self._jitter = jitter
        self._attempts = attempts

    def create_exclusive(self, key: str, data: bytes | Path) -> bool:
        """See ObjectStore; False is also the answer where an earlier try of ours created it."""
        return self._retry(lambda: self._store.create_exclusive(key, data))

    def put(self, key: str, data: bytes | Path) -> None:
        """See ObjectStore."""
        self._retry(lambda: self._store.put(key, data))

    def get(self, key: str) -> bytes:
        """See ObjectStore."""
        return self._retry(lambda: self._store.get(key))

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """See ObjectStore."""
        return self._retry(lambda: self._store.get_range(key, start, stop))

    def head(self, key: str) -> ObjectInfo:
        """See ObjectStore."""
        return self._retry(lambda: self._store.head(key))

    def list(self, prefix: str) -> builtins.list[ObjectInfo]:
        """See ObjectStore."""
        return self._retry(lambda: self._store.list(prefix))

    def delete(self, key: str) -> None:
        """See ObjectStore."""
        self._retry(lambda: self._store.delete(key))

    def _retry(self, call: Callable[[], Result]) -> Result:
        pause = FIRST_PAUSE
        for _ in range(self._attempts - 1):
            try:
                return call()
            except TransientStorageError:
                self._clock.sleep(pause * (0.5 + self._jitter.random()))
                pause = min(2 * pause, LONGEST_PAUSE)
        return call()
