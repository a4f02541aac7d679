"""A worker's throughput over time: what it had done at a bounded number of moments of its life."""

from __future__ import annotations

from typing import NamedTuple

MOMENTS = 96


class Moment(NamedTuple):
    """What a worker had done after ``spent_ns`` of its life: rows it had finished, and their tokens."""

    spent_ns: int
    rows: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


def extended(history: tuple[Moment, ...], moment: Moment) -> tuple[Moment, ...]:
    """The history with one more moment at its end.

    It holds at most ``MOMENTS``. A full one is thinned to the first moment of every span of 2^k ns, of
    which there are at most half as many; spans nest, so thinning again and again keeps it even. A life of
    days keeps its beginning as well as its last minutes, and a heartbeat stays small.
    """
    history = (*history, moment)
    if len(history) <= MOMENTS:
        return history
    span = (moment.spent_ns // (MOMENTS // 2 - 1)).bit_length()
    firsts = {found.spent_ns >> span: found for found in reversed(history[:-1])}
    return (*reversed(firsts.values()), moment)
