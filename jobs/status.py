"""Where a job stands, told from its folder alone."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from batchinfer.jobs.budget import USED_UP, cap_of, job_slots, used_up
from batchinfer.jobs.clock import SystemClock
from batchinfer.jobs.columns import NANOSECONDS_PER_HOUR
from batchinfer.jobs.cost import Settlement, settle
from batchinfer.jobs.folder import JobFolder, ShardName
from batchinfer.jobs.records import Control, JobRecord, PartFooter, WorkerRecord, table_from_bytes
from batchinfer.jobs.retry import job_shards, read_rounds
from batchinfer.jobs.rounds import FailedRow, RoundPlan
from batchinfer.jobs.types import JobError

State = Literal["starting", "running", "done", "cancelled", "failed", "stalled", "budget"]

# A worker whose heartbeat is older is taken for dead; the leases of a dead worker end by then.
ALIVE_SECONDS = 60.0
# How long a submitted job may be without any worker before it counts as stalled.
START_SECONDS = 120.0
_PARALLEL_READS = 16
_LIVING = ("starting", "running", "draining")

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """Where a job stands.

    Rows are input rows: ``rows_answered`` have all their samples, ``rows_failed`` are among the
    failures, counted by code in ``failures``; rows of open shards that their workers have saved are
    counted with those of committed parts. ``round`` is the last retry round, 0 without any, and
    ``rows_retried`` are failed rows that wait for its answer. Tokens are those of the answers; while
    shards are open, what the workers say that they had of them. ``tokens_per_second`` are completion
    tokens of the workers alive, since each had its engine; ``eta_seconds`` is None while nothing tells.
    ``usd`` and ``worker_hours`` are what all workers took up to their last heartbeat, ``usd`` None without
    a price; ``max_usd`` and ``max_worker_hours`` are the budget. ``message`` says in one sentence why a job
    failed, stalled or ran out of budget, and what to do.
    """

    uri: str
    name: str | None
    state: State
    message: str
    exit_code: int
    shards: int
    shards_done: int
    rows: int
    rows_answered: int
    rows_failed: int
    failures: Mapping[str, int]
    round: int
    rows_retried: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    tokens_per_second: float
    eta_seconds: float | None
    usd: float | None
    max_usd: float | None
    worker_hours: float
    max_worker_hours: float | None
    workers_alive: int
    workers: tuple[WorkerRecord, ...]

    @property
    def over(self) -> bool:
        """Whether nothing more happens by itself."""
        return self.state in ("done", "cancelled", "failed", "stalled", "budget")


class StatusReader:
    """Reads a job's status again and again; what never changes is read once.

    ``now`` gives seconds since the epoch; it is compared with the store's times of heartbeats. Workers
    in ``before`` belong to an earlier submit: they count in the bill, but say nothing of how this one goes.
    """

    def __init__(
        self,
        folder: JobFolder,
        before: Collection[str] = (),
        now: Callable[[], float] = time.time,
    ) -> None:
        """Read the job in ``folder``. Raises JobError where there is none."""
        record = folder.read_job()
        if record is None:
            raise JobError(
                f"there is no job at {folder.uri}: give the output.uri of a job that was submitted"
            )
        self.record: JobRecord = record
        self._folder = folder
        self._before = frozenset(before)
        self._now = now
        self._since = now() if self._before else _seconds(record.created)
        self.footers: dict[ShardName, PartFooter] = {}
        """Of the committed parts that the last read found."""
        self.rounds: dict[int, RoundPlan] = {}
        """The plans of the retry rounds that it found."""
        self._progress: dict[str, pa.Table] = {}

    def settlement(self) -> Settlement:
        """The bill so far."""
        self._read_footers()
        return settle((record for record, _ in self._folder.read_workers()), self.footers.values())

    def read(self) -> JobStatus:
        """The status as it is now."""
        workers = list(self._folder.read_workers())
        control = self._folder.read_control()
        self._read_footers()
        self.rounds = read_rounds(self._folder, self.rounds)
        shards = job_shards(self.record, self.rounds)
        answered, failures, retried = self._rows(shards)
        failed = failures.total()
        settlement = settle((record for record, _ in workers), self.footers.values())
        alive = living(workers, self._now())
        done = sum(shard in self.footers for shard in shards)
        tokens = [settlement.prompt_tokens, settlement.cached_tokens, settlement.completion_tokens]
        if done < len(shards):
            said = [
                (worker.prompt_tokens, worker.cached_tokens, worker.completion_tokens)
                for worker, _ in workers
            ]
            tokens = [max(sure, sum(column)) for sure, *column in zip(tokens, *said, strict=True)]
        complete = done == len(shards)
        cap = cap_of(control, self.record)
        state, message, exit_code = self._state(complete, control, alive, workers)
        if state == "budget":
            message = used_up(cap, settlement.bill.total, settlement.usd or 0.0)
        rows_left = self.record.rows - answered - failed + retried
        pace = sum(_per_second(record, record.rows_done) for record in alive)
        return JobStatus(
            uri=self._folder.uri,
            name=self.record.spec.get("name"),
            state=state,
            message=message,
            exit_code=exit_code,
            shards=len(shards),
            shards_done=done,
            rows=self.record.rows,
            rows_answered=answered,
            rows_failed=failed,
            failures={code: count for code, count in sorted(failures.items()) if count},
            round=max(self.rounds, default=0),
            rows_retried=retried,
            prompt_tokens=tokens[0],
            cached_tokens=tokens[1],
            completion_tokens=tokens[2],
            tokens_per_second=sum(_per_second(record, record.completion_tokens) for record in alive),
            eta_seconds=rows_left / pace if pace and state == "running" else None,
            usd=settlement.usd,
            max_usd=cap.usd,
            worker_hours=settlement.bill.total / NANOSECONDS_PER_HOUR,
            max_worker_hours=None if cap.nanoseconds is None else cap.nanoseconds / NANOSECONDS_PER_HOUR,
            workers_alive=len(alive),
            workers=tuple(record for record, _ in workers),
        )

    def _samples(self) -> int:
        return int(self.record.spec.get("sampling", {}).get("n", 1))

    def _read_footers(self) -> None:
        parts = self._folder.committed()
        new = [shard for shard in parts if shard not in self.footers]
        self.footers |= _read_all(lambda shard: self._folder.read_footer(shard, parts[shard].size), new)

    def _rows(self, shards: Iterable[ShardName]) -> tuple[int, Counter[str], int]:
        """How many rows are answered, how many have failed for now, by code, and how many of these a
        retry round has yet to answer."""
        saved = self._open_rows(shards)
        answered, retried = 0, 0
        failed: Counter[str] = Counter()
        for shard in shards:
            footer = self.footers.get(shard)
            if footer is not None:
                answered += footer.rows // self._samples()
                failed.update(footer.codes)
                failed.subtract(row.code for row in self._retried(shard))
            else:
                done, codes = saved.get(shard, ([], {}))
                answered += len(done)
                failed.update(codes.values())
                if shard.round:
                    settled = {*done, *codes}
                    waiting = self._retried(shard)
                    failed.subtract(row.code for row in waiting if row.row_index in settled)
                    retried += len(waiting) - len(settled)
        return answered, failed, retried

    def _retried(self, shard: ShardName) -> tuple[FailedRow, ...]:
        return self.rounds[shard.round].shards[shard.index] if shard.round else ()

    def _open_rows(
        self, shards: Iterable[ShardName]
    ) -> dict[ShardName, tuple[list[int], Mapping[int, str]]]:
        """Rows that open shards' workers have saved: those answered, and the codes of those failed."""
        claimed = self._folder.list_claims()
        keys: dict[ShardName, list[str]] = {}
        for shard in shards:
            if shard.label in claimed and shard not in self.footers:
                keys[shard] = [item.key for item in self._folder.list_progress(shard) if not item.inflight]
        wanted = [key for listed in keys.values() for key in listed]
        kept = {key: self._progress[key] for key in wanted if key in self._progress}
        self._progress = kept | _read_all(self._read_progress, (key for key in wanted if key not in kept))
        saved: dict[ShardName, tuple[list[int], Mapping[int, str]]] = {}
        for shard, listed in keys.items():
            tables = [self._progress[key] for key in listed if self._progress[key].num_rows]
            if tables:
                rows = pa.concat_tables(tables)
                failed = rows.filter(pc.is_valid(rows["code"])).select(["row_index", "code"])
                codes = dict(zip(*failed.to_pydict().values(), strict=True))
                # A failed row hides its samples; one that two workers finished counts once.
                hidden = pc.is_in(rows["row_index"], value_set=pa.array(codes.keys(), pa.int64()))
                finished = rows.filter(pc.invert(hidden)).group_by(["row_index", "sample_index"])
                counts = finished.aggregate([]).group_by("row_index").aggregate([([], "count_all")])
                whole = counts.filter(pc.greater_equal(counts["count_all"], self._samples()))
                saved[shard] = whole["row_index"].to_pylist(), codes
        return saved

    def _read_progress(self, key: str) -> pa.Table:
        empty = pa.schema([("row_index", pa.int64()), ("sample_index", pa.int32()), ("code", pa.string())])
        try:
            return table_from_bytes(self._folder.store.get(key)).select(empty.names)
        except FileNotFoundError:
            return empty.empty_table()  # its shard was committed since

    def _state(
        self,
        complete: bool,
        control: Control,
        alive: list[WorkerRecord],
        workers: list[tuple[WorkerRecord, float]],
    ) -> tuple[State, str, int]:
        """The state, what to say about it, and the exit code of a command that waited for it."""
        if complete:
            return "done", "", 0
        if alive:
            started = any(record.state != "starting" for record in alive)
            return ("running" if started else "starting"), "", 0
        if control.state == "cancel":
            return "cancelled", "submit again to go on", 77
        if control.state == "stop":
            return "failed", control.message, 77
        own = [(modified, record) for record, modified in workers if record.worker not in self._before]
        failed = [(modified, record) for modified, record in own if record.exit_code in (70, 77, 78)]
        last = max(failed, key=lambda item: item[0])[1] if failed else None
        spent = last is not None and last.message.startswith(USED_UP)
        if last is not None and not spent:
            return "failed", last.message, last.exit_code or 70
        cap = cap_of(control, self.record)
        slots = job_slots(self._folder, SystemClock(), self.record, control, ALIVE_SECONDS)
        if spent or (cap.limited and not slots.affordable(cap)):
            return "budget", "", 77
        if not own and self._now() - self._since < START_SECONDS:
            return "starting", "", 0
        return "stalled", "no worker is alive: submit again to go on", 75


