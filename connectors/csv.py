"""CSV with a header line and double quotes (RFC 4180), whatever separates its fields: its schema, and rows
by byte range."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pyarrow as pa

from batchinfer.connectors.batches import CONVERT, Mismatch, Record
from batchinfer.connectors.lines import LONGEST_LINE_BYTES
from batchinfer.connectors.types import BadRow, StorageError

_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)").fullmatch
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?").fullmatch
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT64 = range(-(2**63), 2**63)

DELIMITERS = ",;\t|"
"""What separates fields where nobody says otherwise; of equally good ones the first."""

SAMPLE_BYTES = 64 << 10
"""How much of a file is looked at to find its delimiter."""

_SAMPLE_RECORDS = 200


def find_delimiter(sample: bytes) -> str | None:
    """What separates the fields of a file that begins with ``sample``, or None for a file of one column.

    It is the one of ``DELIMITERS`` that occurs in the header and gives most records as many fields as
    the header has, if these are at least half.
    """
    best: tuple[float, str | None] = (0.5, None)
    for delimiter in DELIMITERS:
        records = islice(CsvRecords(iter([sample]), delimiter=delimiter), _SAMPLE_RECORDS)
        counts = [len(record) if isinstance(record, list) else 0 for record in records]
        if not counts or counts[0] < 2:
            continue
        share = counts.count(counts[0]) / len(counts)
        if share > best[0] or (share == best[0] and best[1] is None):
            best = (share, delimiter)
    return best[1]


class CsvRecords:
    """The records of blocks of lines; a quoted field may hold line breaks.

    After each record ``offset`` is the number of bytes and ``line`` the number of lines consumed, and
    ``raw`` the record's text. Iterating yields lists of fields, or the csv.Error of a bad record; lines
    without anything on them are no records.
    """

    def __init__(
        self, blocks: Iterator[bytes], offset: int = 0, line: int = 0, delimiter: str = ","
    ) -> None:
        """Begin after ``offset`` bytes and ``line`` lines."""
        self.offset = offset
        self.line = line
        self.first_offset, self.first_line = offset, line + 1
        self._text: list[str] = []
        # One limit for the whole process: the module keeps no other, and prompts are long.
        csv.field_size_limit(LONGEST_LINE_BYTES)
        self._reader = csv.reader(self._lines(blocks), delimiter=delimiter, strict=True)

    @property
    def raw(self) -> str:
        """The text of the record, without its last line break."""
        return "".join(self._text).rstrip("\r\n")

    def _lines(self, blocks: Iterator[bytes]) -> Iterator[str]:
        for block in blocks:
            for line in _split(block):
                text = line.decode("utf-8", "surrogateescape")
                if self.offset == 0:
                    text = text.removeprefix("\ufeff")
                self.offset += len(line)
                self.line += 1
                self._text.append(text)
                yield text

    def __iter__(self) -> Iterator[list[str] | csv.Error]:
        """See the class."""
        while True:
            self.first_offset, self.first_line = self.offset, self.line + 1
            self._text.clear()
            try:
                record = next(self._reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield error
                continue
            if record:
                yield record


def _split(block: bytes) -> Iterator[bytes]:
    lines = block.split(b"\n")
    last = lines.pop()
    for line in lines:
        yield line + b"\n"
    if last:
        yield last


def header(records: CsvRecords, uri: str) -> list[str]:
    """The names in a file's first record; a column without one is called ``columnN``, from 0.

    Raises StorageError for a file without a header, with one name twice, or in another encoding.
    """
    first = next(iter(records), None)
    if not _is_unicode(records.raw):
        # What spreadsheets call Unicode text begins with one of these marks.
        wide = records.raw.startswith(("\udcff\udcfe", "\udcfe\udcff"))
        advice = CONVERT.replace("WINDOWS-1252", "UTF-16") if wide else CONVERT
        raise StorageError(f"{uri}: the header line is not UTF-8; {advice}")
    if first is None or isinstance(first, csv.Error):
        raise StorageError(f"{uri}: the file has no header line with the columns' names; add one")
    names = [name or f"column{position}" for position, name in enumerate(first)]
    for name in names:
        if names.count(name) > 1:
            raise StorageError(f"{uri}: the header names the column {name} more than once; rename one")
    return names


class SchemaScan:
    """Collects the types of a file's columns.

    int64 where every value is a whole number as one writes it (no leading zeros, so that codes such as
    007 stay text), float64 where every value is a number, bool where every one is true or false, and
    string otherwise. Nothing between two commas is null, and in a string column the empty string.
    """

    def __init__(self, names: list[str]) -> None:
        """Columns by the file's header."""
        self._names = names
        self.kinds = ["null"] * len(names)
        self._open = list(range(len(names)))

    def add(self, record: list[str]) -> None:
        """Note a record with as many fields as the header."""
        closed = False
        for position in self._open:
            if value := record[position]:
                kind = combine(self.kinds[position], _kind(value))
                self.kinds[position] = kind
                closed = closed or kind == "string"
        if closed:
            self._open = [position for position in self._open if self.kinds[position] != "string"]

    def by_name(self) -> dict[str, str]:
        """The kind of each column: null, int, float, bool or string."""
        return dict(zip(self._names, self.kinds, strict=True))


