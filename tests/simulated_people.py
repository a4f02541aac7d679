"""People in the simulated world: they cancel a job, let it go on, and retry it, two of them at a time.

Their machines are killed, frozen and lied to like any other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import pyarrow as pa
from simulated_retry import PlainStore, failures_now
from simulated_store import FaultPlan, SimStore
from simulated_world import Broken, Process, SimClock, SimThread, World

from batchinfer.connectors.types import StorageError
from batchinfer.jobs.folder import JobFolder, ShardName
from batchinfer.jobs.records import Control, JobRecord
from batchinfer.jobs.retry import begin_round, round_shards
from batchinfer.jobs.rounds import RoundPlan
from batchinfer.jobs.types import JobError, Shard

_EXPECTED = ("somebody else has just begun", "is not complete", "no row of the job", "would come again")


class Job(Protocol):
    """What people do something with: ``job`` holds the shards of all rounds, ``first`` those of the job's
    own plan."""

    world: World
    plan: FaultPlan
    people: int
    job: dict[ShardName, Shard]
    first: Sequence[Shard]
    retries: int
    rounds: int


def _person(simulation: Job, what: str, act: Callable[[JobFolder], None]) -> SimThread:
    """Somebody who does one thing, once; it may fail, or end with her machine."""
    world = simulation.world
    simulation.people += 1
    process = Process(f"person{simulation.people}", world.now_ns)
    store = SimStore(world, process, simulation.plan)
    folder = JobFolder(store, SimClock(world, process), random.Random(world.chance.random()), attempts=12)

    def main() -> None:
        try:
            act(folder)
        except StorageError as error:
            world.log(f"could not {what}: {error}")

    return world.spawn(process, process.name, main)


def ask(simulation: Job, what: str, change: Callable[[Control], Control]) -> None:
    """Have the job's control changed, by one person after the other until one succeeds."""
    done: list[Control] = []
    while not done:
        simulation.world.log(f"somebody asks: {what}")
        _person(simulation, what, lambda folder: done.append(folder.append_control(change))).join()


def submit(simulation: Job) -> JobRecord:
    """The job's record, with its plan in the folder."""
    folder = JobFolder(PlainStore(simulation.world))
    return JobRecord(
        spec={},
        schema=pa.schema([]),
        input_schema=pa.schema([]),
        fingerprint="",
        plan=folder.write_plan(list(simulation.first)),
        shards=len(simulation.first),
        rows=sum(shard.rows for shard in simulation.first),
        created="",
        nonce="",
    )


def retry(simulation: Job, record: JobRecord) -> bool:
    """Have two people begin a retry round at about the same time: True if one is begun."""
    folder, chance = JobFolder(PlainStore(simulation.world)), simulation.world.chance
    if simulation.retries == 0 or not failures_now(folder):
        return False
    simulation.retries -= 1
    begun: dict[int, RoundPlan] = {}

    def begin(folder: JobFolder) -> None:
        codes = chance.choice([("too_long",), ("too_long", "bad_line"), ()])
        try:
            number, plan = begin_round(folder, record, codes, chance.choice([1, 3]))
        except JobError as error:
            simulation.world.log(f"no retry: {error}")
            if not any(words in str(error) for words in _EXPECTED):
                raise Broken(str(error)) from error
            return
        if number in begun:
            raise Broken(f"two people think that round {number} is theirs")
        begun[number] = plan
        simulation.world.log(f"round {number} begins, of {plan.rows} rows")
        if folder.read_control().state != "run":
            folder.append_control(lambda control: replace(control, state="run"))

    people = [_person(simulation, "retry", begin) for _ in range(2)]
    for person in people:
        person.join()
    # Workers that were still there may have done all of one round before the second person looked.
    rounds = folder.list_rounds()
    if rounds != list(range(1, len(rounds) + 1)) or len(rounds) > simulation.rounds + 2:
        raise Broken(f"two people have begun the rounds {rounds}, after {simulation.rounds}")
    if any(plan != folder.read_round(number) for number, plan in begun.items()):
        raise Broken(f"somebody's round {list(begun)} is another one's")
    new = rounds[simulation.rounds :]
    for number in new:
        shards: Any = round_shards(folder, simulation.first, number)
        simulation.job.update(shards)
    simulation.rounds = len(rounds)
    return bool(new)
