"""A frame as a job's input: kept once in the job's folder, the same again resumes, another is refused."""

from __future__ import annotations

import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import batchinfer.jobs.plan as planning
import batchinfer.jobs.submit as submitting
from batchinfer.connectors.readers import discover, read_batches, scan_input
from batchinfer.connectors.types import BadRow, StorageError
from batchinfer.jobs.folder import JobFolder
from batchinfer.jobs.frames import as_table, frame_file
from batchinfer.jobs.inspection import InspectedModel
from batchinfer.jobs.job import Job
from batchinfer.jobs.types import JobError


class Words(InspectedModel):
    """A model whose tokens are words."""

    def encode(self, prompts: Any) -> list[Any]:
        return [np.ones(len(str(prompt).split()), np.int32) for prompt in prompts]


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A spec without an input; no worker is started."""
    words = Words("m", "fingerprint", 10**6, 100, None)
    monkeypatch.setattr(planning, "inspect_model", lambda spec: words)
    monkeypatch.setattr(submitting, "inspect_model", lambda spec: words)
    monkeypatch.setattr(submitting, "begin_work", lambda submitted, attached: None)
    return {
        "model": "m",
        "prompt": "{{ text }}",
        "output": {"uri": str(tmp_path / "out")},
        "shards": {"rows": 700},
    }


ROWS = {"id": list(range(3000)), "text": [None if row % 7 == 0 else f"row {row}" for row in range(3000)]}
FRAMES: dict[str, Any] = {
    "table": pa.table(ROWS),
    "batch": pa.table(ROWS).combine_chunks().to_batches()[0],
    "pandas": pd.DataFrame(ROWS, index=range(5, 3005)),
    "polars": pl.DataFrame(ROWS),
}


def rows_of(job: Job) -> list[dict[str, Any]]:
    """The input as the job's workers read it."""
    folder = JobFolder(submitting.open_store(job.uri))
    found: list[dict[str, Any]] = []
    for shard in folder.read_plan(job.record.plan):
        for split in shard.splits:
            for batch in read_batches(split, job.record.input_schema):
                assert not batch.bad and list(batch.indices) == list(
                    range(len(found), len(found) + batch.batch.num_rows)
                )
                found += batch.batch.to_pylist()
    return found


@pytest.mark.parametrize("kind", FRAMES)
def test_a_frame_is_a_jobs_input_and_stays_in_its_folder(
    kind: str, spec: dict[str, Any], tmp_path: Path
) -> None:
    job = submitting.submit(spec, input=FRAMES[kind])
    assert (job.record.rows, job.record.shards) == (3000, 5)
    assert rows_of(job) == pa.table(ROWS).to_pylist()
    [uri] = job.record.spec["input"]["uri"]
    assert uri.startswith(f"{tmp_path}/out/") and uri.endswith(".arrow")
    assert not list(Path(job.uri).rglob("*.parquet")), "readers of the folder find no input"
    before = {path: path.stat().st_mtime_ns for path in Path(job.uri).rglob("*") if path.is_file()}
    again = submitting.submit(spec, input=FRAMES[kind].__copy__() if kind == "polars" else FRAMES[kind])
    assert again.record == job.record
    assert {path: path.stat().st_mtime_ns for path in Path(job.uri).rglob("*") if path.is_file()} == before


def test_another_frame_is_another_job(spec: dict[str, Any]) -> None:
    job = submitting.submit(spec, input=FRAMES["table"])
    files = sorted(Path(job.uri).rglob("*"))
    changed = FRAMES["table"].set_column(0, "id", pa.array([*range(2999), 0]))
    with pytest.raises(JobError, match=r"holds another job: there input\.uri is"):
        submitting.submit(spec, input=changed)
    assert sorted(Path(job.uri).rglob("*")) == files, "nothing of it is left there"
    with pytest.raises(JobError, match="holds another job"):
        submitting.submit({**spec, "input": {"uri": "other.parquet"}})


