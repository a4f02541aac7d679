"""Workers as real processes on a folder of this machine, with an engine whose answers are known."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fake_engine as fake
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.connectors.readers import discover, scan_input
from batchinfer.connectors.storage import open_store
from batchinfer.connectors.types import StorageError, TransientStorageError
from batchinfer.jobs.backends import local
from batchinfer.jobs.backends.local import start_workers
from batchinfer.jobs.columns import output_schema
from batchinfer.jobs.cost import settle
from batchinfer.jobs.failure_limit import JobStopped
from batchinfer.jobs.folder import JobFolder, ShardName, new_nonce
from batchinfer.jobs.processes import python_command
from batchinfer.jobs.records import JobRecord, WorkerRecord
from batchinfer.jobs.spec import parse_spec
from batchinfer.jobs.supervisor import EngineGone, outcome
from batchinfer.jobs.types import JobError, Shard

FAKE = Path(__file__).with_name("fake_engine.py")
WAIT = 240.0


def until(condition: Callable[[], Any], what: str, seconds: float = WAIT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@dataclass
class JobOnDisk:
    """A job in a folder, its workers, and what it must hold in the end."""

    uri: str
    folder: JobFolder
    record: JobRecord
    environment: dict[str, str]
    tmp: Path
    workers: list[subprocess.Popen[bytes]]

    def start(self, **environment: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            python_command("batchinfer", "worker", self.uri),
            env={**self.environment, **environment},
            stderr=subprocess.PIPE,
        )
        self.workers.append(process)
        return process

    def run(self, **environment: str) -> int:
        return self.start(**environment).wait(WAIT)

    def table(self) -> pa.Table:
        parts = [self.folder.store.get(shard.part) for shard in sorted(self.folder.committed())]
        return pa.concat_tables([pq.read_table(pa.BufferReader(part)) for part in parts])

    def heartbeats(self) -> list[WorkerRecord]:
        return [record for record, _ in self.folder.read_workers()]

    def decoded(self) -> Counter[str]:
        log = Path(self.environment["FAKE_LOG"])
        return Counter(log.read_text().splitlines()) if log.exists() else Counter()

    def check(self, n: int = 1, failed: dict[int, str] | None = None) -> pa.Table:
        """Every row once, with the right answer; the bill adds up."""
        table = self.table()
        failed = failed or {}
        rows = [row for row in range(self.record.rows) if row not in failed for _ in range(n)]
        assert table["row_index"].to_pylist() == rows
        samples = table["sample_index"].to_pylist() if n > 1 else [0] * len(rows)
        texts = [fake.text_of(row, sample) for row, sample in zip(rows, samples, strict=True)]
        assert table["completion"].to_pylist() == texts
        assert table["id"].to_pylist() == [f"id {row}" for row in rows]
        found = {}
        footers = []
        for shard in self.folder.committed():
            footer = self.folder.read_footer(shard)
            footers.append(footer)
            if footer.failures is not None:
                failures = self.folder.read_failures(shard, footer.failures)
                found.update({failure.row_index: failure.code for failure in failures})
        assert found == failed
        settlement = settle(self.heartbeats(), footers)
        settlement.check()
        spent = sum(table["prefill_ns"].to_pylist()) + sum(table["decode_ns"].to_pylist())
        assert settlement.bill.rows == spent
        assert settlement.bill.total == sum(record.bill.total for record in self.heartbeats())
        return table


MakeJob = Callable[..., JobOnDisk]


@pytest.fixture
def make_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeJob]:
    made: list[JobOnDisk] = []

    def make(
        rows: int = 40, shard_rows: int = 10, step: float = 0.0, tokens: int = 5, **spec: Any
    ) -> JobOnDisk:
        source = spec.pop("source", tmp_path / "in.parquet")
        if isinstance(source, Path) and not source.exists():
            columns = {
                "id": [f"id {row}" for row in range(rows)],
                "text": [f"the text of row {row}" for row in range(rows)],
            }
            pq.write_table(pa.table(columns), source, row_group_size=shard_rows)
        parsed = parse_spec(
            {
                "model": "fake",
                "input": {"uri": str(source)},
                "prompt": "Say: {{ text }}",
                "output": {"uri": str(tmp_path / "out"), "tokens": True},
                "price": {"usd_per_hour": 3.6},
                **spec,
            }
        )
        scan = scan_input(discover(parsed.input.uri), None, shard_rows)
        shards = [Shard(index, (split,), 1) for index, split in enumerate(scan.splits(shard_rows))]
        folder = JobFolder(open_store(parsed.output.uri))
        names = parsed.input.columns or scan.schema.names
        passed = [field for field in scan.schema if field.name in names]
        record = JobRecord(
            spec=parsed.model_dump(mode="json"),
            schema=output_schema(pa.schema(passed), parsed.sampling_params(), parsed.output.tokens),
            input_schema=scan.schema,
            fingerprint="",
            plan=folder.write_plan(shards),
            shards=len(shards),
            rows=scan.rows,
            created="2026-01-01T00:00:00+00:00",
            nonce=new_nonce(),
        )
        assert folder.create_job(record)
        environment = {
            **os.environ,
            "BATCHINFER_ENGINE_FACTORY": f"{FAKE}:fake_engine",
            "BATCHINFER_PACE": json.dumps({"lease": 4.0, "flush": 0.5}),
            "BATCHINFER_CACHE": str(tmp_path / "cache"),
            "FAKE_LOG": str(tmp_path / "decoded.log"),
            "FAKE_STEP": str(step),
            "FAKE_TOKENS": str(tokens),
            "OMP_NUM_THREADS": "1",
        }
        monkeypatch.setenv("FAKE_TOKENS", str(tokens))
        job = JobOnDisk(parsed.output.uri, folder, record, environment, tmp_path, [])
        made.append(job)
        return job

    yield make
    for job in made:
        for process in job.workers:
            if process.poll() is None:
                process.kill()
            process.communicate()


def test_one_worker_answers_every_row_and_its_bill_is_its_life(make_job: MakeJob) -> None:
    job = make_job(sampling={"n": 2})
    started = time.monotonic_ns()
    assert job.run() == 0
    life = time.monotonic_ns() - started
    table = job.check(n=2)
    assert table.schema.equals(job.record.schema)
    [record] = job.heartbeats()
    assert record.state == "left" and record.exit_code == 0
    assert record.bill.waste == 0
    assert record.bill.total <= life + 20_000_000, "10 ms is how exact a process's start is known"
    assert record.rows_done == 40
    costs = table["cost_usd"].to_pylist()
    assert costs == pytest.approx([seconds * 3.6 / 3600 for seconds in table["seconds"].to_pylist()])
    summary = json.loads(job.folder.read_summary())
    assert summary["complete"] and summary["rows"] == {"answered": 40, "failed": 0}
    assert summary["nanoseconds"]["total"] == record.bill.total
    assert (
        sum(value for key, value in summary["nanoseconds"].items() if key != "total") == record.bill.total
    )
    # Nothing is left but what the contract names.
    assert not list(Path(job.uri).glob("_batchinfer/progress/*/*"))
    assert job.run() == 0, "a complete job needs no engine"
    assert len(job.heartbeats()) == 1


def test_two_workers_share_the_shards(make_job: MakeJob) -> None:
    job = make_job(rows=80, step=0.02)
    first, second = job.start(), job.start()
    assert (first.wait(WAIT), second.wait(WAIT)) == (0, 0)
    job.check()
    workers = {job.folder.read_footer(shard).worker for shard in job.folder.committed()}
    assert len(workers) == 2
    helpers = _check_only_helpers_repeat(job)
    assert helpers or all(record.bill.waste == 0 for record in job.heartbeats())


def test_an_idle_worker_helps_with_the_last_shard(make_job: MakeJob) -> None:
    job = make_job(rows=600, shard_rows=600, step=0.1, tokens=80)
    first, second = job.start(), job.start()
    assert (first.wait(WAIT), second.wait(WAIT)) == (0, 0)
    table = job.check()
    assert list(Path(job.uri).glob("_batchinfer/claims/00000/helper-0001.json"))
    [shard] = job.folder.committed()
    charged = job.folder.read_footer(shard).nanoseconds
    assert len(charged) == 2 and min(charged.values()) > 0.1 * max(charged.values())
    # Each of them runs 256 rows at a time: what both began before either could tell is less than that.
    again = sum(job.decoded().values()) - sum(table["completion_tokens"].to_pylist())
    assert again < 256 * 80
    assert not list(Path(job.uri).glob("_batchinfer/progress/*/*"))


@pytest.mark.chaos
def test_one_of_two_killed_in_the_middle(make_job: MakeJob) -> None:
    job = make_job(rows=60, step=0.1, tokens=20)
    first, second = job.start(), job.start()
    until(lambda: list(Path(job.uri).glob("_batchinfer/progress/*/*")), "progress")
    first.kill()
    assert second.wait(WAIT) == 0
    job.check()


@pytest.mark.chaos
@pytest.mark.parametrize("server", ["s3_moto", "s3_seaweed"])
def test_one_of_two_killed_on_a_bucket(
    server: str, make_job: MakeJob, request: pytest.FixtureRequest
) -> None:
    bucket = request.getfixturevalue(server)
    source = f"{bucket.uri}/in/data.parquet"
    table = pa.table({"id": [f"id {row}" for row in range(40)], "text": ["x"] * 40})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=10)
    open_store(f"{bucket.uri}/in").put("data.parquet", sink.getvalue().to_pybytes())
    job = make_job(source=source, step=0.1, tokens=20, output={"uri": f"{bucket.uri}/out"})
    first, second = job.start(), job.start()
    shards = [ShardName(0, index, job.record.shards) for index in range(job.record.shards)]
    until(lambda: any(job.folder.list_progress(shard) for shard in shards), "progress")
    first.kill()
    assert second.wait(WAIT) == 0
    job.check()


@pytest.mark.chaos
def test_all_killed_and_started_again(make_job: MakeJob) -> None:
    job = make_job(rows=30, step=0.05, tokens=40)
    first = job.start()
    until(lambda: list(Path(job.uri).glob("_batchinfer/progress/*/*.inflight.arrow")), "progress")
    until(lambda: len(job.decoded()) > 300, "tokens")
    children = [int(pid) for pid in _children(first.pid)]
    assert children
    first.kill()
    until(lambda: not any(alive(pid) for pid in children), "the engine to die with its supervisor")
    before = job.decoded()
    assert job.run() == 0
    table = job.check()
    # What was saved before the kill is not decoded again: at most one checkpoint's tokens are.
    again = sum(count - 1 for count in job.decoded().values())
    assert again < sum(before.values())
    total = sum(table["completion_tokens"].to_pylist())
    assert len(job.decoded()) == total
    [dead] = [record for record in job.heartbeats() if record.exit_code is None]
    assert dead.bill.total > 0


@pytest.mark.chaos
def test_sigterm_saves_every_token_in_flight(make_job: MakeJob) -> None:
    job = make_job(rows=30, step=0.05, tokens=60)
    first = job.start(BATCHINFER_PACE=json.dumps({"lease": 60.0, "flush": 3600.0}))
    until(lambda: len(job.decoded()) > 100, "tokens")
    asked = time.monotonic()
    first.terminate()
    assert first.wait(WAIT) == 75
    assert time.monotonic() - asked < 25
    claims = job.folder.list_claims()
    shards = [ShardName(0, int(label), job.record.shards) for label in claims]
    open_shards = [shard for shard in shards if shard not in job.folder.committed()]
    assert open_shards
    assert all(job.folder.read_claim(shard, 1).released for shard in open_shards)
    [record] = job.heartbeats()
    assert (record.state, record.exit_code) == ("left", 75)
    # With a lease of a minute the next worker can go on at once only because it was released.
    assert job.run(BATCHINFER_PACE=json.dumps({"lease": 60.0})) == 0
    job.check()
    assert max(job.decoded().values()) == 1, "a token was decoded twice"


def test_an_engine_that_dies_is_started_again(make_job: MakeJob) -> None:
    job = make_job(rows=30, step=0.02, tokens=20)
    trigger = job.tmp / "die"
    process = job.start(FAKE_DIE=str(trigger))
    until(lambda: len(job.decoded()) > 30, "tokens")
    trigger.touch()
    assert process.wait(WAIT) == 0
    job.check()
    assert not trigger.exists()


@pytest.mark.parametrize(
    ("word", "code", "rows", "pace"),
    [
        ("deadly", "engine_crash", 60, {"lease": 4.0, "flush": 0.5}),
        ("endless", "engine_stall", 4, {"lease": 1.0, "flush": 0.5, "stall": 0.6}),
    ],
)
def test_the_one_row_that_engines_die_of_is_condemned(
    word: str, code: str, rows: int, pace: dict[str, float], make_job: MakeJob, tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    poison = rows * 2 // 3
    lines = [{"id": f"id {row}", "text": word if row == poison else f"row {row}"} for row in range(rows)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = make_job(source=source, shard_rows=rows // 2)
    process = job.start(BATCHINFER_PACE=json.dumps(pace))
    _, errors = process.communicate(timeout=WAIT)
    assert process.returncode == 0
    job.check(failed={poison: code})
    deaths = errors.count(b"starting it again")
    assert 3 <= deaths <= math.ceil(math.log2(rows)) + 3
    [shard] = [shard for shard in job.folder.committed() if job.folder.read_footer(shard).failed_rows]
    [failure] = job.folder.read_failures(shard, job.folder.read_footer(shard).failures or "")
    assert failure.attempts == 3 and json.loads(failure.input or "")["text"] == word
    reason = "exit code 1" if word == "deadly" else "no step"
    assert reason in failure.message


def test_an_engine_that_always_dies_ends_the_worker(make_job: MakeJob) -> None:
    job = make_job()
    broken = job.tmp / "broken.py"
    broken.write_text("def make(config):\n    raise RuntimeError('no such device')\n")
    process = job.start(BATCHINFER_ENGINE_FACTORY=f"{broken}:make")
    assert process.wait(WAIT) == 70
    [record] = job.heartbeats()
    assert record.state == "failed" and "no such device" in record.message
    assert record.bill.total == record.bill.startup


def test_an_engine_for_which_the_job_is_wrong_ends_it_for_good(make_job: MakeJob) -> None:
    job = make_job()
    wrong = job.tmp / "wrong.py"
    wrong.write_text(
        "from batchinfer.engine.types import ModelError\n"
        "def make(config):\n    raise ModelError('there is no model here')\n"
    )
    process = job.start(BATCHINFER_ENGINE_FACTORY=f"{wrong}:make")
    _, errors = process.communicate(timeout=WAIT)
    assert process.returncode == 78
    assert b"there is no model here" in errors and b"Traceback" not in errors


def test_a_cancel_is_obeyed_and_a_cancelled_job_is_not_begun(make_job: MakeJob) -> None:
    job = make_job(rows=30, step=0.1, tokens=200)
    process = job.start()
    until(lambda: len(job.decoded()) > 10, "tokens")
    job.folder.append_control(lambda control: replace(control, state="cancel"))
    assert process.wait(WAIT) == 77
    assert job.run() == 77
    assert len(job.heartbeats()) == 1
    job.folder.append_control(lambda control: replace(control, state="run"))
    assert job.run(FAKE_STEP="0") == 0
    job.check()
    assert max(job.decoded().values()) == 1


def test_no_job_and_a_changed_input_are_job_errors(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job()
    process = subprocess.run(
        python_command("batchinfer", "worker", str(tmp_path / "nowhere")), capture_output=True, timeout=WAIT
    )
    assert process.returncode == 78
    assert b"there is no job at" in process.stderr and b"Traceback" not in process.stderr
    source = tmp_path / "in.parquet"
    pq.write_table(pa.table({"id": ["x"], "text": ["y"]}), source)
    worker = job.start()
    _, errors = worker.communicate(timeout=WAIT)
    assert worker.returncode == 78
    assert str(source).encode() in errors and b"Traceback" not in errors


def test_rows_that_fail_go_to_the_failures_with_their_input(make_job: MakeJob, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    lines = [json.dumps({"id": f"id {row}", "text": f"row {row}"}) for row in range(20)]
    lines[3] = '{"id": "id 3", "text": '
    lines[7] = json.dumps({"id": "id 7", "text": "this is too long"})
    lines[11] = json.dumps({"id": "id 11", "text": None})
    source.write_text("\n".join(lines) + "\n")
    job = make_job(source=source, prompt="{{ text.strip() }}")
    assert job.run() == 0
    job.check(failed={3: "bad_line", 7: "too_long", 11: "render_error"})
    failures = {}
    for shard in job.folder.committed():
        nonce = job.folder.read_footer(shard).failures
        if nonce is not None:
            failures |= {row.row_index: row for row in job.folder.read_failures(shard, nonce)}
    assert failures[3].input == lines[3]
    assert json.loads(failures[7].input or "") == {"id": "id 7", "text": "this is too long"}


@pytest.mark.parametrize(
    ("bad", "limits"),
    [
        (lambda row: row % 5 == 0, {"max_share": 0.1, "after_rows": 40}),
        (lambda row: True, {"max_share": 0.9, "after_rows": 10_000}),
    ],
)
def test_a_job_stops_where_too_many_rows_fail_and_goes_on_when_more_may(
    bad: Callable[[int], bool], limits: dict[str, Any], make_job: MakeJob, tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    lines = [{"id": f"id {row}", "text": None if bad(row) else f"row {row}"} for row in range(400)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = make_job(
        source=source, shard_rows=50, prompt="{{ text.strip() }}", failures=limits, step=0.1, tokens=60
    )
    first, second = job.start(), job.start()
    _, errors = first.communicate(timeout=WAIT)
    assert (first.returncode, second.wait(WAIT)) == (77, 77)
    assert b"failures.max_share" in errors and b"render_error" in errors and b"such as row" in errors
    assert b"Traceback" not in errors
    assert len(job.folder.committed()) < job.record.shards
    assert "render_error" in job.folder.read_control().message
    assert {record.exit_code for record in job.heartbeats()} == {77}
    assert job.run() == 77, "it stays stopped until it is submitted again"
    more = {"max_share": 1.0, "after_rows": 1}
    job.folder.append_control(lambda control: replace(control, state="run", message="", failures=more))
    assert job.run(FAKE_STEP="0") == 0
    job.check(failed={row: "render_error" for row in range(400) if bad(row)})
    assert max(job.decoded().values(), default=1) == 1


def test_a_few_failures_stop_nothing(make_job: MakeJob, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    lines = [{"id": f"id {row}", "text": None if row < 30 else f"row {row}"} for row in range(200)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    limits = {"max_share": 0.2, "after_rows": 200}
    job = make_job(source=source, shard_rows=100, prompt="{{ text.strip() }}", failures=limits)
    assert job.run() == 0
    job.check(failed=dict.fromkeys(range(30), "render_error"))


def test_a_column_may_be_for_the_prompt_alone(make_job: MakeJob, tmp_path: Path) -> None:
    source = tmp_path / "in.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "id": ["id 0", "id 1"]}), source)
    job = make_job(input={"uri": str(source), "columns": ["id"]}, source=source)
    assert job.run() == 0
    assert job.check().column_names[:2] == ["id", "row_index"]


def test_gpus_are_shared_out_one_group_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def given(count: int, gpus: int) -> list[str | None]:
        return [share.get("CUDA_VISIBLE_DEVICES") for share in local.worker_shares(count, gpus, None)]

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert given(4, 1) == ["4", "5", "6", "7"]
    assert given(2, 2) == ["4,5", "6,7"]
    assert given(6, 1) == ["4", "5", "6", "7", "4", "5"]
    assert [share["BATCHINFER_MEMORY_SHARE"] for share in local.worker_shares(6, 1, None)] == ["0.4"] * 6
    assert given(2, 0) == [None, None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    shares = local.worker_shares(cores, 1, None)
    assert [share["OMP_NUM_THREADS"] for share in shares] == ["1"] * cores
    assert local.worker_shares(1, 1, 3.0)[0]["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    ("stop", "error", "code"),
    [
        ("done", None, 0),
        ("drain", None, 75),
        ("cancel", None, 77),
        ("error", TransientStorageError("down"), 75),
        ("error", StorageError("denied"), 78),
        ("error", JobError("wrong"), 78),
        ("error", JobStopped("too many"), 77),
        ("error", EngineGone("gone"), 70),
        ("error", ValueError("a bug"), 70),
    ],
)
def test_exit_codes_are_those_of_the_contract(stop: Any, error: Exception | None, code: int) -> None:
    found, message = outcome(stop, error)
    assert found == code
    assert error is None or str(error) in message


def test_local_workers_divide_the_machine_and_stop_when_asked(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(rows=60, step=0.1, tokens=100)
    for name, value in job.environment.items():
        monkeypatch.setenv(name, value)
    with start_workers(job.uri, 2, 1, {}, attached=True) as workers:
        until(lambda: len(job.decoded()) > 20, "tokens")
        assert workers.running()
    assert not workers.running()
    assert [process.returncode for process in workers.processes] == [75, 75]
    assert {record.index for record in job.heartbeats()} == {0, 1}
    monkeypatch.setenv("FAKE_STEP", "0")
    detached = start_workers(job.uri, 2, 1, {}, attached=False)
    until(lambda: not detached.running(), "the workers")
    job.check()
    _check_only_helpers_repeat(job)


@pytest.mark.parametrize("gpus", [0, 1])
def test_where_all_workers_are_there_none_is_started(make_job: MakeJob, gpus: int) -> None:
    with start_workers(make_job().uri, 0, gpus, {}, attached=True) as workers:
        assert workers.count == 0 and not workers.running()


@pytest.mark.chaos
def test_attached_workers_leave_with_a_submit_that_is_killed(make_job: MakeJob) -> None:
    job = make_job(rows=30, step=0.1, tokens=200)
    code = (
        "import sys, time\n"
        "from batchinfer.jobs.backends.local import start_workers\n"
        f"start_workers({job.uri!r}, 1, 1, {{}}, attached=True)\n"
        "time.sleep(600)\n"
    )
    submit = subprocess.Popen([sys.executable, "-P", "-c", code], env=job.environment)
    job.workers.append(submit)
    until(lambda: len(job.decoded()) > 10, "tokens")
    [record] = job.heartbeats()
    submit.send_signal(signal.SIGKILL)
    until(lambda: not alive(record.pid), "the worker to leave")
    assert job.heartbeats()[0].exit_code == 75


@pytest.mark.slow
def test_a_million_rows_stream_through_in_bounded_memory(make_job: MakeJob, tmp_path: Path) -> None:
    rows, shard_rows = 1_000_000, 20_000
    source = tmp_path / "in.parquet"
    schema = pa.schema([("id", pa.string()), ("text", pa.string())])
    with pq.ParquetWriter(source, schema) as writer:
        for start in range(0, rows, shard_rows):
            some = range(start, start + shard_rows)
            columns = {
                "id": [f"id {row}" for row in some],
                "text": [f"row {row} " + "x" * 200 for row in some],
            }
            writer.write_table(pa.table(columns, schema=schema))
    job = make_job(source=source, shard_rows=shard_rows, tokens=1, output={"uri": str(tmp_path / "out")})
    environment = {"BATCHINFER_PACE": json.dumps({"flush": 5.0})}
    del job.environment["FAKE_LOG"]
    process = job.start(**environment)
    peaks: list[int] = []

    def sample() -> bool:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except FileNotFoundError:
            return True
        peaks.extend(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
        return process.poll() is not None

    until(sample, "a million rows", 280)
    assert process.wait() == 0
    parts = sorted(Path(job.uri).glob("*.parquet"))
    assert sum(pq.read_metadata(part).num_rows for part in parts) == rows
    # After the first shards the memory no longer grows: what is held is two shards, not the data set.
    early, late = max(peaks[: len(peaks) // 4]), max(peaks[len(peaks) // 2 :])
    assert late < 1.5 * early + 50_000, f"{early} kB early, {late} kB late"
    assert late < 700_000


def _check_only_helpers_repeat(job: JobOnDisk) -> set[int]:
    """Where one helped the other at the end both may have begun a row; nothing else is decoded twice.
    Returns the shards of ten rows that had a helper."""
    _, leases = job.folder.list_leases("")
    helped = {int(label) for label in leases}
    assert {int(key.split()[0]) // 10 for key, count in job.decoded().items() if count > 1} <= helped
    return helped


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
