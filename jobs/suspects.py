"""Rows that an engine may have died of, isolated by halving until one is left to blame.

An engine that dies with several rows in flight makes suspects of all of them. From then on they are
tried in groups, each alone in the engine: a group that the engine survives is finished and cleared, one
of which it dies is halved, and a row of which it dies alone three times is condemned. One such row
among n costs at most ``ceil(log2(n)) + 3`` engines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

DEATHS_ALONE = 3


@dataclass(frozen=True, slots=True)
class EngineDeath:
    """How an engine ended that nobody asked to: ``code`` for failures, ``how`` for people."""

    code: Literal["engine_crash", "engine_stall"]
    how: str


@dataclass(frozen=True, slots=True)
class Suspicion:
    """What is held against rows, as it is kept with the progress of their shard.

    ``groups`` are rows that were in flight together when an engine died and are still to be tried, the
    next one last; ``deaths`` counts how often an engine died of a row that was alone in it.
    """

    groups: tuple[tuple[int, ...], ...] = ()
    deaths: Mapping[int, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.groups or self.deaths)

    def to_json(self) -> str:
        """As JSON."""
        deaths = {str(row): count for row, count in self.deaths.items()}
        return json.dumps({"groups": self.groups, "deaths": deaths})

    @classmethod
    def from_json(cls, text: str | bytes) -> Suspicion:
        """The inverse of :meth:`to_json`."""
        values = json.loads(text)
        groups = tuple(tuple(group) for group in values["groups"])
        return cls(groups, {int(row): count for row, count in values["deaths"].items()})

    def among(self, wanted: Callable[[int], bool]) -> Suspicion:
        """The part of it that concerns the rows that are ``wanted``."""
        groups = (tuple(filter(wanted, group)) for group in self.groups)
        return Suspicion(
            tuple(group for group in groups if group),
            {row: count for row, count in self.deaths.items() if wanted(row)},
        )

    def merged(self, other: Suspicion) -> Suspicion:
        """Both: the groups of both, a row in the smaller of its groups, and the larger counts."""
        smallest: dict[int, tuple[int, ...]] = {}
        for group in (*self.groups, *other.groups):
            for row in group:
                if row not in smallest or len(group) < len(smallest[row]):
                    smallest[row] = group
        groups = dict.fromkeys((*self.groups, *other.groups))
        kept = (tuple(row for row in group if smallest[row] == group) for group in groups)
        deaths = dict(self.deaths)
        for row, count in other.deaths.items():
            deaths[row] = max(count, deaths.get(row, 0))
        return Suspicion(tuple(group for group in kept if group), deaths)


UNSUSPECTED = Suspicion()


class Suspects:
    """The suspicion of one worker, and the group that is on trial.

    Invariant (``check``): no row is in two groups, or in a group and on trial.
    """

    def __init__(self) -> None:
        self._groups: list[tuple[int, ...]] = []
        self._deaths: dict[int, int] = {}
        self._trial: tuple[int, ...] = ()

    @property
    def active(self) -> bool:
        """Whether a group is on trial or waits for it: then the engine gets nothing else."""
        return bool(self._groups or self._trial)

    def add(self, suspicion: Suspicion) -> None:
        """Take over what others held against rows."""
        known = {row for group in (*self._groups, self._trial) for row in group}
        for group in suspicion.groups:
            fresh = tuple(row for row in group if row not in known)
            if fresh:
                self._groups.append(fresh)
                known.update(fresh)
        for row, count in suspicion.deaths.items():
            self._deaths[row] = max(count, self._deaths.get(row, 0))

    def died(self, rows: Sequence[int], alone: bool) -> int | None:
        """An engine died with ``rows`` in flight; returns the row that is condemned for it, if one is.

        ``alone`` says that nothing else was in flight, so that a single row is to blame.
        """
        self._trial = ()
        if len(rows) == 1 and alone:
            [row] = rows
            self._deaths[row] = self._deaths.get(row, 0) + 1
            if self._deaths[row] >= DEATHS_ALONE:
                return row
            self._groups.append((row,))
        elif rows:
            half = -(-len(rows) // 2)
            self._groups += [part for part in (tuple(rows[half:]), tuple(rows[:half])) if part]
        return None

    def next_group(self, limit: int) -> tuple[int, ...]:
        """Put up to ``limit`` rows of the next group on trial; none where no group is left. The engine
        must be empty."""
        self._trial = ()
        if self._groups:
            group = self._groups.pop()
            self._trial = group[:limit]
            if group[limit:]:
                self._groups.append(group[limit:])
        return self._trial

    def of(self, wanted: Callable[[int], bool]) -> Suspicion:
        """What is held against the rows that are ``wanted``, the group on trial included."""
        trial = (self._trial,) if self._trial else ()
        return Suspicion((*self._groups, *trial), self._deaths).among(wanted)

    def forget(self, gone: Callable[[int], bool]) -> None:
        """The rows for which ``gone`` holds are settled, or somebody else's."""
        if self.active or self._deaths:
            left = self.of(lambda row: not gone(row))
            self._trial = tuple(row for row in self._trial if not gone(row))
            self._groups = [group for group in left.groups if group != self._trial]
            self._deaths = dict(left.deaths)

    def check(self) -> None:
        """Raise AssertionError where the invariant is broken."""
        rows = [row for group in (*self._groups, self._trial) for row in group]
        assert len(set(rows)) == len(rows), f"rows are suspected twice: {sorted(rows)}"
