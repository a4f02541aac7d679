"""Claims shards and turns their rows into requests, ahead of the engine by a bounded number."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from batchinfer.connectors.batches import RowBatch
from batchinfer.connectors.types import BadRow, Split
from batchinfer.engine.types import Request, SamplingParams
from batchinfer.jobs.claims import Claims, Lease
from batchinfer.jobs.events import log_event
from batchinfer.jobs.failure_limit import NO_LIMIT, FailureLimit
from batchinfer.jobs.folder import JobFolder, ShardName
from batchinfer.jobs.open_shard import OpenShard
from batchinfer.jobs.progress import Progress, ProgressReader, ProgressWriter, read_progress
from batchinfer.jobs.records import Failure, input_as_json
from batchinfer.jobs.types import RowError, Shard
from batchinfer.jobs.workbench import Workbench

logger = logging.getLogger(__name__)

FIRST_WAIT = 0.25
WAIT_GROWTH = 1.1


class Patience:
    """How long a worker that finds nothing waits: often the others are about to finish, so it looks soon,
    and then less and less often, up to every ``most`` seconds: a tenth of what it has waited so far. So
    it costs little, and it sees the end soon after."""

    def __init__(self, most: float) -> None:
        self._most = most
        self.reset()

    def reset(self) -> None:
        """Something was found."""
        self._next = FIRST_WAIT

    def next(self, least: float) -> float:
        """Seconds to wait now: ``least`` or more."""
        seconds = max(least, min(self._next, self._most))
        self._next = min(self._next * WAIT_GROWTH, self._most)
        return seconds


@dataclass(frozen=True, slots=True)
class Work:
    """What a worker does: the job's shards, how to read and to prompt their rows, and how to sample.

    ``schema`` is that of the parts, ``passed`` the input's columns in it. ``read`` gives all rows of a
    split with the columns that are passed and prompted; ``render`` raises RowError. ``next_round`` gives
    the shards of a retry round, by its number; none where it was not begun. ``row_sampling`` is how a row
    is sampled that says so itself; its ``n`` is the job's. ``limit`` is how many rows may fail.
    """

    shards: Mapping[ShardName, Shard]
    schema: pa.Schema
    passed: pa.Schema
    sampling: SamplingParams
    read: Callable[[Split], Iterable[RowBatch]]
    render: Callable[[Mapping[str, Any]], Any]
    next_round: Callable[[int], Mapping[ShardName, Shard]]
    row_sampling: Callable[[Mapping[str, Any]], SamplingParams] | None = None
    limit: FailureLimit = NO_LIMIT


def helping_pays(rows: int, progress: Progress, n: int, owner: str) -> bool:
    """Whether a helper of a shard of ``rows`` rows has enough to do, from what its ``owner`` has published.

    It has while at least as many rows wait as the owner's engine has begun: then there is as much left
    for another engine as the owner is at. Before the owner has published anything nobody knows, whatever
    earlier owners have left; and while rows are suspected of ending engines, one worker that isolates
    them is enough.
    """
    if owner not in progress.running or progress.suspicion:
        return False
    running = len(progress.running[owner])
    return rows - progress.settled(n) - running >= max(2, running)


class Feeder:
    """Keeps the bench supplied: claims a shard, reads what is known of it, and queues the rest.

    ``shards`` are those of the round that the worker is at.
    """

    def __init__(
        self, folder: JobFolder, bench: Workbench, claims: Claims, work: Work, worker: str, patience: float
    ) -> None:
        self._folder = folder
        self._bench = bench
        self._claims = claims
        self._work = work
        self.shards = work.shards
        self._worker = worker
        self._patience = Patience(patience)
        self._n = work.sampling.n

    def run(self) -> None:
        """Feed until the worker stops, or every shard is committed, or has workers enough."""
        while self._bench.wait_for_room():
            lease = self._claims.claim(self._bench.held())
            if lease is not None:
                self._patience.reset()
                self._feed(lease)
            elif (
                self._claims.all_committed()
                and not (following := self._next_round())
                and not self._bench.is_helping()
            ):
                self._bench.request_stop("done")
            elif self._claims.all_committed() and not self._bench.held():
                # Not before the engine has forgotten the last round's rows: they may be tried again.
                self.shards = following
                self._claims.begin(list(following))
            elif not self._bench.held() and (lease := self._help()) is not None:
                self._patience.reset()
                self._feed(lease)
            elif not self._bench.held() and self._claims.is_surplus():
                self._bench.request_stop("done")
            elif self._bench.held() or not self._claims.all_committed():
                # The others' leases may still go stale, so there may be work for us later.
                least = self._claims.least_wait()
                self._bench.wait_for_work(self._patience.next(least))

    def _next_round(self) -> Mapping[ShardName, Shard]:
        return self._work.next_round(next(iter(self.shards)).round + 1)

    def _help(self) -> Lease | None:
        """A helper's lease on a shard of somebody else's, where helping pays."""
        for offer in self._claims.helpable():
            progress = read_progress(self._folder, offer.shard)
            if progress is None or not progress.running:
                continue
            owner = self._claims.owner(offer)
            if helping_pays(self.shards[offer.shard].rows, progress, self._n, owner):
                lease = self._claims.help(offer)
                if lease is not None:
                    return lease
        return None

    def _feed(self, lease: Lease) -> None:
        planned = self.shards[lease.shard]
        what = "helping with" if lease.helper else "claimed"
        figures = {"shard": lease.shard.label, "rows": planned.rows, "helper": lease.helper}
        log_event(logger, "claim", f"{what} shard {lease.shard.label}, {planned.rows:,} rows", **figures)
        writer = ProgressWriter(self._folder, lease.shard, self._worker)
        shard = OpenShard(planned, lease, self._work.sampling.n, writer)
        self._bench.add(shard)  # from here on the lease is renewed
        progress = read_progress(self._folder, lease.shard)
        if progress is None:
            self._bench.lose(shard)
            return
        reader = ProgressReader(self._folder, lease.shard, self._worker, progress.read)
        shard.load(progress, reader)
        parts = (self._prepare(shard, part) for split in planned.splits for part in self._work.read(split))
        if lease.helper:
            # From the far end: all of the shard is read before its last row comes first.
            parts = (
                (requests[::-1], inputs, failures) for requests, inputs, failures in reversed(list(parts))
            )
        for requests, inputs, failures in parts:
            if not self._bench.enqueue(shard, requests, inputs, failures):
                return
        self._bench.finish_reading(shard)

    def _prepare(
        self, shard: OpenShard, part: RowBatch
    ) -> tuple[list[Request], dict[int, Mapping[str, Any]], list[Failure]]:
        """Requests for the rows of a batch that are not settled, their values, and failures."""
        passed = part.batch.select(self._work.passed.names)
        shard.add_rows(part.indices, passed, len(part.bad))
        requests, inputs, failures = [], {}, []
        for row in part.rows():
            if isinstance(row, BadRow):
                failures.append(Failure(row.index, row.code, row.message, 1, row.raw))
                continue
            if not shard.missing(row.index):
                continue
            try:
                prompt = self._work.render(row.values)
                own = self._work.row_sampling
                sampling = self._work.sampling if own is None else own(row.values)
            except RowError as error:
                values = input_as_json(row.values)
                failures.append(Failure(row.index, error.code, error.message, 1, values))
                continue
            requests.append(Request(row.index, prompt, sampling))
            inputs[row.index] = row.values
        return requests, inputs, failures
