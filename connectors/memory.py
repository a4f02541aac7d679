"""Objects in this process's memory: a lock is its create-if-absent."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from batchinfer.connectors.errors import empty_object
from batchinfer.connectors.types import ObjectInfo

_memory_lock = threading.Lock()


class MemoryStore:
    """An ObjectStore in this process's memory, shared with fsspec's memory:// file system."""

    def __init__(self, root: str, file_system: Any, path: str) -> None:
        """Use the objects below ``path`` of the in-memory ``file_system``."""
        self.root = root
        self._file_system = file_system
        self._path = path

    def create_exclusive(self, key: str, data: bytes | Path) -> bool:
        """See ObjectStore."""
        content = data if isinstance(data, bytes) else data.read_bytes()
        if not content:
            raise empty_object(f"{self.root}/{key}")
        with _memory_lock:
            if f"{self._path}/{key}" in self._file_system.store:
                return False
            self._file_system.pipe_file(f"{self._path}/{key}", content)
        return True

    def put(self, key: str, data: bytes | Path) -> None:
        """See ObjectStore."""
        content = data if isinstance(data, bytes) else data.read_bytes()
        with _memory_lock:
            self._file_system.pipe_file(f"{self._path}/{key}", content)

    def get(self, key: str) -> bytes:
        """See ObjectStore."""
        with _memory_lock:
            return bytes(self._file(key).getvalue())

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """See ObjectStore."""
        return self.get(key)[start:stop]

    def head(self, key: str) -> ObjectInfo:
        """See ObjectStore."""
        with _memory_lock:
            return self._info(key, self._file(key))

    def list(self, prefix: str) -> list[ObjectInfo]:
        """See ObjectStore."""
        start = len(self._path) + 1
        with _memory_lock:
            return [
                self._info(path[start:], file)
                for path, file in sorted(self._file_system.store.items())
                if path.startswith(f"{self._path}/{prefix}")
            ]

    def delete(self, key: str) -> None:
        """See ObjectStore."""
        with _memory_lock:
            self._file_system.store.pop(f"{self._path}/{key}", None)

    def _file(self, key: str) -> Any:
        try:
            return self._file_system.store[f"{self._path}/{key}"]
        except KeyError:
            raise FileNotFoundError(f"{self.root}/{key}: there is no such object") from None

    def _info(self, key: str, file: Any) -> ObjectInfo:
        modified = file.modified.timestamp()
        size = len(file.getbuffer())
        return ObjectInfo(key, size, f"{int(modified * 1e6):x}-{size:x}", modified)