def living(beats: Sequence[tuple[WorkerRecord, float]], now: float) -> list[WorkerRecord]:
    """The workers alive ``now``, in seconds since the epoch, by their last heartbeats and the store's
    times of them."""
    now = max((now, *(modified for _, modified in beats)))
    fresh = [record for record, modified in beats if now - modified < ALIVE_SECONDS]
    return [record for record in fresh if record.state in _LIVING and runs_here(record) is not False]


def runs_here(record: WorkerRecord) -> bool | None:
    """Whether a worker's process runs on this machine; None where it is another machine's."""
    if record.host != socket.gethostname():
        return None
    if record.state not in _LIVING:
        return False
    try:
        state = Path(f"/proc/{record.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in ("Z", "X")


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def _per_second(record: WorkerRecord, count: int) -> float:
    """A worker's pace since its engine was there."""
    nanoseconds = record.bill.total - record.bill.startup
    return count * 1e9 / nanoseconds if nanoseconds > 0 else 0.0


def _read_all(read: Callable[[K], V], keys: Iterable[K]) -> dict[K, V]:
    """``read`` of every key, several at a time."""
    keys = list(keys)
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        return dict(zip(keys, pool.map(read, keys), strict=True))


def status_values(status: JobStatus) -> dict[str, Any]:
    """The status as JSON values; of workers what they are now, without their histories."""
    values = asdict(status)
    for worker in values["workers"]:
        del worker["history"]
    return values
