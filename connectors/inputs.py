"""Finds and opens input objects by address: files, folders and globs on any store."""

from __future__ import annotations

import glob
import io
import os
import re
from typing import NamedTuple

from batchinfer.connectors.storage import (
    Storage,
    join_uri,
    normalize_uri,
    open_store,
    protocol_of,
    split_root,
)
from batchinfer.connectors.types import ObjectInfo, ObjectStore, StorageError

_MAGIC = re.compile(r"[*?\[]")


class InputObject(NamedTuple):
    """One object that an address stands for; ``in_folder``: found by naming its folder."""

    uri: str
    size: int
    etag: str
    in_folder: bool


class ObjectFile(io.RawIOBase):
    """An object as a seekable binary file; every read is one range request, nothing is kept.

    ``error`` is the failure of the last read, if it failed: libraries that read through this file may
    report it as something else.
    """

    def __init__(self, store: ObjectStore, key: str) -> None:
        """Open the object; raises FileNotFoundError or StorageError."""
        self.info = store.head(key)
        self.error: Exception | None = None
        self._store = store
        self._position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The next byte's position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See io.IOBase."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.info.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def size(self) -> int:
        """Bytes of the object when it was opened."""
        return self.info.size

    def read(self, size: int = -1, /) -> bytes:
        """The next ``size`` bytes, or all that are left."""
        stop = self.info.size if size < 0 else min(self.info.size, self._position + size)
        if stop <= self._position:
            return b""
        try:
            data = self._store.get_range(self.info.key, self._position, stop)
        except Exception as error:
            self.error = error
            raise
        self._position += len(data)
        return data

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """See io.RawIOBase."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def open_input(uri: str, storage: Storage | None = None) -> ObjectFile:
    """The object at ``uri`` as a binary file that reads only the ranges asked for.

    Raises FileNotFoundError, or StorageError with one sentence.
    """
    root, key = split_root(normalize_uri(uri))
    return ObjectFile(_store_at(root, uri, storage), key)


def list_inputs(pattern: str, storage: Storage | None = None) -> list[InputObject]:
    """The objects that one address stands for, sorted by key: a file, a folder's files at any depth, or
    a glob (``*`` and ``?`` within one level, ``**`` over levels).

    Below a folder, and for the wildcards of a glob, names that begin with ``_`` or ``.`` are hidden,
    so an earlier job's folder gives its results and nothing else. Raises StorageError if there is none.
    """
    uri = normalize_uri(pattern)
    root, key = split_root(uri)
    store = _store_at(root, uri, storage)
    found = _exact(store, key)
    if found:
        return [InputObject(uri, found.size, found.etag, in_folder=False)]
    if _MAGIC.search(key):
        infos, in_folder = _glob(store, key), False
    else:
        folder = f"{key.rstrip('/')}/" if key else ""
        infos, in_folder = (
            [info for info in store.list(folder) if not _hidden(info.key[len(folder) :])],
            True,
        )
    if not infos:
        raise StorageError(f"{pattern}: no file is there; correct the address")
    return [InputObject(join_uri(root, info.key), info.size, info.etag, in_folder) for info in infos]


def _store_at(root: str, uri: str, storage: Storage | None) -> ObjectStore:
    """The store at ``root`` with the options that ``storage`` has for ``uri``."""
    matching = [prefix for prefix in storage or {} if f"{uri}/".startswith(prefix)]
    options = {root: (storage or {})[max(matching, key=len)]} if matching else None
    return open_store(root, options)


def _exact(store: ObjectStore, key: str) -> ObjectInfo | None:
    try:
        return store.head(key) if key else None
    except FileNotFoundError:
        return None


def _hidden(path: str) -> bool:
    return any(part.startswith(("_", ".")) for part in path.split("/"))


def _glob(store: ObjectStore, pattern: str) -> list[ObjectInfo]:
    if protocol_of(store.root) == "file":
        paths = glob.glob(f"/{pattern}", recursive=True)
        keys = [path.lstrip("/") for path in paths if os.path.isfile(path)]
        infos = [store.head(key) for key in sorted(set(keys))]
    else:
        literal = pattern[: _MAGIC.search(pattern).start()]  # type: ignore[union-attr]
        infos = store.list(literal)
    matches = re.compile(_expression(pattern)).fullmatch
    return [info for info in infos if matches(info.key)]


def _expression(pattern: str) -> str:
    """A glob as a regular expression over keys."""
    parts: list[str] = []
    at_start = True  # of a level: a wildcard there matches no hidden name
    position = 0
    while position < len(pattern):
        visible = r"(?![._])" if at_start else ""
        at_start = False
        rest = pattern[position:]
        if rest.startswith("**/") and visible:
            parts.append(r"(?:(?![._])[^/]+/)*")
            position += 3
            at_start = True
        elif rest.startswith("**"):
            parts.append(visible + r"[^/]*(?:/(?![._])[^/]*)*")
            position += 2
        elif rest[0] == "*":
            parts.append(visible + r"[^/]*")
            position += 1
        elif rest[0] == "?":
            parts.append(visible + r"[^/]")
            position += 1
        elif rest[0] == "[" and (found := re.match(r"\[(!?)(\]?[^\]]*)\]", rest)):
            negated = "^" if found[1] else ""
            characters = found[2].replace("\\", r"\\").replace("[", r"\[").replace("]", r"\]")
            parts.append(visible + f"[{negated}{characters}]")
            position += found.end()
        else:
            parts.append(re.escape(rest[0]))
            at_start = rest[0] == "/"
            position += 1
    return "".join(parts)
