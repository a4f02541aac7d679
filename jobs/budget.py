"""The budget: a job's cap cut into slots of worker time, which workers buy ahead and settle at their end.

A worker ends before what it has bought is used up, and slots are never bought beyond the cap, so no bill
exceeds it. What a dead worker bought counts as spent.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, islice

from batchinfer.jobs.clock import Clock
from batchinfer.jobs.columns import NANOSECONDS_PER_HOUR, usd
from batchinfer.jobs.folder import JobFolder, new_nonce
from batchinfer.jobs.records import Control, JobRecord, SettledSlot, Slot
from batchinfer.jobs.unbought import Unbought

SLOT_NS = 300_000_000_000
SHORTEST_SLOT_NS = 1_000_000_000
SLOTS_PER_WORKER = 2
# What a worker has left when it is told to save its work and leave, and what it may take to exit.
MARGIN_NS = 20_000_000_000
EXIT_NS = 2_000_000_000
ASK_AGAIN_SECONDS = 5.0
USED_UP = "the budget is used up"


class BudgetSpent(Exception):
    """The worker's slots are used up: nothing more may be said in its name."""


@dataclass(frozen=True, slots=True)
class Cap:
    """What a job may use at most: worker time and USD; None where there is no limit."""

    nanoseconds: int | None
    usd: float | None

    @property
    def limited(self) -> bool:
        """Whether there is any limit."""
        return self.nanoseconds is not None or self.usd is not None


def cap_of(control: Control, record: JobRecord) -> Cap:
    """The job's cap as it was last asked for."""
    stored = record.spec.get("budget", {})
    return asked_cap(
        control.max_usd or stored.get("max_usd"),
        control.max_worker_hours or stored.get("max_worker_hours"),
    )


def asked_cap(max_usd: float | None, max_worker_hours: float | None) -> Cap:
    """The cap that a spec's budget asks for."""
    hours = max_worker_hours
    return Cap(None if hours is None else round(hours * NANOSECONDS_PER_HOUR), max_usd)


def slot_ns(cap: Cap, usd_per_hour: float | None, workers: int) -> int:
    """The worker time of a slot for a job with this cap: about five minutes, less where the cap would not
    give each of its ``workers`` two of them."""
    limits = [] if cap.nanoseconds is None else [float(cap.nanoseconds)]
    if cap.usd is not None and usd_per_hour:
        limits.append(cap.usd / usd_per_hour * NANOSECONDS_PER_HOUR)
    # One less, so that rounding leaves room for the last slot.
    fair = [int(limit / (SLOTS_PER_WORKER * workers)) - 1 for limit in limits]
    return max(SHORTEST_SLOT_NS, min([SLOT_NS, *fair]))


