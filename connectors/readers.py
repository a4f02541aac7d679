"""The input of a job: its files, its schema, its splits, and their rows.

    files = discover(["s3://demo/prompts/*.parquet"], "auto", storage)
    scan = scan_input(files, storage)             # footers, or one pass over text files
    scan.rows, scan.schema                        # the schema is part of the job: store it
    splits = scan.splits(rows_per_split)
    for row in read_split(splits[0], scan.schema, columns, storage): ...     # Row | BadRow, in order
    for part in read_batches(splits[0], scan.schema, columns, storage): ...  # RowBatch: Arrow and positions

Values stay exact as long as they stay in Arrow: to pass columns through, read their batches with
``read_batches`` and select rows by ``indices``; do not rebuild them from ``Row.values``.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import PurePath
from typing import Literal

import pyarrow as pa

from batchinfer.connectors import arrow, csv, jsonl, openai, parquet
from batchinfer.connectors.batches import Record, RowBatch, batches_of_records, selected
from batchinfer.connectors.inputs import InputObject, ObjectFile, list_inputs, open_input
from batchinfer.connectors.lines import blocks_of_lines
from batchinfer.connectors.storage import Storage
from batchinfer.connectors.types import BadRow, Compression, Format, InputFile, Row, Split, StorageError

_FORMATS: dict[str, Format] = {
    ".parquet": "parquet",
    ".parq": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
}
_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
_THREADS = 16
_DELIMITER = b"delimiter"

GRANULE = 64
"""Without a wanted number of rows, text files can be split at multiples of so many rows."""


def discover(
    uris: Sequence[str], format: Literal["auto"] | Format = "auto", storage: Storage | None = None
) -> list[InputFile]:
    """The input's files in the order of ``uris``, within each sorted by name; each file once.

    A URI is a file, a folder or a glob (see ``list_inputs``). The format goes by the name's end, less
    .gz or .zst; with a ``format`` given, a folder gives the files of that format, and files named or
    globbed are read as it whatever their name. Raises StorageError if nothing is there, for a name
    whose format is unknown, and for a mix of formats.
    """
    found: dict[str, InputFile] = {}
    for uri in uris:
        objects = list_inputs(uri, storage)
        files = [file for item in objects if (file := _input_file(item, format)) is not None]
        if not files:
            kind = "an input file" if format == "auto" else f"a {format} file"
            raise StorageError(
                f"{uri}: none of its {len(objects)} files is {kind} by its name; "
                f"names end in {', '.join(_FORMATS)}, and .gz or .zst"
            )
        for file in files:
            found.setdefault(file.uri, file)
    formats = sorted({file.format for file in found.values()})
    if len(formats) > 1:
        raise StorageError(
            f"{', '.join(uris)}: the input mixes {' and '.join(formats)} files; set input.format or "
            "narrow input.uri to one of them"
        )
    return list(found.values())


def _input_file(item: InputObject, format: Literal["auto"] | Format) -> InputFile | None:
    """The object as an input file; None for one that its folder holds besides."""
    name = item.uri.rpartition("/")[2].lower()
    compression: Compression = next(
        (kind for end, kind in _COMPRESSIONS.items() if name.endswith(end)), "none"
    )
    stem = name if compression == "none" else name.rpartition(".")[0]
    by_name = next((kind for end, kind in _FORMATS.items() if stem.endswith(end)), None)
    # Batch files are JSON Lines by their names.
    named = "jsonl" if format == "openai" else format
    if item.in_folder and (by_name is None or named not in {"auto", by_name}):
        return None
    chosen = by_name if format == "auto" else format
    if chosen is None:
        raise StorageError(
            f"{item.uri}: the name does not tell the format; set input.format, or let it end in "
            f"{', '.join(_FORMATS)}, and .gz or .zst"
        )
    if chosen in ("parquet", "arrow") and compression != "none":
        kind = "Parquet" if chosen == "parquet" else "Arrow"
        raise StorageError(f"{item.uri}: a compressed {kind} file can't be read by ranges; unpack it")
    return InputFile(item.uri, item.size, item.etag, chosen, compression)


@dataclass(frozen=True, slots=True)
class FileScan:
    """Where the rows of one file are.

    ``groups`` are the rows of each row group of a Parquet file; an Arrow IPC file, which can be cut
    anywhere, is one. For text files ``offsets`` and ``lines`` say where every ``granule``-th row begins:
    byte, and line number from 1. Where a line may be several rows, ``firsts`` counts the rows before each
    of these places, which are then as close as the lines allow.
    """

    file: InputFile
    rows: int
    groups: tuple[int, ...] = ()
    granule: int = GRANULE
    offsets: Sequence[int] = ()
    lines: Sequence[int] = ()
    firsts: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class InputScan:
    """What planning knows of the input: its files, rows and schema."""

    files: tuple[FileScan, ...]
    schema: pa.Schema
    rows_per_split: int | None

    @property
    def rows(self) -> int:
        """Rows of the whole input."""
        return sum(file.rows for file in self.files)

    def splits(self, rows_per_split: int | None = None) -> list[Split]:
        """The whole input in consecutive splits of at most ``rows_per_split`` rows each.

        None takes the number that the scan was made with. Splits end with their file. In Parquet,
        whole row groups go together while they fit, and larger ones are cut; text files are cut at
        multiples of the scan's granule (at least one), so there splits are at most that long or that
        granule. Compressed text files are cut only if the scan was made with a number of rows.
        """
        rows = rows_per_split or self.rows_per_split
        if rows is None:
            raise ValueError("the scan was made without rows_per_split, so splits() needs it")
        splits: list[Split] = []
        first_row = 0
        for scan in self.files:
            file = scan.file
            if file.format in ("parquet", "arrow"):
                for start, stop in _cut_groups(scan.groups, rows):
                    splits.append(Split(file, "rows", start, stop, first_row + start, stop - start))
            elif file.compression == "none":
                splits += _byte_splits(scan, rows, first_row)
            elif scan.rows:
                step = scan.rows if self.rows_per_split is None else rows
                starts = scan.firsts if scan.firsts and step < scan.rows else range(0, scan.rows, step)
                for start, stop in pairwise((*starts, scan.rows)):
                    count = stop - start
                    splits.append(Split(file, "rows", start, start + count, first_row + start, count))
            first_row += scan.rows
        return splits


def _cut_groups(groups: Sequence[int], rows: int) -> Iterator[tuple[int, int]]:
    """Row ranges of at most ``rows`` rows that join whole row groups or cut one."""
    start = stop = 0
    for group in groups:
        if stop > start and stop + group - start > rows:
            yield start, stop
            start = stop
        stop += group
        while stop - start > rows:
            yield start, start + rows
            start += rows
    if stop > start:
        yield start, stop


def _byte_splits(scan: FileScan, rows: int, first_row: int) -> Iterator[Split]:
    step = max(1, rows // scan.granule)
    marks = list(zip(scan.offsets, scan.lines, strict=True))
    for mark in range(0, len(marks), step):
        start, line = marks[mark]
        stop = marks[mark + step][0] if mark + step < len(marks) else scan.file.size
        if scan.firsts:
            before = scan.firsts[mark]
            count = (scan.firsts[mark + step] if mark + step < len(marks) else scan.rows) - before
        else:
            before = mark * scan.granule
            count = min(scan.rows - before, step * scan.granule)
        yield Split(scan.file, "bytes", start, stop, first_row + before, count, line)


def scan_input(
    files: Sequence[InputFile],
    storage: Storage | None = None,
    rows_per_split: int | None = None,
    delimiter: str | None = None,
) -> InputScan:
    """Count the rows and find the schema: of Parquet from the footers, of JSONL and CSV in one pass.

    With ``rows_per_split`` text files can be split exactly there. What separates the fields of CSV is
    found from its first rows unless ``delimiter`` says it; another one than the comma is kept in the
    schema's metadata. Files are read in parallel. Raises StorageError naming a file that is unreadable,
    changed since ``discover``, or whose columns don't fit those of the others.
    """
    granule = rows_per_split or GRANULE
    format = files[0].format
    if delimiter is not None and format != "csv":
        raise StorageError(
            f"input.delimiter is given, but {files[0].uri} is read as {format}: remove it, or set "
            "input.format to csv"
        )
    columnar = {"parquet": _scan_parquet, "arrow": _scan_arrow}
    with ThreadPoolExecutor(_THREADS if format in columnar else 4) as threads:
        if format in columnar:
            footers = list(threads.map(lambda file: columnar[format](file, storage), files))
            schema = footers[0][1]
            for file, (_, other) in zip(files, footers, strict=True):
                schema = parquet.unify(schema, other, file.uri)
            scans = [scan for scan, _ in footers]
        elif format == "jsonl":
            lines = list(threads.map(lambda file: _scan_jsonl(file, storage, granule), files))
            kinds = jsonl.Kinds()
            for _, seen in lines:
                kinds.merge(seen)
            schema = jsonl.schema_of(kinds)
            scans = [scan for scan, _ in lines]
        elif format == "openai":
            batches = list(threads.map(lambda file: _scan_openai(file, storage, granule), files))
            schema = openai.schema(any(logprobs for _, logprobs in batches))
            scans = [scan for scan, _ in batches]
        else:
            between = delimiter or _common_delimiter(
                files, list(threads.map(lambda file: _find_delimiter(file, storage), files))
            )
            records = list(threads.map(lambda file: _scan_csv(file, storage, granule, between), files))
            columns: dict[str, str] = {}
            for _, by_name in records:
                for name, kind in by_name.items():
                    columns[name] = csv.combine(columns.get(name, "null"), kind)
            schema = pa.schema(
                [pa.field(name, csv.arrow_type(kind)) for name, kind in columns.items()],
                None if between == "," else {_DELIMITER: between.encode()},
            )
            scans = [scan for scan, _ in records]
    return InputScan(tuple(scans), schema, rows_per_split)


def _open(file: InputFile, storage: Storage | None) -> ObjectFile:
    try:
        opened = open_input(file.uri, storage)
    except FileNotFoundError as error:
        raise _gone(file) from error
    _check_unchanged(file, opened)
    return opened


def _gone(file: InputFile) -> StorageError:
    return StorageError(f"{file.uri}: the input file is gone since the job was planned; put it back")


def _check_unchanged(file: InputFile, opened: ObjectFile) -> None:
    if (opened.info.size, opened.info.etag) != (file.size, file.etag):
        raise StorageError(
            f"{file.uri}: the input file has changed since the job was planned; put the old one back, "
            "or submit a new job with another output.uri"
        )


def _scan_parquet(file: InputFile, storage: Storage | None) -> tuple[FileScan, pa.Schema]:
    footer = parquet.read_footer(_open(file, storage), file.uri)
    groups = tuple(footer.row_group(group).num_rows for group in range(footer.num_row_groups))
    return FileScan(file, footer.num_rows, groups), parquet.schema_of(footer, file.uri)


def _scan_arrow(file: InputFile, storage: Storage | None) -> tuple[FileScan, pa.Schema]:
    rows, schema = arrow.scan(_open(file, storage), file.uri)
    return FileScan(file, rows, (rows,) if rows else ()), schema


def _scan_jsonl(file: InputFile, storage: Storage | None, granule: int) -> tuple[FileScan, jsonl.Kinds]:
    schema = jsonl.SchemaScan()
    rows = offset = line_number = 0
    offsets, lines = array("q"), array("q")
    for block in blocks_of_lines(_open(file, storage), file.uri, file.compression):
        if offset == 0 and ".json" in PurePath(file.uri.lower()).suffixes and jsonl.is_array_file(block):
            raise StorageError(
                f"{file.uri}: the file is one JSON array; write it as JSON Lines, one object a line"
            )
        for line in block.split(b"\n"):
            line_number += 1
            if line and not line.isspace():
                if rows % granule == 0:
                    offsets.append(offset)
                    lines.append(line_number)
                rows += 1
            offset += len(line) + 1
        if block.endswith(b"\n"):  # after it split() saw one more line, which the next block begins
            line_number -= 1
            offset -= 1
        schema.add(block)
    return FileScan(file, rows, (), granule, offsets, lines), schema.kinds


def _scan_openai(file: InputFile, storage: Storage | None, granule: int) -> tuple[FileScan, bool]:
    """The scan of a batch file, and whether any of its lines asks for log-probabilities."""
    scan = openai.LineScan(blocks_of_lines(_open(file, storage), file.uri, file.compression), granule)
    return FileScan(file, scan.rows, (), granule, scan.offsets, scan.lines, scan.firsts), scan.logprobs


def _find_delimiter(file: InputFile, storage: Storage | None) -> str | None:
    blocks = blocks_of_lines(_open(file, storage), file.uri, file.compression, block_bytes=csv.SAMPLE_BYTES)
    return csv.find_delimiter(next(blocks, b""))


def _common_delimiter(files: Sequence[InputFile], found: Sequence[str | None]) -> str:
    """The delimiter of all files; those of one column have any."""
    by_delimiter = {delimiter: file.uri for file, delimiter in zip(files, found, strict=True) if delimiter}
    if len(by_delimiter) > 1:
        (first, one), (second, other), *_ = by_delimiter.items()
        raise StorageError(
            f"{one} separates its fields by {first!r}, but {other} by {second!r}; convert one of them, or "
            "set input.delimiter"
        )
    return next(iter(by_delimiter), ",")


def _scan_csv(
    file: InputFile, storage: Storage | None, granule: int, delimiter: str
) -> tuple[FileScan, dict[str, str]]:
    records = csv.CsvRecords(
        blocks_of_lines(_open(file, storage), file.uri, file.compression), delimiter=delimiter
    )
    names = csv.header(records, file.uri)
    schema = csv.SchemaScan(names)
    rows = 0
    offsets, lines = array("q"), array("q")
    for record in records:
        if rows % granule == 0:
            offsets.append(records.first_offset)
            lines.append(records.first_line)
        rows += 1
        if isinstance(record, list) and len(record) == len(names):
            schema.add(record)
    return FileScan(file, rows, (), granule, offsets, lines), schema.by_name()


def read_batches(
    split: Split, schema: pa.Schema, columns: Sequence[str] | None = None, storage: Storage | None = None
) -> Iterator[RowBatch]:
    """The rows of a split as Arrow batches of the asked columns of ``schema`` (None: all), streaming.

    Reads only the split's byte range or row groups, and of Parquet only these columns; gives only the
    rows that the split asks for. Raises
    StorageError naming the file if it is gone or changed since the plan; TransientStorageError if the
    store fails for longer than a few tries; KeyError for a column that ``schema`` lacks.
    """
    wanted = selected(schema, columns)
    file = split.file
    opened = _open(file, storage)
    if file.format == "parquet":
        rows = parquet.read_rows(opened, file.uri, split.start, split.stop, split.first_row, wanted)
    elif file.format == "arrow":
        rows = arrow.read_rows(opened, file.uri, split.start, split.stop, split.first_row, wanted)
    else:
        delimiter = (schema.metadata or {}).get(_DELIMITER, b",").decode()
        records = _records(split, opened, wanted, storage, delimiter)
        rows = batches_of_records(records, wanted, split.first_row)
    count = 0
    only = None if split.only is None else frozenset(split.only)
    with closing(opened):
        try:
            for part in rows:
                count += len(part.indices) + len(part.bad)
                if only is not None:
                    part = part.only(only)
                if part.indices or part.bad:
                    yield part
        except FileNotFoundError as error:
            raise _gone(file) from error
    # A file replaced while it was read gives rows that nobody planned.
    _open(file, storage).close()
    if count != split.rows:
        raise StorageError(
            f"{file.uri}: the plan counts {split.rows} rows where {count} are; submit a new job"
        )


def _records(
    split: Split, opened: ObjectFile, schema: pa.Schema, storage: Storage | None, delimiter: str
) -> Iterator[Record | BadRow]:
    file, first_row = split.file, split.first_row
    in_bytes = split.unit == "bytes"
    start, stop = (split.start, split.stop) if in_bytes else (0, None)
    blocks = blocks_of_lines(opened, file.uri, file.compression, start, stop)
    if file.format in ("jsonl", "openai"):
        first_line, skip = (split.first_line, 0) if in_bytes else (1, split.start)
        lines = jsonl.records if file.format == "jsonl" else openai.records
        rows = lines(blocks, schema, file.uri, first_line, first_row, skip)
        return islice(rows, split.rows)
    if in_bytes:
        head = blocks_of_lines(_open(file, storage), file.uri, "none", block_bytes=csv.SAMPLE_BYTES)
        names = csv.header(csv.CsvRecords(head, delimiter=delimiter), file.uri)
        records = csv.CsvRecords(blocks, start, split.first_line - 1, delimiter)
        return csv.records(records, names, schema, file.uri, first_row)
    records = csv.CsvRecords(blocks, delimiter=delimiter)
    names = csv.header(records, file.uri)
    rows = csv.records(records, names, schema, file.uri, first_row - split.start)
    return islice(rows, split.start, split.stop)


def read_split(
    split: Split, schema: pa.Schema, columns: Sequence[str] | None = None, storage: Storage | None = None
) -> Iterator[Row | BadRow]:
    """The rows of a split in the order of the input; see ``read_batches``.

    ``Row.values`` is a mapping of the asked columns whose values become Python objects when looked up;
    maps become dicts, and nanoseconds are cut to microseconds.
    """
    for part in read_batches(split, schema, columns, storage):
        yield from part.rows()
