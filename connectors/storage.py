"""Opens object stores by URI: fsspec, with create-if-absent that is atomic on every store allowed here."""

from __future__ import annotations

import functools
import os
import uuid
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec
import fsspec.asyn

from batchinfer.connectors.errors import AlreadyExists, attempt, empty_object
from batchinfer.connectors.local import LocalStore
from batchinfer.connectors.memory import MemoryStore
from batchinfer.connectors.types import ObjectInfo, ObjectStore, StorageError

Storage = Mapping[str, Mapping[str, Any]]
"""Options of stores by URI prefix; the longest prefix of a URI applies to it (the spec's ``storage``)."""

# The stores whose create-if-absent is known to be atomic, and the packages that reach them. fsspec's
# generic create asks first and writes then, so any other protocol is refused.
_EXTRAS = {
    "s3": ("s3", "s3fs"),
    "s3a": ("s3", "s3fs"),
    "gs": ("gcs", "gcsfs"),
    "gcs": ("gcs", "gcsfs"),
    "abfs": ("azure", "adlfs"),
    "abfss": ("azure", "adlfs"),
    "az": ("azure", "adlfs"),
}
_OPTIONS = {"s3": {"endpoint_url", "region"}, "gcs": {"endpoint_url"}, "azure": {"endpoint_url"}}
_SUPPORTED = "a local path, file://, memory://, s3://, gs:// and abfs://"

# Seconds that a store may leave us without a byte before a request counts as lost; the environment may
# say otherwise.
READ_TIMEOUT = "BATCHINFER_READ_TIMEOUT"
_READ_TIMEOUT_SECONDS = 60.0

# Above twice this many bytes an upload is cut into parts.
PART_BYTES = 32 << 20
_PARALLEL_PARTS = 4


def protocol_of(uri: str) -> str:
    """The URI's protocol in lower case; "file" for a path without one."""
    protocol, separator, _ = uri.partition("://")
    return protocol.lower() if separator else "file"


def normalize_uri(uri: str) -> str:
    """The one spelling of ``uri``: local paths absolute, no slash at the end.

    Raises StorageError for a protocol that is not on the list, and for a URI without a bucket.
    """
    protocol = protocol_of(uri)
    if protocol == "file":
        path = unquote(uri.partition("://")[2]) if "://" in uri else os.path.expanduser(uri)
        if not path:
            raise StorageError("the address is empty; give a path or a URI such as s3://bucket/folder")
        return os.path.abspath(path)
    if protocol != "memory" and protocol not in _EXTRAS:
        raise StorageError(f"{uri}: {protocol}:// is not supported; use {_SUPPORTED}")
    path = uri.partition("://")[2].rstrip("/")
    if not path.lstrip("/"):
        raise StorageError(f"{uri}: the address names no bucket; write it as {protocol}://BUCKET/FOLDER")
    return f"{protocol}://{path}"


def split_root(uri: str) -> tuple[str, str]:
    """(root of a store, key below it) of a normalized URI: the bucket, or "/" for local paths."""
    protocol = protocol_of(uri)
    if protocol == "file":
        return "/", uri.lstrip("/")
    bucket, _, key = uri.partition("://")[2].lstrip("/").partition("/")
    return f"{protocol}://{bucket}", key


def join_uri(root: str, key: str) -> str:
    """The URI of the object ``key`` of the store at ``root``."""
    return f"{root.rstrip('/')}/{key}"


