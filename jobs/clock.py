"""Time and threads as the protocol sees them, so that a simulator can stand in for both."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

_PR_SET_NAME = 15


class Condition(AbstractContextManager[object], Protocol):
    """What the protocol uses of threading.Condition. No storage call is made while it is held."""

    def wait(self, timeout: float | None = None) -> bool:
        """Release, sleep until notified or ``timeout`` seconds passed, acquire again."""
        ...

    def notify_all(self) -> None:
        """Wake every waiter."""
        ...


class Thread(Protocol):
    """A started thread."""

    def join(self, timeout: float | None = None) -> None:
        """Wait until it ended, or ``timeout`` seconds."""
        ...

    def is_alive(self) -> bool:
        """Whether it still runs."""
        ...


class Clock(Protocol):
    """Monotonic time, sleeping, conditions and threads. It says nothing about the time of day: the
    only "now" that workers share is the store's."""

    def now_ns(self) -> int:
        """Nanoseconds on a monotonic clock shared by the processes of one host."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait."""
        ...

    def condition(self) -> Condition:
        """A new condition with its own lock."""
        ...

    def spawn(self, name: str, function: Callable[[], None]) -> Thread:
        """Start a daemon thread."""
        ...


class SystemClock:
    """The real clock and real threads."""

    def now_ns(self) -> int:
        """CLOCK_MONOTONIC, as ``time.perf_counter_ns`` reads it."""
        return time.perf_counter_ns()

    def sleep(self, seconds: float) -> None:
        """``time.sleep``."""
        time.sleep(seconds)

    def condition(self) -> Condition:
        """``threading.Condition``."""
        return threading.Condition()

    def spawn(self, name: str, function: Callable[[], None]) -> Thread:
        """A started daemon thread, which the system's tools show by its name."""

        def run() -> None:
            ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)
            function()

        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        return thread