@given(st.data())
def test_equal_frames_have_equal_digests_and_others_do_not(data: st.DataObject) -> None:
    values = data.draw(st.lists(st.none() | st.integers(0, 3), min_size=1, max_size=12))
    table = pa.table(
        {
            "n": pa.array(values, pa.int32()),
            "s": [None if value is None else str(value) for value in values],
            "d": pa.array([str(value) for value in values]).dictionary_encode(),
            "l": [None if value is None else [value] * value for value in values],
        }
    )
    cut = data.draw(st.integers(0, len(values)))
    apart = pa.concat_tables([table.slice(0, cut), table.slice(cut)])
    padded = pa.concat_tables([table, table]).slice(len(values))
    with frame_file(table) as first, frame_file(apart) as second, frame_file(padded) as third:
        assert first.digest == second.digest == third.digest
        assert pa.ipc.open_file(str(first.path)).read_all().equals(table)
    other = data.draw(st.lists(st.none() | st.integers(0, 3), min_size=1, max_size=12))
    with frame_file(pa.table({"n": values})) as first, frame_file(pa.table({"n": other})) as second:
        assert (first.digest == second.digest) == (
            values == other or ({*values} == {*other} == {None} and len(values) == len(other))
        )


def test_what_lies_beneath_nulls_makes_no_other_frame() -> None:
    mask = np.array([False, True])
    digests = set()
    for hidden in (7, 8):
        with frame_file(pa.table({"n": pa.array(np.array([1, hidden]), mask=mask)})) as file:
            digests.add(file.digest)
    assert len(digests) == 1


TYPES = pa.table(
    {
        "small": pa.array([1, None], pa.int8()),
        "price": pa.array([Decimal("1.20"), None], pa.decimal128(10, 2)),
        "at": pa.array([datetime.datetime(2026, 1, 1), None], pa.timestamp("us", "Europe/Berlin")),
        "kind": pa.array(["a", "b"]).dictionary_encode(),
        "tags": pa.array([[{"k": 1}], None], pa.list_(pa.struct([("k", pa.int16())]))),
        "text": pa.array(["x", "y"], pa.large_string()),
        "raw": pa.array([b"\x00", None], pa.binary()),
    }
)


def test_types_pass_through_as_they_are(spec: dict[str, Any], tmp_path: Path) -> None:
    job = submitting.submit(spec, input=TYPES.replace_schema_metadata({"pandas": "x"}))
    assert job.record.input_schema.equals(TYPES.schema, check_metadata=True)
    assert rows_of(job) == TYPES.to_pylist()
    assert list(job.record.schema)[: TYPES.num_columns] == list(TYPES.schema)
    pq.write_table(TYPES, tmp_path / "kept.parquet")  # as answers are
    assert pq.read_table(tmp_path / "kept.parquet").equals(TYPES)
    assert as_table(pd.DataFrame({"c": pd.Categorical(["u", "v"])})).schema.field(
        "c"
    ).type == pa.dictionary(pa.int8(), pa.large_string())


def test_a_part_of_a_kept_frame_is_read_by_its_batches(tmp_path: Path) -> None:
    with frame_file(FRAMES["table"]) as file:
        (tmp_path / "in.arrow").write_bytes(file.path.read_bytes())
    scan = scan_input(discover([str(tmp_path / "in.arrow")]), None, None)
    assert scan.rows == 3000
    for rows in (1, 100, 1024, 1500, 5000):
        splits = scan.splits(rows)
        assert max(split.rows for split in splits) <= rows
        if rows == 1:
            splits = splits[1020:1030]
        for split in splits:
            found = list(read_batches(split, scan.schema, ["text"]))
            assert [index for batch in found for index in batch.indices] == list(
                range(split.start, split.stop)
            )
            texts = [text for batch in found for text in batch.batch["text"].to_pylist()]
            assert texts == ROWS["text"][split.start : split.stop]
        counted = list(read_batches(splits[0], scan.schema, []))
        assert sum(len(batch.indices) for batch in counted) == splits[0].rows


def write_batches(path: Path, sizes: list[int], **columns: pa.DataType) -> None:
    schema = pa.schema(columns or {"n": pa.int64()})
    with pa.ipc.new_file(path, schema) as writer:
        for size in sizes:
            arrays = [pa.array(range(size)).cast(kind) for kind in schema.types]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))


