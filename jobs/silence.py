"""How long an engine has said nothing, as far as its supervisor was there to hear it."""

from __future__ import annotations


class Silence:
    """The time since an engine was last heard, in nanoseconds, asked for at least every ``pause_ns``.

    Where the last question is longer ago, the supervisor stood still itself (a stopped process, a frozen
    machine): maybe the engine did, too, and what it said meanwhile is still to be read. Of that time only
    the usual pause counts.
    """

    def __init__(self, now_ns: int, pause_ns: int) -> None:
        self._heard = self._asked = now_ns
        self._pause_ns = pause_ns

    def end(self, now_ns: int) -> None:
        """The engine was heard, or has nothing to say."""
        self._heard = now_ns

    def so_far(self, now_ns: int) -> int:
        """How long it has lasted."""
        stood_still = max(0, now_ns - self._asked - self._pause_ns)
        self._heard = min(now_ns, self._heard + stood_still)
        self._asked = now_ns
        return now_ns - self._heard
