"""The supervisor: moves requests to the engine and results back, and comes to an orderly end.

Four threads share the bench: this one talks to the engine and never waits for storage, the feeder
claims and reads, the publisher writes, the renewer keeps leases and heartbeat alive.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from batchinfer.connectors.types import StorageError, TransientStorageError
from batchinfer.jobs.budget import Allowance, BudgetSpent
from batchinfer.jobs.claims import GLANCES, LEASE_SECONDS, REGION_DIGITS, RENEWALS_PER_LEASE, Claims
from batchinfer.jobs.clock import Clock, Thread
from batchinfer.jobs.cost import Ledger
from batchinfer.jobs.events import log_event
from batchinfer.jobs.failure_limit import JobStopped
from batchinfer.jobs.feeder import Feeder, Work
from batchinfer.jobs.folder import JobFolder
from batchinfer.jobs.heartbeat import Heartbeat, Life, Renewer
from batchinfer.jobs.link import (
    Add,
    Drop,
    Dropped,
    Ended,
    EngineLink,
    Failed,
    FromEngine,
    Inflight,
    Ready,
    Results,
    Snapshot,
    StartEngine,
    Stop,
)
from batchinfer.jobs.prometheus import MetricsFile
from batchinfer.jobs.publisher import Publisher
from batchinfer.jobs.records import WorkerRecord, WorkerState
from batchinfer.jobs.silence import Silence
from batchinfer.jobs.summary import SummaryWriter
from batchinfer.jobs.suspects import EngineDeath
from batchinfer.jobs.types import JobError
from batchinfer.jobs.workbench import StopReason, Workbench

logger = logging.getLogger(__name__)

EXIT_DONE, EXIT_INTERNAL, EXIT_RETRY, EXIT_STOPPED, EXIT_JOB = 0, 70, 75, 77, 78


class EngineGone(Exception):
    """The engine ended with nothing in flight more often than is worth another try."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How often and how long, in seconds; ``read_ahead`` counts rows, ``engine_restarts`` the starts in a
    row after an engine that ended before it had anything to do.

    ``flush`` is the longest time that finished work stays unsaved; ``stall`` how long an engine with
    work may say nothing; ``drain`` how long an engine may take for its last word. The summary is rewritten
    with every ``summary_shards``-th shard, and by workers that leave with at most ``summary_others`` others
    about (see :class:`SummaryWriter`). ``region_digits`` says how many shards one look sees (see
    :class:`Claims`).
    """

    lease: float = LEASE_SECONDS
    flush: float = 30.0
    stall: float = 600.0
    drain: float = 12.0
    read_ahead: int = 4096
    engine_restarts: int = 3
    summary_shards: int = 1024
    summary_others: int = 32
    region_digits: int = REGION_DIGITS


class Supervisor:
    """One worker, from its first heartbeat to its last."""

    def __init__(
        self,
        folder: JobFolder,
        clock: Clock,
        work: Work,
        record: WorkerRecord,
        started_ns: int,
        start_engine: StartEngine,
        pace: Pace,
        allowance: Allowance | None = None,
    ) -> None:
        """``record`` is the worker's first heartbeat: who it is, and at which price; ``started_ns`` when
        its process started, on ``clock``; ``allowance`` what it may spend, where the job has a budget."""
        self._folder = folder
        self._clock = clock
        self._pace = pace
        self._start_engine = start_engine
        worker, price = record.worker, record.usd_per_hour
        self.bench = Workbench(clock, Ledger(started_ns), worker, price, pace.read_ahead)
        self._heartbeat = Heartbeat(folder, self.bench, clock, record)
        self._claims = Claims(
            folder,
            list(work.shards),
            worker,
            self._heartbeat.now,
            pace.lease,
            record.index,
            pace.region_digits,
        )
        self._renewer = Renewer(
            folder, self.bench, clock, self._claims, self._heartbeat, pace.lease, self._stalled
        )
        patience = pace.lease / RENEWALS_PER_LEASE / (GLANCES + 1)
        self._feeder = Feeder(folder, self.bench, self._claims, work, worker, patience)
        self._summary = SummaryWriter(
            folder,
            worker,
            lambda: self._feeder.shards,
            work.sampling.n,
            pace.lease,
            pace.summary_shards,
            pace.summary_others,
        )
        self._publisher = Publisher(
            folder,
            self.bench,
            clock,
            self._heartbeat,
            self._claims,
            self._summary,
            work,
            worker,
            pace.flush,
        )
        self._feeding: Thread | None = None
        self._allowance = allowance
        self._buying: Thread | None = None
        if allowance is not None:
            self._heartbeat.until = lambda: allowance.until_ns
        self.message = ""
        """Why it stopped, once it has, where somebody should know."""
        self._link: EngineLink | None = None
        self._inbox: list[FromEngine] = []
        self._silence = Silence(started_ns, int(pace.lease / 2 * 1e9))
        self._capacity = 0
        self._last_failure = ""
        self._restarts = 0
        self._stall_ended = False

    def run(self) -> int:
        """Work until every shard is committed or something stops the worker; returns the exit code."""
        if self._allowance is not None and (stopped := self._begin_budget(self._allowance)) is not None:
            return stopped
        renewing = self._spawn("renewer", self._renewer.run)
        publishing = self._spawn("publisher", self._publisher.run)
        try:
            while self._turn():
                pass
        except Exception as error:
            self.bench.request_stop("error", error)
        self._end_engine()
        return self._leave(renewing, publishing)

    def write_metrics(self, metrics: MetricsFile) -> None:
        """Have the worker's figures written there with each heartbeat."""
        self._heartbeat.metrics = metrics

    def drain(self) -> None:
        """Stop admitting rows, save what there is, and leave (SIGTERM)."""
        log_event(logger, "drain", "told to leave: saving what there is")
        self._heartbeat.life = Life("draining")
        self.bench.request_stop("drain")

    def _begin_budget(self, allowance: Allowance) -> int | None:
        """Buy the first slot before anything else: the exit code if that can't be had."""
        try:
            if not allowance.begin():
                self.message = allowance.message
                return EXIT_STOPPED
        except StorageError as error:
            code, self.message = outcome("error", error)
            return code
        self._buying = self._spawn("buyer", allowance.keep_buying)
        self._spawn("watchdog", lambda: allowance.watch(lambda: self.bench.request_stop("budget")))
        return None

    # -- the engine -------------------------------------------------------------------------------

    def _receive(self, message: FromEngine) -> None:
        """Called by the link, in order, on a thread of its own."""
        with self.bench.changed:
            self._inbox.append(message)
            self.bench.changed.notify_all()

    def _turn(self) -> bool:
        """Wait for something to do with the engine and do it; False when the worker is to stop."""
        bench = self.bench
        if self._link is None:
            self._link = self._start_engine(self._receive)
        link = self._link
        with bench.changed:
            rows = bench.in_engine
            while not (self._inbox or self._room() or self._to_ask() or rows.any_to_drop or bench.stop):
                bench.update_account()
                bench.changed.wait()
            for message in self._take_inbox():
                self._handle(message)
            if bench.stop is not None:
                return False
            if not bench.in_engine:
                self._silence.end(self._clock.now_ns())
            requests = bench.take_requests(self._room())
            drop = bench.in_engine.take_to_drop()
            ask = self._to_ask()
            if ask:
                bench.snapshot = "asked"
            bench.update_account()
        if drop:
            link.send(Drop(drop))
        if requests:
            link.send(Add(tuple(requests)))
        if ask:
            link.send(Snapshot())
        return True

    def _room(self) -> int:
        """How many requests the engine should get now: none until a good few fit, so that it can order
        them among each other."""
        bench = self.bench
        if not bench.engine_ready or not bench.has_requests():
            return 0
        room = self._capacity - len(bench.in_engine)
        return room if 4 * room >= self._capacity else 0

    def _to_ask(self) -> bool:
        return self.bench.engine_ready and self.bench.snapshot == "wanted"

    def _take_inbox(self) -> list[FromEngine]:
        messages, self._inbox = self._inbox, []
        if messages:
            self._silence.end(self._clock.now_ns())
        return messages

    def _handle(self, message: FromEngine) -> None:
        bench = self.bench
        if isinstance(message, Ready):
            self._capacity = message.capacity
            bench.engine_ready = True
            self._heartbeat.life = Life("running")
            if self._feeding is None:
                self._feeding = self._spawn("feeder", self._feeder.run)
        elif isinstance(message, Failed):
            if message.permanent:
                bench.request_stop("error", JobError(message.message))
            else:
                logger.error("the engine failed: %s", message.message)
                self._last_failure = message.message
        elif isinstance(message, Ended):
            self._engine_died(message)
        else:
            self._take_in(message)

    def _engine_died(self, message: Ended) -> None:
        """Blame the rows that were in flight; without any, the engine itself is what does not work."""
        bench = self.bench
        how = self._last_failure or message.how
        if self._stall_ended:
            how = f"it made no step for {self._pace.stall:.0f} s"
        self._restarts = 0 if bench.in_engine else self._restarts + 1
        bench.engine_ended(EngineDeath("engine_stall" if self._stall_ended else "engine_crash", how))
        self._link, self._last_failure, self._stall_ended = None, "", False
        if self._restarts > self._pace.engine_restarts:
            error = EngineGone(
                f"the engine ended {self._restarts} times with nothing to do, the last time so: {how}"
            )
            bench.request_stop("error", error)
        else:
            logger.error("the engine ended (%s): starting it again", how)

    def _take_in(self, message: Results | Dropped | Inflight) -> None:
        if isinstance(message, Results):
            self.bench.accept(message.items, message.spent)
        elif isinstance(message, Dropped):
            self.bench.accept_dropped(message)
        else:
            self.bench.accept_inflight(message)

    def _stalled(self) -> bool:
        """Whether the engine has work and has said nothing for too long; then it is ended."""
        with self.bench.changed:
            link = self._link
            silent = self._silence.so_far(self._clock.now_ns())
            stalled = silent > self._pace.stall * 1e9 and bool(self.bench.in_engine) and not self._inbox
        if stalled and link is not None:
            logger.error("the engine made no step for %.0f s: ending it", silent / 1e9)
            self._stall_ended = True
            link.kill()
        return stalled

    def _end_engine(self) -> None:
        """Get the engine's last word about what is in flight, for a limited time, and end it."""
        bench, link = self.bench, self._link
        if link is None:
            return
        if bench.engine_ready:
            link.send(Stop())
            deadline = self._clock.now_ns() + int(self._pace.drain * 1e9)
            with bench.changed:
                last_word = False
                while not last_word and (left := deadline - self._clock.now_ns()) > 0:
                    for message in self._take_inbox():
                        if isinstance(message, Results | Dropped | Inflight):
                            self._take_in(message)
                        final = isinstance(message, Inflight) and message.final
                        last_word = last_word or final or isinstance(message, Ended)
                    if not last_word:
                        bench.changed.wait(left / 1e9)
        link.kill()
        with bench.changed:
            bench.engine_ended(None)

    # -- leaving ----------------------------------------------------------------------------------

    def _leave(self, renewing: Thread, publishing: Thread) -> int:
        """Save finished rows and tokens in flight, release the leases, write the last heartbeat."""
        bench, allowance = self.bench, self._allowance
        if allowance is not None:
            allowance.stop_buying()
        if self._feeding is not None:
            self._feeding.join()
        self._publisher.close()
        publishing.join()
        self._renewer.close()
        renewing.join()
        code, self.message = outcome(bench.stop, bench.error)
        if allowance is not None and (bench.stop == "budget" or isinstance(bench.error, BudgetSpent)):
            self.message = allowance.message
        state: WorkerState = "failed" if code in (EXIT_INTERNAL, EXIT_JOB) else "left"
        self._heartbeat.life = Life(state, code, self.message)
        try:
            for shard in list(bench.open.values()):
                if shard.lease is not None:
                    self._claims.release(shard.lease)
            self._heartbeat.beat()
            self._summary.leave()
            if allowance is not None and self._buying is not None:
                self._buying.join()
                allowance.settle(code)
        except BudgetSpent:
            code = EXIT_STOPPED
        except StorageError as error:
            logger.error("the last words could not be written: %s", error)
            code = code or EXIT_RETRY
        return code

    def _spawn(self, name: str, function: Callable[[], None]) -> Thread:
        """A thread whose failure stops the worker."""

        def run() -> None:
            try:
                function()
            except Exception as error:
                self.bench.request_stop("error", error)

        return self._clock.spawn(name, run)


def outcome(stop: StopReason | None, error: BaseException | None) -> tuple[int, str]:
    """The exit code of a worker that stopped for this reason, and one sentence where it failed."""
    if stop == "done":
        return EXIT_DONE, ""
    if stop == "drain":
        return EXIT_RETRY, ""
    if stop == "cancel":
        return EXIT_STOPPED, "the job was cancelled"
    if stop == "budget" or isinstance(error, BudgetSpent):
        return EXIT_STOPPED, ""
    if isinstance(error, TransientStorageError):
        return EXIT_RETRY, str(error)
    if isinstance(error, JobError | StorageError):
        return EXIT_JOB, str(error)
    if isinstance(error, JobStopped):
        return EXIT_STOPPED, str(error)
    if isinstance(error, EngineGone):
        return EXIT_INTERNAL, str(error)
    return EXIT_INTERNAL, f"{type(error).__name__}: {error}"
