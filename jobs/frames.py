"""Data frames as a job's input: kept once in the job's folder, under the digest of their content."""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.connectors.batches import BATCH_ROWS
from batchinfer.connectors.storage import join_uri
from batchinfer.jobs.folder import input_key
from batchinfer.jobs.spec import JobSpec, parse_spec
from batchinfer.jobs.spec_source import read_spec
from batchinfer.jobs.types import JobError


@dataclass(frozen=True, slots=True)
class FrameFile:
    """A frame as an Arrow IPC file of this machine, and the digest of its content."""

    path: Path
    digest: str


def as_table(frame: object) -> pa.Table:
    """A pyarrow table or record batch, a pandas or polars frame, or whatever else offers an Arrow stream,
    as a table without metadata; the index of a pandas frame is left out.

    Raises JobError for anything else, and for columns that have no Arrow type.
    """
    kind = f"{type(frame).__module__.partition('.')[0]}.{type(frame).__name__}"
    try:
        if isinstance(frame, pa.Table):
            table = frame
        elif isinstance(frame, pa.RecordBatch):
            table = pa.Table.from_batches([frame])
        elif kind == "pandas.DataFrame":
            table = pa.Table.from_pandas(frame, preserve_index=False)
        elif kind == "polars.DataFrame":
            table = frame.to_arrow()  # type: ignore[attr-defined]
        elif hasattr(frame, "__arrow_c_stream__"):
            table = pa.table(frame)
        else:
            raise JobError(
                f"the input is a {kind}, but it must be a pyarrow table, a pandas or polars frame, or what "
                "offers an Arrow stream; collect a lazy one first"
            )
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise JobError(f"the input's {kind} can't be made an Arrow table: {error}") from None
    return table.cast(pa.schema([field.remove_metadata() for field in table.schema]))


@contextmanager
def frame_file(frame: object) -> Iterator[FrameFile]:
    """The frame's rows in a temporary Arrow IPC file. Equal frames have equal digests, whatever their
    chunks and what lies beneath their nulls.

    Raises JobError for a frame that is none, and for columns of a type that answers can't be kept with.
    """
    table = as_table(frame).unify_dictionaries()
    _check_types(table.schema)
    digest = _Digest()
    with tempfile.TemporaryDirectory(prefix="batchinfer-") as folder:
        path = Path(folder, "frame.arrow")
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with (
            pa.ipc.new_file(path, table.schema, options=options) as file,
            pa.ipc.new_stream(pa.PythonFile(digest, mode="w"), table.schema) as plain,
        ):
            for start in range(0, table.num_rows, BATCH_ROWS):
                part = table.slice(start, BATCH_ROWS)
                # Taking rows packs them: nothing is left of chunks, offsets, and values beneath nulls.
                rows = part.combine_chunks().take(pa.array(range(part.num_rows)))
                for batch in rows.combine_chunks().to_batches():
                    file.write_batch(batch)
                    plain.write_batch(batch)
        yield FrameFile(path, digest.hexdigest())


def frame_spec(
    source: str | Path | Mapping[str, Any] | JobSpec, overrides: Sequence[str], digest: str
) -> JobSpec:
    """The spec of a job whose input is the frame with this digest, in the job's folder.

    ``source`` says everything but ``input.uri`` and ``input.format``. Raises JobError like ``load_spec``,
    and where it says one of these too.
    """
    data, where = read_spec(source, overrides)
    given = data.get("input") if isinstance(data, Mapping) else None
    if given is not None and not isinstance(given, Mapping):
        raise JobError(f"{where}: input is {given!r}, but it must be a mapping; with a frame, of columns")
    for name in ("uri", "format"):
        if given and given.get(name) is not None:
            raise JobError(f"{where}: input.{name} is given, but the input is a frame: remove one of them")
    inner = {**(given or {}), "uri": "frame.arrow", "format": "arrow"}
    spec = parse_spec({**data, "input": inner} if isinstance(data, Mapping) else data, where)
    uri = join_uri(spec.output.uri, input_key(digest))
    return spec.model_copy(update={"input": spec.input.model_copy(update={"uri": (uri,)})})


def _check_types(schema: pa.Schema) -> None:
    """Answers are kept as Parquet beside the columns that pass through."""
    for field in schema:
        try:
            pq.write_table(pa.schema([field]).empty_table(), io.BytesIO())
        except pa.ArrowException as error:
            raise JobError(
                f"the input's column {field.name} has the type {field.type}, which Parquet can't hold "
                f"({error}): leave it out, or convert it"
            ) from None


class _Digest(io.RawIOBase):
    """A file that keeps only the SHA-256 of what is written to it."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self._hash.update(data)
        return len(data)

    def hexdigest(self) -> str:
        """The first 16 digits."""
        return self._hash.hexdigest()[:16]
