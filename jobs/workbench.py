"""What a worker has on its hands, shared by its threads under one condition."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from batchinfer.engine.types import Completion, Rejection, Request
from batchinfer.jobs.clock import Clock, Condition
from batchinfer.jobs.cost import Ledger
from batchinfer.jobs.folder import ShardName
from batchinfer.jobs.link import Dropped, Inflight, Spent
from batchinfer.jobs.open_shard import OpenShard
from batchinfer.jobs.progress import News
from batchinfer.jobs.records import Failure, input_as_json
from batchinfer.jobs.samples import NOTHING, Finished, Flight, Partial, SampleKey, charges_after
from batchinfer.jobs.suspects import DEATHS_ALONE, Suspects

StopReason = Literal["done", "drain", "cancel", "budget", "error"]

Unsaved = tuple[OpenShard, list[Finished], list[Failure], Flight]

SnapshotState = Literal["none", "wanted", "asked"]

OPEN_SHARDS = 2
SNAPSHOT_NS = 60_000_000_000
QUEUE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class EngineDeath:
    """How an engine ended that nobody asked to: ``code`` for failures, ``how`` for people."""

    code: Literal["engine_crash", "engine_stall"]
    how: str


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
        self.queue: deque[Request] = deque()
        self.in_engine: dict[int, tuple[Request, OpenShard]] = {}
        self.to_drop: list[int] = []
        self.dropping: set[int] = set()
        self.stop: StopReason | None = None
        self.error: BaseException | None = None
        self.rows_failed = 0
        self.rows_done = self.prompt_tokens = self.cached_tokens = self.completion_tokens = 0
        self.starved_for_work = False
        self.engine_ready = False
        self.snapshot: SnapshotState = "none"
        self.suspects = Suspects()
        self.to_save = False
        self._read_ahead = read_ahead
        self._queue_bytes = 0
        self._clock = clock
        self._worker = worker
        self._usd_per_hour = usd_per_hour
        self._engine_kept = 0
        self._outstanding: dict[int, set[int]] = {}

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
                if len(self.open) < OPEN_SHARDS and self._queue_has_room():
                    return True
                self.changed.wait()
            return False

    def held(self) -> set[ShardName]:
        """Shards that must not be claimed: open ones, and lost ones with rows still in the engine."""
        with self.changed:
            return {*self.open, *(shard.name for _, shard in self.in_engine.values())}

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
                self.rows_failed += shard.fail(failure)
            while self.stop is None and shard.lease is not None and not self._queue_has_room():
                self.changed.wait()
            if self.stop is not None or shard.lease is None:
                return False
            self.queue.extend(requests)
            self._queue_bytes += sum(map(_size, requests))
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
            running = frozenset(row for row, (_, shard) in self.in_engine.items() if row not in shard.aside)
            found = [
                (shard, *shard.take_news(self._worker, running, self.suspects.of(shard.has_row)))
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
                if row in self.in_engine:
                    # It waits in our engine, while the other one's has begun it.
                    shard.aside[row] = self.in_engine[row][0]
                    self._drop([row])
            self._take_back(shard)
            self.changed.notify_all()

    def _take_back(self, shard: OpenShard) -> None:
        """Queue what is set aside for no reason any more."""
        reasons = (shard.elsewhere, self.in_engine, self.dropping)
        back = [row for row in shard.aside if not any(row in reason for reason in reasons)]
        self._put_back([shard.aside.pop(row) for row in back])

    def _drop(self, rows: Iterable[int]) -> None:
        """Have the engine forget rows; until it says that it has, they are not given to it again."""
        new = [row for row in rows if row not in self.dropping]
        self.to_drop += new
        self.dropping.update(new)

    # -- the engine's side (the condition is held by the caller) ----------------------------------

    def has_requests(self) -> bool:
        """Whether the engine may get more: a group of suspects has it for itself."""
        return bool(self.queue) and not (self.suspects.active and self.in_engine)

    def take_requests(self, room: int) -> list[Request]:
        """Up to ``room`` requests of shards that are still ours, marked as being in the engine: each for
        what is missing of its row by now, to continue from what is known."""
        if room and self.suspects.active:
            room = min(room, self._suspects_first(room))
        taken: list[Request] = []
        while self.queue and len(taken) < room:
            request = self.queue.popleft()
            self._queue_bytes -= _size(request)
            shard = self._shard_of(request.index)
            if shard is None or not (missing := shard.missing(request.index)):
                continue
            row = request.index
            if row in shard.elsewhere or row in self.in_engine or row in self.dropping:
                shard.aside[request.index] = request
            else:
                request = _still_to_do(request, shard, missing)
                self.in_engine[row] = (request, shard)
                self._outstanding[row] = set(missing)
                for sample in request.resume:
                    key = SampleKey(request.index, sample)
                    shard.sent[key] = shard.partials[key]
                taken.append(request)
        if taken:
            self.changed.notify_all()
        return taken

    def _suspects_first(self, room: int) -> int:
        """Put the next group of suspects at the head of the queue; returns how many the engine may get."""
        while group := self.suspects.next_group(room):
            wanted = set(group)
            found = [request for request in self.queue if request.index in wanted]
            if found:
                self.queue = deque(request for request in self.queue if request.index not in wanted)
                self.queue.extendleft(reversed(found))
                return len(found)
        return room

    def accept(self, items: Iterable[Completion | Rejection], spent: Spent) -> None:
        """Results from the engine."""
        self.report(spent)
        for item in items:
            entry = self.in_engine.get(item.index)
            if entry is None:
                continue
            row, shard = item.index, entry[1]
            missing = shard.missing(row)
            if isinstance(item, Rejection):
                del self.in_engine[row], self._outstanding[row]
                if missing:
                    values = input_as_json(shard.inputs.pop(row))
                    self.rows_failed += shard.fail(Failure(row, item.code, item.message, 1, values))
                    self._row_settled(shard, row)
                continue
            own = shard.finish(item, self._worker, self._usd_per_hour)
            self._engine_kept += own
            if shard.lease is None or item.sample_index not in missing:
                # Somebody else's now, or finished elsewhere before: what it cost here helps nobody.
                self.ledger.lose(own)
            self._outstanding[row].discard(item.sample_index)
            if not self._outstanding[row]:
                del self.in_engine[row], self._outstanding[row]
            self.completion_tokens += len(item.token_ids)
            if missing and not shard.missing(row):
                shard.inputs.pop(row)
                self._row_settled(shard, row)
                self.rows_done += 1
                self.prompt_tokens += item.prompt_tokens
                self.cached_tokens += item.cached_tokens
        self.changed.notify_all()

    def _row_settled(self, shard: OpenShard, row: int) -> None:
        shard.aside.pop(row, None)
        self.suspects.forget(row.__eq__)
        if row in self.in_engine:
            self._drop([row])

    def accept_dropped(self, message: Dropped) -> None:
        """The engine has forgotten rows, which from now on may be given to it again."""
        self.report(message.spent)
        self.dropping.difference_update(message.rows)
        for row in message.rows:
            self.in_engine.pop(row, None)
            self._outstanding.pop(row, None)
        for shard in self.open.values():
            self._take_back(shard)
        self.changed.notify_all()

    def accept_inflight(self, message: Inflight) -> None:
        """What is decoded so far of the rows in the engine."""
        self.report(message.spent)
        self.snapshot = "none"
        for key, decoded in message.samples:
            entry = self.in_engine.get(key.row)
            if entry is not None and decoded.token_ids and key.sample in entry[1].missing(key.row):
                shard = entry[1]
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
        in_flight = {id(shard): shard for _, shard in self.in_engine.values() if shard.lease is not None}
        kept = self._engine_kept + sum(shard.own_in_flight() for shard in in_flight.values())
        self.ledger.engine_ended(self._clock.now_ns(), kept, "startup" if death else "storage")
        self._engine_kept = 0
        self.engine_ready = False
        self.snapshot = "none"
        self.to_drop.clear()
        self.dropping.clear()
        if death is not None and self.in_engine:
            self._blame(death)
        back = []
        for row, (request, shard) in self.in_engine.items():
            missing = shard.missing(row)
            if shard.lease is not None and missing and row not in shard.aside:
                back.append(_still_to_do(request, shard, missing))
        for shard in self.open.values():
            shard.sent.clear()
        self.in_engine.clear()
        self._outstanding.clear()
        for shard in self.open.values():
            self._take_back(shard)
        self._put_back(back)
        self.changed.notify_all()

    def _blame(self, death: EngineDeath) -> None:
        """Suspect the rows of which an engine died, and condemn one that can't be tried again."""
        rows = [
            row
            for row, (_, shard) in self.in_engine.items()
            if shard.lease is not None and shard.missing(row)
        ]
        condemned = self.suspects.died(rows, alone=len(self.in_engine) == 1)
        if condemned is not None:
            shard = self.in_engine[condemned][1]
            self.ledger.lose(shard.own_charges(condemned, self._worker))
            self.suspects.forget(condemned.__eq__)
            values = input_as_json(shard.inputs.pop(condemned))
            message = (
                f"{DEATHS_ALONE} engines ended with this row alone in flight, the last one so: {death.how}"
            )
            self.rows_failed += shard.fail(Failure(condemned, death.code, message, DEATHS_ALONE, values))
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
                self.ledger.lose(shard.own_unpublished(self._worker))
                del self.open[shard.name]
                self.queue = deque(request for request in self.queue if not shard.has_row(request.index))
                self._queue_bytes = sum(map(_size, self.queue))
                self._drop(row for row in self.in_engine if shard.has_row(row))
                self.suspects.forget(shard.has_row)
                self.changed.notify_all()

    def close(self, shard: OpenShard) -> None:
        """The shard is committed by us."""
        with self.changed:
            if shard.lease is not None:
                shard.lease = None
                del self.open[shard.name]
                self.changed.notify_all()

    def check(self) -> None:
        """Raise AssertionError where the invariant is broken."""
        with self.changed:
            queued = [request.index for request in self.queue]
            assert len(set(queued)) == len(queued)
            assert self._queue_bytes == sum(map(_size, self.queue))
            assert not set(queued) & self.in_engine.keys()
            for shard in self.open.values():
                shard.check()
            self.suspects.check()
            self.ledger.check(self._clock.now_ns())

    def _put_back(self, requests: list[Request]) -> None:
        self.queue.extendleft(reversed(requests))
        self._queue_bytes += sum(map(_size, requests))

    def _queue_has_room(self) -> bool:
        return len(self.queue) < self._read_ahead and self._queue_bytes < QUEUE_BYTES

    def _shard_of(self, row: int) -> OpenShard | None:
        for shard in self.open.values():
            if shard.has_row(row):
                return shard
        return None


def _still_to_do(request: Request, shard: OpenShard, missing: tuple[int, ...]) -> Request:
    """A request for the samples of a row that are missing, from what is known of them."""
    keys = [(sample, SampleKey(request.index, sample)) for sample in missing]
    resume = {sample: shard.partials[key].decoded for sample, key in keys if key in shard.partials}
    samples = None if len(missing) == shard.n else missing
    return Request(request.index, request.prompt, request.sampling, resume, samples)


def _size(request: Request) -> int:
    """About how many bytes a request's prompt takes."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return len(prompt)
    return sum(8 if isinstance(part, int) else len(str(part.get("content"))) for part in prompt)
