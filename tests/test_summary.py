"""The summary: right after the last worker has left, at a cost that does not grow with the job."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batchinfer.connectors.storage import open_store
from batchinfer.engine.types import Completion, SamplingParams
from batchinfer.jobs.columns import output_schema
from batchinfer.jobs.commit import commit
from batchinfer.jobs.cost import settle
from batchinfer.jobs.folder import JobFolder, ShardName
from batchinfer.jobs.records import Bill, Failure, WorkerRecord
from batchinfer.jobs.samples import Charge, Finished
from batchinfer.jobs.summary import Basis, SummaryWriter

SHARDS = 40


class Job:
    """A job of 40 shards of 2 rows in a folder that counts what is asked of it."""

    def __init__(self, uri: str) -> None:
        self.requests: Counter[str] = Counter()
        self.folder = JobFolder(self.counting(open_store(uri)))
        self.names = [ShardName(0, index, SHARDS) for index in range(SHARDS)]
        self.schema = output_schema(pa.schema([]), SamplingParams(), tokens=False)

    def counting(self, store: Any) -> Any:
        for name in ("get", "get_range", "head", "list", "put"):
            setattr(store, name, self.counted(name, getattr(store, name)))
        return store

    def counted(self, name: str, call: Any) -> Any:
        def count(key: str, *given: Any) -> Any:
            self.requests[f"{name} {'part' if key.startswith('part-') else key.split('/')[1]}"] += 1
            return call(key, *given)

        return count

    def commit(self, index: int, worker: str = "a") -> None:
        done = Completion(
            index=2 * index,
            sample_index=0,
            text="x",
            token_ids=(1, 2),
            finish_reason="stop",
            prompt_tokens=5,
            cached_tokens=3,
            prefill_ns=100,
            token_ns=(10, 20),
        )
        samples = [Finished(done, (Charge(worker, 3.6, 100, 30, 2),))]
        failures = {2 * index + 1: Failure(2 * index + 1, "too_long", "why")}
        empty = pa.Table.from_arrays([], schema=pa.schema([]))
        assert commit(
            self.folder, self.names[index], worker, self.schema, empty, samples, failures, lambda: None
        )

    def beat(self, worker: str, state: str, rows: int = 0) -> None:
        bill = Bill(startup=7, rows=130 * rows, idle=11)
        record = WorkerRecord(
            worker=worker,
            state=state,
            beat=1,
            usd_per_hour=3.6,
            bill=bill,
            started="",  # type: ignore[arg-type]
        )
        self.folder.write_worker(record)

    def writer(self, worker: str, every: int = 1024, few: int = 32) -> SummaryWriter:
        return SummaryWriter(self.folder, worker, lambda: self.names, 1, 60.0, every, few)

    def check(self, committed: int) -> None:
        """The summary holds all that is in the folder."""
        found = json.loads(self.folder.read_summary())
        parts = self.folder.committed()
        assert len(parts) == committed
        settled = settle(
            (record for record, _ in self.folder.read_workers()), map(self.folder.read_footer, parts)
        )
        settled.check()
        assert found["complete"] == (committed == SHARDS)
        assert found["shards"] == {"committed": committed, "total": SHARDS}
        assert found["rows"] == {"answered": settled.rows, "failed": settled.failed_rows}
        assert found["nanoseconds"]["total"] == settled.bill.total
        assert found["nanoseconds"]["rows"] == settled.bill.rows
        assert found["usd"]["total"] == pytest.approx(settled.usd)
        assert found["usd"]["decode"] == pytest.approx(settled.decode_usd)
        assert found["workers"].keys() == {account.worker for account in settled.accounts}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(str(tmp_path / "job"))


def test_each_part_and_each_last_heartbeat_is_read_once(job: Job) -> None:
    for index in range(SHARDS):
        job.commit(index)
        job.beat("a", "running", index + 1)
        job.writer("a", every=8).committed(job.names[index])
    read = dict(job.requests)
    assert read["get_range part"] == SHARDS
    assert "head part" not in read
    assert read["put summary.json"] == SHARDS // 8
    for worker in "abcdef":
        job.beat(worker, "left", SHARDS if worker == "a" else 0)
    before = job.requests.copy()
    for worker in "abcdef":
        job.writer(worker).leave()
    asked = job.requests - before
    assert "get_range part" not in asked
    assert asked["get workers"] == 6
    job.check(SHARDS)


def test_with_many_at_work_the_last_to_leave_writes_it(job: Job) -> None:
    workers = [f"w{number:02d}" for number in range(20)]
    for index in range(SHARDS):
        job.commit(index, workers[index % 20])
    for worker in workers:
        job.beat(worker, "running", 2)
    job.requests.clear()
    for worker in workers:
        job.beat(worker, "left", 2)
        job.writer(worker, few=3).leave()
    # A sample of 3 misses those still at work only when few of them are left.
    assert job.requests["put summary.json"] < 12
    assert job.requests["get workers"] < 150
    job.check(SHARDS)


def test_what_was_left_undone_by_a_job_that_was_stopped_is_told(job: Job) -> None:
    for index in (3, 4, 7):
        job.commit(index)
    job.beat("a", "left", 3)
    job.writer("a").leave()
    job.check(3)


def test_parts_that_somebody_removed_are_no_longer_counted(job: Job) -> None:
    for index in range(5):
        job.commit(index)
    job.beat("a", "left", 5)
    job.writer("a").leave()
    job.folder.store.delete(job.names[2].part)
    job.beat("a", "left", 4)
    job.writer("a").leave()
    job.check(4)


def test_an_older_summary_that_comes_late_is_made_anew(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.commit(0)
    job.beat("a", "left", 1)
    job.beat("b", "running")
    slow, write = job.writer("a"), JobFolder.write_summary

    def overtaken(folder: JobFolder, data: bytes) -> None:
        monkeypatch.undo()
        job.commit(1, "b")
        job.beat("b", "left", 1)
        job.writer("b").leave()
        write(folder, data)

    monkeypatch.setattr(JobFolder, "write_summary", overtaken)
    slow.leave()
    job.check(2)


def test_what_a_summary_was_derived_from_is_kept_with_it() -> None:
    parts = frozenset(ShardName(*name) for name in [(0, 1, 9), (0, 2, 9), (0, 5, 9), (1, 0, 2), (1, 1, 2)])
    values = json.loads(json.dumps(Basis(parts).to_values()))
    assert values["parts"][0] == {"round": 0, "of": 9, "ranges": [[1, 2], [5, 5]]}
    assert Basis.from_values(values).parts == parts
