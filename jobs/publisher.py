"""Writes what is finished: progress now and then, and a part when a shard is complete."""

from __future__ import annotations

import logging
from dataclasses import replace

from batchinfer.jobs.claims import Claims
from batchinfer.jobs.clock import Clock
from batchinfer.jobs.commit import commit
from batchinfer.jobs.events import log_event
from batchinfer.jobs.failure_limit import FailureCount, FailureLimit, JobStopped
from batchinfer.jobs.feeder import Work
from batchinfer.jobs.folder import JobFolder
from batchinfer.jobs.heartbeat import Heartbeat
from batchinfer.jobs.open_shard import OpenShard
from batchinfer.jobs.progress import delete_progress
from batchinfer.jobs.summary import SummaryWriter
from batchinfer.jobs.workbench import Workbench

logger = logging.getLogger(__name__)

FLUSH_BYTES = 8 << 20
SHARED_FLUSH_NS = 5_000_000_000


class Publisher:
    """Publishes on a thread of its own, so that neither the engine nor a lease waits for an upload.

    A complete shard is committed at once. Progress is written every ``flush_seconds``, or when more
    than ``FLUSH_BYTES`` of finished rows wait, or an engine has died; each time the engine is asked what
    is in flight. Then it looks at what others have published of the same shards; while one is shared,
    every five seconds.
    """

    def __init__(
        self,
        folder: JobFolder,
        bench: Workbench,
        clock: Clock,
        heartbeat: Heartbeat,
        claims: Claims,
        summary: SummaryWriter,
        work: Work,
        worker: str,
        flush_seconds: float,
    ) -> None:
        self._folder = folder
        self._bench = bench
        self._clock = clock
        self._heartbeat = heartbeat
        self._claims = claims
        self._summary = summary
        self._schema = work.schema
        self._limit = work.limit
        self._count = FailureCount(folder, work.shards, work.sampling.n)
        self._failed_before = 0
        self._worker = worker
        self._flush_ns = int(flush_seconds * 1e9)
        self._closing = False

    def close(self) -> None:
        """Commit what is complete, save the rest, and end. The engine must be gone."""
        with self._bench.changed:
            self._closing = True
            self._bench.changed.notify_all()

    def run(self) -> None:
        """Publish until closed."""
        flushed = self._clock.now_ns()
        while True:
            with self._bench.changed:
                shard = self._wait(flushed)
                closing = self._closing
            if shard is not None:
                self._commit(shard)
                self._stop_at_limit()
            elif closing:
                for shard in list(self._bench.open.values()):
                    if self._folder.is_committed(shard.name):
                        self._lose(shard)
                self._flush()
                return
            else:
                self._bench.take_snapshot()
                self._flush()
                for shard in list(self._bench.open.values()):
                    self._look(shard)
                self._stop_at_limit()
                flushed = self._clock.now_ns()

    def _wait(self, flushed: int) -> OpenShard | None:
        """Wait for a complete shard; None when it is time to flush, or to close."""
        while True:
            shards = list(self._bench.open.values())
            for shard in shards:
                if shard.complete:
                    return shard
            waiting = sum(shard.unpublished_bytes for shard in shards)
            if self._closing or self._bench.to_save or waiting > FLUSH_BYTES:
                return None
            pause = self._flush_ns
            if any(shard.shared for shard in shards):
                pause = min(pause, SHARED_FLUSH_NS)
            left = flushed + pause - self._clock.now_ns()
            if shards and left <= 0:
                return None
            self._bench.changed.wait(left / 1e9 if shards else None)

    def _commit(self, shard: OpenShard) -> None:
        passed, samples = shard.answers()
        won = commit(
            self._folder,
            shard.name,
            self._worker,
            self._schema,
            passed,
            samples,
            shard.failures,
            self._heartbeat.beat,
        )
        if won:
            self._bench.close(shard)
            figures = {"shard": shard.name.label, "rows": len(samples), "failed": len(shard.failures)}
            log_event(logger, "commit", f"committed shard {shard.name.label}", **figures)
            delete_progress(self._folder, shard.name)
            self._summary.committed(shard.name)
        else:
            self._lose(shard)

    def _lose(self, shard: OpenShard) -> None:
        logger.info("shard %s was committed by another worker", shard.name.label)
        self._bench.lose(shard)
        delete_progress(self._folder, shard.name)

    def _flush(self) -> None:
        news = self._bench.take_news()
        if news:
            self._heartbeat.beat()
        for shard, samples, failures, flight in news:
            shard.writer.write(samples, failures, flight)

    def _stop_at_limit(self) -> None:
        """Stop the job where too many of its rows have failed.

        The whole job is counted only when this worker has seen more failures, and too many for its own
        rows: where a job's share is too large, that of some worker is.
        """
        failed, done = self._bench.failures.total(), self._bench.rows_done
        if failed == self._failed_before:
            return
        self._failed_before = failed
        control = self._folder.read_control()
        limit = self._limit if control.failures is None else FailureLimit(**control.failures)
        if failed <= limit.max_share * (failed + done):
            return
        reason = self._count.reason_to_stop(limit)
        if reason is not None:
            self._folder.append_control(lambda current: replace(current, state="stop", message=reason))
            self._bench.request_stop("error", JobStopped(reason))

    def _look(self, shard: OpenShard) -> None:
        """See what others have published of the shard."""
        if shard.reader is None or shard.lease is None:
            return
        news = shard.reader.news()
        if news is not None and news.others:
            shard.shared = True
        if news is None or (shard.shared and self._folder.is_committed(shard.name)):
            self._lose(shard)
        elif shard.shared:
            self._bench.absorb(shard, news, self._claims.at_work(shard.name))
