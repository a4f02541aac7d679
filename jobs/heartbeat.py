"""Signs of life: the worker's record and its leases, renewed on a thread of their own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from batchinfer.jobs.budget import BudgetSpent
from batchinfer.jobs.claims import RENEWALS_PER_LEASE, Claims
from batchinfer.jobs.clock import Clock
from batchinfer.jobs.failure_limit import JobStopped
from batchinfer.jobs.folder import JobFolder
from batchinfer.jobs.health import show_life
from batchinfer.jobs.history import Moment, extended
from batchinfer.jobs.prometheus import MetricsFile
from batchinfer.jobs.records import WorkerRecord, WorkerState
from batchinfer.jobs.workbench import Workbench

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Life:
    """How a worker is: what its record says beside its numbers."""

    state: WorkerState
    exit_code: int | None = None
    message: str = ""


class Heartbeat:
    """Writes the worker's record, whose bill is exact at the moment of writing.

    One write at a time, whoever asks: the renewal thread, a claimant that needs the store's time, and
    whoever is about to publish rows, so that a durable bill always covers the rows in storage.
    """

    def __init__(self, folder: JobFolder, bench: Workbench, clock: Clock, first: WorkerRecord) -> None:
        self.life = Life("starting")
        self.until: Callable[[], int] | None = None
        """What the worker's budget pays for, where it has one: nothing is billed beyond it."""
        self._folder = folder
        self._bench = bench
        self._clock = clock
        self._record = first
        self._writing = False
        self.metrics: MetricsFile | None = None
        """Where the worker's figures are written with each heartbeat, if anybody asked for it."""

    def beat(self) -> None:
        """Write the record as of now."""
        with self._bench.changed:
            while self._writing:
                self._bench.changed.wait()
            now = self._clock.now_ns()
            if self.until is not None and now > self.until():
                raise BudgetSpent("what the worker has bought is used up")
            self._writing = True
            bench, bill = self._bench, self._bench.ledger.bill(now)
            done = (bench.rows_done, bench.prompt_tokens, bench.cached_tokens, bench.completion_tokens)
            failures = dict(bench.failures)
            self._record = replace(
                self._record,
                state=self.life.state,
                exit_code=self.life.exit_code,
                message=self.life.message,
                beat=self._record.beat + 1,
                bill=bill,
                rows_done=bench.rows_done,
                prompt_tokens=bench.prompt_tokens,
                cached_tokens=bench.cached_tokens,
                completion_tokens=bench.completion_tokens,
                history=extended(self._record.history, Moment(bill.total, *done)),
            )
        try:
            self._folder.write_worker(self._record)
            if self.metrics is not None:
                self.metrics.write(self._record, failures, bench.shards_done, len(bench.in_engine))
        finally:
            with self._bench.changed:
                self._writing = False
                self._bench.changed.notify_all()

    def now(self) -> float:
        """The store's own time, in seconds: that of a heartbeat written for it."""
        self.beat()
        return self._folder.worker_time(self._record.worker)


class Renewer:
    """Renews every lease four times in its life, notices lost ones, and looks for a cancel."""

    def __init__(
        self,
        folder: JobFolder,
        bench: Workbench,
        clock: Clock,
        claims: Claims,
        heartbeat: Heartbeat,
        lease_seconds: float,
        stalled: Callable[[], bool],
    ) -> None:
        self._folder = folder
        self._bench = bench
        self._clock = clock
        self._claims = claims
        self._heartbeat = heartbeat
        self._interval = lease_seconds / RENEWALS_PER_LEASE
        self._stalled = stalled
        self._closing = False

    def close(self) -> None:
        """Renew nothing more; the thread ends once it has finished what it is at."""
        with self._bench.changed:
            self._closing = True
            self._bench.changed.notify_all()

    def run(self) -> None:
        """Show that the worker is there, then renew until closed. While the engine is stalled nothing is
        renewed, so others may take over, and whoever probes the container sees no life."""
        self._heartbeat.beat()
        self._obey()
        while self._wait():
            if not (stalled := self._stalled()):
                with self._bench.changed:
                    shards = list(self._bench.open.values())
                for shard in shards:
                    lease = shard.lease
                    if lease is not None and not self._claims.renew(lease):
                        logger.warning("shard %s was taken over by another worker", shard.name.label)
                        self._bench.lose(shard)
            self._heartbeat.beat()
            if not stalled:
                show_life()
            self._obey()

    def _obey(self) -> None:
        """Do what was last asked of the job's workers."""
        control = self._folder.read_control()
        if control.state == "cancel":
            self._bench.request_stop("cancel")
        elif control.state == "stop":
            self._bench.request_stop("error", JobStopped(control.message))
        elif control.limited and self._heartbeat.until is None:
            logger.warning("the job has a budget now, and this worker has bought none of it: leaving")
            self._bench.request_stop("drain")

    def _wait(self) -> bool:
        with self._bench.changed:
            deadline = self._clock.now_ns() + int(self._interval * 1e9)
            while not self._closing:
                left = deadline - self._clock.now_ns()
                if left <= 0:
                    return True
                self._bench.changed.wait(left / 1e9)
            return False
