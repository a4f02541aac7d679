"""JSON Lines: the schema that all rows fit, and rows by byte range."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.json

from batchinfer.connectors.batches import Mismatch, Record
from batchinfer.connectors.types import BadRow, StorageError

MOST_FIELDS = 256
"""An object with more different keys than this is kept as its JSON text."""

_PILOT_LINES = 1000
_BOM = b"\xef\xbb\xbf"
_INT64 = range(-(2**63), 2**63)


class Kinds:
    """What has been seen of one column: how many values of each kind, and the same of their parts.

    ``type()`` is the Arrow type for the column: int64, float64, bool, string, list or struct. Numbers
    of both kinds are float64; any other mix of scalars is a string, where a value that is no string
    stands as its JSON text. Where objects or arrays are mixed with something else, the kind that
    most values have wins, and the other rows don't fit (but a string takes any value). A column with
    nothing but nulls is a string. A string stays a string, also when it looks like a date.
    """

    __slots__ = ("counts", "fields", "item")

    def __init__(self) -> None:
        """Nothing seen yet."""
        self.counts: dict[str, int] = {}
        self.item: Kinds | None = None
        self.fields: dict[str, Kinds] = {}

    def _count(self, kind: str, values: int = 1) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + values

    def _field(self, name: str) -> Kinds:
        found = self.fields.get(name)
        if found is None:
            found = self.fields[name] = Kinds()
        return found

    def _items(self) -> Kinds:
        if self.item is None:
            self.item = Kinds()
        return self.item

    def add(self, value: Any) -> None:
        """Note a parsed JSON value."""
        if value is None:
            return
        kind = type(value)
        if kind is str:
            self._count("string")
        elif kind is bool:
            self._count("bool")
        elif kind is int:
            self._count("int" if value in _INT64 else "float")
        elif kind is float:
            self._count("float")
        elif kind is list:
            self._count("list")
            for item in value:
                self._items().add(item)
        else:
            self._count("struct")
            for name, part in value.items():
                self._field(name).add(part)

    def add_array(self, array: pa.Array) -> None:
        """Note all values of an array that Arrow's JSON reader made."""
        valid = len(array) - array.null_count
        kind = array.type
        if pa.types.is_null(kind):
            return
        if pa.types.is_struct(kind):
            self._count("struct", valid)
            for field, part in zip(kind, array.flatten(), strict=True):
                self._field(field.name).add_array(part)
        elif pa.types.is_list(kind):
            self._count("list", valid)
            items = array.flatten()
            if len(items):
                self._items().add_array(items)
        elif valid:
            names = {pa.int64(): "int", pa.float64(): "float", pa.bool_(): "bool"}
            self._count(names.get(kind, "string"), valid)

    def merge(self, other: Kinds) -> None:
        """Note all that ``other`` has seen."""
        for kind, values in other.counts.items():
            self._count(kind, values)
        for name, part in other.fields.items():
            self._field(name).merge(part)
        if other.item is not None:
            self._items().merge(other.item)

    def wide(self) -> bool:
        """Whether an object here or below has more keys than become fields."""
        parts = [*self.fields.values(), *([self.item] if self.item else [])]
        return len(self.fields) > MOST_FIELDS or any(part.wide() for part in parts)

    def type(self) -> pa.DataType:
        """The Arrow type for what has been seen."""
        counts = self.counts
        scalars = sum(counts.get(kind, 0) for kind in ("string", "bool", "int", "float"))
        structs, lists = counts.get("struct", 0), counts.get("list", 0)
        if structs and structs >= max(lists, scalars):
            if not self.fields or len(self.fields) > MOST_FIELDS:
                return pa.string()
            return pa.struct([pa.field(name, part.type()) for name, part in self.fields.items()])
        if lists and lists >= scalars:
            return pa.list_(self.item.type() if self.item else pa.string())
        seen = {kind for kind in ("string", "bool", "int", "float") if counts.get(kind)}
        if seen == {"int"}:
            return pa.int64()
        if seen and seen <= {"int", "float"}:
            return pa.float64()
        return pa.bool_() if seen == {"bool"} else pa.string()


def schema_of(kinds: Kinds) -> pa.Schema:
    """A column for every key of the rows that ``kinds`` has seen, in the order of their first sight."""
    return pa.schema([pa.field(name, part.type()) for name, part in kinds.fields.items()])


