"""Progress inside an open shard: finished rows, and the tokens of rows in flight.

Every claimant reads the objects of all workers and generations and goes on from their union, so it does
not matter who wrote what, or whether a writer had lost its lease.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from batchinfer.jobs.folder import JobFolder, ShardName
from batchinfer.jobs.records import Failure
from batchinfer.jobs.samples import (
    Finished,
    Flight,
    Partial,
    SampleKey,
    finished_from_bytes,
    finished_to_bytes,
    inflight_from_bytes,
    inflight_to_bytes,
)
from batchinfer.jobs.suspects import UNSUSPECTED, Suspicion


@dataclass(slots=True)
class Progress:
    """The union of a shard's progress: a finished sample hides what was in flight of it, and of
    several copies in flight the longest counts. A failed row hides its samples. ``suspicion`` is what is
    held against rows of which engines may have died, ``read`` the keys that were read. ``running`` has an
    entry for each worker that published anything: the rows that its engine has begun."""

    samples: dict[SampleKey, Finished] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)
    partials: dict[SampleKey, Partial] = field(default_factory=dict)
    running: dict[str, set[int]] = field(default_factory=dict)
    suspicion: Suspicion = UNSUSPECTED
    read: set[str] = field(default_factory=set)

    def settled(self, n: int) -> int:
        """Rows that are failed, or have all their ``n`` samples."""
        counts = Counter(key.row for key in self.samples)
        return len(self.failures) + sum(count == n for count in counts.values())


def read_progress(folder: JobFolder, shard: ShardName) -> Progress | None:
    """The shard's progress so far; None when it turns out to be committed (its leftovers are deleted)."""
    while True:
        progress = Progress()
        try:
            for item in folder.list_progress(shard):
                data = folder.store.get(item.key)
                progress.read.add(item.key)
                running = progress.running.setdefault(item.worker, set())
                if item.inflight:
                    flight = inflight_from_bytes(data)
                    progress.suspicion = progress.suspicion.merged(flight.suspicion)
                    running |= flight.running
                    for key, partial in flight.partials.items():
                        known = progress.partials.get(key)
                        if known is None or len(known.decoded.token_ids) < len(partial.decoded.token_ids):
                            progress.partials[key] = partial
                else:
                    samples, failures = finished_from_bytes(data)
                    for sample in samples:
                        progress.samples.setdefault(sample.key, sample)
                    for failure in failures:
                        progress.failures.setdefault(failure.row_index, failure)
        except FileNotFoundError:
            if folder.is_committed(shard):
                return None
            # Its writer replaced an object of rows in flight by a newer one: list again.
            continue
        for key in [key for key in progress.samples if key.row in progress.failures]:
            del progress.samples[key]
        for key in [
            key for key in progress.partials if key in progress.samples or key.row in progress.failures
        ]:
            del progress.partials[key]
        return progress


@dataclass(frozen=True, slots=True)
class News:
    """What others have published of a shard since the last look, and what they have in flight now, by
    worker; ``others`` says whether anything was new."""

    samples: Sequence[Finished]
    failures: Sequence[Failure]
    flights: Mapping[str, Flight]
    others: bool


class ProgressReader:
    """Follows what others publish of a shard that ``worker`` has open; ``read`` are keys that it knows."""

    def __init__(self, folder: JobFolder, shard: ShardName, worker: str, read: Iterable[str]) -> None:
        self._folder = folder
        self._shard = shard
        self._worker = worker
        self._read = set(read)
        self._flights: dict[str, Flight] = {}

    def news(self) -> News | None:
        """Look once; None when the shard is committed, and objects of it are gone."""
        samples: list[Finished] = []
        failures: list[Failure] = []
        flights: dict[str, Flight] = {}
        by_worker: dict[str, Flight] = {}
        new = False
        for item in self._folder.list_progress(self._shard):
            if item.worker == self._worker or (item.key in self._read and not item.inflight):
                continue
            new = new or item.key not in self._read
            try:
                if item.inflight:
                    flights[item.key] = flight = self._flights.get(item.key) or inflight_from_bytes(
                        self._folder.store.get(item.key)
                    )
                    by_worker[item.worker] = flight
                else:
                    more = finished_from_bytes(self._folder.store.get(item.key))
                    samples += more[0]
                    failures += more[1]
            except FileNotFoundError:
                if self._folder.is_committed(self._shard):
                    return None
                continue  # its writer has replaced it by a newer one, which the next look finds
            self._read.add(item.key)
        self._flights = flights
        return News(samples, failures, by_worker, new)


class ProgressWriter:
    """Publishes one worker's progress on one shard, as numbered immutable objects."""

    def __init__(self, folder: JobFolder, shard: ShardName, worker: str) -> None:
        self._folder = folder
        self._shard = shard
        self._worker = worker
        self._next: int | None = None
        self._inflight: str | None = None

    @property
    def said_in_flight(self) -> bool:
        """Whether an object of ours in storage says what is in flight."""
        return self._inflight is not None

    def write(
        self,
        samples: Sequence[Finished],
        failures: Sequence[Failure],
        flight: Flight,
    ) -> None:
        """Publish finished samples and failed rows since the last call, and all that is in flight.

        Rows first: once they are there, what was in flight of them may go.
        """
        sequence = self._sequence()
        if samples or failures:
            key = self._folder.progress_key(self._shard, self._worker, sequence)
            self._folder.store.create_exclusive(key, finished_to_bytes(samples, failures))
        before, self._inflight = self._inflight, None
        if flight:
            key = self._folder.progress_key(self._shard, self._worker, sequence, inflight=True)
            self._folder.store.create_exclusive(key, inflight_to_bytes(flight))
            self._inflight = key
        if before is not None:
            self._folder.store.delete(before)

    def _sequence(self) -> int:
        if self._next is None:
            # We may have owned this shard before; numbers are never used twice.
            ours = [item for item in self._folder.list_progress(self._shard) if item.worker == self._worker]
            self._next = max((item.sequence for item in ours), default=-1) + 1
        sequence, self._next = self._next, self._next + 1
        return sequence


def delete_progress(folder: JobFolder, shard: ShardName) -> None:
    """Delete the leftovers of a committed shard."""
    for item in folder.list_progress(shard):
        folder.store.delete(item.key)