class Slots:
    """A job's slots: buys, settles and counts them. ``price`` is the spec's: what a slot is in USD.

    ``unbought`` is what was spent outside of slots, where the job has not always had a budget: the cap pays
    for that as well.
    """

    def __init__(
        self,
        folder: JobFolder,
        nanoseconds: int,
        price: float | None,
        chance: random.Random,
        unbought: Unbought | None = None,
    ) -> None:
        self.nanoseconds = nanoseconds
        self.usd = usd(nanoseconds, price) or None
        self._folder = folder
        self._chance = chance
        self._unbought = unbought
        self._bought: set[int] = set()
        self._settled: dict[int, SettledSlot] = {}

    def begin(self) -> None:
        """Wait until nobody spends anything outside of slots; to be called before the first is bought."""
        if self._unbought is not None:
            self._unbought.wait()

    def buy(self, worker: str, cap: Cap) -> int | None:
        """Buy a slot; None where the cap does not pay for another one."""
        window = 1
        while True:
            number = self._free(cap, window)
            if number is None:
                return None
            if self._folder.create_slot(number, Slot(worker=worker, nonce=new_nonce())):
                return number
            # Others buy at the same time: spread out.
            window *= 2

    def affordable(self, cap: Cap) -> bool:
        """Whether the cap pays for another slot."""
        return self._free(cap, 1) is not None

    def settle(self, number: int, spent_ns: int, spent_usd: float) -> None:
        """Say what was spent of a slot that we bought: once, and nothing is spent of it afterwards."""
        record = SettledSlot(spent_ns=spent_ns, spent_usd=spent_usd, nonce=new_nonce())
        self._folder.settle_slot(number, record)

    def used(self) -> tuple[int, float]:
        """Nanoseconds and USD that the slots seen so far stand for, and what was spent outside of them."""
        rest_ns, rest_usd = self._rest()
        return len(self._bought) * self.nanoseconds - rest_ns, len(self._bought) * (
            self.usd or 0.0
        ) - rest_usd

    def _free(self, cap: Cap, window: int) -> int | None:
        """A slot that nobody has bought and the cap pays for: one of the first ``window`` such."""
        if self._unbought is not None:
            self._unbought.look()
        bought, settled = self._folder.list_slots()
        self._bought = bought
        free = self._candidates(cap, window)
        for number in sorted(settled - self._settled.keys()):
            # What was settled only adds to the cap, so it is read no sooner than it is needed.
            if free:
                break
            self._settled[number] = self._folder.read_settled(number)
            free = self._candidates(cap, window)
        return self._chance.choice(free) if free else None

    def _candidates(self, cap: Cap, window: int) -> list[int]:
        numbers = (number for number in count() if number not in self._bought)
        limit = self._limit(cap)
        return [number for number in islice(numbers, window) if number < limit]

    def _limit(self, cap: Cap) -> int:
        """Slot k may be bought only if (k + 1) slots are within the cap and the unspent rest of settled
        ones. Both only grow, so what is known too late can only under-spend."""
        rest_ns, rest_usd = self._rest()
        limits = [1 << 62]
        if cap.nanoseconds is not None:
            limits.append((cap.nanoseconds + rest_ns) // self.nanoseconds)
        if cap.usd is not None and self.usd is not None:
            limits.append(int((cap.usd + rest_usd) / self.usd))
        return min(limits)

    def _rest(self) -> tuple[int, float]:
        """What is left of settled slots, less what was spent outside of slots."""
        known = self._settled.values()
        other_ns, other_usd = (0, 0.0) if self._unbought is None else self._unbought.spent()
        return (
            sum(self.nanoseconds - slot.spent_ns for slot in known) - other_ns,
            sum((self.usd or 0.0) - slot.spent_usd for slot in known) - other_usd,
        )


def job_slots(
    folder: JobFolder, clock: Clock, record: JobRecord, control: Control, lease_seconds: float
) -> Slots:
    """The slots of the job that ``record`` describes, as ``control`` changes it."""
    price = record.spec.get("price", {}).get("usd_per_hour")
    always = any(value is not None for value in record.spec.get("budget", {}).values())
    unbought = None if always else Unbought(folder, clock, lease_seconds)
    return Slots(folder, control.slot_ns or record.slot_ns, price, random.Random(), unbought)


class Allowance:
    """What one worker has bought. It sees to it that the worker ends before that is used up.

    A slot pays for its nanoseconds, or for as long as its USD last at the worker's price if that is
    less. ``leave`` ends the process at once with an exit code; ``cap`` reads the cap as it is now.
    """

    def __init__(
        self,
        slots: Slots,
        clock: Clock,
        worker: str,
        usd_per_hour: float | None,
        started_ns: int,
        cap: Callable[[], Cap],
        leave: Callable[[int], None],
    ) -> None:
        self._slots = slots
        self._clock = clock
        self._worker = worker
        self._price = usd_per_hour or 0.0
        self._started = started_ns
        self._cap = cap
        self._leave = leave
        self._slot_ns = slots.nanoseconds
        if slots.usd is not None and self._price:
            self._slot_ns = min(self._slot_ns, int(slots.usd / self._price * NANOSECONDS_PER_HOUR))
        self._margin = min(MARGIN_NS, self._slot_ns // 2)
        self._seen = Cap(None, None)
        self._changed = clock.condition()
        self._numbers: list[int] = []
        self._until: int | None = None
        self._exit_code = 77
        self._buying = True

    @property
    def until_ns(self) -> int:
        """When the worker must be gone, on its clock."""
        paid = self._started + len(self._numbers) * self._slot_ns
        return paid if self._until is None else min(paid, self._until)

    @property
    def message(self) -> str:
        """Why a worker stops whose cap pays for no other slot."""
        return used_up(self._seen, *self._slots.used())

    def begin(self) -> bool:
        """Buy what it takes to begin; False where the cap does not pay for it."""
        self._slots.begin()
        while self.until_ns - self._clock.now_ns() <= self._margin:
            number = self._buy()
            if number is None:
                self.settle(self._exit_code)
                return False
            self._numbers.append(number)
        return True

    def _buy(self) -> int | None:
        self._seen = self._cap()
        return self._slots.buy(self._worker, self._seen)

    def keep_buying(self) -> None:
        """Buy the next slot before the last one is used up, until told to stop."""
        while self._wait_to_buy():
            number = self._buy()
            with self._changed:
                if number is not None:
                    self._numbers.append(number)
                    self._changed.notify_all()
                elif self._buying:
                    # Others may settle what they have left.
                    self._changed.wait(ASK_AGAIN_SECONDS)

    def _wait_to_buy(self) -> bool:
        with self._changed:
            while self._buying:
                left = self.until_ns - 3 * self._margin - self._clock.now_ns()
                if left <= 0:
                    return True
                self._changed.wait(left / 1e9)
            return False

    def watch(self, drain: Callable[[], None]) -> None:
        """Call ``drain`` while there is time left to save what is in work, and end the process when there
        is none. Never waits for storage."""
        drained = False
        while True:
            with self._changed:
                left = self.until_ns - self._clock.now_ns()
                if left > 0 and (drained or left > self._margin):
                    self._changed.wait((left if drained else left - self._margin) / 1e9)
                    continue
            if left <= 0:
                self._leave(self._exit_code)
                return
            drained = True
            drain()

    def stop_buying(self) -> None:
        """Buy nothing more; what there is must do."""
        with self._changed:
            self._buying = False
            self._changed.notify_all()

    def settle(self, exit_code: int) -> None:
        """Say what is spent of the slots, up to a moment from now by which the process is gone. It must be
        the worker's last act, with nobody buying."""
        with self._changed:
            self._exit_code = exit_code
            end = self._until = min(self.until_ns, self._clock.now_ns() + EXIT_NS)
            self._changed.notify_all()
        for place, number in enumerate(self._numbers):
            spent = min(self._slot_ns, max(0, end - self._started - place * self._slot_ns))
            spent_usd = usd(spent, self._price) or 0.0
            if spent < self._slots.nanoseconds or spent_usd < (self._slots.usd or 0.0):
                self._slots.settle(number, spent, spent_usd)


def used_up(cap: Cap, spent_ns: int, spent_usd: float) -> str:
    """One sentence that names the cap and what is spent of it."""
    parts = []
    if cap.usd is not None:
        parts.append(f"${spent_usd:.6g} of budget.max_usd ${cap.usd:.6g}")
    if cap.nanoseconds is not None:
        hours, most = spent_ns / NANOSECONDS_PER_HOUR, cap.nanoseconds / NANOSECONDS_PER_HOUR
        parts.append(f"{hours:.6g} of budget.max_worker_hours {most:.6g}")
    return (
        f"{USED_UP}: {' and '.join(parts)} is spent, and what is left does not pay for more work; "
        "raise the budget and submit again to go on"
    )