class SchemaScan:
    """Collects the kinds of JSON Lines from blocks of whole lines."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self.kinds = Kinds()
        self._first = True

    def add(self, block: bytes) -> None:
        """Note all rows of a block; lines that are no objects are left to the reader to report."""
        if self._first:
            self._first = False
            lines = block.removeprefix(_BOM).split(b"\n", _PILOT_LINES)
            self._add_lines(lines[:_PILOT_LINES])
            block = lines[_PILOT_LINES] if len(lines) > _PILOT_LINES else b""
        if not block.strip():
            return
        if not self.kinds.wide():
            # Arrow's reader is fast, but stops at the first line that is bad or unlike the others,
            # and makes every key a column.
            try:
                table = pyarrow.json.read_json(
                    pa.BufferReader(block), pyarrow.json.ReadOptions(block_size=1 << 20)
                )
            except (pa.ArrowException, UnicodeError):
                pass
            else:
                for name, column in zip(table.column_names, table.columns, strict=True):
                    part = self.kinds._field(name)
                    for chunk in column.chunks:
                        part.add_array(chunk)
                return
        self._add_lines(block.split(b"\n"))

    def _add_lines(self, lines: list[bytes]) -> None:
        for line in lines:
            if line and not line.isspace():
                try:
                    value = json.loads(line.decode())
                except (ValueError, RecursionError):
                    continue
                if type(value) is dict:
                    for name, part in value.items():
                        self.kinds._field(name).add(part)


def is_array_file(block: bytes) -> bool:
    """Whether a file's first block begins a JSON array over several lines, not JSON Lines."""
    first = block.removeprefix(_BOM).lstrip()[:1]
    return first == b"["


Fit = Callable[[Any], Any]


def fit(kind: pa.DataType) -> Fit:
    """A function from a parsed JSON value to what Arrow takes for ``kind``; it raises Mismatch."""
    if pa.types.is_string(kind):
        return _as_text
    if pa.types.is_list(kind):
        item = fit(kind.value_type)

        def fit_list(value: Any) -> Any:
            if value is None:
                return None
            if type(value) is not list:
                raise Mismatch(_unlike(value, "an array"))
            return [item(part) for part in value]

        return fit_list
    if pa.types.is_struct(kind):
        fields = [(field.name, fit(field.type)) for field in kind]

        def fit_struct(value: Any) -> Any:
            if value is None:
                return None
            if type(value) is not dict:
                raise Mismatch(_unlike(value, "an object"))
            return {name: part(value.get(name)) for name, part in fields}

        return fit_struct
    if pa.types.is_int64(kind):
        return _as_int
    if pa.types.is_float64(kind):
        return _as_float
    if pa.types.is_boolean(kind):
        return _as_bool
    raise StorageError(f"a JSON column can't have the type {kind}; plan the input again")


def _as_text(value: Any) -> Any:
    if value is None or type(value) is str:
        return value
    return json.dumps(value, ensure_ascii=False)


def _as_int(value: Any) -> Any:
    if value is None or (type(value) is int and value in _INT64):
        return value
    raise Mismatch(_unlike(value, "a whole number of 64 bits"))


def _as_float(value: Any) -> Any:
    if value is None or type(value) is float:
        return value
    if type(value) is int:
        try:
            return float(value)
        except OverflowError:
            pass
    raise Mismatch(_unlike(value, "a number"))


def _as_bool(value: Any) -> Any:
    if value is None or type(value) is bool:
        return value
    raise Mismatch(_unlike(value, "true or false"))


def _unlike(value: Any, wanted: str) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return f"is {text if len(text) <= 60 else text[:57] + '...'}, but it must be {wanted}"


def records(
    blocks: Iterator[bytes], schema: pa.Schema, uri: str, first_line: int, first_row: int, skip: int
) -> Iterator[Record | BadRow]:
    """The rows of blocks of lines that begin at line ``first_line``, less the first ``skip`` ones.

    Values are fitted to ``schema``; ``first_row`` is the position of the first row given out.
    """
    fits = [(field.name, fit(field.type)) for field in schema]
    number, index = first_line - 1, first_row - skip
    for block in blocks:
        lines = block.split(b"\n")
        if not lines[-1]:
            lines.pop()
        for line in lines:
            number += 1
            if number == 1:
                line = line.removeprefix(_BOM)
            if line and not line.isspace():
                if index >= first_row:
                    yield _record(line, fits, f"{uri}, line {number}", index)
                index += 1


def _record(line: bytes, fits: list[tuple[str, Fit]], place: str, index: int) -> Record | BadRow:
    raw = line.decode("utf-8", "replace").rstrip("\r")
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError:
        return BadRow(index, "bad_line", f"{place}: the line is not valid UTF-8", raw)
    except (ValueError, RecursionError) as error:
        return BadRow(index, "bad_line", f"{place}: the line is not JSON ({error})", raw)
    if type(value) is not dict:
        return BadRow(index, "bad_line", f"{place}: the line is JSON, but no object", raw)
    values = []
    for name, fit_value in fits:
        try:
            values.append(fit_value(value.get(name)))
        except Mismatch as mismatch:
            return BadRow(index, "type_mismatch", f"{place}: column {name} {mismatch}", raw)
    return Record(values, raw, place)
