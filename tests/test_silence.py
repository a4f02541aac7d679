"""An engine is silent only as long as somebody listens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from batchinfer.jobs.silence import Silence


def test_time_in_which_the_supervisor_stood_still_does_not_count() -> None:
    silence = Silence(0, 30)
    assert silence.so_far(15) == 15
    assert silence.so_far(15 + 218) == 15 + 30
    silence.end(240)
    assert silence.so_far(250) == 10


@given(st.lists(st.integers(0, 30)))
def test_every_second_counts_where_it_is_asked_in_time(pauses: list[int]) -> None:
    silence = Silence(0, 30)
    for end in range(len(pauses)):
        assert silence.so_far(sum(pauses[: end + 1])) == sum(pauses[: end + 1])


@given(st.lists(st.tuples(st.integers(0, 1000), st.booleans())))
def test_it_is_never_longer_than_the_time_that_was_listened(events: list[tuple[int, bool]]) -> None:
    silence, now, listened = Silence(0, 30), 0, 0
    for pause, heard in events:
        now += pause
        listened += min(pause, 30)
        assert 0 <= silence.so_far(now) <= listened
        if heard:
            silence.end(now)
            listened = 0