def open_store(root_uri: str, storage: Storage | None = None) -> ObjectStore:
    """The store of the objects below ``root_uri``.

    Opening checks the address and the options only; ``probe`` tries the store. Endpoint and region
    come from ``storage`` or, where it has none, from the environment (AWS_ENDPOINT_URL, AWS_REGION,
    ...); credentials come from the environment or the machine's role, never from ``storage``.

    Raises StorageError for an unknown protocol or option, or a package that is not installed.
    """
    root = normalize_uri(root_uri)
    protocol = protocol_of(root)
    options = _options(root, storage or {})
    if protocol == "file":
        return LocalStore(root)
    path = root.partition("://")[2]
    if protocol == "memory":
        return MemoryStore(root, fsspec.filesystem("memory"), "/" + path.strip("/"))
    extra, package = _EXTRAS[protocol]
    environment = tuple(
        sorted(item for item in os.environ.items() if item[0].startswith(("AWS_", READ_TIMEOUT)))
    )
    try:
        if extra == "s3":
            region = options.get("region") or os.environ.get("AWS_REGION")
            return S3Store(root, _s3(options.get("endpoint_url"), region, environment, os.getpid()), path)
        # gcsfs would reach some buckets by another protocol, for which no condition is known to hold.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        file_system = fsspec.filesystem(protocol, **_generic_options(extra, options))
        if extra == "azure":
            _leave_retries_to_us(file_system)
        return GenericStore(root, file_system, path, extra)
    except ImportError as error:
        raise StorageError(
            f"{root}: {protocol}:// needs the package {package}; install batchinfer-jobs[{extra}]"
        ) from error


def _options(uri: str, storage: Storage) -> dict[str, Any]:
    """The options of the longest prefix of ``uri``, less those that are None."""
    matching = [prefix for prefix in storage if f"{uri}/".startswith(prefix)]
    if not matching:
        return {}
    prefix = max(matching, key=len)
    protocol = protocol_of(uri)
    allowed = _OPTIONS[_EXTRAS[protocol][0]] if protocol in _EXTRAS else set()
    options = {name: value for name, value in storage[prefix].items() if value is not None}
    for name in options:
        if name not in allowed:
            known = ", ".join(sorted(allowed)) or "no options"
            raise StorageError(
                f"storage.{prefix}: {name} is not an option of {protocol}://, which has {known}; "
                "credentials come from the environment or the role"
            )
    return options


