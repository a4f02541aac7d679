"""Suspects: halving finds every row of which engines die, condemns no other, and costs few engines."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from batchinfer.jobs.suspects import DEATHS_ALONE, UNSUSPECTED, Suspects, Suspicion


def tried(suspects: Suspects, rows: list[int], poison: set[int], limit: int) -> tuple[set[int], int]:
    """Run ``rows`` on engines that take ``limit`` of them and die of poison; who is condemned, and how
    many engines it took."""
    waiting, condemned, deaths = list(rows), set(), 0
    while waiting:
        group = next_group(suspects, waiting, limit)
        if not poison.intersection(group):
            suspects.forget(group.__contains__)
            waiting = [row for row in waiting if row not in group]
            continue
        deaths += 1
        row = suspects.died(group, alone=len(group) == 1)
        if row is not None:
            suspects.forget(row.__eq__)
            condemned.add(row)
            waiting.remove(row)
        suspects.check()
    return condemned, deaths


def next_group(suspects: Suspects, waiting: list[int], limit: int) -> list[int]:
    while group := suspects.next_group(limit):
        found = [row for row in waiting if row in group]
        if found:
            return found
    return waiting[:limit]


@given(st.integers(1, 200), st.sets(st.integers(0, 199), max_size=6), st.integers(1, 300))
def test_exactly_the_poison_is_condemned(rows: int, poison: set[int], limit: int) -> None:
    poison = {row for row in poison if row < rows}
    condemned, deaths = tried(Suspects(), list(range(rows)), poison, limit)
    assert condemned == poison
    bound = math.ceil(math.log2(min(rows, limit))) + DEATHS_ALONE if rows else 0
    assert deaths <= len(poison) * bound


def test_one_poison_among_a_thousand_costs_thirteen_engines() -> None:
    worst = max(tried(Suspects(), list(range(1000)), {row}, 1000)[1] for row in range(0, 1000, 37))
    assert worst <= math.ceil(math.log2(1000)) + DEATHS_ALONE == 13


def test_a_death_with_others_in_flight_condemns_nobody() -> None:
    suspects = Suspects()
    for _ in range(5):
        assert suspects.died([4], alone=False) is None
    assert suspects.of(lambda row: True).deaths == {}


@given(st.integers(2, 64), st.integers(0, 63), st.integers(0, 10))
def test_suspicion_survives_a_supervisor(rows: int, poison: int, handovers: int) -> None:
    poison %= rows
    suspects, deaths = Suspects(), 0
    waiting = list(range(rows))
    while True:
        group = next_group(suspects, waiting, rows)
        if poison not in group:
            suspects.forget(group.__contains__)
            waiting = [row for row in waiting if row not in group]
            continue
        deaths += 1
        condemned = suspects.died(group, alone=len(group) == 1)
        if condemned is not None:
            break
        if handovers:
            handovers -= 1
            kept = Suspicion.from_json(suspects.of(waiting.__contains__).to_json())
            suspects = Suspects()
            suspects.add(kept)
    assert condemned == poison
    assert deaths <= math.ceil(math.log2(rows)) + DEATHS_ALONE


def test_of_two_views_the_narrower_counts() -> None:
    wide, narrow = Suspicion(((1, 2, 3, 4),), {9: 1}), Suspicion(((3,), (4,)), {9: 2, 8: 1})
    both = wide.merged(narrow)
    assert sorted(both.groups) == [(1, 2), (3,), (4,)]
    assert both.deaths == {9: 2, 8: 1}
    assert not UNSUSPECTED and both
    assert both.among((1).__eq__) == Suspicion(((1,),), {})
