"""Retry rounds: which rows they hold, how those are read again, and what every reader sees of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.connectors.readers import discover, read_batches, scan_input
from batchinfer.connectors.storage import open_store
from batchinfer.connectors.types import InputFile, Split, StorageError
from batchinfer.engine.types import Completion, SamplingParams
from batchinfer.jobs.columns import output_schema
from batchinfer.jobs.commit import commit
from batchinfer.jobs.cost import settle
from batchinfer.jobs.folder import JobFolder, ShardName
from batchinfer.jobs.job import Job
from batchinfer.jobs.progress import ProgressWriter
from batchinfer.jobs.records import Claim, Failure, JobRecord
from batchinfer.jobs.retry import PERMANENT, begin_round, current_failures, is_complete, last_round
from batchinfer.jobs.rounds import FailedRow, RoundPlan, cut_round, in_order, shards_of
from batchinfer.jobs.samples import Charge, Finished
from batchinfer.jobs.spec import parse_spec
from batchinfer.jobs.status import StatusReader
from batchinfer.jobs.types import JobError, Shard

ROWS, SHARDS = 40, 4
ID = pa.schema([("id", pa.int64())])


class Retried:
    """A job of 4 shards of 10 rows with n samples, whose parts are written by hand."""

    def __init__(self, path: Path, n: int) -> None:
        self.n = n
        self.uri = str(path / "out")
        spec = parse_spec({"model": "m", "input": {"uri": "x"}, "prompt": "x", "output": {"uri": self.uri}})
        values = spec.model_dump(mode="json")
        values["sampling"]["n"] = n
        self.folder = JobFolder(open_store(self.uri))
        self.schema = output_schema(ID, SamplingParams(n=n), tokens=False)
        file = InputFile("sim://input", 1, "", "parquet", "none")
        self.first = [
            Shard(index, (Split(file, "rows", index * 10, index * 10 + 10, index * 10, 10),), 100)
            for index in range(SHARDS)
        ]
        record = JobRecord(
            spec=values,
            schema=self.schema,
            input_schema=ID,
            fingerprint="f",
            plan=self.folder.write_plan(self.first),
            shards=SHARDS,
            rows=ROWS,
            created="2026-01-01T00:00:00+00:00",
            nonce="n",
        )
        assert self.folder.create_job(record)
        self.record = record

    def finished(self, row: int, sample: int = 0) -> Finished:
        completion = Completion(
            index=row,
            sample_index=sample,
            text=str(row),
            token_ids=(1,),
            finish_reason="stop",
            prompt_tokens=5,
            cached_tokens=0,
            prefill_ns=100,
            token_ns=(10,),
        )
        return Finished(completion, (Charge("a", 3.6, 100, 10, 1),))

    def commit(self, name: ShardName, shard: Shard, failed: dict[int, str]) -> None:
        rows = [row for row in range(ROWS) if shard.has(row) and row not in failed]
        samples = [self.finished(row, sample) for row in rows for sample in range(self.n)]
        passed = pa.table({"id": [row for row in rows for _ in range(self.n)]}, schema=ID)
        failures = {
            row: Failure(row, code, "why", 1 + shard.attempts_before(row)) for row, code in failed.items()
        }
        assert commit(self.folder, name, "a", self.schema, passed, samples, failures, lambda: None)

    def commit_last(self, failed: dict[int, str], shards: slice = slice(None)) -> None:
        """Commit the shards of the last round."""
        for name, shard in list(last_round(self.folder, self.first).items())[shards]:
            mine = {row: code for row, code in failed.items() if shard.has(row)}
            self.commit(name, shard, mine)

    def begin(self, *codes: str) -> tuple[int, RoundPlan]:
        return begin_round(self.folder, self.record, codes)

    def failed(self) -> dict[int, str]:
        return {row: failure.code for row, (_, failure) in current_failures(self.folder).items()}


@pytest.fixture(params=[1, 2])
def job(tmp_path: Path, request: pytest.FixtureRequest) -> Retried:
    return Retried(tmp_path, request.param)


FAILED = {3: "poison", 4: "too_long", 17: "poison", 39: "bad_line"}


def test_a_row_of_a_later_round_is_answered_or_failed_there_and_once(job: Retried) -> None:
    job.commit_last(FAILED)
    number, plan = job.begin()
    assert (number, plan.rows) == (1, 2)
    assert [row.part for shard in plan.shards for row in shard] == [
        "part-00000-of-00004.parquet",
        "part-00001-of-00004.parquet",
    ]
    assert not is_complete(job.folder, job.record)
    job.commit_last({17: "stuck"})
    assert is_complete(job.folder, job.record)
    assert job.failed() == {4: "too_long", 17: "stuck", 39: "bad_line"}
    opened = Job(job.uri)
    expected = [row for row in range(ROWS) if row not in job.failed() for _ in range(job.n)]
    batches = pa.Table.from_batches(opened.batches())
    assert batches["row_index"].to_pylist() == batches["id"].to_pylist() == expected
    assert opened.table()["row_index"].to_pylist() == expected
    assert opened.table(["id"]).schema.names == ["id"]
    assert opened.table(["id"])["id"].to_pylist() == expected
    parts = pq.read_table(job.uri, schema=job.schema)
    assert sorted(parts["row_index"].to_pylist()) == expected
    failures = opened.failures().to_pylist()
    assert [(row["row_index"], row["attempts"]) for row in failures] == [(4, 1), (17, 2), (39, 1)]
    settlement = settle([], [job.folder.read_footer(shard) for shard in job.folder.committed()])
    assert (settlement.rows // job.n, settlement.failed_rows) == (37, 3)
    job.begin("stuck", "bad_line")
    job.commit_last({})
    assert job.failed() == {4: "too_long"}
    assert len(list(Path(job.uri).glob("part-r002-*"))) == 1


def test_the_status_follows_a_round(job: Retried) -> None:
    def status() -> dict[str, Any]:
        found = StatusReader(job.folder).read()
        return {
            name: getattr(found, name)
            for name in ("state", "rows_answered", "rows_failed", "rows_retried", "round", "failures")
        } | {"shards": (found.shards_done, found.shards)}

    failed = dict.fromkeys(range(20), "poison") | {30: "too_long"}
    job.commit_last(failed)
    before = {"rows_answered": 19, "rows_failed": 21, "failures": {"poison": 20, "too_long": 1}}
    assert status() == before | {"state": "done", "rows_retried": 0, "round": 0, "shards": (4, 4)}
    job.begin()
    assert status() == before | {"state": "stalled", "rows_retried": 20, "round": 1, "shards": (4, 6)}
    names = list(last_round(job.folder, job.first))
    assert [name.part for name in names] == [f"part-r001-0000{index}-of-00002.parquet" for index in (0, 1)]
    job.folder.create_claim(names[0], 1, Claim(worker="a", nonce="a"))
    saved = [job.finished(2, sample) for sample in range(job.n)]
    ProgressWriter(job.folder, names[0], "a").write(saved, [Failure(5, "stuck", "why", 2)], {})
    now = {"rows_answered": 20, "rows_failed": 20, "rows_retried": 18, "round": 1, "shards": (4, 6)}
    assert status() == now | {"state": "stalled", "failures": {"poison": 18, "stuck": 1, "too_long": 1}}
    job.commit_last({5: "stuck"}, slice(1))
    assert status()["rows_retried"] == 10
    job.commit_last({}, slice(1, None))
    end = {"rows_answered": 38, "rows_failed": 2, "rows_retried": 0, "round": 1, "shards": (6, 6)}
    assert status() == end | {"state": "done", "failures": {"stuck": 1, "too_long": 1}}


REFUSED: dict[str, tuple[Callable[[Retried], object], tuple[str, ...], list[str]]] = {
    "not complete": (lambda job: job.commit_last({}, slice(3)), (), ["not complete", "submit it again"]),
    "nothing failed": (lambda job: job.commit_last({}), (), ["nothing to retry"]),
    "no such code": (
        lambda job: job.commit_last(FAILED),
        ("poisson",),
        ["poisson", "bad_line 1, poison 2, too_long 1"],
    ),
    "only permanent ones": (
        lambda job: job.commit_last({4: "too_long"}),
        (),
        ["too_long 1", "come again", "--code"],
    ),
    "the last round is not complete": (
        lambda job: (job.commit_last(FAILED), job.begin()),
        ("too_long",),
        ["not complete"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_retried_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    prepare, codes, words = REFUSED[case]
    job = Retried(tmp_path, 1)
    prepare(job)
    rounds = job.folder.list_rounds()
    with pytest.raises(JobError) as refused:
        job.begin(*codes)
    for word in [*words, job.folder.uri]:
        assert word in str(refused.value)
    assert job.folder.list_rounds() == rounds


def test_of_two_retries_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Retried(tmp_path, 1)
    job.commit_last(FAILED)
    create = JobFolder.create_round

    def late(self: JobFolder, number: int, plan: RoundPlan) -> bool:
        monkeypatch.undo()
        job.begin("poison")
        return create(self, number, plan)

    monkeypatch.setattr(JobFolder, "create_round", late)
    with pytest.raises(JobError, match="somebody else has just begun retry round 1"):
        job.begin("too_long")
    plan = job.folder.read_round(1)
    assert plan is not None
    assert [row.row_index for shard in plan.shards for row in shard] == [3, 17]


def test_permanent_codes_are_retried_when_they_are_named(tmp_path: Path) -> None:
    job = Retried(tmp_path, 1)
    job.commit_last(dict(enumerate(sorted(PERMANENT))))
    with pytest.raises(JobError):
        job.begin()
    _, plan = job.begin(*PERMANENT)
    assert plan.rows == len(PERMANENT)


rows_of_rounds = st.lists(st.sets(st.integers(0, 60), min_size=1), max_size=4)


@given(rows_of_rounds, st.integers(1, 7))
def test_rounds_are_merged_in_the_order_of_the_input(rounds: list[set[int]], size: int) -> None:
    seen: set[int] = set()
    streams = []
    for rows in rounds:
        mine = sorted(row for row in rows - seen for _ in range(2))
        seen |= rows
        table = pa.table({"row_index": pa.array(mine, pa.int64())})
        streams.append(iter(table.to_batches(max_chunksize=size)))
    merged = [row for batch in in_order(streams) for row in batch["row_index"].to_pylist()]
    assert merged == sorted(row for row in seen for _ in range(2))


failed_rows = st.lists(
    st.tuples(st.integers(0, 99), st.integers(1, 5)), min_size=1, unique_by=lambda item: item[0]
).map(
    lambda rows: [
        FailedRow(row, f"part-{row % 3}", attempts, f"code {row % 5}") for row, attempts in sorted(rows)
    ]
)


@given(failed_rows, st.integers(1, 20))
def test_a_round_survives_its_bytes_and_holds_each_row_once(failed: list[FailedRow], rows: int) -> None:
    plan = cut_round(failed, rows, "nonce")
    assert RoundPlan.from_bytes(plan.to_bytes()) == plan
    assert [row for shard in plan.shards for row in shard] == failed
    assert max(map(len, plan.shards)) <= rows
    assert plan.rows == len(failed)


FORMATS = ("parquet", "jsonl", "jsonl.gz", "csv")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same 100 rows in every format, with a few lines that are bad."""
    import gzip

    folder = tmp_path_factory.mktemp("inputs")
    table = pa.table({"id": list(range(100)), "text": [f"row {row}" for row in range(100)]})
    pq.write_table(table, folder / "in.parquet", row_group_size=30)
    lines = [json.dumps(row) for row in table.to_pylist()]
    for bad in (7, 64):
        lines[bad] = "{"
    (folder / "in.jsonl").write_text("\n".join(lines))
    (folder / "in.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "in.csv").write_text(
        "id,text\n" + "".join(f"{row},row {row}\n" if row not in (7, 64) else "x\n" for row in range(100))
    )
    return {name: folder / f"in.{name}" for name in FORMATS}


