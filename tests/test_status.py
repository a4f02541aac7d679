"""Where a job stands, told from a folder that the protocol's own writers filled."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batchinfer.connectors.storage import open_store
from batchinfer.engine.types import Completion, SamplingParams
from batchinfer.jobs.columns import output_schema
from batchinfer.jobs.commit import commit
from batchinfer.jobs.folder import JobFolder, ShardName
from batchinfer.jobs.progress import ProgressWriter
from batchinfer.jobs.records import Bill, Claim, Failure, JobRecord, WorkerRecord
from batchinfer.jobs.samples import Charge, Finished
from batchinfer.jobs.status import START_SECONDS, StatusReader, status_values
from batchinfer.jobs.types import JobError
from batchinfer.jobs.view import bill_lines, duration, money, status_line, status_lines

SHARDS, ROWS = 4, 40
SECOND = 10**9


class Job:
    """A job of 4 shards of 10 rows, whose folder is filled step by step."""

    def __init__(self, uri: str, samples: int = 1) -> None:
        self.folder = JobFolder(open_store(uri))
        self.samples = samples
        self.schema = output_schema(pa.schema([]), SamplingParams(n=samples), tokens=False)
        self.seconds = datetime.now(UTC).timestamp()

    def submit(self) -> Job:
        record = JobRecord(
            spec={"name": "docs", "sampling": {"n": self.samples}},
            schema=self.schema,
            input_schema=pa.schema([]),
            fingerprint="f",
            plan="plan-x.arrow",
            shards=SHARDS,
            rows=ROWS,
            created=datetime.fromtimestamp(self.seconds, UTC).isoformat(),
            nonce="n",
        )
        assert self.folder.create_job(record)
        return self

    def finished(self, row: int, sample: int = 0, worker: str = "a") -> Finished:
        completion = Completion(
            index=row,
            sample_index=sample,
            text="x",
            token_ids=(1, 2),
            finish_reason="stop",
            prompt_tokens=5,
            cached_tokens=3,
            prefill_ns=100,
            token_ns=(10, 20),
        )
        return Finished(completion, (Charge(worker, 3.6, 100, 30, 2),))

    def commit(self, index: int, failed: dict[int, str] | None = None) -> None:
        failed = failed or {}
        rows = [row for row in range(index * 10, index * 10 + 10) if row not in failed]
        samples = [self.finished(row, sample) for row in rows for sample in range(self.samples)]
        empty = pa.Table.from_arrays([], schema=pa.schema([]))
        failures = {row: Failure(row, code, "why") for row, code in failed.items()}
        name = ShardName(0, index, SHARDS)
        assert commit(self.folder, name, "a", self.schema, empty, samples, failures, lambda: None)

    def progress(
        self, index: int, samples: list[Finished], failures: list[Failure], worker: str = "a"
    ) -> None:
        name = ShardName(0, index, SHARDS)
        self.folder.create_claim(
            name, len(self.folder.list_claims(name)) + 1, Claim(worker=worker, nonce=worker)
        )
        ProgressWriter(self.folder, name, worker).write(samples, failures, {})

    def beat(self, worker: str = "a", **fields: Any) -> None:
        values: dict[str, Any] = {
            "worker": worker,
            "state": "running",
            "beat": 1,
            "usd_per_hour": 3.6,
            "bill": Bill(startup=SECOND, rows=2 * SECOND),
            "started": "",
        }
        self.folder.write_worker(WorkerRecord(**(values | fields)))

    def status(self, later: float = 0.0) -> Any:
        now = datetime.now(UTC).timestamp() + later
        return StatusReader(self.folder, now=lambda: now).read()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(f"memory://jobs{tmp_path.as_posix()}").submit()


def test_no_job() -> None:
    with pytest.raises(JobError, match="no job at memory://jobs/none"):
        StatusReader(JobFolder(open_store("memory://jobs/none")))


def test_committed_and_open_rows_are_counted_once(job: Job) -> None:
    job.beat()
    job.commit(0, failed={3: "too_long", 4: "too_long", 5: "render_error"})
    job.commit(1)
    job.progress(2, [job.finished(20), job.finished(21)], [Failure(22, "bad_row", "why")])
    # A helper finished a row twice, and answered one that failed.
    job.progress(2, [job.finished(21), job.finished(22), job.finished(23)], [], worker="b")
    # What is left of a committed shard's progress does not count again.
    job.progress(1, [job.finished(10)], [])
    status = job.status()
    assert (status.state, status.shards, status.shards_done, status.rows) == ("running", 4, 2, 40)
    assert status.rows_answered == 7 + 10 + 3
    assert status.failures == {"bad_row": 1, "render_error": 1, "too_long": 2}
    assert status.rows_failed == 4
    assert (status.prompt_tokens, status.cached_tokens, status.completion_tokens) == (85, 51, 34)


def test_a_stop_at_the_failure_limit_is_seen_though_no_worker_told(job: Job) -> None:
    job.beat(exit_code=75, state="left")
    job.folder.append_control(lambda control: replace(control, state="stop", message="too many; do this"))
    status = job.status(later=1000)
    assert (status.state, status.message, status.exit_code) == ("failed", "too many; do this", 77)


def test_workers_that_left_as_too_many_stall_nothing(job: Job) -> None:
    job.commit(0)
    job.beat("a", state="left", exit_code=0)
    job.beat("b")
    assert job.status().state == "running"


def test_a_row_of_several_samples_counts_when_all_are_there(tmp_path: Path) -> None:
    job = Job(f"memory://jobs{tmp_path.as_posix()}", samples=2).submit()
    job.beat()
    job.commit(0, failed={1: "too_long"})
    job.progress(1, [job.finished(10, 0), job.finished(10, 1), job.finished(11, 1)], [])
    assert job.status().rows_answered == 9 + 1


def test_pace_and_spend(job: Job) -> None:
    job.beat(rows_done=10, completion_tokens=100, bill=Bill(startup=SECOND, rows=4 * SECOND))
    job.beat(
        "b", rows_done=5, completion_tokens=60, bill=Bill(startup=SECOND, idle=2 * SECOND), state="left"
    )
    job.commit(0)
    status = job.status()
    assert status.tokens_per_second == 25.0
    assert status.eta_seconds == pytest.approx(30 / 2.5)
    assert status.usd == pytest.approx((5 + 3) * 3.6 / 3600)
    assert status.workers_alive == 1
    job.beat("c", usd_per_hour=None)
    assert job.status().usd is None


@pytest.mark.parametrize(
    ("fill", "later", "state", "exit_code", "words"),
    [
        (lambda job: None, 0.0, "starting", 0, ""),
        (lambda job: None, START_SECONDS + 1, "stalled", 75, "submit again"),
        (lambda job: job.beat(state="starting"), 0.0, "starting", 0, ""),
        (lambda job: job.beat(), 0.0, "running", 0, ""),
        (lambda job: job.beat(), 61.0, "stalled", 75, "submit again"),
        (lambda job: job.beat(state="left", exit_code=75), 0.0, "stalled", 75, "submit again"),
        (
            lambda job: job.beat(state="failed", exit_code=78, message="no weights"),
            0.0,
            "failed",
            78,
            "no weights",
        ),
        (lambda job: [job.commit(index) for index in range(SHARDS)], 61.0, "done", 0, ""),
        (lambda job: [job.beat(), cancel(job)], 0.0, "running", 0, ""),
        (lambda job: [job.beat(state="left"), cancel(job)], 0.0, "cancelled", 77, "submit again"),
    ],
)
def test_states(
    job: Job, fill: Callable[[Job], object], later: float, state: str, exit_code: int, words: str
) -> None:
    fill(job)
    status = job.status(later)
    assert (status.state, status.exit_code) == (state, exit_code)
    assert words in status.message
    assert status.over is (state not in ("starting", "running"))


def test_workers_of_an_earlier_submit_do_not_fail_this_one(job: Job) -> None:
    job.beat(state="failed", exit_code=78, message="no weights")
    assert StatusReader(job.folder).read().state == "failed"
    assert StatusReader(job.folder, before={"a"}).read().state == "starting"
    job.beat("b", state="failed", exit_code=70, message="broken")
    assert StatusReader(job.folder, before={"a"}).read().message == "broken"


def cancel(job: Job) -> None:
    job.folder.append_control(lambda control: replace(control, state="cancel"))


def test_what_never_changes_is_read_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.beat()
    job.commit(0, failed={3: "too_long"})
    job.progress(1, [job.finished(10)], [])
    reader = StatusReader(job.folder)
    # Failures hold the input of their rows, and are counted without being read at all.
    monkeypatch.setattr(job.folder, "read_failures", None)
    first = reader.read()
    assert first.failures == {"too_long": 1}
    monkeypatch.setattr(job.folder, "read_footer", None)
    monkeypatch.setattr(reader, "_read_progress", None)
    assert reader.read() == first


def test_the_status_is_json_and_text(job: Job) -> None:
    job.beat(rows_done=10, completion_tokens=100)
    job.commit(0, failed={3: "too_long"})
    status = job.status()
    assert json.loads(json.dumps(status_values(status)))["failures"] == {"too_long": 1}
    text = "\n".join(status_lines(status))
    for word in ("docs", "10 of 40 rows", "1 of 4 shards", "too_long 1", "27 of them cached", "1 alive"):
        assert word in text
    assert "10 of 40 rows" in status_line(status)


def test_the_bill_names_every_bucket_and_the_price_of_a_million(job: Job) -> None:
    job.beat(state="left", bill=Bill(startup=SECOND, rows=1300, idle=SECOND))
    job.commit(0)
    settlement = StatusReader(job.folder).settlement()
    settlement.check()
    text = "\n".join(bill_lines(settlement))
    for word in (
        "tokens in",
        "50, 30 of them cached",
        "tokens out",
        "a million",
        "start-up",
        "waste",
        "idle",
    ):
        assert word in text
    job.beat("b", usd_per_hour=None)
    assert "price.usd_per_hour" in "\n".join(bill_lines(StatusReader(job.folder).settlement()))


@pytest.mark.parametrize(
    ("usd", "text"),
    [
        (0, "$0.00"),
        (12.3, "$12.30"),
        (1234.5, "$1,234.50"),
        (0.0123, "$0.0123"),
        (0.000012345, "$1.23e-05"),
    ],
)
def test_money(usd: float, text: str) -> None:
    assert money(usd) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.25, "1.2 s"),
        (61, "1 min 1 s"),
        (7200, "2 h 0 min"),
        (3 * 86400, "3.0 days"),
        (3599, "59 min 59 s"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
