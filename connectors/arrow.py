"""Arrow IPC files: rows by range, of the record batches and columns needed.

All record batches of a file but its last have the same number of rows, so that a row is found without
reading those before it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from batchinfer.connectors.batches import BATCH_BYTES, BATCH_ROWS, RowBatch
from batchinfer.connectors.inputs import ObjectFile
from batchinfer.connectors.parquet import fitted, unreadable
from batchinfer.connectors.types import StorageError


def scan(file: ObjectFile, uri: str) -> tuple[int, pa.Schema]:
    """How many rows there are, and the schema without metadata.

    Raises StorageError where the file is no Arrow IPC file, has a column's name twice, or record batches
    of different sizes.
    """
    schema = _open(file, uri, []).schema.remove_metadata()
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise StorageError(f"{uri}: the column {name} occurs more than once; rename one")
    counts = _open(file, uri, [0] if schema.names else [])  # one column tells how many rows there are
    try:
        rows = tuple(counts.get_batch(number).num_rows for number in range(counts.num_record_batches))
    except (OSError, pa.ArrowException) as error:
        raise _refused(file, uri, error) from error
    if any(count != rows[0] for count in rows[:-1]) or (rows and rows[-1] > rows[0]):
        raise StorageError(
            f"{uri}: its record batches have different numbers of rows; write it with "
            "write_table(table.combine_chunks(), max_chunksize=1024)"
        )
    return sum(rows), schema


def read_rows(
    file: ObjectFile, uri: str, start: int, stop: int, first_row: int, schema: pa.Schema
) -> Iterator[RowBatch]:
    """Rows start:stop of the file, the first at position ``first_row`` of the whole input.

    Reads the columns of ``schema`` and the record batches that the range touches. One that can't be
    decoded gives a BadRow with code ``unreadable`` for each of its rows; a value that can't be cast to
    its column's type one with code ``type_mismatch``.
    """
    names = _open(file, uri, []).schema.names
    columns = [name for name in schema.names if name in names]
    # Without a column, rows have no number: one is read for it.
    reader = _open(file, uri, [names.index(name) for name in columns] or [0])
    size = reader.get_batch(0).num_rows
    for number in range(start // size, -(-stop // size)):
        position = max(start, number * size)
        until = min(stop, (number + 1) * size)
        offset = first_row - start
        try:
            batch = reader.get_batch(number).slice(position - number * size, until - position)
        except (OSError, pa.ArrowException) as error:
            if file.error is not None:
                raise file.error from error
            message = f"{uri}, record batch {number}: it can't be read ({_one_line(error)})"
            yield unreadable(position + offset, until + offset, message, schema)
            continue
        step = max(1, min(BATCH_ROWS, BATCH_BYTES * batch.num_rows // max(1, batch.nbytes)))
        for place in range(0, batch.num_rows, step):
            part = batch.slice(place, step)
            yield fitted(part, schema, uri, position + place, position + place + offset)


def _open(file: ObjectFile, uri: str, places: list[int]) -> pa.ipc.RecordBatchFileReader:
    """The file with the columns at these places; none means all."""
    try:
        options = pa.ipc.IpcReadOptions(included_fields=places, use_threads=False)
        return pa.ipc.open_file(pa.PythonFile(file, mode="r"), options=options)
    except (OSError, pa.ArrowException) as error:
        raise _refused(file, uri, error) from error


def _refused(file: ObjectFile, uri: str, error: Exception) -> Exception:
    if file.error is not None:
        return file.error
    return StorageError(
        f"{uri}: it is no whole Arrow IPC file ({_one_line(error)}); replace the file or leave it out"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
