"""Whole lines of a byte range or of a compressed file, in blocks, in bounded memory."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import pyarrow as pa

from batchinfer.connectors.inputs import ObjectFile
from batchinfer.connectors.types import Compression, StorageError

BLOCK_BYTES = 8 << 20
LONGEST_LINE_BYTES = 64 << 20


def blocks_of_lines(
    file: ObjectFile,
    uri: str,
    compression: Compression,
    start: int = 0,
    stop: int | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[bytes]:
    """The bytes start:stop of the file, unpacked, in blocks that end with a line.

    ``block_bytes`` is how much one request reads. A compressed file is read from its beginning and has
    no ranges. Raises StorageError for a file that
    can't be unpacked or a line of more than 64 MiB.
    """
    if compression == "none":
        file.seek(start)
        left = (file.size() if stop is None else stop) - start

        def read() -> bytes:
            nonlocal left
            data = file.read(min(left, block_bytes))
            left -= len(data)
            return data

        return _whole_lines(read, uri)
    return _whole_lines(_unpacked(file, uri, compression), uri)


def _unpacked(file: ObjectFile, uri: str, compression: Compression) -> Callable[[], bytes]:
    packed = pa.PythonFile(io.BufferedReader(file, BLOCK_BYTES), mode="r")
    stream = pa.CompressedInputStream(packed, "gzip" if compression == "gzip" else "zstd")

    def read() -> bytes:
        try:
            return bytes(stream.read(BLOCK_BYTES))
        except (OSError, pa.ArrowException) as error:
            if file.error is not None:
                raise file.error from error
            raise StorageError(
                f"{uri}: the file can't be unpacked as {compression} ({error}); replace it or leave it out"
            ) from error

    return read


def _whole_lines(read: Callable[[], bytes], uri: str) -> Iterator[bytes]:
    rest = b""
    while chunk := read():
        cut = chunk.rfind(b"\n") + 1
        if cut:
            yield rest + chunk[:cut]
            rest = chunk[cut:]
        else:
            rest += chunk
            if len(rest) > LONGEST_LINE_BYTES:
                raise StorageError(
                    f"{uri}: a line has more than {LONGEST_LINE_BYTES >> 20} MiB; "
                    "check that it is a text file with one row a line"
                )
    if rest:
        yield rest
