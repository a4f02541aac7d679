"""What a supervisor and its engine say to each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from batchinfer.engine.types import Completion, Decoded, Rejection, Request
from batchinfer.jobs.samples import SampleKey


@dataclass(frozen=True, slots=True)
class Spent:
    """What an engine has charged since it started, in nanoseconds: to samples, finished or not, and to
    tokens that it computed again. ``at_ns`` is when it last had nothing uncharged, on the host's
    monotonic clock."""

    charged_ns: int
    waste_ns: int
    at_ns: int


@dataclass(frozen=True, slots=True)
class Add:
    """To the engine: requests to complete."""

    requests: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """To the engine: say what is in flight."""


@dataclass(frozen=True, slots=True)
class Drop:
    """To the engine: these rows are somebody else's now."""

    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """To the engine: make no further step, say what is in flight, and end."""


@dataclass(frozen=True, slots=True)
class Ready:
    """From the engine: it is loaded. ``capacity`` is how many requests it can use at a time, those
    that wait to be ordered included."""

    capacity: int


@dataclass(frozen=True, slots=True)
class Results:
    """From the engine: what finished; sent without items too, as a sign that steps are made."""

    items: tuple[Completion | Rejection, ...]
    spent: Spent


@dataclass(frozen=True, slots=True)
class Dropped:
    """From the engine: it has forgotten these rows; what they cost is in its waste."""

    rows: tuple[int, ...]
    spent: Spent


@dataclass(frozen=True, slots=True)
class Inflight:
    """From the engine: every unfinished sample with what is decoded of it, those resumed included.
    ``final`` when it answers Stop: the engine's last word."""

    samples: tuple[tuple[SampleKey, Decoded], ...]
    spent: Spent
    final: bool


@dataclass(frozen=True, slots=True)
class Failed:
    """From the engine, as its last word: why it can't go on. ``permanent`` when no other try can help,
    because the job asks for something that can't be had."""

    message: str
    permanent: bool


@dataclass(frozen=True, slots=True)
class Ended:
    """The engine's process is gone; ``how`` says so for people."""

    how: str


ToEngine = Add | Drop | Snapshot | Stop
FromEngine = Ready | Results | Dropped | Inflight | Failed | Ended


class EngineLink(Protocol):
    """An engine elsewhere. What it says is handed to a callback in order, :class:`Ended` at last."""

    def send(self, message: ToEngine) -> None:
        """Hand a message over; does nothing once the engine is gone. May wait for the engine to read."""
        ...

    def kill(self) -> None:
        """End the engine now; :class:`Ended` follows."""
        ...


StartEngine = Callable[[Callable[[FromEngine], None]], EngineLink]
