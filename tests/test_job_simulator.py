"""The job protocol under kills, freezes, lost replies and errors at every storage call."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partialmethod
from typing import Any

import job_simulator as simulator
import pytest
import simulated_store
import simulated_world
from simulated_engine import unreadable, unrendered, words

from batchinfer.jobs import commit as commit_module
from batchinfer.jobs import feeder as feeder_module
from batchinfer.jobs.claims import Claims
from batchinfer.jobs.folder import JobFolder
from batchinfer.jobs.heartbeat import Heartbeat, Renewer
from batchinfer.jobs.open_shard import OpenShard
from batchinfer.jobs.progress import Progress
from batchinfer.jobs.publisher import Publisher
from batchinfer.jobs.suspects import Suspects

SEEDS = 500


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def run(seed: int, **changes: Any) -> Any:
    try:
        return replace(simulator.from_seed(seed), **changes).run()
    except Exception as error:
        raise AssertionError(
            f"seed {seed}: {error}; see it again with: python tests/job_simulator.py {seed} --trace"
        ) from error


def total_tokens(simulation: Any) -> int:
    rows = [
        row
        for row in range(simulation.shards * simulation.rows)
        if not (unreadable(row) or unrendered(row) or simulation.rejects(row))
    ]
    return sum(len(words(row, sample)) for row in rows for sample in range(simulation.n))


@pytest.mark.slow
def test_every_row_is_there_once_whatever_happens_at_any_storage_call() -> None:
    struck: set[tuple[str, str]] = set()
    seen = Counter[str]()
    for seed in range(SEEDS):
        simulation = run(seed)
        struck |= simulation.plan.seen
        seen["helpers"] += any("/helper-" in key for key in simulation.world.objects)
        seen["engines that died of rows"] += simulation.engine_deaths
        seen["stops at the failure limit"] += simulation.stops
        seen["retry rounds"] += simulation.rounds
        seen["workers that were too many"] += simulation.surplus
        seen["summaries held to the whole folder"] += simulation.summaries
    assert min(seen.values()) > 0, seen
    every = set(simulated_store.AIMS)
    for aim in sorted(every - struck):
        # A call that is seldom made: the next seeds that are aimed at it.
        more = range(
            SEEDS - SEEDS % len(simulated_store.AIMS) + simulated_store.AIMS.index(aim), 20 * SEEDS
        )
        for seed in more[:: len(simulated_store.AIMS)]:
            struck |= run(seed).plan.seen
            if aim in struck:
                break
    assert every <= struck, f"never struck: {sorted(every - struck)}"
    assert struck <= every, f"calls that no fault is aimed at: {sorted(struck - every)}"


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("fault", ["kill_before", "kill_after", "freeze"])
def test_a_kill_or_a_pause_at_each_single_storage_call(n: int, fault: str) -> None:
    def simulation(struck_at: tuple[int, str] | None) -> Any:
        faults = simulator.Faults(struck_at=struck_at)
        return simulator.Simulation(11, faults, workers=2, shards=2, rows=7, n=n, drains=1)

    calls = simulation(None).run().world.operations
    assert calls > 60
    for call in range(1, calls + 1):
        try:
            killed = simulation((call, fault)).run()
            for process in killed.processes:
                # What a heartbeat did not see is at most what came after the last one.
                if process.name in killed.records:
                    life = process.ended_ns - process.started_ns
                    unrecorded = life - killed.records[process.name].bill.total
                    limit = 17 if fault != "freeze" else 320
                    assert 0 <= unrecorded < limit * simulated_world.SECOND, f"{unrecorded} ns unrecorded"
        except Exception as error:
            raise AssertionError(f"{fault} at call {call}: {error}") from error


def test_a_seed_decides_everything() -> None:
    def trace(seed: int) -> list[str]:
        lines = run(seed).world.trace
        return [re.sub(r"[0-9a-f]{16}", "NONCE", line) for line in lines]

    for seed in (3, 7, 19):
        assert trace(seed) == trace(seed)


@pytest.mark.parametrize("seed", range(12))
def test_undisturbed_nothing_but_help_is_wasted_and_no_lease_changes_hands(seed: int) -> None:
    # Slow uploads, lost replies, errors and creates that are refused for no reason are none to lose a lease
    # or to compute anything twice.
    for faults in (
        simulator.Faults(),
        simulator.Faults(slow=0.2),
        simulator.Faults(lost_reply=0.1, error=0.05, phantom=0.1),
    ):
        simulation = replace(
            simulator.from_seed(seed), faults=faults, drains=0, cancels=0, poison=False, budget=None
        ).run()
        keys = [key for key in simulation.world.objects if "/claims/" in key]
        assert not [key for key in keys if not key.endswith("0001.json")]
        helpers = len([key for key in keys if "/helper-" in key])
        waste = simulation.settlement.bill.waste
        if not helpers:
            assert waste == 0
            assert all(record.bill.waste == 0 for record in simulation.records.values())
            assert simulation.decoded_tokens == total_tokens(simulation)
        elif not faults.slow:
            # What an owner and its helper both began before either could tell the other.
            assert waste < helpers * 45 * simulated_world.SECOND
        assert not [key for key in simulation.world.objects if "/progress/" in key]
        for process in simulation.processes:
            # Only the summary is written after the last heartbeat.
            life = process.ended_ns - process.started_ns
            assert simulation.records[process.name].bill.total <= life


@pytest.mark.parametrize("seed", range(12))
def test_undisturbed_a_poison_row_costs_a_bounded_number_of_engines(seed: int) -> None:
    capacity = 16
    simulation = replace(
        simulator.from_seed(seed),
        faults=simulator.Faults(),
        drains=0,
        cancels=0,
        retries=0,
        budget=None,
        poison=True,
        workers=1,
        capacity=capacity,
        rows=20,
    ).run()
    rows = range(simulation.shards * simulation.rows)
    codes = [simulation.expected_code(row) for row in rows]
    poison = sum(code.startswith("engine_") for code in codes)
    assert simulation.engine_deaths <= poison * (math.log2(capacity) + 3)


@pytest.mark.parametrize("seed", range(25))
def test_after_a_drain_no_token_is_decoded_again(seed: int) -> None:
    simulation = replace(
        simulator.from_seed(seed), faults=simulator.Faults(), drains=4, cancels=1, poison=False, budget=None
    ).run()
    if not any("/helper-" in key for key in simulation.world.objects):
        assert simulation.decoded_tokens == total_tokens(simulation)


def test_drains_are_resumed_from_tokens_in_flight() -> None:
    resumed = 0
    for seed in range(25):
        simulation = replace(
            simulator.from_seed(seed), faults=simulator.Faults(), drains=4, poison=False, budget=None
        ).run()
        resumed += simulation.resumed_tokens
    assert resumed > 20


# -- the simulator must see what it is there to see ------------------------------------------------


def overwriting_create(patch: pytest.MonkeyPatch) -> None:
    def create(self: Any, key: str, data: Any) -> bool:
        self.put(key, data)
        return True

    patch.setattr(simulated_store.SimStore, "create_exclusive", create)


def no_read_back(patch: pytest.MonkeyPatch) -> None:
    def create(self: JobFolder, key: str, data: Any, nonce: str, read_nonce: Any) -> bool:
        return self.store.create_exclusive(key, data)

    patch.setattr(JobFolder, "create", create)


def exists_is_taken_for_good(patch: pytest.MonkeyPatch) -> None:
    """Believes a store that says that an object exists which is not there."""

    def create(self: JobFolder, key: str, data: Any, nonce: str, read_nonce: Any) -> bool:
        try:
            return self.store.create_exclusive(key, data) or read_nonce(key) == nonce
        except FileNotFoundError:
            return False

    patch.setattr(JobFolder, "create", create)


def never_stale(patch: pytest.MonkeyPatch) -> None:
    before = Claims.__init__

    def init(self: Claims, *arguments: Any, **named: Any) -> None:
        before(self, *arguments, **named)
        self._lease_seconds = 1e9

    patch.setattr(Claims, "__init__", init)


def always_stale(patch: pytest.MonkeyPatch) -> None:
    before = Claims.__init__

    def init(self: Claims, *arguments: Any, **named: Any) -> None:
        before(self, *arguments, **named)
        self._lease_seconds = 3.0

    patch.setattr(Claims, "__init__", init)


def no_renewal(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Renewer, "run", lambda self: None)


def no_progress_union(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(feeder_module, "read_progress", lambda folder, shard: Progress())


def part_before_failures(patch: pytest.MonkeyPatch) -> None:
    later: list[Callable[[], None]] = []
    write, create = JobFolder.write_failures, JobFolder.create_part
    patch.setattr(
        JobFolder, "write_failures", lambda self, *given: later.append(lambda: write(self, *given))
    )

    def create_part(self: JobFolder, *given: Any) -> bool:
        won = create(self, *given)
        for call in later:
            call()
        later.clear()
        return won

    patch.setattr(JobFolder, "create_part", create_part)


def no_heartbeat_before_publishing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Publisher, "_flush", lambda self: _flush_without_beat(self))
    original = commit_module.commit

    def commit(*given: Any) -> bool:
        return original(*given[:-1], lambda: None)

    patch.setattr("batchinfer.jobs.publisher.commit", commit)


def _flush_without_beat(publisher: Publisher) -> None:
    for shard, samples, failures, flight in publisher._bench.take_news():
        shard.writer.write(samples, failures, flight)


def half_answered_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(OpenShard, "complete", property(lambda self: self.read_all and bool(self.samples)))


def progress_deleted_early(patch: pytest.MonkeyPatch) -> None:
    before = Publisher._commit

    def commit(self: Publisher, shard: Any) -> None:
        from batchinfer.jobs.progress import delete_progress

        delete_progress(self._folder, shard.name)
        before(self, shard)

    patch.setattr(Publisher, "_commit", commit)


def beats_that_forget(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Heartbeat, "now", lambda self: float(simulated_store.EPOCH))


def first_suspect_condemned(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Suspects, "died", lambda self, rows, alone: rows[0] if rows else None)


def nobody_suspected(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Suspects, "died", lambda self, rows, alone: None)


def begun_elsewhere_is_done(patch: pytest.MonkeyPatch) -> None:
    complete = OpenShard.complete.fget  # type: ignore[attr-defined]

    def too_early(self: OpenShard) -> bool:
        rows = self.settled + len(self.aside)
        return complete(self) or (self.read_all and bool(self.aside) and rows == self.rows_read)

    patch.setattr(OpenShard, "complete", property(too_early))


def nothing_absorbed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(OpenShard, "absorb", lambda self, news: set())


@pytest.mark.parametrize(
    "fault",
    [
        first_suspect_condemned,
        nobody_suspected,
        begun_elsewhere_is_done,
        nothing_absorbed,
        overwriting_create,
        no_read_back,
        exists_is_taken_for_good,
        never_stale,
        always_stale,
        no_renewal,
        no_progress_union,
        part_before_failures,
        no_heartbeat_before_publishing,
        half_answered_rows,
        progress_deleted_early,
        beats_that_forget,
    ],
)
def test_the_simulator_goes_red_for(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A job that never ends is found at the end of the world, which sound ones are far from.
    short = partialmethod(simulated_world.World.__init__, limit_seconds=3 * 3600)
    monkeypatch.setattr(simulated_world.World, "__init__", short)
    run(0, budget=None)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        for seed in range(30):
            run(seed, budget=None)
            test_undisturbed_nothing_but_help_is_wasted_and_no_lease_changes_hands(seed)
            test_after_a_drain_no_token_is_decoded_again(seed)
        test_a_kill_or_a_pause_at_each_single_storage_call(1, "kill_after")
