"""Several reads at a time, on threads of a clock, as a store takes long to answer each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from batchinfer.jobs.clock import Clock

Key = TypeVar("Key")
Value = TypeVar("Value")

THREADS = 16
# Fewer are read one after the other: a thread costs more than it saves.
_FEW = 4


def read_all(clock: Clock, read: Callable[[Key], Value], keys: Iterable[Key]) -> dict[Key, Value]:
    """``read`` of every key, by key; raises what the first read that fails raises, when all have ended."""
    wanted = list(keys)
    if len(wanted) <= _FEW:
        return {key: read(key) for key in wanted}
    found: dict[Key, Value] = {}
    errors: list[Exception] = []
    left = iter(wanted)
    changed = clock.condition()

    def work() -> None:
        while True:
            with changed:
                if errors:
                    return
                try:
                    key = next(left)
                except StopIteration:
                    return
            try:
                found[key] = read(key)
            except Exception as error:
                errors.append(error)

    threads = [clock.spawn("reader", work) for _ in range(min(THREADS, len(wanted)))]
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return {key: found[key] for key in wanted}
