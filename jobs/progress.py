"""Progress inside an open shard: finished rows, and the tokens of rows in flight.

Every claimant reads the objects of all workers and generations and goes on from their union, so it does
not matter who wrote what, or whether a writer had lost its lease.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from batchinfer.jobs.folder import JobFolder, ShardName
from batchinfer.jobs.records import Failure
from batchinfer.jobs.samples import (
    Finished,
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
    held against rows of which engines may have died."""

    samples: dict[SampleKey, Finished] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)
    partials: dict[SampleKey, Partial] = field(default_factory=dict)
    suspicion: Suspicion = UNSUSPECTED


def read_progress(folder: JobFolder, shard: ShardName) -> Progress | None:
    """The shard's progress so far; None when it turns out to be committed (its leftovers are deleted)."""
    while True:
        progress = Progress()
        try:
            for item in folder.list_progress(shard):
                data = folder.store.get(item.key)
                if item.inflight:
                    partials, suspicion = inflight_from_bytes(data)
                    progress.suspicion = progress.suspicion.merged(suspicion)
                    for key, partial in partials.items():
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


class ProgressWriter:
    """Publishes one worker's progress on one shard, as numbered immutable objects."""

    def __init__(self, folder: JobFolder, shard: ShardName, worker: str) -> None:
        self._folder = folder
        self._shard = shard
        self._worker = worker
        self._next: int | None = None
        self._inflight: str | None = None

    def write(
        self,
        samples: Sequence[Finished],
        failures: Sequence[Failure],
        partials: Mapping[SampleKey, Partial],
        suspicion: Suspicion = UNSUSPECTED,
    ) -> None:
        """Publish finished samples and failed rows since the last call, all samples in flight, and what is
        held against rows.

        Rows first: once they are there, what was in flight of them may go.
        """
        sequence = self._sequence()
        if samples or failures:
            key = self._folder.progress_key(self._shard, self._worker, sequence)
            self._folder.store.create_exclusive(key, finished_to_bytes(samples, failures))
        before, self._inflight = self._inflight, None
        if partials or suspicion:
            key = self._folder.progress_key(self._shard, self._worker, sequence, inflight=True)
            self._folder.store.create_exclusive(key, inflight_to_bytes(partials, suspicion))
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
