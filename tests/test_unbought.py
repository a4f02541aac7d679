"""What a job spent before it had a budget counts, and ends before anything is bought."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from batchinfer.connectors.storage import open_store
from batchinfer.jobs.budget import Cap, Slots
from batchinfer.jobs.folder import JobFolder
from batchinfer.jobs.records import Bill, WorkerRecord
from batchinfer.jobs.unbought import Unbought

SECOND = 10**9


@dataclass
class Sleeper:
    """A clock whose sleeps pass at once; ``then`` is called after each."""

    then: Callable[[int], None] = lambda sleeps: None
    now: int = 0
    sleeps: int = field(default=0)

    def now_ns(self) -> int:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += int(seconds * SECOND)
        self.sleeps += 1
        assert self.sleeps < 100, "it waits for ever"
        self.then(self.sleeps)


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    return JobFolder(open_store(str(tmp_path)))


def beat(folder: JobFolder, worker: str, seconds: int, beat: int = 0, **fields: object) -> None:
    values = {"state": "running", "usd_per_hour": 3.6, "started": ""} | fields
    bill = Bill(rows=seconds * SECOND)
    folder.write_worker(WorkerRecord(worker=worker, beat=beat, bill=bill, **values))  # type: ignore[arg-type]


def unbought(folder: JobFolder, clock: Sleeper | None = None) -> Unbought:
    return Unbought(folder, clock or Sleeper(), 60.0)  # type: ignore[arg-type]


def test_the_cap_pays_for_what_was_spent_before_it(folder: JobFolder) -> None:
    beat(folder, "a", 120, state="left")
    beat(folder, "b", 130, state="left", usd_per_hour=1.8)
    beat(folder, "c", 999, state="left", bought=True)
    assert unbought(folder).spent() == (0, 0.0)
    slots = Slots(folder, 100 * SECOND, 3.6, random.Random(0), unbought(folder))
    for cap, bought in [
        (Cap(349 * SECOND, None), None),
        (Cap(350 * SECOND, None), 0),
        (Cap(None, 0.28), None),
        (Cap(None, 0.4), 1),
        (Cap(450 * SECOND, None), None),
    ]:
        assert slots.buy("w", cap) == bought
    assert slots.used() == (450 * SECOND, pytest.approx(0.2 + 0.185))


def test_nothing_is_bought_before_the_others_have_left(folder: JobFolder) -> None:
    def goes_on(sleeps: int) -> None:
        beat(folder, "a", 100 + sleeps, sleeps, state="running" if sleeps < 30 else "left")

    beat(folder, "a", 100)
    clock = Sleeper(goes_on)
    mine = unbought(folder, clock)
    mine.wait()
    assert clock.sleeps == 30
    assert mine.spent() == (130 * SECOND, pytest.approx(0.13))


def test_one_that_was_killed_is_waited_for_no_longer_than_a_lease(folder: JobFolder) -> None:
    beat(folder, "a", 100)
    clock = Sleeper()
    mine = unbought(folder, clock)
    mine.wait()
    assert 60 <= clock.now / SECOND <= 70
    assert mine.spent()[0] == 100 * SECOND


def test_workers_that_bought_their_time_are_not_waited_for(folder: JobFolder) -> None:
    beat(folder, "a", 100, bought=True)
    clock = Sleeper()
    unbought(folder, clock).wait()
    assert clock.sleeps == 0
