"""A shard that this worker has claimed: what was read of it, what is answered, what is published."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from batchinfer.engine.types import Completion, Request
from batchinfer.jobs.claims import Lease
from batchinfer.jobs.commit import take_rows
from batchinfer.jobs.folder import ShardName
from batchinfer.jobs.progress import News, Progress, ProgressReader, ProgressWriter
from batchinfer.jobs.records import Failure
from batchinfer.jobs.samples import NOTHING, Charge, Finished, Flight, Partial, SampleKey, charges_after
from batchinfer.jobs.suspects import UNSUSPECTED, Suspicion
from batchinfer.jobs.types import Shard


class OpenShard:
    """One claimed shard in memory.

    ``lease`` becomes None when the shard is lost to another worker; what comes in for it then is waste.
    ``partials`` holds what is known of unfinished samples: what they were resumed from, then what the
    last snapshot said. ``sent`` is the same as the present engine got it, the base of its charges.
    ``inputs`` holds the values of rows that wait for an answer, for the failures that may come.
    ``suspicion`` is what earlier owners held against rows.

    Where this worker had the shard before and lost it, what it saved of unfinished samples became waste of
    its bill then. It may resume them, but must not call the same nanoseconds waste again.

    A shard is ``shared`` once its owner and its helper both work on it: ``elsewhere`` are the rows that
    the other one's engine has begun, ``aside`` requests for such rows, which we do not begin as well.

    Invariant: ``settled`` counts the rows in ``failures`` and those with all ``n`` samples finished.
    """

    def __init__(self, shard: Shard, lease: Lease, n: int, writer: ProgressWriter) -> None:
        self.shard = shard
        self.name: ShardName = lease.shard
        self.lease: Lease | None = lease
        self.n = n
        self.writer = writer
        self.samples: dict[SampleKey, Finished] = {}
        self.failures: dict[int, Failure] = {}
        self.partials: dict[SampleKey, Partial] = {}
        self.sent: dict[SampleKey, Partial] = {}
        self.inputs: dict[int, Mapping[str, Any]] = {}
        self.suspicion = UNSUSPECTED
        self.shared = lease.helper
        self.reader: ProgressReader | None = None
        self.elsewhere: frozenset[int] = frozenset()
        self.aside: dict[int, Request] = {}
        self.unpublished: list[Finished] = []
        self.unpublished_failures: list[Failure] = []
        self.unpublished_bytes = 0
        self.read_all = False
        self.rows_read = 0
        self.settled = 0
        self._batches: list[pa.RecordBatch] = []
        self._indexes: list[pa.Array] = []
        self._counts: dict[int, int] = {}
        self._worker = lease.claim.worker
        self._lost_before: dict[SampleKey, int] = {}

    def load(self, progress: Progress, reader: ProgressReader) -> None:
        """Begin with what others saved; to be called before any row is read. ``reader`` then follows
        what they save from now on."""
        self.samples, self.failures = progress.samples, progress.failures
        self.partials = progress.partials
        self._lost_before = {
            key: _charged(partial.charges, self._worker) for key, partial in self.partials.items()
        }
        self.suspicion = progress.suspicion
        for key in self.samples:
            self._counts[key.row] = self._counts.get(key.row, 0) + 1
        self.settled = len(self.failures) + sum(count == self.n for count in self._counts.values())
        if self.shared:
            self.elsewhere = frozenset().union(*progress.running.values())
        self.reader = reader

    @property
    def complete(self) -> bool:
        """Whether every row was read and is answered or failed."""
        return self.read_all and self.settled == self.rows_read

    def has_row(self, row: int) -> bool:
        """Whether the row, by its position in the whole input, belongs to this shard."""
        return self.shard.has(row)

    def missing(self, row: int) -> tuple[int, ...]:
        """Samples of a row that are still to be answered; none for a failed row."""
        if row in self.failures:
            return ()
        if row not in self._counts:
            return tuple(range(self.n))
        return tuple(sample for sample in range(self.n) if SampleKey(row, sample) not in self.samples)

    def still_to_do(self, request: Request, missing: tuple[int, ...]) -> Request:
        """A request for the samples of its row that are ``missing``, from what is known of them."""
        keys = [(sample, SampleKey(request.index, sample)) for sample in missing]
        resume = {sample: self.partials[key].decoded for sample, key in keys if key in self.partials}
        samples = None if len(missing) == self.n else missing
        return Request(request.index, request.prompt, request.sampling, resume, samples)

    def add_rows(self, indexes: Sequence[int], passed: pa.RecordBatch, unreadable: int) -> None:
        """Keep the pass-through columns of rows that were read, and count those that have none."""
        self._batches.append(passed)
        self._indexes.append(pa.array(indexes, pa.int64()))
        self.rows_read += len(indexes) + unreadable

    def finish(self, done: Completion, usd_per_hour: float | None) -> int:
        """Take a finished sample; returns the nanoseconds that its engine charged to it."""
        key = SampleKey(done.index, done.sample_index)
        base = self.sent.pop(key, NOTHING)
        own = done.prefill_ns + done.decode_ns - base.decoded.prefill_ns - sum(base.decoded.token_ns)
        self.partials.pop(key, None)
        if key in self.samples or key.row in self.failures:
            return own
        charges = charges_after(base, self._worker, usd_per_hour, done.prefill_ns, done.token_ns)
        finished = Finished(done, charges)
        self.samples[key] = finished
        self.unpublished.append(finished)
        self.unpublished_bytes += 200 + len(done.text) + 12 * len(done.token_ids)
        self._counts[key.row] = self._counts.get(key.row, 0) + 1
        self.settled += self._counts[key.row] == self.n
        return own

    def fail(self, failure: Failure) -> bool:
        """Take a row that can't be answered; it counts once, whatever was answered of it: False where it
        was settled before."""
        row = failure.row_index
        if row in self.failures or self._counts.get(row) == self.n:
            return False
        failure = replace(failure, attempts=failure.attempts + self.shard.attempts_before(row))
        self.unpublished_failures.append(failure)
        self.unpublished_bytes += 200 + len(failure.input or "")
        self._settle_failed(failure)
        return True

    def absorb(self, news: News) -> set[int]:
        """Take what others have finished; returns the rows that are settled by it."""
        settled = set()
        for failure in news.failures:
            if self.missing(failure.row_index):
                self._settle_failed(failure)
                settled.add(failure.row_index)
        for sample in news.samples:
            key = sample.key
            if key not in self.samples and key.row not in self.failures:
                self.samples[key] = sample
                self.partials.pop(key, None)
                self._counts[key.row] = self._counts.get(key.row, 0) + 1
                if self._counts[key.row] == self.n:
                    self.settled += 1
                    settled.add(key.row)
        return settled

    def _settle_failed(self, failure: Failure) -> None:
        row = failure.row_index
        for sample in range(self.n):
            key = SampleKey(row, sample)
            self.samples.pop(key, None)
            self.partials.pop(key, None)
            self.sent.pop(key, None)
        self._counts.pop(row, None)
        self.failures[row] = failure
        self.settled += 1

    def own_partials(self) -> dict[SampleKey, Partial]:
        """Samples in flight that this worker decoded something of."""
        return {
            key: partial
            for key, partial in self.partials.items()
            if partial.charges and partial.charges[-1].worker == self._worker
        }

    def take_news(
        self, running: frozenset[int], suspicion: Suspicion
    ) -> tuple[list[Finished], list[Failure], Flight]:
        """What is to be published: samples and failures since the last call, and what is in flight;
        ``running`` rows are in the engine, ``suspicion`` is held against rows of this shard."""
        samples, self.unpublished = self.unpublished, []
        failures, self.unpublished_failures = self.unpublished_failures, []
        self.unpublished_bytes = 0
        begun = frozenset(key.row for key in self.partials) & running
        flight = Flight(self.own_partials(), begun, self.suspicion.merged(suspicion))
        return samples, failures, flight

    def own_charges(self, row: int) -> int:
        """Nanoseconds that this worker charged to what is finished and in flight of a row, and that are no
        waste yet."""
        total = 0
        for key in (SampleKey(row, sample) for sample in range(self.n)):
            known = self.samples.get(key) or self.partials.get(key)
            if known is not None:
                total += _charged(known.charges, self._worker) - self._lost_before.get(key, 0)
        return total

    def own_unpublished(self) -> int:
        """Nanoseconds that this worker charged to finished samples which nobody else can know of, and
        that are no waste yet."""
        return sum(
            _charged(sample.charges, self._worker) - self._lost_before.get(sample.key, 0)
            for sample in self.unpublished
        )

    def own_in_flight(self) -> int:
        """Nanoseconds that the present engine charged to unfinished samples, of what can be resumed."""
        total = 0
        for key, base in self.sent.items():
            now = self.partials.get(key, NOTHING).decoded
            if len(now.token_ids) > len(base.decoded.token_ids):
                total += now.prefill_ns + sum(now.token_ns)
                total -= base.decoded.prefill_ns + sum(base.decoded.token_ns)
        return total

    def answers(self) -> tuple[pa.Table, list[Finished]]:
        """The answered samples, sorted by row and sample, and the input's columns of each."""
        samples = sorted(self.samples.values(), key=lambda sample: sample.key)
        passed = pa.Table.from_batches(self._batches)
        rows = [sample.completion.index for sample in samples]
        return take_rows(passed, pa.chunked_array(self._indexes, pa.int64()), rows), samples

    def check(self) -> None:
        """Raise AssertionError where the invariant is broken."""
        rows = {key.row for key in self.samples}
        assert not rows & self.failures.keys()
        assert self.settled == len(self.failures) + sum(not self.missing(row) for row in rows)
        for sample in self.samples.values():
            done = sample.completion
            assert sum(charge.prefill_ns for charge in sample.charges) == done.prefill_ns
            assert sum(charge.decode_ns for charge in sample.charges) == done.decode_ns
            assert sum(charge.tokens for charge in sample.charges) == len(done.token_ids)


def _charged(charges: Iterable[Charge], worker: str) -> int:
    """Nanoseconds of the charges that are ``worker``'s."""
    return sum(charge.nanoseconds for charge in charges if charge.worker == worker)
