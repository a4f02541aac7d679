"""Retry rounds in the simulated world: begun as soon as a job is complete, and what must hold of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from simulated_engine import rejected
from simulated_world import Broken, World

from batchinfer.connectors.types import ObjectInfo
from batchinfer.jobs.folder import JobFolder, ShardName, new_nonce
from batchinfer.jobs.records import Failure
from batchinfer.jobs.retry import current_failures, round_shards
from batchinfer.jobs.rounds import FailedRow, RoundPlan, cut_round
from batchinfer.jobs.suspects import DEATHS_ALONE
from batchinfer.jobs.types import Shard


class Job(Protocol):
    """What is retried: ``job`` holds the shards of all rounds, ``first`` those of the job's own plan."""

    world: World
    job: dict[ShardName, Shard]
    first: Sequence[Shard]
    retries: int
    rounds: int


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

    def create_exclusive(self, key: str, data: bytes) -> bool:
        if key in self._world.objects:
            return False
        self._world.objects[key] = (data, self._world.now_ns)
        return True


def heals(row: int) -> bool:
    """Whether a row that the engine rejects at first is answered when it is tried again."""
    return rejected(row) and row % 3 != 0


def begin_round(simulation: Job) -> bool:
    """Begin a retry round, if there is any left and anything to retry: True if it is begun."""
    folder = JobFolder(PlainStore(simulation.world))
    failed = _failures(folder)
    if simulation.retries == 0 or not failed:
        return False
    simulation.retries -= 1
    codes = {"too_long"} if simulation.world.chance.random() < 0.5 else {"too_long", "bad_line"}
    rows = [
        FailedRow(row, shard.part, failure.attempts, failure.code)
        for row, (shard, failure) in failed.items()
        if failure.code in codes
    ]
    if not rows:
        return False
    simulation.rounds += 1
    plan = cut_round(rows, simulation.world.chance.choice([1, 2, 9]), new_nonce())
    if not folder.create_round(simulation.rounds, plan):
        raise Broken("a round was there already")
    simulation.world.log(f"round {simulation.rounds} begins, of {len(rows)} rows")
    simulation.job.update(round_shards(folder, simulation.first, simulation.rounds))
    return True


def _failures(folder: JobFolder) -> dict[int, tuple[ShardName, Failure]]:
    try:
        return current_failures(folder)
    except FileNotFoundError as error:
        raise Broken(f"{error} is missing") from error


def check_rounds(simulation: Job) -> Mapping[int, Failure]:
    """The failures that are left, each with as many attempts as there were rounds for its row."""
    folder = JobFolder(PlainStore(simulation.world))
    current = {row: failure for row, (_, failure) in _failures(folder).items()}
    plans = [folder.read_round(number) for number in folder.list_rounds()]
    tried = [row.row_index for plan in plans for row in _rows(plan)]
    for row, failure in current.items():
        last = DEATHS_ALONE if failure.code.startswith("engine_") else 1
        if failure.attempts != last + tried.count(row):
            raise Broken(f"row {row} is said to have failed {failure.attempts} times")
    return current


def _rows(plan: RoundPlan | None) -> Iterator[FailedRow]:
    assert plan is not None
    for shard in plan.shards:
        yield from shard
