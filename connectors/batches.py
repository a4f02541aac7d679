"""Rows in Arrow batches: values pass from input to output as they are, Python sees them on demand."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from batchinfer.connectors.types import BadRow, Row

BATCH_ROWS = 1024
BATCH_BYTES = 4 << 20

CONVERT = "convert the file, such as with iconv -f WINDOWS-1252 -t UTF-8"
"""What to do with text in another encoding."""


class Mismatch(Exception):
    """A value that does not fit its column's type: one clause that says so."""


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Consecutive rows of a split: ``batch`` holds the readable ones, ``bad`` the others.

    ``indices[i]`` is the position in the whole input of row i of ``batch``, ascending; ``bad`` is
    ascending too, and the two interleave. With no column asked for, ``batch`` has none and ``indices``
    still counts the rows.
    """

    indices: Sequence[int]
    batch: pa.RecordBatch
    bad: tuple[BadRow, ...] = ()

    def rows(self) -> Iterator[Row | BadRow]:
        """The rows in the order of the input; values become Python objects when looked up."""
        columns = _Columns(self.batch)
        bad = iter(self.bad)
        next_bad = next(bad, None)
        for position, index in enumerate(self.indices):
            while next_bad is not None and next_bad.index < index:
                yield next_bad
                next_bad = next(bad, None)
            yield Row(index, _Values(columns, position))
        if next_bad is not None:
            yield next_bad
            yield from bad

    def only(self, wanted: Collection[int]) -> RowBatch:
        """The rows whose positions in the whole input are ``wanted``."""
        places = [place for place, index in enumerate(self.indices) if index in wanted]
        # A batch without columns can't be told how many rows it has.
        batch = self.batch.take(pa.array(places, pa.int64())) if self.batch.num_columns else self.batch
        bad = tuple(row for row in self.bad if row.index in wanted)
        return RowBatch([self.indices[place] for place in places], batch, bad)


class _Columns:
    """The columns of a batch as Python lists, each made when first asked for."""

    __slots__ = ("_lists", "batch", "names")

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch = batch
        self.names: list[str] = batch.schema.names
        self._lists: dict[str, list[Any]] = {}

    def __getitem__(self, name: str) -> list[Any]:
        values = self._lists.get(name)
        if values is None:
            values = self._lists[name] = _python_values(self.batch.column(name))
        return values


class _Values(Mapping[str, Any]):
    """One row's values by column name."""

    __slots__ = ("_columns", "_position")

    def __init__(self, columns: _Columns, position: int) -> None:
        self._columns = columns
        self._position = position

    def __getitem__(self, name: str) -> Any:
        return self._columns[name][self._position]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns.names)

    def __len__(self) -> int:
        return len(self._columns.names)

    def __contains__(self, name: object) -> bool:
        return name in self._columns.names

    def __repr__(self) -> str:
        return repr(dict(self))


def _python_values(array: pa.Array) -> list[Any]:
    """Python values; nanoseconds are cut to microseconds, as Python's clock has no finer ones."""
    kind = _in_microseconds(array.type)
    if not kind.equals(array.type):
        array = array.cast(kind, safe=False)
    return list(array.to_pylist(maps_as_pydicts="lossy"))


def _in_microseconds(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    if pa.types.is_time64(kind) and kind.unit == "ns":
        return pa.time64("us")
    if pa.types.is_duration(kind) and kind.unit == "ns":
        return pa.duration("us")
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_in_microseconds(field.type)) for field in kind])
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_in_microseconds(kind.value_type)))
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_in_microseconds(kind.value_type)))
    return kind


def selected(schema: pa.Schema, columns: Sequence[str] | None) -> pa.Schema:
    """The fields of ``schema`` that are asked for, in that order; None: all.

    Raises KeyError naming a column that is not in the schema.
    """
    if columns is None:
        return schema
    for name in columns:
        if name not in schema.names:
            raise KeyError(f"there is no column {name}; the columns are {', '.join(schema.names)}")
    return pa.schema([schema.field(name) for name in columns])


@dataclass(frozen=True, slots=True)
class Record:
    """One parsed line: its fitted values in the order of the schema, its text, and where it is from."""

    values: Sequence[Any]
    raw: str
    place: str


def batches_of_records(
    records: Iterable[Record | BadRow], schema: pa.Schema, first_row: int
) -> Iterator[RowBatch]:
    """Arrow batches of bounded rows and bytes from parsed lines, numbered from ``first_row``."""
    waiting: list[tuple[int, Record]] = []
    bad: list[BadRow] = []
    size = 0
    for index, record in enumerate(records, first_row):
        if isinstance(record, BadRow):
            bad.append(record)
            size += len(record.raw or "")
        else:
            waiting.append((index, record))
            size += len(record.raw)
        if len(waiting) + len(bad) >= BATCH_ROWS or size >= BATCH_BYTES:
            yield _batch(waiting, bad, schema)
            waiting, bad, size = [], [], 0
    if waiting or bad:
        yield _batch(waiting, bad, schema)


def _batch(numbered: list[tuple[int, Record]], bad: list[BadRow], schema: pa.Schema) -> RowBatch:
    try:
        batch = _arrow([record for _, record in numbered], schema)
    except (pa.ArrowException, UnicodeError, ValueError, TypeError, OverflowError):
        good: list[tuple[int, Record]] = []
        for index, record in numbered:
            try:
                _arrow([record], schema)
                good.append((index, record))
            except UnicodeError:
                bad.append(_bad(index, record, "bad_line", _not_unicode(record.raw)))
            except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
                bad.append(_bad(index, record, "type_mismatch", str(error)))
        bad.sort(key=lambda row: row.index)
        numbered = good
        batch = _arrow([record for _, record in numbered], schema)
    return RowBatch([index for index, _ in numbered], batch, tuple(bad))


def _not_unicode(raw: str) -> str:
    """What is wrong with a record whose text is not Unicode: bytes that are no UTF-8, or JSON's half a
    character."""
    if any("\udc80" <= character <= "\udcff" for character in raw):
        return f"the line is not UTF-8; {CONVERT}"
    return "it holds text that is not valid Unicode"


def _bad(index: int, record: Record, code: str, message: str) -> BadRow:
    raw = record.raw.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return BadRow(index, code, f"{record.place}: {message}", raw)


def _arrow(records: list[Record], schema: pa.Schema) -> pa.RecordBatch:
    arrays = [
        pa.array([record.values[position] for record in records], field.type)
        for position, field in enumerate(schema)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
