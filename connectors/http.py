"""Files from web servers: read once, whole, onto this machine."""

from __future__ import annotations

import http.client
import os
import shutil
import urllib.error
import urllib.request
import uuid
from pathlib import Path

from batchinfer.connectors.types import StorageError, TransientStorageError

_TIMEOUT_SECONDS = 60.0
_MAY_PASS = {408, 425, 429, 500, 502, 503, 504}


def download(url: str, path: Path) -> None:
    """Fetch what is at an http:// or https:// address into the file ``path``, whole or not at all.

    Raises StorageError where the server has no such file or the disk no room, and TransientStorageError
    where it failed in a way that may pass.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "xb") as file:
            _fetch(url, file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise StorageError(
            f"{url} can't be kept in {path.parent} ({error.strerror or error}): set BATCHINFER_CACHE to a "
            "folder with room for it"
        ) from error
    finally:
        aside.unlink(missing_ok=True)


def _fetch(url: str, descriptor: int) -> None:
    try:
        answer = urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        kind = TransientStorageError if error.code in _MAY_PASS else StorageError
        raise kind(
            f"{url}: the server answers {error.code} {error.reason}; correct the address or try later"
        ) from error
    except ValueError as error:
        raise StorageError(f"{url}: this is no address of a file ({error}); correct it") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise TransientStorageError(f"{url}: the server can't be reached ({reason}); try again") from error
    with answer, os.fdopen(os.dup(descriptor), "wb") as file:
        source = _Body(answer, url)
        shutil.copyfileobj(source, file, 1 << 20)
        expected = answer.headers.get("Content-Length")
        if expected is not None and source.count != int(expected):
            raise TransientStorageError(
                f"{url}: the connection broke after {source.count:,} bytes; try again"
            )


class _Body:
    """A response's body, whose failures are told from those of the disk."""

    def __init__(self, answer: http.client.HTTPResponse, url: str) -> None:
        self._answer = answer
        self._url = url
        self.count = 0

    def read(self, size: int = -1, /) -> bytes:
        try:
            data = self._answer.read(size)
        except (OSError, http.client.HTTPException) as error:
            raise TransientStorageError(
                f"{self._url}: the connection broke ({error}); try again"
            ) from error
        self.count += len(data)
        return data