def test_arrow_files_of_different_types_become_one_input(tmp_path: Path) -> None:
    write_batches(tmp_path / "a.arrow", [3, 2], n=pa.int8())
    write_batches(tmp_path / "b.feather", [2], n=pa.int64(), more=pa.string())
    scan = scan_input(discover([str(tmp_path)]), None, None)
    assert (scan.rows, scan.schema.field("n").type) == (7, pa.int64())
    rows = [
        row
        for split in scan.splits(100)
        for part in read_batches(split, scan.schema)
        for row in part.batch.to_pylist()
    ]
    assert [row["n"] for row in rows] == [0, 1, 2, 0, 1, 0, 1]
    assert [row["more"] for row in rows] == [None] * 5 + ["0", "1"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([3, 2, 3], "its record batches have different numbers of rows"),
        ([2, 3], "its record batches have different numbers of rows"),
        (b"ARROW1 and nothing", "no whole Arrow IPC file"),
    ],
)
def test_arrow_files_that_can_not_be_read_by_ranges_are_refused(
    content: Any, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "in.arrow"
    path.write_bytes(content) if isinstance(content, bytes) else write_batches(path, content)
    with pytest.raises(StorageError, match=f"{path}.*{words}"):
        scan_input(discover([str(path)]), None, None)


def test_a_damaged_batch_costs_its_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with frame_file(FRAMES["table"]) as file:
        data = bytearray(file.path.read_bytes())
    path = tmp_path / "in.arrow"
    path.write_bytes(data)
    scan = scan_input(discover([str(path)]), None, None)
    reader = pa.ipc.open_file(pa.BufferReader(bytes(data)))
    assert reader.num_record_batches == 3
    place = data.index(b"\x28\xb5\x2f\xfd", len(data) // 2)  # a compressed buffer of the second batch
    data[place : place + 4] = b"\0\0\0\0"
    path.write_bytes(data)
    monkeypatch.setattr("batchinfer.connectors.readers._check_unchanged", lambda file, opened: None)
    parts = [part for split in scan.splits(5000) for part in read_batches(split, scan.schema)]
    bad = [row for part in parts for row in part.bad]
    assert 0 < len(bad) <= 1024 and all(isinstance(row, BadRow) and row.code == "unreadable" for row in bad)
    assert sorted([index for part in parts for index in part.indices] + [row.index for row in bad]) == list(
        range(3000)
    )


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    ([1], {}, "the input is a builtins.list, but it must be a pyarrow table"),
    (pl.DataFrame(ROWS).lazy(), {}, "polars.LazyFrame.*collect a lazy one"),
    (pd.DataFrame({"o": [1, "x"]}), {}, "pandas.DataFrame can't be made an Arrow table"),
    (pa.table({"text": ["x"]}), {"input": {"uri": "x"}}, "input.uri is given, but the input is a frame"),
    (pa.table({"text": ["x"]}), {"input": {"format": "csv"}}, "input.format is given, but the input is"),
    (pa.table({"text": ["x"]}), {"input": "x"}, "input is 'x', but it must be a mapping"),
    (
        pa.table({"text": pa.array([(1, 2, 3)], pa.month_day_nano_interval())}),
        {},
        "text has the type .*Parquet",
    ),
    (pa.table({"text": pa.array([], pa.string())}), {}, "has no rows"),
    (pa.table({"other": ["x"]}), {}, "names the column text"),
    (pa.table([["x"], ["y"]], ["text", "text"]), {}, "text"),
]


@pytest.mark.parametrize(("frame", "more", "words"), REFUSED)
def test_what_is_no_input_is_refused(
    frame: Any, more: dict[str, Any], words: str, spec: dict[str, Any]
) -> None:
    with pytest.raises((JobError, StorageError), match=words):
        submitting.submit({**spec, **more}, input=frame)


def test_columns_may_be_chosen(spec: dict[str, Any]) -> None:
    job = submitting.submit({**spec, "input": {"columns": ["id"]}}, input=FRAMES["polars"])
    assert job.record.schema.names[:2] == ["id", "row_index"]
