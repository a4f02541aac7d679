"""Retry rounds in the simulated world: what must hold of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from simulated_engine import rejected
from simulated_world import Broken, World

from batchinfer.connectors.types import ObjectInfo
from batchinfer.jobs.folder import JobFolder, ShardName
from batchinfer.jobs.records import Failure
from batchinfer.jobs.retry import current_failures
from batchinfer.jobs.rounds import FailedRow, RoundPlan
from batchinfer.jobs.suspects import DEATHS_ALONE


class Job(Protocol):
    """What is retried."""

    world: World


class PlainStore:
    """The world's objects with no time and no faults."""

    root = "sim://job"

    def __init__(self, world: World) -> None:
        self._world = world

    def get(self, key: str) -> bytes:
        if key not in self._world.objects:
            raise FileNotFoundError(key)
        return self._world.objects[key][0]

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        return self.get(key)[start:stop]

    def head(self, key: str) -> ObjectInfo:
        return ObjectInfo(key, len(self.get(key)), "", 0.0)

    def list(self, prefix: str) -> list[ObjectInfo]:
        return [
            ObjectInfo(key, len(self._world.objects[key][0]), "", 0.0)
            for key in sorted(self._world.objects)
            if key.startswith(prefix)
        ]

    def put(self, key: str, data: bytes) -> None:
        self._world.objects[key] = (data, self._world.now_ns)


def heals(row: int) -> bool:
    """Whether a row that the engine rejects at first is answered when it is tried again."""
    return rejected(row) and row % 3 != 0


def failures_now(folder: JobFolder) -> dict[int, tuple[ShardName, Failure]]:
    """The failures of the job, each with the shard that failed it last."""
    try:
        return current_failures(folder)
    except FileNotFoundError as error:
        raise Broken(f"{error} is missing") from error


def retried_rows(world: World) -> set[int]:
    """The rows that some retry round tries again."""
    folder = JobFolder(PlainStore(world))
    plans = [folder.read_round(number) for number in folder.list_rounds()]
    return {row.row_index for plan in plans for row in _rows(plan)}


def check_rounds(simulation: Job) -> Mapping[int, Failure]:
    """The failures that are left, each with as many attempts as there were rounds for its row."""
    folder = JobFolder(PlainStore(simulation.world))
    current = {row: failure for row, (_, failure) in failures_now(folder).items()}
    plans = [folder.read_round(number) for number in folder.list_rounds()]
    tried = [row.row_index for plan in plans for row in _rows(plan)]
    for row, failure in current.items():
        last = DEATHS_ALONE if failure.code.startswith("engine_") else 1
        if failure.attempts != last * (1 + tried.count(row)):
            raise Broken(f"row {row} is said to have failed {failure.attempts} times")
    return current


def _rows(plan: RoundPlan | None) -> Iterator[FailedRow]:
    assert plan is not None
    for shard in plan.shards:
        yield from shard