@functools.lru_cache(maxsize=16)
def _s3(endpoint_url: str | None, region: str | None, environment: object, process: int) -> Any:
    """A connected file system; ``environment`` and ``process`` only tell apart what may not be shared."""
    del environment, process
    import s3fs

    file_system = s3fs.S3FileSystem(
        endpoint_url=endpoint_url,
        client_kwargs={"region_name": region} if region else {},
        config_kwargs={
            "max_pool_connections": 64,
            "connect_timeout": 5,
            "read_timeout": float(os.environ.get(READ_TIMEOUT, _READ_TIMEOUT_SECONDS)),
            "retries": {"total_max_attempts": 2, "mode": "standard"},
        },
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    file_system.retries = 1  # errors.attempt does it, for every store alike
    return file_system


def _generic_options(extra: str, options: Mapping[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if options.get("endpoint_url"):
        settings["endpoint_url" if extra == "gcs" else "account_host"] = options["endpoint_url"]
    return settings


def _leave_retries_to_us(file_system: Any) -> None:
    """Switch off the retries of the Azure client: its pauses of 15 seconds and more would outlast leases.
    errors.attempt does it, for every store alike."""
    pipeline = getattr(file_system.service_client, "_pipeline", None)
    for policy in getattr(pipeline, "_impl_policies", ()):
        if hasattr(policy, "total_retries"):
            policy.total_retries = 0


class S3Store:
    """An ObjectStore in a bucket of S3 or of a server that speaks its protocol."""

    def __init__(self, root: str, file_system: Any, path: str) -> None:
        """Use the objects below ``path`` ("bucket/prefix") through the s3fs ``file_system``."""
        self.root = root
        self._file_system = file_system
        self._bucket, _, prefix = path.partition("/")
        self._prefix = f"{prefix}/" if prefix else ""

    def _call(self, method: str, uri: str, **arguments: Any) -> Any:
        return attempt(
            lambda: self._file_system.call_s3(method, Bucket=self._bucket, **arguments),
            uri,
        )

    def create_exclusive(self, key: str, data: bytes | Path) -> bool:
        """See ObjectStore. The condition travels with the upload or, in parts, with its completion."""
        try:
            self._write(key, data, "create")
        except AlreadyExists:
            return False
        return True

    def put(self, key: str, data: bytes | Path) -> None:
        """See ObjectStore."""
        self._write(key, data, "overwrite")

    def _write(self, key: str, data: bytes | Path, mode: str) -> None:
        path = f"{self._bucket}/{self._prefix}{key}"
        _write(self._file_system, "s3", path, data, mode, join_uri(self.root, key))

    def get(self, key: str) -> bytes:
        """See ObjectStore."""
        return self._get(key, {})

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """See ObjectStore."""
        if start < 0:
            size = self.head(key).size
            start, stop, _ = slice(start, stop).indices(size)
        if stop <= start:
            return b""
        return self._get(key, {"Range": f"bytes={start}-{stop - 1}"})

    def _get(self, key: str, arguments: Mapping[str, str]) -> bytes:
        uri = join_uri(self.root, key)

        def read() -> bytes:
            return bytes(
                fsspec.asyn.sync(
                    self._file_system.loop,
                    _read,
                    self._file_system,
                    self._bucket,
                    self._prefix + key,
                    arguments,
                )
            )

        return attempt(read, uri)

    def head(self, key: str) -> ObjectInfo:
        """See ObjectStore."""
        found = self._call("head_object", join_uri(self.root, key), Key=self._prefix + key)
        return ObjectInfo(
            key, found["ContentLength"], found["ETag"].strip('"'), found["LastModified"].timestamp()
        )

    def list(self, prefix: str) -> list[ObjectInfo]:
        """See ObjectStore."""
        found: list[ObjectInfo] = []
        more: dict[str, str] = {}
        while True:
            page = self._call(
                "list_objects_v2", join_uri(self.root, prefix), Prefix=self._prefix + prefix, **more
            )
            for item in page.get("Contents", ()):
                key = item["Key"][len(self._prefix) :]
                if key and not key.endswith("/"):
                    tag = item["ETag"].strip('"')
                    found.append(ObjectInfo(key, item["Size"], tag, item["LastModified"].timestamp()))
            if not page.get("IsTruncated"):
                return sorted(found, key=lambda info: info.key)
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        """See ObjectStore."""
        self._call("delete_object", join_uri(self.root, key), Key=self._prefix + key)


async def _read(file_system: Any, bucket: str, key: str, arguments: Mapping[str, str]) -> bytes:
    """The body of one GET; a range that begins past the end is empty."""
    try:
        answer = await file_system._call_s3("get_object", Bucket=bucket, Key=key, **arguments)
    except OSError as error:
        response = getattr(error.__cause__, "response", None) or {}
        if response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 416:
            return b""
        raise
    async with answer["Body"] as body:
        return bytes(await body.read())


class GenericStore:
    """An ObjectStore over Google Cloud Storage or Azure Blob Storage, whose fsspec packages pass the
    condition of a create to the service."""

    def __init__(self, root: str, file_system: Any, path: str, service: str) -> None:
        """Use the objects below ``path`` ("bucket/prefix") through the fsspec ``file_system`` of the
        ``service`` ("gcs" or "azure")."""
        self.root = root
        self._file_system = file_system
        self._path = path
        self._service = service

    def create_exclusive(self, key: str, data: bytes | Path) -> bool:
        """See ObjectStore."""
        try:
            self._write(key, data, "create")
        except AlreadyExists:
            return False
        return True

    def put(self, key: str, data: bytes | Path) -> None:
        """See ObjectStore."""
        self._write(key, data, "overwrite")

    def _write(self, key: str, data: bytes | Path, mode: str) -> None:
        path = f"{self._path}/{key}"
        _write(self._file_system, self._service, path, data, mode, join_uri(self.root, key))

    def get(self, key: str) -> bytes:
        """See ObjectStore."""
        path = f"{self._path}/{key}"
        return bytes(attempt(lambda: self._file_system.cat_file(path), join_uri(self.root, key)))

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """See ObjectStore."""
        first, last, _ = slice(start, stop).indices(self.head(key).size)
        if last <= first:
            return b""
        path, uri = f"{self._path}/{key}", join_uri(self.root, key)
        return bytes(attempt(lambda: self._file_system.cat_file(path, start=first, end=last), uri))

    def head(self, key: str) -> ObjectInfo:
        """See ObjectStore."""
        uri = join_uri(self.root, key)
        found = attempt(lambda: self._file_system.info(f"{self._path}/{key}", refresh=True), uri)
        if found["type"] != "file":
            raise FileNotFoundError(f"{uri}: there is no such object")
        return _info(key, found)

    def list(self, prefix: str) -> list[ObjectInfo]:
        """See ObjectStore."""
        folder, _, start = f"{self._path}/{prefix}".rpartition("/")
        try:
            found = attempt(
                lambda: self._file_system.find(folder, prefix=start, detail=True),
                join_uri(self.root, prefix),
            )
        except FileNotFoundError:
            return []
        infos = (_info(path[len(self._path) + 1 :], info) for path, info in found.items())
        return sorted((info for info in infos if info.key.startswith(prefix)), key=lambda info: info.key)

    def delete(self, key: str) -> None:
        """See ObjectStore."""
        uri = join_uri(self.root, key)
        try:
            attempt(lambda: self._file_system.rm_file(f"{self._path}/{key}"), uri)
        except FileNotFoundError:
            return


def _info(key: str, found: Mapping[str, Any]) -> ObjectInfo:
    modified = found.get("last_modified") or found.get("mtime") or found["updated"]
    if isinstance(modified, str):
        modified = datetime.fromisoformat(modified)
    return ObjectInfo(key, found["size"], str(found["etag"]).strip('"'), modified.timestamp())


def _write(file_system: Any, service: str, path: str, data: bytes | Path, mode: str, uri: str) -> None:
    """One upload of bytes or of a file through fsspec; ``mode`` is "create" or "overwrite"."""
    size = len(data) if isinstance(data, bytes) else data.stat().st_size
    if size == 0 and mode == "create":
        raise empty_object(uri)
    settings: dict[str, Any] = {"mode": mode}
    if service in ("s3", "gcs"):
        settings["chunksize"] = PART_BYTES
    if service in ("s3", "azure"):
        settings["max_concurrency"] = _PARALLEL_PARTS
    if isinstance(data, bytes):
        attempt(lambda: file_system.pipe_file(path, data, **settings), uri)
    else:
        attempt(lambda: file_system.put_file(os.fspath(data), path, **settings), uri)


def probe(store: ObjectStore) -> None:
    """Try that ``store`` can be written, read and listed, and that create-if-absent holds there.

    Some servers take any condition and overwrite; on these a job would lose rows, so they are refused.
    Leaves nothing behind. Raises StorageError with one sentence that says what to change.
    """
    key = f"_probe-{uuid.uuid4().hex}.json"
    first, second = b'{"probe": 1}', b'{"probe": 2}'
    # After a lost reply the object that is there may be our own.
    if not store.create_exclusive(key, first) and store.get(key) != first:
        raise StorageError(f"{store.root}: the store says that a new object exists; use another store")
    try:
        if store.create_exclusive(key, second) or store.get(key) != first:
            raise StorageError(
                f"{store.root}: this store overwrites an object that should only be created if absent "
                "(If-None-Match is ignored), so no row could be answered exactly once; use another store"
            )
        if key not in {info.key for info in store.list(key)}:
            raise StorageError(
                f"{store.root}: the store does not list an object just written; use another store"
            )
    finally:
        store.delete(key)
