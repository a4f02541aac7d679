"""Budgets in the simulated world: caps that are raised when they are used up, and that nothing exceeds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from simulated_retry import PlainStore
from simulated_world import SECOND, Broken, Process, SimClock, World

from batchinfer.jobs.budget import Allowance, Cap, Slots, slot_ns
from batchinfer.jobs.folder import JobFolder
from batchinfer.jobs.records import Control
from batchinfer.jobs.unbought import Unbought

PRICE = 2.0
HOUR = 3600 * SECOND
SLOW = 300 * SECOND
"""A worker that is started then has shown itself, however many of its calls fail."""


@dataclass
class Budget:
    """A cap of worker time, of USD or of both, in seconds of a worker at the job's price; it is raised
    by ``raised`` of itself whenever nothing goes on any more. A ``late`` one is added to a job that began
    without any, ``after_ns`` or later."""

    seconds: float
    kind: str
    raised: float = 1.0
    late: bool = False
    after_ns: int = 0
    workers: int = 1
    added_ns: int = 0
    caps: list[Cap] = field(default_factory=list)
    slot: int = 0

    def begin(self, workers: int) -> None:
        self.workers = workers
        if not self.late:
            self._add()

    def _add(self) -> None:
        self.caps = [self._cap()]
        self.slot = slot_ns(self.caps[0], PRICE, self.workers)

    def add(self, simulation: Job) -> None:
        """Add it to a job that goes on."""
        cap = self._cap()
        hours = None if cap.nanoseconds is None else cap.nanoseconds / HOUR
        simulation.ask(
            "a budget", lambda control: replace(control, max_usd=cap.usd, max_worker_hours=hours)
        )
        self.added_ns = simulation.world.now_ns
        self._add()

    def to_add(self, now_ns: int) -> bool:
        return self.late and not self.caps and now_ns >= self.after_ns

    def raise_cap(self, world: World, number: int) -> None:
        self.seconds += max(self.raised * self.seconds, 2 * self.slot / SECOND)
        cap = self._cap()
        self.caps.append(cap)
        hours = None if cap.nanoseconds is None else cap.nanoseconds / HOUR
        control = Control(max_usd=cap.usd, max_worker_hours=hours, nonce="harness")
        world.objects[f"_batchinfer/control/{number:04d}.json"] = (control.to_bytes(), world.now_ns)
        world.log(f"the cap is now {self.seconds:.0f} s")

    def _cap(self) -> Cap:
        nanoseconds = int(self.seconds * SECOND) if self.kind != "usd" else None
        return Cap(nanoseconds, self.seconds * PRICE / 3600 if self.kind != "time" else None)


class Job(Protocol):
    """What has a budget."""

    world: World
    processes: list[Process]
    budget: Budget | None
    prices: dict[str, float]

    def ask(self, what: str, change: Callable[[Control], Control]) -> None: ...


def allowance(simulation: Job, process: Process, folder: JobFolder) -> Allowance | None:
    """What a worker of the simulation may spend."""
    budget, world = simulation.budget, simulation.world
    if budget is None or not budget.caps:
        return None

    def cap() -> Cap:
        folder.read_control()
        assert budget is not None
        return budget.caps[-1]

    def leave(code: int) -> None:
        if process.ended_ns is None:
            world.log(f"what it bought is used up: exit {code}")
            process.exit_code = code
            world.kill(process)

    clock, price = SimClock(world, process), simulation.prices[process.name]
    unbought = Unbought(folder, clock, 60.0) if budget.late else None
    slots = Slots(folder, budget.slot, PRICE, random.Random(world.chance.random()), unbought)
    return Allowance(slots, clock, process.name, price, process.started_ns, cap, leave)


def is_used_up(simulation: Job) -> bool:
    """Whether no worker can begin. Once none is left either, the cap is raised."""
    budget, world = simulation.budget, simulation.world
    if budget is None or not budget.caps:
        return False
    folder = JobFolder(PlainStore(world))
    unbought = Unbought(folder, folder.clock, 60.0) if budget.late else None
    slots = Slots(folder, budget.slot, PRICE, random.Random(0), unbought)
    if slots.affordable(budget.caps[-1]):
        return False
    if any(process.ended_ns is None for process in simulation.processes):
        return True
    check_budget(simulation)
    number = len([key for key in world.objects if key.startswith("_batchinfer/control/")]) + 1
    budget.raise_cap(world, number)
    return False


def check_budget(simulation: Job) -> None:
    """No life is longer than what was bought for it, and what was bought is within the cap."""
    budget, world = simulation.budget, simulation.world
    if budget is None or not budget.caps:
        return
    prices = simulation.prices
    slot_usd = budget.slot * PRICE / HOUR
    lives: dict[str, int] = {}
    spent_ns, spent_usd = 0, 0.0
    for key in sorted(world.objects):
        if key.startswith("_batchinfer/budget/") and not key.endswith(".settled.json"):
            worker = json.loads(world.objects[key][0])["worker"]
            settled = key.replace(".json", ".settled.json")
            mine = min(budget.slot, int(slot_usd / prices[worker] * HOUR))
            nanoseconds, usd = budget.slot, slot_usd
            if settled in world.objects:
                record = json.loads(world.objects[settled][0])
                nanoseconds, usd = record["spent_ns"], record["spent_usd"]
                mine = nanoseconds
            lives[worker] = lives.get(worker, 0) + mine
            spent_ns, spent_usd = spent_ns + nanoseconds, spent_usd + usd
    cap = budget.caps[-1]
    if cap.nanoseconds is not None and spent_ns > cap.nanoseconds:
        raise Broken(f"{spent_ns} ns are bought of {cap.nanoseconds}")
    if cap.usd is not None and spent_usd > cap.usd + 1e-12:
        raise Broken(f"${spent_usd} are bought of ${cap.usd}")
    records = [record for record, _ in JobFolder(PlainStore(world)).read_workers()]
    bills = {record.worker: record.bill.total for record in records}
    unbought = {record.worker for record in records if not record.bought}
    for process in simulation.processes:
        assert process.ended_ns is not None
        bought = lives.get(process.name, 0)
        # A process that is frozen when its time is up ends as soon as it thaws.
        until = max(process.started_ns + bought, process.frozen_until)
        # One that could not pay for a beginning left at once, without a heartbeat or a bill.
        if process.name in unbought:
            continue
        if process.name in bills and process.ended_ns > until:
            raise Broken(f"{process.name} lived {process.ended_ns - until} ns longer than it had bought")
        if bills.get(process.name, 0) > bought:
            raise Broken(f"{process.name} billed more than it had bought")
    for process in simulation.processes:
        # One that shows itself when others have counted already, or is silent for longer than a lease,
        # leaves as soon as it sees the budget; what it takes until then may be beyond the cap.
        if process.name in unbought and (
            process.frozen_until or process.started_ns > budget.added_ns - SLOW
        ):
            del bills[process.name]
    if budget.late and not lives:
        return  # it is less than what was spent before, and nothing was bought of it
    total = sum(bills.values())
    if cap.nanoseconds is not None and total > cap.nanoseconds:
        raise Broken(f"the bill is {total} ns, the cap {cap.nanoseconds}")
    billed_usd = sum(bill * prices[worker] / HOUR for worker, bill in bills.items())
    if cap.usd is not None and billed_usd > cap.usd:
        raise Broken(f"the bill is ${billed_usd}, the cap ${cap.usd}")