def combine(first: str, second: str) -> str:
    """The kind that holds values of both kinds."""
    if first == second or second == "null":
        return first
    if first == "null":
        return second
    return "float" if {first, second} == {"int", "float"} else "string"


def arrow_type(kind: str) -> pa.DataType:
    """The Arrow type of a kind."""
    return {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}.get(kind, pa.string())


def _kind(value: str) -> str:
    if _INTEGER(value):
        return "int" if len(value) < 19 or int(value) in _INT64 else "string"
    if _NUMBER(value):
        return "float"
    return "bool" if value in _BOOLEANS else "string"


def _fit(name: str, kind: pa.DataType) -> Callable[[str], Any]:
    if pa.types.is_string(kind):
        return lambda value: value

    def convert(value: str) -> Any:
        if not value:
            return None
        if pa.types.is_int64(kind) and _INTEGER(value):
            return int(value)
        if pa.types.is_float64(kind) and _NUMBER(value):
            return float(value)
        if pa.types.is_boolean(kind) and value in _BOOLEANS:
            return _BOOLEANS[value]
        raise Mismatch(f"column {name} is {value[:60]!r}, but the column's type is {kind}")

    return convert


def records(
    rows: CsvRecords, names: list[str], schema: pa.Schema, uri: str, first_row: int
) -> Iterator[Record | BadRow]:
    """The rows of ``rows`` in a file whose header is ``names``, values fitted to ``schema``."""
    position_of = {name: position for position, name in enumerate(names)}
    fits = [(position_of.get(field.name), _fit(field.name, field.type)) for field in schema]
    for index, record in enumerate(rows, first_row):
        place, raw = f"{uri}, line {rows.first_line}", rows.raw
        if isinstance(record, csv.Error):
            yield BadRow(index, "bad_line", f"{place}: {_problem(record)}", _text(raw))
        elif len(record) != len(names):
            message = f"{place}: the row has {len(record)} fields, but the header has {len(names)}"
            yield BadRow(index, "bad_line", message, _text(raw))
        else:
            try:
                values = [
                    fit_value(record[position]) if position is not None else None
                    for position, fit_value in fits
                ]
            except Mismatch as mismatch:
                yield BadRow(index, "type_mismatch", f"{place}: {mismatch}", _text(raw))
            else:
                yield Record(values, raw, place)


def _problem(error: csv.Error) -> str:
    if "unexpected end" in str(error):
        return "a quoted field that begins here is never closed; close it, or double the quote"
    return f"the line is not CSV ({error})"


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _text(raw: str) -> str:
    return raw.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
