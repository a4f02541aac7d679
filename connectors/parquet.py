"""Parquet: rows and schema from footers, and rows by range, only the columns and pages needed."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.connectors.batches import BATCH_BYTES, BATCH_ROWS, RowBatch
from batchinfer.connectors.inputs import ObjectFile
from batchinfer.connectors.types import BadRow, StorageError

# Up to this many bytes the column chunks of a row group are fetched together, in few requests;
# above, each is streamed through a buffer.
_FETCH_BYTES = 64 << 20
_BUFFER_BYTES = 4 << 20


def read_footer(file: ObjectFile, uri: str) -> pq.FileMetaData:
    """The file's footer, in one or two range requests. Raises StorageError if it is unreadable."""
    try:
        return pq.ParquetFile(pa.PythonFile(file, mode="r")).metadata
    except (OSError, pa.ArrowException) as error:
        if file.error is not None:
            raise file.error from error
        raise StorageError(
            f"{uri}: the Parquet footer can't be read ({_one_line(error)}); "
            "replace the file or leave it out"
        ) from error


def schema_of(footer: pq.FileMetaData, uri: str) -> pa.Schema:
    """The Arrow schema of a footer, without metadata. Raises StorageError for a name used twice."""
    schema = footer.schema.to_arrow_schema().remove_metadata()
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise StorageError(f"{uri}: the column {name} occurs more than once; rename one")
    return schema


def unify(first: pa.Schema, second: pa.Schema, uri: str) -> pa.Schema:
    """The schema that rows of both files fit; ``second`` is that of ``uri``.

    Narrow numbers become wide ones, dictionaries plain values, and a column that one file lacks is null
    there. Raises StorageError if a column's types have nothing in common.
    """
    if first.equals(second):
        return first
    try:
        return pa.unify_schemas([_plain(first), _plain(second)], promote_options="permissive")
    except pa.ArrowException as error:
        raise StorageError(
            f"{uri}: its columns don't fit those of the files before it ({_one_line(error)}); "
            "convert it or leave it out"
        ) from error


def _plain(schema: pa.Schema) -> pa.Schema:
    return pa.schema(
        [
            field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
            for field in schema
        ]
    )


def read_rows(
    file: ObjectFile, uri: str, start: int, stop: int, first_row: int, schema: pa.Schema
) -> Iterator[RowBatch]:
    """Rows start:stop of the file, the first at position ``first_row`` of the whole input.

    Reads the columns of ``schema`` and the row groups that the range touches; a range that begins
    inside a row group decodes that group from its beginning. A row group that can't be decoded gives a
    BadRow with code ``unreadable`` for each of its rows not yet read; a value that can't be cast to its
    column's type one with code ``type_mismatch``.
    """
    footer = read_footer(file, uri)
    names = set(footer.schema.to_arrow_schema().names)
    columns = [name for name in schema.names if name in names]
    group_start = 0
    for group in range(footer.num_row_groups):
        rows = footer.row_group(group).num_rows
        first, last = max(start, group_start), min(stop, group_start + rows)
        if first < last:
            position = first
            try:
                for batch in _group(file, footer, group, columns, first - group_start, last - group_start):
                    yield fitted(batch, schema, uri, position, first_row + position - start)
                    position += batch.num_rows
            except (OSError, pa.ArrowException) as error:
                if file.error is not None:
                    raise file.error from error
                message = f"{uri}, row group {group}: it can't be read ({_one_line(error)})"
                for lost in range(position, last, BATCH_ROWS):
                    until = min(last, lost + BATCH_ROWS)
                    yield unreadable(lost - start + first_row, until - start + first_row, message, schema)
        group_start += rows


def _group(
    file: ObjectFile, footer: pq.FileMetaData, group: int, columns: list[str], start: int, stop: int
) -> Iterator[pa.RecordBatch]:
    """Rows start:stop of one row group, in batches of bounded bytes."""
    details = footer.row_group(group)
    wanted = set(columns)
    packed = unpacked = 0
    for position in range(details.num_columns):
        chunk = details.column(position)
        if chunk.path_in_schema in wanted or chunk.path_in_schema.split(".")[0] in wanted:
            packed += chunk.total_compressed_size
            unpacked += chunk.total_uncompressed_size
    # Dictionaries make the bytes on disk an underestimate, hence the bound on rows.
    batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES * details.num_rows // max(1, unpacked)))
    together = packed <= _FETCH_BYTES
    reader = pq.ParquetFile(
        pa.PythonFile(file, mode="r"),
        metadata=footer,
        pre_buffer=together,
        buffer_size=0 if together else _BUFFER_BYTES,
        page_checksum_verification=True,
    )
    position = 0
    for batch in reader.iter_batches(batch_rows, row_groups=[group], columns=columns, use_threads=False):
        first, last = max(start - position, 0), min(stop - position, batch.num_rows)
        position += batch.num_rows
        if first < last:
            yield batch.slice(first, last - first)
        if position >= stop:
            return


def fitted(batch: pa.RecordBatch, schema: pa.Schema, uri: str, position: int, index: int) -> RowBatch:
    """The batch with the columns of ``schema``; rows whose values can't be cast apart."""
    indices = range(index, index + batch.num_rows)
    try:
        return RowBatch(indices, _cast(batch, schema))
    except pa.ArrowException:
        good: list[int] = []
        bad: list[BadRow] = []
        for row in range(batch.num_rows):
            try:
                _cast(batch.slice(row, 1), schema)
                good.append(row)
            except pa.ArrowException as error:
                message = f"{uri}, row {position + row}: {_one_line(error)}"
                bad.append(BadRow(index + row, "type_mismatch", message, None))
        fitting = batch.take(pa.array(good, pa.int64()))
        return RowBatch([index + row for row in good], _cast(fitting, schema), tuple(bad))


def _cast(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    arrays = []
    for field in schema:
        if field.name not in batch.schema.names:
            arrays.append(pa.nulls(batch.num_rows, field.type))
            continue
        column = batch.column(field.name)
        arrays.append(column if column.type.equals(field.type) else column.cast(field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def unreadable(start: int, stop: int, message: str, schema: pa.Schema) -> RowBatch:
    """Rows start:stop of the whole input, none of which can be read."""
    bad = tuple(BadRow(index, "unreadable", message, None) for index in range(start, stop))
    return RowBatch([], _empty(schema), bad)


def _empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
