"""A job's rows for people and other tools: as a table, JSON lines or Parquet."""

from __future__ import annotations

import base64
import json
import os
import sys
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from batchinfer.jobs.job import Job
from batchinfer.jobs.types import JobError

_INPUT_COLUMNS = 2
_LONGEST_CELL = 200
_WIDTH = 140
_LEAD = ("row_index", "sample_index", "completion", "completion_tokens", "cost_usd", "code", "message")


def rows_of(job: Job, failures: bool, limit: int | None) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """A job's answers, or its failed rows, in the order of the input: at most ``limit`` of them."""
    if failures:
        table = job.failures()
        return table.schema, _first(table.to_batches(), limit)
    return job.record.schema, _first(job.batches(), limit)


def _first(batches: Iterable[pa.RecordBatch], limit: int | None) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        if limit is None:
            yield batch
            continue
        yield batch.slice(0, limit)
        limit -= min(limit, batch.num_rows)
        if limit == 0:
            return


def json_rows(batches: Iterable[pa.RecordBatch]) -> Iterator[str]:
    """Each row as one line of JSON."""
    for batch in batches:
        for row in batch.to_pylist():
            yield json.dumps(row, ensure_ascii=False, default=_as_json)


def _as_json(value: Any) -> Any:
    return base64.b64encode(value).decode("ascii") if isinstance(value, bytes) else str(value)


def write_file(path: Path, format: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    """Write rows to a local file, whole or not at all; returns how many. ``format``: jsonl or parquet.

    Raises JobError where the file can't be written.
    """
    with _whole(path) as file:
        return _write(file, format, schema, batches)


def write_lines(path: Path, lines: Iterable[str]) -> int:
    """Write lines to a local file, whole or not at all; returns how many.

    Raises JobError where the file can't be written.
    """
    count = 0
    with _whole(path) as file:
        for line in lines:
            file.write(line.encode() + b"\n")
            count += 1
    return count


@contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes its name when it is complete."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(aside, "xb") as file:
            yield file
        os.replace(aside, path)
    except OSError as error:
        raise JobError(
            f"{path} can't be written ({error.strerror or error}): give another --output"
        ) from None
    finally:
        aside.unlink(missing_ok=True)


def _write(file: IO[bytes], format: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    count = 0
    if format == "jsonl":
        for line in json_rows(batches):
            file.write(line.encode("utf-8") + b"\n")
            count += 1
        return count
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)
            count += batch.num_rows
    return count


def show_table(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Print rows as a table on stdout: the columns that matter most, long values cut."""
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    console.print(_table(schema, batches))


def _table(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Table:
    lead = [name for name in _LEAD if name in schema.names] or schema.names
    others = [field.name for field in schema if field.name not in lead and not _added(schema, field.name)]
    names = [*lead[:1], *others[:_INPUT_COLUMNS], *lead[1:]]
    table = Table()
    for name in names:
        long = name in (*others, "completion", "message", "input")
        table.add_column(name, no_wrap=not long, overflow="fold" if long else "ellipsis")
    for batch in batches:
        for row in batch.select(names).to_pylist():
            table.add_row(*(_cell(row[name]) for name in names))
    return table


def _added(schema: pa.Schema, name: str) -> bool:
    """Whether a column is one that the job added: those come after row_index."""
    names = schema.names
    return "row_index" in names and names.index(name) > names.index("row_index")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    text = "" if value is None else " ".join(str(value).split())
    text = text if len(text) <= _LONGEST_CELL else f"{text[:_LONGEST_CELL]}…"
    return text.replace("[", r"\[")
