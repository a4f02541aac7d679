"""Plans: every row in exactly one shard, in order; estimates; and what is refused before it runs."""

from __future__ import annotations

import gzip
import io
import json
import resource
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import batchinfer.jobs.plan as planning
from batchinfer.connectors.readers import read_split
from batchinfer.connectors.types import StorageError
from batchinfer.jobs.inspection import InspectedModel
from batchinfer.jobs.lengths import exactly
from batchinfer.jobs.plan import FEWEST_ROWS, MOST_ROWS, MOST_SHARDS, Plan, make_plan, plan_values
from batchinfer.jobs.plan_view import plan_lines
from batchinfer.jobs.records import plan_from_bytes, plan_to_bytes
from batchinfer.jobs.spec import JobSpec, parse_spec
from batchinfer.jobs.spec_source import located
from batchinfer.jobs.types import JobError, RowError

CONTEXT = 100


class Words(InspectedModel):
    """A model whose tokens are words, and whose chat template knows only users."""

    def encode(self, prompts: Sequence[Any]) -> list[Any]:
        found: list[Any] = []
        for prompt in prompts:
            if isinstance(prompt, str):
                words = prompt.split()
            elif all(message["role"] == "user" for message in prompt):
                words = [word for message in prompt for word in message["content"].split()]
            else:
                found.append(RowError("chat_template", "only users speak here"))
                continue
            found.append(np.array([zlib.crc32(word.encode()) % 2**31 for word in words], np.int32))
        return found


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    words = Words("m", "fingerprint", 10**6, CONTEXT, None)
    monkeypatch.setattr(planning, "inspect_model", lambda spec: words)


def spec(uri: str | list[str], **fields: Any) -> JobSpec:
    values: dict[str, Any] = {"model": "m", "input": {"uri": uri}, "output": {"uri": "memory://out/job"}}
    if not fields.keys() & {"prompt", "messages", "prompt_column", "messages_column"}:
        values["prompt"] = "{{ text }}"
    return located(parse_spec(values | fields))


def table(rows: int, first: int = 0) -> pa.Table:
    return pa.table(
        {
            "id": pa.array(range(first, first + rows), pa.int64()),
            "text": pa.array([f"row {row}" for row in range(first, first + rows)], pa.string()),
        }
    )


def write(path: Path, rows: pa.Table, row_group: int = 10) -> None:
    """A data set in the format of its name."""
    if path.suffix == ".parquet":
        pq.write_table(rows, path, row_group_size=row_group)
    elif path.suffix == ".csv":
        lines = ["id,text", *(f'{row["id"]},"{row["text"]}"' for row in rows.to_pylist())]
        path.write_text("\n".join(lines) + "\n")
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows.to_pylist()).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def rows_of(plan: Plan) -> Iterator[tuple[int, Any]]:
    for shard in plan.shards:
        for split in shard.splits:
            for row in read_split(split, plan.input_schema):
                yield row.index, row.values["id"]  # type: ignore[union-attr]


@settings(max_examples=40, deadline=None)
@given(
    suffix=st.sampled_from(["parquet", "jsonl", "csv", "jsonl.gz"]),
    sizes=st.lists(st.integers(0, 150), min_size=1, max_size=4).filter(any),
    shard_rows=st.none() | st.integers(1, 120),
    row_group=st.integers(1, 60),
    workers=st.integers(1, 5),
)
def test_every_row_is_in_exactly_one_shard_in_order(
    tmp_path_factory: pytest.TempPathFactory,
    suffix: str,
    sizes: list[int],
    shard_rows: int | None,
    row_group: int,
    workers: int,
) -> None:
    folder = tmp_path_factory.mktemp("input")
    first = 0
    for number, size in enumerate(sizes):
        write(folder / f"{number}.{suffix}", table(size, first), row_group)
        first += size
    plan = make_plan(spec(str(folder), shards={"rows": shard_rows}, workers={"count": workers}))
    plan.check()
    assert plan.rows == sum(sizes)
    assert list(rows_of(plan)) == [(row, row) for row in range(sum(sizes))]
    if shard_rows is not None:
        assert max(shard.rows for shard in plan.shards) <= shard_rows
    assert plan_from_bytes(plan_to_bytes(plan.shards)) == list(plan.shards)
    assert json.loads(json.dumps(plan_values(plan)))["rows"] == sum(sizes)


