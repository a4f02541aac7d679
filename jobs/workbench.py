"""What a worker has on its hands, shared by its threads under one condition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

from batchinfer.engine.types import Completion, Rejection, Request
from batchinfer.jobs.clock import Clock, Condition
from batchinfer.jobs.cost import Ledger
from batchinfer.jobs.engine_rows import EngineRows
from batchinfer.jobs.folder import ShardName
from batchinfer.jobs.link import Dropped, Inflight, Spent
from batchinfer.jobs.open_shard import OpenShard
from batchinfer.jobs.progress import News
from batchinfer.jobs.records import Failure, input_as_json
from batchinfer.jobs.request_queue import RequestQueue
from batchinfer.jobs.samples import NOTHING, Finished, Flight, Partial, SampleKey, charges_after
from batchinfer.jobs.suspects import DEATHS_ALONE, EngineDeath, Suspects

StopReason = Literal["done", "drain", "cancel", "budget", "error"]

Unsaved = tuple[OpenShard, list[Finished], list[Failure], Flight]

SnapshotState = Literal["none", "wanted", "asked"]

OPEN_SHARDS = 2
SNAPSHOT_NS = 60_000_000_000


class Workbench:
    """Open shards, requests that wait for the engine, and rows in it.

    Every method takes the condition ``changed`` and never waits for storage while holding it.

    Invariant (``check``): a row of an open shard is settled, in the engine, in the queue, or not read yet;
    a row is in the engine at most once, also when its shard was lost and claimed again.
    """

    def __init__(
        self, clock: Clock, ledger: Ledger, worker: str, usd_per_hour: float | None, read_ahead: int
    ) -> None:
        self.changed: Condition = clock.condition()
        self.ledger = ledger
        self.open: dict[ShardName, OpenShard] = {}
        self.queue = RequestQueue(read_ahead)
        self.in_engine = EngineRows()
        self.stop: StopReason | None = None
        self.error: BaseException | None = None
        self.failures: Counter[str] = Counter()
        self.shards_done = 0
        self.rows_done = self.prompt_tokens = self.cached_tokens = self.completion_tokens = 0
        self.starved_for_work = False
        self.engine_ready = False
        self.snapshot: SnapshotState = "none"
        self.suspects = Suspects()
        self.to_save = False
        self._clock = clock
        self._worker = worker
        self._usd_per_hour = usd_per_hour
        self._engine_kept = 0

    # -- stopping ---------------------------------------------------------------------------------

    def request_stop(self, reason: StopReason, error: BaseException | None = None) -> None:
        """Ask every thread to come to an end; the first reason counts."""
        with self.changed:
            if self.stop is None:
                self.stop, self.error = reason, error
            self.changed.notify_all()

    # -- the feeder's side ------------------------------------------------------------------------

    def wait_for_room(self) -> bool:
        """Wait until another shard may be opened: False when the worker stops."""
        with self.changed:
            while self.stop is None:
                if len(self.open) < OPEN_SHARDS and self.queue.has_room():
                    return True
                self.changed.wait()
            return False

    def held(self) -> set[ShardName]:
        """Shards that must not be claimed: open ones, and lost ones with rows still in the engine."""
        with self.changed:
            return {*self.open, *(row.shard.name for row in self.in_engine.all())}

    def is_helping(self) -> bool:
        """Whether a shard is open as somebody else's helper."""
        with self.changed:
            return any(shard.lease is not None and shard.lease.helper for shard in self.open.values())

    def add(self, shard: OpenShard) -> None:
        """A shard was claimed."""
        with self.changed:
            self.open[shard.name] = shard
            self.changed.notify_all()

    def enqueue(
        self,
        shard: OpenShard,
        requests: list[Request],
        inputs: Mapping[int, Mapping[str, Any]],
        failures: list[Failure],
    ) -> bool:
        """Take rows that were read, waiting for room: False when the shard is lost or the worker stops.

        ``inputs`` are the values of the rows that ``requests`` ask for.
        """
        with self.changed:
            for failure in failures:
                self._fail(shard, failure)
            while self.stop is None and shard.lease is not None and not self.queue.has_room():
                self.changed.wait()
            if self.stop is not None or shard.lease is None:
                return False
            self.queue.extend(requests)
            self.suspects.add(shard.suspicion.among(inputs.__contains__))
            shard.inputs.update(inputs)
            self.changed.notify_all()
            return True

    def finish_reading(self, shard: OpenShard) -> None:
        """All rows of the shard were read."""
        with self.changed:
            shard.read_all = True
            self.changed.notify_all()

    def wait_for_work(self, seconds: float) -> None:
        """Nothing can be claimed: wait until that may have changed."""
        with self.changed:
            self.starved_for_work = True
            shards = len(self.open)
            if self.stop is None:
                self.changed.notify_all()
                deadline = self._clock.now_ns() + int(seconds * 1e9)
                while self.stop is None and len(self.open) == shards:
                    left = deadline - self._clock.now_ns()
                    if left <= 0:
                        break
                    self.changed.wait(left / 1e9)
            self.starved_for_work = False
            self.changed.notify_all()

    # -- the publisher's side ---------------------------------------------------------------------

    def take_snapshot(self) -> None:
        """Have the engine say what is in flight; gives up when it does not answer, or there is none."""
        with self.changed:
            if not self.in_engine:
                return
            self.snapshot = "wanted"
            self.changed.notify_all()
            deadline = self._clock.now_ns() + SNAPSHOT_NS
            while self._snapshot_pending():
                left = deadline - self._clock.now_ns()
                if left <= 0:
                    return
                self.changed.wait(left / 1e9)

    def _snapshot_pending(self) -> bool:
        return self.snapshot != "none" and self.engine_ready and self.stop is None

    def take_news(self) -> list[Unsaved]:
        """What is to be published of each open shard that has anything new, or said something of what
        is in flight."""
        with self.changed:
            self.to_save = False
            rows = self.in_engine.all()
            running = frozenset(
                row.request.index for row in rows if row.request.index not in row.shard.aside
            )
            found = [
                (shard, *shard.take_news(running, self.suspects.of(shard.has_row)))
                for shard in self.open.values()
            ]
            return [news for news in found if any(news[1:]) or news[0].writer.said_in_flight]

    def absorb(self, shard: OpenShard, news: News, at_work: Collection[str]) -> None:
        """Take what others published of a shard: rows that they finished are not begun, or dropped, and
        rows that the engine of one who is ``at_work`` on it has begun are left to it."""
        with self.changed:
            if shard.lease is None:
                return
            settled = shard.absorb(news)
            shard.elsewhere = frozenset(
                row
                for worker, flight in news.flights.items()
                if worker in at_work
                for row in flight.running
            )
            for row in settled:
                shard.inputs.pop(row, None)
                self._row_settled(shard, row)
            begun = {key.row for key in shard.partials}
            for row in shard.elsewhere - begun - shard.aside.keys():
                if (ours := self.in_engine.get(row)) is not None:
                    # It waits in our engine, while the other one's has begun it.
                    shard.aside[row] = ours.request
                    self.in_engine.drop([row])
            self._take_back(shard)
            self.changed.notify_all()

    def _take_back(self, shard: OpenShard) -> None:
        """Queue what is set aside for no reason any more."""
        back = [
            row for row in shard.aside if row not in shard.elsewhere and not self.in_engine.blocked(row)
        ]
        self.queue.put_back([shard.aside.pop(row) for row in back])

    # -- the engine's side (the condition is held by the caller) ----------------------------------

    def has_requests(self) -> bool:
        """Whether the engine may get more: a group of suspects has it for itself."""
        return bool(self.queue) and not (self.suspects.active and self.in_engine)

    def take_requests(self, room: int) -> list[Request]:
        """Up to ``room`` requests of shards that are still ours, marked as being in the engine: each for
        what is missing of its row by now, to continue from what is known."""
        taken: list[Request] = []
        while room and not taken and self.suspects.active:
            group = self.suspects.next_group(room)
            taken = self._take(self.queue.bring_forward(set(group)), room)
        return taken or self._take(len(self.queue), room)

    def _take(self, first: int, room: int) -> list[Request]:
        """Those of the ``first`` requests of the queue, up to ``room``, that the engine may get now. On
        a trial they are the group's alone: the next ones may be of another group."""
        taken: list[Request] = []
        while first and len(taken) < room:
            first -= 1
            request = self.queue.pop()
            shard = self._shard_of(request.index)
            if shard is None or not (missing := shard.missing(request.index)):
                continue
            row = request.index
            if row in shard.elsewhere or self.in_engine.blocked(row):
                shard.aside[row] = request
            else:
                request = shard.still_to_do(request, missing)
                self.in_engine.give(request, shard, missing)
                for sample in request.resume:
                    key = SampleKey(request.index, sample)
                    shard.sent[key] = shard.partials[key]
                taken.append(request)
        if taken:
            self.changed.notify_all()
        return taken

    def accept(self, items: Iterable[Completion | Rejection], spent: Spent) -> None:
        """Results from the engine."""
        self.report(spent)
        for item in items:
            entry = self.in_engine.get(item.index)
            if entry is None:
                continue
            row, shard = item.index, entry.shard
            missing = shard.missing(row)
            if isinstance(item, Rejection):
                self.in_engine.forget(row)
                if missing:
                    values = input_as_json(shard.inputs.pop(row))
                    self._fail(shard, Failure(row, item.code, item.message, 1, values))
                    self._row_settled(shard, row)
                continue
            own = shard.finish(item, self._usd_per_hour)
            self._engine_kept += own
            if shard.lease is None or item.sample_index not in missing:
                # Somebody else's now, or finished elsewhere before: what it cost here helps nobody.
                self.ledger.lose(own)
            self.in_engine.sample_done(row, item.sample_index)
            self.completion_tokens += len(item.token_ids)
            if missing and not shard.missing(row):
                shard.inputs.pop(row)
                self._row_settled(shard, row)
                self.rows_done += 1
                self.prompt_tokens += item.prompt_tokens
                self.cached_tokens += item.cached_tokens
        self.changed.notify_all()

    def _fail(self, shard: OpenShard, failure: Failure) -> None:
        if shard.fail(failure):
            self.failures[failure.code] += 1

    def _row_settled(self, shard: OpenShard, row: int) -> None:
        shard.aside.pop(row, None)
        self.suspects.forget(row.__eq__)
        if row in self.in_engine:
            self.in_engine.drop([row])

    def accept_dropped(self, message: Dropped) -> None:
        """The engine has forgotten rows, which from now on may be given to it again."""
        self.report(message.spent)
        self.in_engine.dropped(message.rows)
        for shard in self.open.values():
            self._take_back(shard)
        self.changed.notify_all()

    def accept_inflight(self, message: Inflight) -> None:
        """What is decoded so far of the rows in the engine."""
        self.report(message.spent)
        self.snapshot = "none"
        for key, decoded in message.samples:
            entry = self.in_engine.get(key.row)
            if entry is not None and decoded.token_ids and key.sample in entry.shard.missing(key.row):
                shard = entry.shard
                base = shard.sent.get(key, NOTHING)
                charges = charges_after(
                    base, self._worker, self._usd_per_hour, decoded.prefill_ns, decoded.token_ns
                )
                shard.partials[key] = Partial(decoded, charges)
                shard.sent.setdefault(key, NOTHING)
        self.changed.notify_all()

    def report(self, spent: Spent) -> None:
        """What the engine has charged so far."""
        self.ledger.report(spent.charged_ns, spent.waste_ns, spent.at_ns)

    def engine_ended(self, death: EngineDeath | None) -> None:
        """The engine is gone: its rows go back to the queue, to continue where the last snapshot saw
        them; what else it computed was wasted. Of a ``death``, which is followed by another engine, the
        rows in flight are suspected."""
        rows = self.in_engine.all()
        in_flight = {id(row.shard): row.shard for row in rows if row.shard.lease is not None}
        kept = self._engine_kept + sum(shard.own_in_flight() for shard in in_flight.values())
        self.ledger.engine_ended(self._clock.now_ns(), kept, "startup" if death else "storage")
        self._engine_kept = 0
        self.engine_ready = False
        self.snapshot = "none"
        if death is not None and self.in_engine:
            self._blame(death)
        back = []
        for row in rows:
            shard, missing = row.shard, row.shard.missing(row.request.index)
            if shard.lease is not None and missing and row.request.index not in shard.aside:
                back.append(shard.still_to_do(row.request, missing))
        for shard in self.open.values():
            shard.sent.clear()
        self.in_engine.clear()
        for shard in self.open.values():
            self._take_back(shard)
        self.queue.put_back(back)
        self.changed.notify_all()

    def _blame(self, death: EngineDeath) -> None:
        """Suspect the rows of which an engine died, and condemn one that can't be tried again."""
        rows = [
            row.request.index
            for row in self.in_engine.all()
            if row.shard.lease is not None and row.shard.missing(row.request.index)
        ]
        condemned = self.suspects.died(rows, alone=len(self.in_engine) == 1)
        if condemned is not None:
            entry = self.in_engine.get(condemned)
            assert entry is not None
            shard = entry.shard
            self.ledger.lose(shard.own_charges(condemned))
            self.suspects.forget(condemned.__eq__)
            values = input_as_json(shard.inputs.pop(condemned))
            message = (
                f"{DEATHS_ALONE} engines ended with this row alone in flight, the last one so: {death.how}"
            )
            self._fail(shard, Failure(condemned, death.code, message, DEATHS_ALONE, values))
        self.to_save = True

    def update_account(self) -> None:
        """Tell the ledger what the worker does now; to be called after anything changed."""
        if self.in_engine:
            self.ledger.enter("busy", self._clock.now_ns())
        elif not self.engine_ready:
            return
        elif self.starved_for_work and not self.open:
            self.ledger.enter("idle", self._clock.now_ns())
        else:
            self.ledger.enter("storage", self._clock.now_ns())

    # -- shards end -------------------------------------------------------------------------------

    def lose(self, shard: OpenShard) -> None:
        """The shard is somebody else's: what only we know of it is of no use."""
        with self.changed:
            if shard.lease is not None:
                shard.lease = None
                self.ledger.lose(shard.own_unpublished())
                del self.open[shard.name]
                self.queue.remove(shard.has_row)
                self.in_engine.drop(row for row in self.in_engine if shard.has_row(row))
                self.suspects.forget(shard.has_row)
                self.changed.notify_all()

    def close(self, shard: OpenShard) -> None:
        """The shard is committed by us."""
        with self.changed:
            self.shards_done += 1
            if shard.lease is not None:
                shard.lease = None
                del self.open[shard.name]
                self.changed.notify_all()

    def check(self) -> None:
        """Raise AssertionError where the invariant is broken."""
        with self.changed:
            self.queue.check()
            assert not any(row in self.in_engine for row in self.queue.rows())
            for shard in self.open.values():
                shard.check()
            self.suspects.check()
            self.ledger.check(self._clock.now_ns())

    def _shard_of(self, row: int) -> OpenShard | None:
        for shard in self.open.values():
            if shard.has_row(row):
                return shard
        return None
