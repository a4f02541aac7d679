"""A submitted job, as Python sees it: its address, where it stands, and its rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from batchinfer.connectors.inputs import ObjectFile
from batchinfer.connectors.storage import join_uri, normalize_uri, open_store, protocol_of
from batchinfer.jobs.cost import Settlement
from batchinfer.jobs.folder import JobFolder, ShardName
from batchinfer.jobs.placement import ServiceReport, ask_services, cancel_services, places
from batchinfer.jobs.records import FAILURES_SCHEMA, JobRecord, WorkerRecord
from batchinfer.jobs.retry import begin_round, current_failures
from batchinfer.jobs.rounds import RoundPlan, in_order
from batchinfer.jobs.status import JobStatus, StatusReader
from batchinfer.jobs.types import JobError

if TYPE_CHECKING:
    from batchinfer.jobs.prediction import Prediction

POLL_SECONDS = 2.0
ASK_SECONDS = 10.0
_PARALLEL_READS = 16
_BATCH_ROWS = 1024


class Job:
    """The job at ``uri``, its ``output.uri``.

    ``storage`` holds settings of stores by URI prefix, as in a job spec; without it they come from the
    environment. ``before`` are workers of an earlier submit, whose end says nothing of this one.
    """

    def __init__(
        self, uri: str, storage: Mapping[str, Mapping[str, Any]] | None = None, before: Collection[str] = ()
    ) -> None:
        """Open the job. Raises JobError where there is none, StorageError where the store refuses."""
        self.uri = normalize_uri(uri)
        self._storage = storage
        self._folder = JobFolder(open_store(self.uri, storage))
        self._status = StatusReader(self._folder, before)
        self._asked, self._expected = float("-inf"), False

    def __repr__(self) -> str:
        return f"Job({self.uri!r})"

    @property
    def record(self) -> JobRecord:
        """What was submitted."""
        return self._status.record

    def status(self) -> JobStatus:
        """Where the job stands now. A service that has yet to start its workers is asked about them."""
        status = self._status.read()
        if status.state != "stalled":
            return status
        if time.monotonic() - self._asked >= ASK_SECONDS:
            self._expected = any(report.active and report.active.total for report in self.services())
            self._asked = time.monotonic()
        return replace(status, state="starting", message="", exit_code=0) if self._expected else status

    def services(self) -> list[ServiceReport]:
        """What each batch service says that was asked for workers of this job."""
        return ask_services(places(self.record, self._folder.read_control(), self.uri))

    def workers(self) -> tuple[WorkerRecord, ...]:
        """The last heartbeat of every worker that the job has had."""
        return tuple(record for record, _ in self._folder.read_workers())

    def prediction(self) -> Prediction | None:
        """What a pilot predicted before the job was submitted; None without one."""
        data = self._folder.read_prediction()
        if data is None:
            return None
        from batchinfer.jobs.prediction import Prediction

        return Prediction.from_bytes(data)

    def bill(self) -> Settlement:
        """What the job has cost so far, and for what."""
        return self._status.settlement()

    def wait(self, on_status: Callable[[JobStatus], None] | None = None) -> JobStatus:
        """Wait until the job is done; ``on_status`` is called with every status on the way.

        Raises JobError, saying why, where it was cancelled, failed, or has no worker left.
        """
        while True:
            status = self.status()
            if on_status is not None:
                on_status(status)
            if status.over:
                break
            time.sleep(POLL_SECONDS)
        if status.state != "done":
            state = "out of budget" if status.state == "budget" else status.state
            raise JobError(f"the job at {self.uri} is {state}: {status.message}")
        return status

    def cancel(self) -> list[str]:
        """Ask all workers to stop, and the services that have some to end them; what is done is kept, and
        submitting again goes on from there. Returns a sentence for each service that could not be told."""
        control = self._folder.append_control(lambda control: replace(control, state="cancel"))
        return cancel_services(places(self.record, control, self.uri))

    def begin_retry(self, codes: Collection[str] = ()) -> tuple[int, RoundPlan]:
        """Begin a retry round, of the current failures with these ``codes`` (none: of those that may
        pass); starts no worker. Returns its number and its rows.

        Raises JobError where the job is not complete or nothing can be retried.
        """
        count = self._folder.read_control().workers or self.record.spec["workers"]["count"]
        begun = begin_round(self._folder, self.record, codes, count)
        if self._folder.read_control().state != "run":
            self._folder.append_control(lambda control: replace(control, state="run"))
        return begun

    def retry(self, codes: Collection[str] = (), workers: int | None = None) -> int:
        """Try failed rows again: begins a retry round (:meth:`begin_retry`) and starts its workers, which
        outlive this process. Returns how many rows it is about."""
        from batchinfer.jobs.submit import begin_work, retry_job

        retried, plan = retry_job(self.uri, codes, workers, self._storage)
        begin_work(retried, attached=False)
        return plan.rows

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows of committed parts, in the order of the input, a bounded number at a time."""
        rounds: dict[int, list[ShardName]] = {}
        for shard in self._parts():
            rounds.setdefault(shard.round, []).append(shard)
        return in_order([self._batches_of(parts) for parts in rounds.values()])

    def _batches_of(self, parts: Iterable[ShardName]) -> Iterator[pa.RecordBatch]:
        for shard in parts:
            file = ObjectFile(self._folder.store, shard.part)
            # One thread and no read-ahead: pyarrow's own threads would wait for Python at its end.
            part = pq.ParquetFile(pa.PythonFile(file, mode="r"), pre_buffer=False)
            yield from part.iter_batches(_BATCH_ROWS, use_threads=False)

    def dataset(self) -> pyarrow.dataset.Dataset:
        """The rows of committed parts as a pyarrow dataset, in the order of the input; those that a
        retry round answered come after the others."""
        parts = self._parts()
        format = pyarrow.dataset.ParquetFileFormat()
        if protocol_of(self.uri) == "file":
            paths = [join_uri(self.uri, shard.part) for shard in parts]
            return pyarrow.dataset.dataset(paths, self.record.schema, format)

        def fragment(shard: ShardName) -> pyarrow.dataset.Fragment:
            file = ObjectFile(self._folder.store, shard.part)
            return format.make_fragment(pa.PythonFile(file, mode="r"))

        with ThreadPoolExecutor(_PARALLEL_READS) as pool:
            fragments = list(pool.map(fragment, parts))
        return pyarrow.dataset.FileSystemDataset(fragments, self.record.schema, format)

    def _parts(self) -> list[ShardName]:
        return sorted(self._folder.committed())

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of committed parts, in the order of the input, in memory."""
        wanted = list(self.record.schema.names if columns is None else columns)
        if not any(shard.round for shard in self._parts()):
            return self.dataset().to_table(columns=wanted)
        keys = [name for name in ("row_index", "sample_index") if name in self.record.schema.names]
        table = self.dataset().to_table(columns=list(dict.fromkeys([*wanted, *keys])))
        return table.sort_by([(name, "ascending") for name in keys]).select(wanted)

    def failures(self) -> pa.Table:
        """The rows that have failed for now: row_index, code, message, attempts, input. A row that a
        later round has answered is none of them."""
        rows = [failure for _, failure in current_failures(self._folder).values()]
        columns = {name: [getattr(row, name) for row in rows] for name in FAILURES_SCHEMA.names}
        return pa.table(columns, schema=FAILURES_SCHEMA)
