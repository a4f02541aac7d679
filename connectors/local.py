"""Objects in a folder of a file system: link(2) is its create-if-absent."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from batchinfer.connectors.errors import AlreadyExists, attempt, empty_object
from batchinfer.connectors.types import ObjectInfo, StorageError

# A name no listing shows and no reader of the folder takes for data.
_ASIDE_SUFFIX = ".aside"


def local_etag(status: os.stat_result) -> str:
    """An entity tag of a file: its time of modification and its size."""
    return f"{status.st_mtime_ns:x}-{status.st_size:x}"


class LocalStore:
    """An ObjectStore in the folder ``root``.

    An object is written and synced to disk aside, under a hidden name, then renamed or linked into
    its place, so that readers see whole versions only. Works on one machine's disks and on shared
    file systems that have hard links.
    """

    def __init__(self, root: str) -> None:
        """Use the folder ``root``, made when the first object is written."""
        self.root = os.path.abspath(root)

    def _path(self, key: str) -> str:
        return os.path.join(self.root, key)

    def create_exclusive(self, key: str, data: bytes | Path) -> bool:
        """See ObjectStore."""
        path = self._path(key)
        if not (data if isinstance(data, bytes) else data.stat().st_size):
            raise empty_object(path)
        try:
            attempt(lambda: self._write(path, data, _link), path)
        except AlreadyExists:
            return False
        return True

    def put(self, key: str, data: bytes | Path) -> None:
        """See ObjectStore."""
        path = self._path(key)
        attempt(lambda: self._write(path, data, os.replace), path)

    def get(self, key: str) -> bytes:
        """See ObjectStore."""
        return attempt(lambda: Path(self._path(key)).read_bytes(), self._path(key))

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """See ObjectStore."""

        def read() -> bytes:
            with open(self._path(key), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                first, last, _ = slice(start, stop).indices(size)
                file.seek(first)
                return file.read(max(0, last - first))

        return attempt(read, self._path(key))

    def head(self, key: str) -> ObjectInfo:
        """See ObjectStore."""
        path = self._path(key)
        if os.path.isdir(path):
            raise FileNotFoundError(f"{path}: there is no such object")
        return _info(key, attempt(lambda: os.stat(path), path))

    def list(self, prefix: str) -> list[ObjectInfo]:
        """See ObjectStore."""
        folder, _, _ = prefix.rpartition("/")
        found = attempt(lambda: list(_walk(self._path(folder), folder, prefix, set())), self._path(prefix))
        return sorted(found, key=lambda info: info.key)

    def delete(self, key: str) -> None:
        """See ObjectStore."""
        path = self._path(key)
        attempt(lambda: Path(path).unlink(missing_ok=True), path)

    def _write(self, path: str, data: bytes | Path, publish: Callable[[str, str], None]) -> None:
        folder, name = os.path.split(path)
        try:
            os.makedirs(folder, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise StorageError(
                f"{folder}: this is no folder; remove the file or choose another place"
            ) from error
        aside = os.path.join(folder, f".{name}.{uuid.uuid4().hex}{_ASIDE_SUFFIX}")
        try:
            with open(aside, "xb") as file:
                if isinstance(data, bytes):
                    file.write(data)
                else:
                    with open(data, "rb") as source:
                        shutil.copyfileobj(source, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
            publish(aside, path)
            _sync_folder(folder)
        finally:
            Path(aside).unlink(missing_ok=True)


def _link(aside: str, path: str) -> None:
    """Give the file its name unless the name is taken: FileExistsError."""
    try:
        os.link(aside, path)
    except FileExistsError:
        # Over a network file system the reply to a link that was made may be lost and the call
        # repeated: the number of names tells.
        if os.stat(aside).st_nlink != 2:
            raise
    except OSError as error:
        if error.errno in {errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS}:
            raise StorageError(
                f"{path}: this file system has no hard links, so nothing can be created there exactly "
                "once; choose a folder on another file system or a bucket"
            ) from error
        raise


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _walk(folder: str, key: str, prefix: str, above: set[tuple[int, int]]) -> Iterator[ObjectInfo]:
    """Files below ``folder``, whose key is ``key``, that begin with ``prefix``; nothing else is looked at.
    Links are followed, but never in a circle."""
    try:
        status = os.stat(folder)
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    for entry in entries:
        name = f"{key}/{entry.name}" if key else entry.name
        if not name.startswith(prefix) and not prefix.startswith(f"{name}/"):
            continue
        try:
            if entry.is_dir():
                yield from _walk(entry.path, name, prefix, above | {identity})
            elif entry.is_file() and not entry.name.endswith(_ASIDE_SUFFIX):
                yield _info(name, entry.stat())
        except FileNotFoundError:
            continue  # deleted since the folder was read


def _info(key: str, status: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, status.st_size, local_etag(status), status.st_mtime_ns / 1e9)