@pytest.mark.parametrize("format", FORMATS)
@given(rows=st.sets(st.integers(0, 99), min_size=1))
@settings(max_examples=20, deadline=None)
def test_a_round_reads_just_its_rows(inputs: dict[str, Path], format: str, rows: set[int]) -> None:
    scan = scan_input(discover([str(inputs[format])]), None, 10)
    first = [Shard(index, (split,), 1) for index, split in enumerate(scan.splits(10))]
    everything = [item for shard in first for item in read(shard, scan.schema)]
    assert len(everything) == 100
    plan = cut_round([FailedRow(row, "part", 1, "code") for row in sorted(rows)], 7, "nonce")
    shards = shards_of(plan, first)
    assert [item for shard in shards for item in read(shard, scan.schema)] == [
        everything[row] for row in sorted(rows)
    ]
    assert sum(shard.rows for shard in shards) == len(rows)
    for shard, planned in zip(shards, plan.shards, strict=True):
        assert [row for row in range(100) if shard.has(row)] == [row.row_index for row in planned]


def read(shard: Shard, schema: pa.Schema) -> list[Any]:
    found: list[Any] = []
    for split in shard.splits:
        for part in read_batches(split, schema):
            found += [
                (row.index, dict(row.values)) if hasattr(row, "values") else row for row in part.rows()
            ]
    return found


def test_a_changed_input_is_refused_when_a_round_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"id": 1}\n{"id": 2}\n')
    scan = scan_input(discover([str(path)]), None, 10)
    split = replace(scan.splits(10)[0], only=(1,))
    path.write_text('{"id": 1}\n{"id": 3}\n{"id": 4}\n')
    with pytest.raises(StorageError, match="has changed since"):
        list(read_batches(split, scan.schema))
