"""Throughput over time, from the moments that workers keep in their heartbeats."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchinfer.jobs.records import WorkerRecord

SPANS = 72
# A pause without any worker is cut out of the time axis when it is longer than this part of the rest.
_SHORTEST_CUT = 0.05

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Cut:
    """A pause without workers that was left out: where, in seconds of the axis, and how long it was."""

    at: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Throughput:
    """What all workers together did in equal spans of time, pauses without workers left out.

    ``started`` is the store's time of the first moment, ``seconds`` the length of the axis. Of each span
    ``rows``, ``prompt_tokens`` and ``completion_tokens`` are a second's, ``workers`` the average number
    of those at work. What a worker did between two of its moments is spread evenly.
    """

    started: float
    seconds: float
    cuts: tuple[Cut, ...]
    rows: tuple[float, ...]
    prompt_tokens: tuple[float, ...]
    completion_tokens: tuple[float, ...]
    workers: tuple[float, ...]


def throughput(beats: Iterable[tuple[WorkerRecord, float]], spans: int = SPANS) -> Throughput | None:
    """The throughput of workers, each given by its last heartbeat and the store's time of that; None
    before any of them has done anything.

    All times are the store's: a moment lies as long before the heartbeat as the worker's bill had grown
    since.
    """
    lives = [_Life(record, modified) for record, modified in beats if record.bill.total]
    if not any(life.counts[-1].any() for life in lives):
        return None
    pieces = _union((life.times[0], life.times[-1]) for life in lives)
    active = sum(stop - start for start, stop in pieces)
    axis, cuts = _axis(pieces, _SHORTEST_CUT * active)
    seconds = axis[-1][1]
    edges = np.linspace(0.0, seconds, spans + 1)
    moments = _moments(edges, axis)
    done = np.zeros((spans, 3))
    present = np.zeros(spans)
    for life in lives:
        done += np.diff([np.interp(moments, life.times, column) for column in life.counts.T], axis=1).T
        inside = np.clip(moments, life.times[0], life.times[-1])
        present += np.diff(inside)
    width = seconds / spans
    rates = done / width
    # A span with a cut in it is longer by the clock; the workers were there in what the axis shows of it.
    return Throughput(
        started=axis[0][2],
        seconds=seconds,
        cuts=tuple(cuts),
        rows=tuple(map(float, rates[:, 0])),
        prompt_tokens=tuple(map(float, rates[:, 1])),
        completion_tokens=tuple(map(float, rates[:, 2])),
        workers=tuple(map(float, present / width)),
    )


class _Life:
    """A worker's moments: ``times`` of the store's clock, and the ``counts`` at each of rows, prompt
    tokens and completion tokens."""

    def __init__(self, record: WorkerRecord, modified: float) -> None:
        total = record.bill.total
        spent = [0, *(moment.spent_ns for moment in record.history)]
        counts = [(0, 0, 0)]
        counts += [
            (moment.rows, moment.prompt_tokens, moment.completion_tokens) for moment in record.history
        ]
        if spent[-1] < total:
            spent.append(total)
            counts.append((record.rows_done, record.prompt_tokens, record.completion_tokens))
        self.times: Floats = modified - (total - np.array(spent, np.float64)) / 1e9
        self.counts: Floats = np.array(counts, np.float64)


def _union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same times as intervals that don't touch, in order."""
    found: list[tuple[float, float]] = []
    for start, stop in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found


def _axis(
    pieces: Sequence[tuple[float, float]], shortest: float
) -> tuple[list[tuple[float, float, float]], list[Cut]]:
    """Pieces of the axis, (first second, last second, time of the first), and what is cut out between."""
    axis: list[tuple[float, float, float]] = []
    cuts: list[Cut] = []
    for start, stop in pieces:
        if not axis:
            axis.append((0.0, stop - start, start))
            continue
        first, last, time = axis[-1]
        pause = start - (time + last - first)
        if pause > shortest:
            cuts.append(Cut(last, pause))
            axis.append((last, last + stop - start, start))
        else:
            axis[-1] = (first, first + stop - time, time)
    return axis, cuts


def _moments(edges: Floats, axis: Sequence[tuple[float, float, float]]) -> Floats:
    """The store's times of these seconds of the axis."""
    firsts = np.array([first for first, _, _ in axis])
    times = np.array([time for _, _, time in axis])
    piece = np.maximum(np.searchsorted(firsts, edges, side="right") - 1, 0)
    found: Floats = times[piece] + edges - firsts[piece]
    return found
