"""The nouns between storage, readers and the jobs that use them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Format = Literal["parquet", "arrow", "jsonl", "csv", "openai"]
Compression = Literal["none", "gzip", "zstd"]


class StorageError(Exception):
    """A store refused or can't do what was asked, for good: one sentence that names the object."""


class TransientStorageError(StorageError):
    """A store failed in a way that may pass (5xx, 409, time-out, connection): try again."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One stored object: its key below the store's root, bytes, entity tag, and the store's own
    time of last modification in seconds since the epoch."""

    key: str
    size: int
    etag: str
    modified: float


class ObjectStore(Protocol):
    """Whole objects below one root; every method may raise StorageError or TransientStorageError.

    Objects are written whole: a reader sees all of one version or none. A missing object raises
    FileNotFoundError. Keys use "/" and are relative to ``root``.
    """

    root: str

    def create_exclusive(self, key: str, data: bytes | Path) -> bool:
        """Create the object if no such key exists, atomically: False if one does.

        ``data`` is the content or a local file that holds it. After a lost reply the store may hold
        our own object and this answer False: the caller reads back and compares its nonce.
        """
        ...

    def put(self, key: str, data: bytes | Path) -> None:
        """Create or replace the object."""
        ...

    def get(self, key: str) -> bytes:
        """The whole content."""
        ...

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes start:stop of the content; negative ``start`` counts from the end."""
        ...

    def head(self, key: str) -> ObjectInfo:
        """The object's size, tag and time, as the store has them now."""
        ...

    def list(self, prefix: str) -> list[ObjectInfo]:
        """All objects whose key starts with ``prefix``, sorted by key; strongly consistent."""
        ...

    def delete(self, key: str) -> None:
        """Delete the object; a missing one is no error."""
        ...


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file of the input as it was when the job was planned."""

    uri: str
    size: int
    etag: str
    format: Format
    compression: Compression


@dataclass(frozen=True, slots=True)
class Split:
    """Consecutive rows of one file: a unit of reading.

    ``unit`` says what ``start`` and ``stop`` count: "rows" of the file, or "bytes" at line borders.
    ``first_row`` is the position of its first row in the whole input, ``rows`` how many there are;
    ``first_line`` the number of its first line in the file, from 1 (0 where there are no lines).
    ``only`` are the positions in the whole input of the rows to give, ascending; None: all of them.
    """

    file: InputFile
    unit: Literal["rows", "bytes"]
    start: int
    stop: int
    first_row: int
    rows: int
    first_line: int = 0
    only: tuple[int, ...] | None = None

    @property
    def given(self) -> int:
        """How many rows reading it gives."""
        return self.rows if self.only is None else len(self.only)


@dataclass(frozen=True, slots=True)
class Row:
    """One readable input row: its position in the whole input and its values by column."""

    index: int
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row that can't be read: its position in the whole input, what is wrong (file and line
    named), and the raw text where there is one."""

    index: int
    code: str
    message: str
    raw: str | None
