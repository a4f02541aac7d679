"""Where a job stands, told from its folder alone."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from batchinfer.jobs.cost import Settlement, settle
from batchinfer.jobs.folder import JobFolder, ShardName
from batchinfer.jobs.records import JobRecord, PartFooter, WorkerRecord, table_from_bytes
from batchinfer.jobs.types import JobError

State = Literal["starting", "running", "done", "cancelled", "failed", "stalled"]

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
    counted with those of committed parts. Tokens are those of the answers; while shards are open, what
    the workers say that they had of them. ``tokens_per_second`` are completion tokens of the workers
    alive, since each had its engine; ``eta_seconds`` is None while nothing tells. ``usd`` is what all
    workers cost up to their last heartbeat, None without a price. ``message`` says in one sentence why
    a job failed or stalled and what to do.
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
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    tokens_per_second: float
    eta_seconds: float | None
    usd: float | None
    workers_alive: int
    workers: tuple[WorkerRecord, ...]

    @property
    def over(self) -> bool:
        """Whether nothing more happens by itself."""
        return self.state in ("done", "cancelled", "failed", "stalled")


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
        self._footers: dict[ShardName, PartFooter] = {}
        self._codes: dict[ShardName, Counter[str]] = {}
        self._progress: dict[str, pa.Table] = {}

    def settlement(self) -> Settlement:
        """The bill so far."""
        self._read_footers()
        return settle((record for record, _ in self._folder.read_workers()), self._footers.values())

    def read(self) -> JobStatus:
        """The status as it is now."""
        workers = list(self._folder.read_workers())
        control = self._folder.read_control()
        self._read_footers()
        answered, failures = self._open_rows()
        samples = self._samples()
        for shard, footer in self._footers.items():
            answered += footer.rows // samples
            failures.update(self._codes[shard])
        settlement = settle((record for record, _ in workers), self._footers.values())
        alive = list(self._alive(workers))
        done = len(self._footers)
        tokens = [settlement.prompt_tokens, settlement.cached_tokens, settlement.completion_tokens]
        if done < self.record.shards:
            said = [
                (worker.prompt_tokens, worker.cached_tokens, worker.completion_tokens)
                for worker, _ in workers
            ]
            tokens = [max(sure, sum(column)) for sure, *column in zip(tokens, *said, strict=True)]
        rows_failed = sum(failures.values())
        state, message, exit_code = self._state(done, control.state == "cancel", alive, workers)
        rows_left = self.record.rows - answered - rows_failed
        pace = sum(_per_second(record, record.rows_done) for record in alive)
        return JobStatus(
            uri=self._folder.uri,
            name=self.record.spec.get("name"),
            state=state,
            message=message,
            exit_code=exit_code,
            shards=self.record.shards,
            shards_done=done,
            rows=self.record.rows,
            rows_answered=answered,
            rows_failed=rows_failed,
            failures=dict(sorted(failures.items())),
            prompt_tokens=tokens[0],
            cached_tokens=tokens[1],
            completion_tokens=tokens[2],
            tokens_per_second=sum(_per_second(record, record.completion_tokens) for record in alive),
            eta_seconds=rows_left / pace if pace and state == "running" else None,
            usd=settlement.usd,
            workers_alive=len(alive),
            workers=tuple(record for record, _ in workers),
        )

    def _samples(self) -> int:
        return int(self.record.spec.get("sampling", {}).get("n", 1))

    def _read_footers(self) -> None:
        new = [shard for shard in self._folder.committed() if shard not in self._footers]
        self._footers |= _read_all(self._folder.read_footer, new)
        failed = [shard for shard in new if self._footers[shard].failures is not None]
        self._codes |= {shard: Counter() for shard in new} | _read_all(self._read_codes, failed)

    def _read_codes(self, shard: ShardName) -> Counter[str]:
        nonce = self._footers[shard].failures
        assert nonce is not None
        return Counter(failure.code for failure in self._folder.read_failures(shard, nonce))

    def _open_rows(self) -> tuple[int, Counter[str]]:
        """Rows that open shards' workers have saved: how many are answered, and failures by code."""
        claimed = self._folder.list_claims()
        keys: dict[str, list[str]] = {}
        for index in range(self.record.shards):
            shard = ShardName(0, index, self.record.shards)
            if shard.label in claimed and shard not in self._footers:
                keys[shard.label] = [
                    item.key for item in self._folder.list_progress(shard) if not item.inflight
                ]
        wanted = [key for listed in keys.values() for key in listed]
        kept = {key: self._progress[key] for key in wanted if key in self._progress}
        self._progress = kept | _read_all(self._read_progress, (key for key in wanted if key not in kept))
        answered, failures = 0, Counter[str]()
        for listed in keys.values():
            tables = [self._progress[key] for key in listed if self._progress[key].num_rows]
            if tables:
                rows = pa.concat_tables(tables)
                failed = rows.filter(pc.is_valid(rows["code"])).select(["row_index", "code"])
                codes = dict(zip(*failed.to_pydict().values(), strict=True))
                failures.update(codes.values())
                # A failed row hides its samples; one that two workers finished counts once.
                hidden = pc.is_in(rows["row_index"], value_set=pa.array(codes.keys(), pa.int64()))
                finished = rows.filter(pc.invert(hidden)).group_by(["row_index", "sample_index"])
                counts = finished.aggregate([]).group_by("row_index").aggregate([([], "count_all")])
                answered += pc.sum(pc.greater_equal(counts["count_all"], self._samples())).as_py() or 0
        return answered, failures

    def _read_progress(self, key: str) -> pa.Table:
        empty = pa.schema([("row_index", pa.int64()), ("sample_index", pa.int32()), ("code", pa.string())])
        try:
            return table_from_bytes(self._folder.store.get(key)).select(empty.names)
        except FileNotFoundError:
            return empty.empty_table()  # its shard was committed since

    def _alive(self, workers: Iterable[tuple[WorkerRecord, float]]) -> Iterable[WorkerRecord]:
        beats = list(workers)
        now = max((self._now(), *(modified for _, modified in beats)))
        for record, modified in beats:
            fresh = record.state in _LIVING and now - modified < ALIVE_SECONDS
            if fresh and runs_here(record) is not False:
                yield record

    def _state(
        self,
        shards_done: int,
        cancelled: bool,
        alive: list[WorkerRecord],
        workers: list[tuple[WorkerRecord, float]],
    ) -> tuple[State, str, int]:
        """The state, what to say about it, and the exit code of a command that waited for it."""
        if shards_done == self.record.shards:
            return "done", "", 0
        if alive:
            started = any(record.state != "starting" for record in alive)
            return ("running" if started else "starting"), "", 0
        if cancelled:
            return "cancelled", "submit again to go on", 77
        own = [(modified, record) for record, modified in workers if record.worker not in self._before]
        failed = [(modified, record) for modified, record in own if record.exit_code in (70, 77, 78)]
        if failed:
            last = max(failed, key=lambda item: item[0])[1]
            return "failed", last.message, last.exit_code or 70
        if not own and self._now() - self._since < START_SECONDS:
            return "starting", "", 0
        return "stalled", "no worker is alive: submit again to go on", 75


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
    """The status as JSON values."""
    return asdict(status)