@pytest.mark.parametrize(
    ("rows", "seconds", "workers", "shard_rows"),
    [
        (8, 1.0, 2, 8),  # tiny data is not cut below FEWEST_ROWS
        (40, 1.0, 2, 14),  # three even shards rather than 16, 16 and 8
        (1000, 1.0, 2, 125),  # four shards a worker
        (1000, 18_000.0, 2, 16),  # three minutes would be ten rows
        (100_000, 18_000.0, 2, 1000),  # three minutes
        (10**9, 1.0, 2, MOST_ROWS),
        (10**9, 1e12, 2, MOST_ROWS),
    ],
)
def test_the_rows_of_a_shard(rows: int, seconds: float, workers: int, shard_rows: int) -> None:
    class Expected:
        worker_seconds = seconds

    found = planning._shard_rows(rows, Expected(), workers)  # type: ignore[arg-type]
    assert found == shard_rows
    assert -(-rows // found) <= MOST_SHARDS
    assert found >= min(rows, FEWEST_ROWS) - 2


def test_small_files_share_a_shard(tmp_path: Path) -> None:
    for number in range(30):
        write(tmp_path / f"{number:02}.jsonl", table(3, 3 * number))
    plan = make_plan(spec(str(tmp_path), shards={"rows": 30}))
    assert [len(shard.splits) for shard in plan.shards] == [10, 10, 10]


def test_a_small_set_is_looked_at_whole_and_what_does_not_fit_is_named(tmp_path: Path) -> None:
    texts = ["word " * (5 if row % 2 else 3) for row in range(4000)]
    texts[0] = "word " * 90
    texts[1] = "word " * CONTEXT
    pq.write_table(pa.table({"text": texts, "id": range(4000)}), tmp_path / "a.parquet", row_group_size=100)
    asked = spec(
        str(tmp_path),
        sampling={"max_tokens": 20, "n": 2},
        price={"usd_per_hour": 3.6},
        workers={"count": 2},
    )
    plan = make_plan(asked)
    found = plan.estimate
    assert found.whole
    assert found.sampled_rows == 4000
    assert found.prompt_tokens == 2 * (1999 * 3 + 1999 * 5 + 90)
    assert found.prompt_range == exactly(found.prompt_tokens)
    assert found.completion_tokens == 2 * (3998 * 20 + 10)
    assert found.fewest_tokens == 2 * 3999
    assert found.largest[0] == (0, 90)
    assert found.too_long == ((1, 100),)
    assert found.too_long_rows == 1
    assert found.failures == {"too_long": 1}
    assert "row 1 has 100 tokens" in found.first_failure
    assert found.seconds == found.worker_seconds / 2
    assert found.usd == pytest.approx(found.worker_seconds * 0.001)
    text = "\n".join(plan_lines(plan))
    for word in ("4,000", "too_long 1", "row 0", "GFLOP/s", "2 workers"):
        assert word in text
    assert make_plan(asked) == plan


def test_without_a_price_there_is_none(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", table(5))
    plan = make_plan(spec(str(tmp_path)))
    assert plan.estimate.usd is None
    assert "price.usd_per_hour" in "\n".join(plan_lines(plan))


def test_rows_that_can_not_be_answered_are_counted_by_code(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\nnonsense\n{"text": "b"}\n')
    found = make_plan(spec(str(tmp_path))).estimate
    assert found.failures == {"bad_line": 1, "render_error": 1}
    assert found.sampled_rows == 4


def test_messages_that_the_model_never_takes_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", table(5))
    with pytest.raises(JobError, match="only users speak here"):
        make_plan(spec(str(tmp_path), messages=[{"role": "system", "content": "{{ text }}"}]))
    make_plan(spec(str(tmp_path), messages=[{"role": "user", "content": "{{ text }}"}]))


def test_named_columns_pass_through_and_others_only_prompt(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", table(5))
    plan = make_plan(spec(str(tmp_path), input={"uri": str(tmp_path), "columns": ["id"]}))
    assert plan.schema.names[:2] == ["id", "row_index"]
    assert plan.input_schema.names == ["id", "text"]


class TestRefused:
    def check(self, asked: JobSpec, *words: str) -> None:
        with pytest.raises((JobError, StorageError)) as refused:
            make_plan(asked)
        assert "\n" not in str(refused.value)
        for word in words:
            assert word in str(refused.value)

    def test_nothing_there(self, tmp_path: Path) -> None:
        self.check(spec(str(tmp_path / "none")), str(tmp_path / "none"))
        self.check(spec(str(tmp_path / "*.parquet")), str(tmp_path))

    def test_no_rows(self, tmp_path: Path) -> None:
        write(tmp_path / "a.parquet", table(0))
        self.check(spec(str(tmp_path)), "has no rows", str(tmp_path))

    def test_an_unreadable_footer(self, tmp_path: Path) -> None:
        write(tmp_path / "a.parquet", table(5))
        (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-7])
        self.check(spec(str(tmp_path)), "b.parquet", "footer")

    def test_a_column_that_collides(self, tmp_path: Path) -> None:
        write(tmp_path / "a.parquet", table(5).append_column("completion", pa.array(["x"] * 5)))
        self.check(spec(str(tmp_path)), "completion", "input.columns")
        make_plan(spec(str(tmp_path), input={"uri": str(tmp_path), "columns": ["id"]}))

    def test_a_column_that_is_not_there(self, tmp_path: Path) -> None:
        write(tmp_path / "a.parquet", table(5))
        self.check(spec(str(tmp_path), prompt="{{ txt }}"), "prompt", "txt", "id, text")
        self.check(spec(str(tmp_path), input={"uri": str(tmp_path), "columns": ["ids"]}), "ids", "id, text")

    @pytest.mark.parametrize(
        ("uri", "output", "inside"),
        [
            ("s3://b/in", "s3://b/in/out", True),
            ("s3://b/in", "s3://b/in", True),
            ("s3://b/in", "s3://b/input", False),
            ("s3://b/in/*.parquet", "s3://b/in", True),
            ("s3://b/in/*.parquet", "s3://b/in/out", False),
            ("s3://b/*/*.parquet", "s3://b/out", True),
            ("s3://b/in/**/*.parquet", "s3://b/in/a/b", True),
            ("s3://b/in/**/*.parquet", "s3://b/out", False),
            ("/data/in", "/data/in/out", True),
            ("/data/*.parquet", "/data/out", False),
            ("/data/in.parquet", "/data", False),
        ],
    )
    def test_an_output_inside_the_input(self, uri: str, output: str, inside: bool) -> None:
        assert planning._covers(uri, output) is inside
        if inside:
            self.check(spec(uri, output={"uri": output}), output, "never reads its own answers")


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_million_rows_plan_in_bounded_memory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"million.{suffix}"
    part = table(100_000)
    if suffix == "parquet":
        with pq.ParquetWriter(path, part.schema) as writer:
            for _ in range(10):
                writer.write_table(part)
    else:
        lines = io.StringIO()
        for row in part.to_pylist():
            lines.write(json.dumps(row) + "\n")
        with open(path, "w") as file:
            for _ in range(10):
                file.write(lines.getvalue())
    del part
    write(tmp_path / f"little.{suffix}", table(5))
    make_plan(spec(str(tmp_path / f"little.{suffix}")))  # whatever it imports is there now
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = make_plan(spec(str(path)))
    assert plan.rows == 1_000_000
    assert 8 <= len(plan.shards) <= MOST_SHARDS
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 150 * 1024, f"planning took {grown} KiB"
