"""The budget: slots that are never bought beyond the cap, and a worker that ends before its own are up."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.connectors.storage import open_store
from batchinfer.jobs.budget import (
    SHORTEST_SLOT_NS,
    SLOT_NS,
    Allowance,
    Cap,
    Slots,
    slot_ns,
    used_up,
)
from batchinfer.jobs.folder import JobFolder

SECOND = 10**9
HOUR = 3600 * SECOND


@pytest.fixture
def folder(tmp_path: Any) -> JobFolder:
    return JobFolder(open_store(str(tmp_path)))


def slots(
    folder: JobFolder, price: float | None = 2.0, nanoseconds: int = 100 * SECOND, seed: int = 0
) -> Slots:
    return Slots(folder, nanoseconds, price, random.Random(seed))


@given(
    seconds=st.floats(10, 1e7),
    price=st.one_of(st.none(), st.floats(0.01, 100)),
    workers=st.integers(1, 1000),
    both=st.booleans(),
)
def test_every_worker_gets_two_slots_or_five_minutes(
    seconds: float, price: float | None, workers: int, both: bool
) -> None:
    usd = None if price is None else seconds * price / 3600
    cap = Cap(int(seconds * SECOND) if both or usd is None else None, usd)
    size = slot_ns(cap, price, workers)
    assert SHORTEST_SLOT_NS <= size <= SLOT_NS
    if SHORTEST_SLOT_NS < size < SLOT_NS:
        for number in range(2 * workers):
            if cap.nanoseconds is not None:
                assert (number + 1) * size <= cap.nanoseconds
            if usd is not None and price is not None:
                assert (number + 1) * (size * price / HOUR) <= usd


def test_without_a_cap_a_slot_is_five_minutes() -> None:
    assert slot_ns(Cap(None, None), None, 3) == SLOT_NS
    assert slot_ns(Cap(None, 5.0), 0.0, 3) == SLOT_NS


@pytest.mark.parametrize(
    ("cap", "bought"),
    [
        (Cap(1000 * SECOND, None), 10),
        (Cap(999 * SECOND, None), 9),
        (Cap(99 * SECOND, None), 0),
        (Cap(None, 0.3), 5),
        (Cap(1000 * SECOND, 0.3), 5),
        (Cap(300 * SECOND, 0.3), 3),
    ],
)
def test_slots_are_bought_up_to_the_cap(folder: JobFolder, cap: Cap, bought: int) -> None:
    ours, theirs = slots(folder), slots(folder, seed=1)
    numbers = [buyer.buy("w", cap) for _ in range(20) for buyer in (ours, theirs)]
    assert sorted(number for number in numbers if number is not None) == list(range(bought))
    assert not ours.affordable(cap)


def test_what_is_left_of_settled_slots_is_bought_again(folder: JobFolder) -> None:
    cap = Cap(200 * SECOND, None)
    mine = slots(folder)
    first, second = mine.buy("a", cap), mine.buy("a", cap)
    assert first is not None
    assert second is not None
    assert slots(folder).buy("b", cap) is None
    mine.settle(first, 40 * SECOND, 0.02)
    assert slots(folder).buy("b", cap) is None
    mine.settle(second, 60 * SECOND, 0.03)
    assert slots(folder).buy("b", cap) == 2
    assert slots(folder).buy("b", cap) is None
    assert slots(folder).buy("b", Cap(300 * SECOND, None)) == 3


steps = st.lists(
    st.tuples(
        st.integers(0, 3), st.sampled_from(["buy", "settle", "die", "raise", "lower"]), st.floats(0, 1)
    ),
    max_size=60,
)


@given(steps, st.floats(50, 2000), st.sampled_from(["time", "usd", "both"]))
@settings(max_examples=60, deadline=None)
def test_whatever_workers_do_the_cap_holds(steps: Any, seconds: float, kind: str) -> None:
    folder = JobFolder(open_store(f"memory://budget-{random.random()}"))
    buyers = [slots(folder, seed=seed) for seed in range(4)]
    owned: dict[int, list[int]] = {buyer: [] for buyer in range(4)}
    spent: dict[int, float] = {}
    cap, highest = seconds, seconds
    for buyer, what, share in steps:
        if what == "raise":
            cap *= 1 + share
            highest = max(highest, cap)
        elif what == "lower":
            cap *= 1 - share / 2
        elif what == "die":
            owned[buyer].clear()
        elif what == "settle" and owned[buyer]:
            number = owned[buyer].pop()
            spent[number] = int(share * 100) * SECOND
            buyers[buyer].settle(number, int(spent[number]), spent[number] * 2.0 / HOUR)
        elif what == "buy":
            usd = cap * 2.0 / 3600
            limits = Cap(int(cap * SECOND) if kind != "usd" else None, usd if kind != "time" else None)
            number = buyers[buyer].buy("w", limits)
            if number is not None:
                assert number not in spent
                owned[buyer].append(number)
                spent[number] = 100 * SECOND
        assert sum(spent.values()) <= highest * SECOND * (1 + 1e-9)


def test_workers_that_buy_at_once_get_a_slot_each(folder: JobFolder) -> None:
    cap, got = Cap(2000 * SECOND, None), []

    def buy(seed: int) -> None:
        got.append(slots(folder, seed=seed).buy(f"w{seed}", cap))

    threads = [threading.Thread(target=buy, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({number for number in got if number is not None}) == 16
    assert max(number for number in got if number is not None) < 20


class Hands:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0

    def now_ns(self) -> int:
        return self.now

    def condition(self) -> threading.Condition:
        return threading.Condition()


def allowance(folder: JobFolder, clock: Any, cap: Cap, price: float = 2.0) -> Allowance:
    left: list[int] = []
    return Allowance(slots(folder), clock, "w", price, 0, lambda: cap, left.append)


@pytest.mark.parametrize(("price", "until"), [(2.0, 100), (1.0, 100), (4.0, 50), (0.0, 100)])
def test_a_slot_pays_for_its_time_or_for_its_usd(folder: JobFolder, price: float, until: int) -> None:
    mine = allowance(folder, Hands(), Cap(None, 1.0), price)
    assert mine.begin()
    assert mine.until_ns == until * SECOND


def test_settled_is_what_was_spent_and_a_moment_to_leave(folder: JobFolder) -> None:
    clock = Hands()
    mine = allowance(folder, clock, Cap(1000 * SECOND, None))
    clock.now = 130 * SECOND  # it took that long to begin
    assert mine.begin()
    assert mine.until_ns == 200 * SECOND
    mine.settle(0)
    assert folder.list_slots() == ({0, 1}, {1})
    settled = folder.read_settled(1)
    assert settled.spent_ns == 32 * SECOND
    assert settled.spent_usd == pytest.approx(32 * 2.0 / 3600)
    assert mine.until_ns == 132 * SECOND


def test_a_worker_that_can_not_pay_for_a_beginning_gives_back_what_it_bought(folder: JobFolder) -> None:
    clock = Hands()
    clock.now = 130 * SECOND
    mine = allowance(folder, clock, Cap(100 * SECOND, None))
    assert not mine.begin()
    assert "budget.max_worker_hours 0.0277" in mine.message
    clock.now = 0
    other = allowance(folder, clock, Cap(50 * SECOND, None))
    assert not other.begin()
    assert folder.list_slots() == ({0}, set())


def test_the_cap_and_what_is_spent_are_named() -> None:
    text = used_up(Cap(2 * HOUR, 1.5), HOUR, 1.25)
    for word in ("$1.25 of budget.max_usd $1.5", "1 of budget.max_worker_hours 2", "raise the budget"):
        assert word in text
    assert "max_usd" not in used_up(Cap(HOUR, None), HOUR, 1.0)
