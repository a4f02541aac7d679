"""The rows that a worker's engine has, and those that it is told to forget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from batchinfer.engine.types import Request
from batchinfer.jobs.open_shard import OpenShard


@dataclass(slots=True)
class EngineRow:
    """A row in the engine: as it was asked for, of which shard, and its samples that are still to come."""

    request: Request
    shard: OpenShard
    outstanding: set[int]


class EngineRows:
    """Rows in the engine, by their position in the whole input.

    A row that is ``dropping`` is one that the engine was told, or is to be told, to forget: it is not given
    again before the engine has said that it did.
    """

    def __init__(self) -> None:
        self._rows: dict[int, EngineRow] = {}
        self._to_drop: list[int] = []
        self._dropping: set[int] = set()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, row: int) -> bool:
        return row in self._rows

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    def get(self, row: int) -> EngineRow | None:
        """The row, if the engine has it."""
        return self._rows.get(row)

    def all(self) -> list[EngineRow]:
        """All of them, in the order in which they were given."""
        return list(self._rows.values())

    def blocked(self, row: int) -> bool:
        """Whether the row must not be given to the engine now."""
        return row in self._rows or row in self._dropping

    def give(self, request: Request, shard: OpenShard, samples: Iterable[int]) -> None:
        """The engine gets a row, for these of its samples."""
        self._rows[request.index] = EngineRow(request, shard, set(samples))

    def sample_done(self, row: int, sample: int) -> None:
        """A sample has come; with the last one the row is out of the engine."""
        entry = self._rows[row]
        entry.outstanding.discard(sample)
        if not entry.outstanding:
            del self._rows[row]

    def forget(self, row: int) -> None:
        """The row is out of the engine."""
        self._rows.pop(row, None)

    def drop(self, rows: Iterable[int]) -> None:
        """Have the engine forget rows."""
        new = [row for row in rows if row not in self._dropping]
        self._to_drop += new
        self._dropping.update(new)

    @property
    def any_to_drop(self) -> bool:
        """Whether the engine is to be told of any."""
        return bool(self._to_drop)

    def take_to_drop(self) -> tuple[int, ...]:
        """The rows that the engine is to be told to forget, which it now is."""
        rows, self._to_drop = tuple(self._to_drop), []
        return rows

    def dropped(self, rows: Iterable[int]) -> None:
        """The engine has forgotten rows."""
        for row in rows:
            self._dropping.discard(row)
            self._rows.pop(row, None)

    def clear(self) -> None:
        """The engine is gone."""
        self._rows.clear()
        self._to_drop.clear()
        self._dropping.clear()
