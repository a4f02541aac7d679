"""Every store the project writes to keeps the same promises."""

from __future__ import annotations

import errno
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from batchinfer.connectors.storage import Storage, normalize_uri, open_store, probe
from batchinfer.connectors.types import ObjectStore, StorageError, TransientStorageError


@pytest.fixture(params=["local", "memory", "moto", "seaweed", "gcs", "azure"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    match request.param:
        case "local":
            return open_store(str(tmp_path / "job folder"))
        case "memory":
            return open_store(f"memory://{uuid.uuid4().hex}/job")
        case "gcs" | "azure":
            server = request.getfixturevalue(f"{request.param}_server")
            for name, value in server.environment.items():
                monkeypatch.setenv(name, value)
            bucket = f"bucket-{uuid.uuid4().hex[:12]}"
            server.create_bucket(bucket)
            return open_store(f"{server.scheme}://{bucket}/jobs/one")
        case name:
            return open_store(request.getfixturevalue(f"s3_{name}").uri + "/jobs/one")


def test_create_exclusive_keeps_the_first_content(store: ObjectStore) -> None:
    assert store.create_exclusive("claims/00000/0001.json", b"first")
    assert not store.create_exclusive("claims/00000/0001.json", b"second")
    assert store.get("claims/00000/0001.json") == b"first"
    store.put("claims/00000/0001.json", b"renewed")
    assert not store.create_exclusive("claims/00000/0001.json", b"third")
    assert store.get("claims/00000/0001.json") == b"renewed"
    store.delete("claims/00000/0001.json")
    assert store.create_exclusive("claims/00000/0001.json", b"fourth")


def test_create_exclusive_of_a_file(store: ObjectStore, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"1" * 100_000)
    second.write_bytes(b"2")
    assert store.create_exclusive("part.parquet", first)
    assert not store.create_exclusive("part.parquet", second)
    first.unlink()
    assert store.get("part.parquet") == b"1" * 100_000
    store.put("part.parquet", second)
    assert store.get("part.parquet") == b"2"


def test_an_empty_object_is_never_created_exclusively(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for nothing in (b"", tmp_path / "empty"):
        with pytest.raises(StorageError, match="empty object"):
            store.create_exclusive("marker", nothing)
    assert store.list("") == []


def test_sixteen_creators_have_one_winner(store: ObjectStore, request: pytest.FixtureRequest) -> None:
    # SeaweedFS takes seconds for a conflict of sixteen.
    rounds = 2 if "seaweed" in request.node.name else 12
    barrier = threading.Barrier(16)

    def create(writer: int) -> list[bool]:
        won = []
        for turn in range(rounds):
            barrier.wait()
            won.append(store.create_exclusive(f"race/{turn}", b"%d" % writer))
        return won

    with ThreadPoolExecutor(16) as threads:
        results = list(threads.map(create, range(16)))
    for turn in range(rounds):
        winners = [writer for writer in range(16) if results[writer][turn]]
        assert len(winners) == 1
        assert store.get(f"race/{turn}") == b"%d" % winners[0]


def test_missing_objects(store: ObjectStore) -> None:
    for read in (
        store.get,
        store.head,
        lambda key: store.get_range(key, 0, 5),
        lambda key: store.get_range(key, -5, 9),
    ):
        with pytest.raises(FileNotFoundError):
            read("nowhere/nothing")
    store.delete("nowhere/nothing")
    assert store.list("nowhere/") == []
    store.put("folder/object", b"x")
    for read in (store.get, store.head):
        with pytest.raises(FileNotFoundError):
            read("folder")


def test_ranges_are_slices(store: ObjectStore) -> None:
    content = bytes(range(100))
    store.put("object", content)
    for start, stop in [
        (0, 10),
        (90, 200),
        (100, 200),
        (150, 200),
        (5, 5),
        (7, 3),
        (-10, 100),
        (-300, 4),
        (-10, 95),
    ]:
        assert store.get_range("object", start, stop) == content[start:stop], (start, stop)


def test_list_is_sorted_complete_and_fresh(store: ObjectStore) -> None:
    keys = ["a/1", "a/10", "a/2", "a/b/c", "ab", "a.json", "b/ü é"]
    for key in keys:
        store.put(key, key.encode())
    assert [info.key for info in store.list("")] == sorted(keys)
    assert [info.key for info in store.list("a/")] == ["a/1", "a/10", "a/2", "a/b/c"]
    assert [info.key for info in store.list("a/1")] == ["a/1", "a/10"]
    assert [info.size for info in store.list("b")] == [len("b/ü é".encode())]
    store.delete("a/10")
    assert [info.key for info in store.list("a/1")] == ["a/1"]


def test_list_pages(store: ObjectStore) -> None:
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda number: store.put(f"many/{number:05d}", b"x"), range(1100)))
    assert [info.key for info in store.list("many/")] == [f"many/{number:05d}" for number in range(1100)]


def test_head_tells_size_tag_and_time(store: ObjectStore) -> None:
    before = time.time()
    store.put("object", b"one")
    first = store.head("object")
    assert (first.key, first.size) == ("object", 3)
    assert abs(first.modified - before) < 30
    assert store.head("object") == first == store.list("object")[0]
    store.put("object", b"another")
    assert store.head("object").etag != first.etag
    assert store.head("object").modified >= first.modified


def test_probe_passes_and_leaves_nothing(store: ObjectStore) -> None:
    probe(store)
    assert store.list("") == []


@pytest.mark.parametrize("bucket", ["s3_moto", "s3_seaweed"])
def test_an_upload_in_parts_keeps_the_condition(
    bucket: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchinfer.connectors.storage.PART_BYTES", 5 << 20)
    store = open_store(request.getfixturevalue(bucket).uri)
    big = tmp_path / "big"
    big.write_bytes(os.urandom(12 << 20))
    assert store.create_exclusive("big", big)
    assert "-" in store.head("big").etag, "not an upload in parts"
    other = tmp_path / "other"
    other.write_bytes(os.urandom(12 << 20))
    assert not store.create_exclusive("big", other)
    assert not store.create_exclusive("big", other.read_bytes())
    assert store.get("big") == big.read_bytes()
    store.put("big", other)
    assert store.get("big") == other.read_bytes()


Failure = tuple[str, Callable[[ObjectStore], object]]
CALLS: list[Failure] = [
    ("list", lambda store: store.list("")),
    ("get", lambda store: store.get("x")),
    ("put", lambda store: store.put("x", b"x")),
    ("create", lambda store: store.create_exclusive("x", b"x")),
    ("probe", probe),
]


def test_a_bucket_that_is_not_there_is_named(s3_moto: Any) -> None:
    # SeaweedFS makes a missing bucket at the first write.
    store = open_store("s3://no-such-bucket-here/jobs")
    for name, call in CALLS:
        with pytest.raises(StorageError, match=r"no-such-bucket-here.*no such bucket") as caught:
            call(store)
        assert not isinstance(caught.value, TransientStorageError), name


def test_wrong_credentials_are_named(s3_seaweed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = s3_seaweed.uri
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for _, call in CALLS:
        with pytest.raises(StorageError, match=r"does not accept the credentials|access denied") as caught:
            call(open_store(uri))
        assert not isinstance(caught.value, TransientStorageError)


def test_missing_credentials_are_named(
    s3_moto: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    for _, call in CALLS:
        with pytest.raises(StorageError, match="no credentials were found"):
            call(open_store(s3_moto.uri))


def test_an_unreachable_endpoint_may_come_back(s3_moto: Any) -> None:
    uri = s3_moto.uri
    store = open_store(uri, {"s3://": {"endpoint_url": "http://127.0.0.1:9"}})
    with pytest.raises(TransientStorageError, match=r"can't be reached.*127\.0\.0\.1:9"):
        store.get("x")


def test_addresses() -> None:
    assert normalize_uri("s3://bucket/folder//") == "s3://bucket/folder"
    assert normalize_uri("file:///a%20b/c/") == "/a b/c"
    assert normalize_uri("data/x") == os.path.abspath("data/x")
    for uri, message in [
        ("http://host/file", r"http:// is not supported; use .*s3://"),
        ("s3://", "names no bucket"),
        ("", "address is empty"),
    ]:
        with pytest.raises(StorageError, match=message):
            open_store(uri)


def test_options_go_by_the_longest_prefix(s3_moto: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    unreachable, reachable = (
        {"endpoint_url": "http://127.0.0.1:9"},
        {"endpoint_url": s3_moto.server.endpoint_url},
    )
    storage = {
        "s3://": unreachable,
        f"{s3_moto.uri}/": reachable | {"region": None},
        "s3://other/a/longer/prefix/of/something/else/": unreachable,
    }
    assert open_store(s3_moto.uri, storage).list("") == []
    assert open_store(f"{s3_moto.uri}/folder", storage).list("") == []


@pytest.mark.parametrize(
    ("uri", "storage", "message"),
    [
        (
            "s3://b/x",
            {"s3://b/": {"secret": "hidden"}},
            "secret is not an option of s3://.*endpoint_url, region",
        ),
        ("memory://b/x", {"memory://": {"region": "eu"}}, "region is not an option"),
        ("s3://b/x", {"s3://": {"endpoint_url": "not an address"}}, "endpoint_url is no address"),
    ],
)
def test_wrong_options_are_named(uri: str, storage: Storage, message: str) -> None:
    with pytest.raises(StorageError, match=message) as caught:
        open_store(uri, storage).list("")
    assert "hidden" not in str(caught.value)


class _Scripted:
    """An S3 server that answers what it is told; without a script it ignores every condition."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.script: list[tuple[int, str]] = []
        self.requests: list[str] = []
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
                self.send_response(status)
                for name, value in {"ETag": '"tag"', "Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(body)

            def handle_any(self) -> None:
                scripted.requests.append(self.command)
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if scripted.script:
                    status, code = scripted.script.pop(0)
                    self.answer(status, f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode())
                elif self.command == "PUT":
                    scripted.objects[self.path] = body
                    self.answer(200)
                elif self.command == "DELETE":
                    scripted.objects.pop(self.path, None)
                    self.answer(204)
                else:
                    self.answer(200, scripted.objects[self.path])

            do_PUT = do_GET = do_DELETE = handle_any

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint_url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Scripted]:
    fake = _Scripted()
    thread = threading.Thread(target=fake.server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", fake.endpoint_url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setattr("batchinfer.connectors.errors.FIRST_DELAY_SECONDS", 0.001)
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


def test_probe_refuses_a_store_that_ignores_conditions(scripted: _Scripted) -> None:
    with pytest.raises(StorageError, match=r"s3://bucket/out: .*If-None-Match is ignored"):
        probe(open_store("s3://bucket/out"))
    assert scripted.objects == {}


def test_a_conflict_is_tried_again_and_a_failed_condition_is_lost(scripted: _Scripted) -> None:
    store = open_store("s3://bucket/out")
    scripted.script = [(409, "ConditionalRequestConflict"), (503, "SlowDown")]
    assert store.create_exclusive("one", b"1")
    scripted.script = [(409, "ConditionalRequestConflict"), (412, "PreconditionFailed")]
    assert not store.create_exclusive("two", b"2")
    assert scripted.script == []


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (500, "InternalError", TransientStorageError),
        (503, "SlowDown", TransientStorageError),
        (409, "ConditionalRequestConflict", TransientStorageError),
        (403, "AccessDenied", StorageError),
        (400, "ExpiredToken", StorageError),
        (501, "NotImplemented", StorageError),
        (400, "SomethingNew", StorageError),
    ],
)
def test_failures_are_sorted(
    scripted: _Scripted, status: int, code: str, expected: type[Exception]
) -> None:
    scripted.script = [(status, code)] * 50
    with pytest.raises(StorageError, match=r"^s3://bucket/out/one: [^\n]+$") as caught:
        open_store("s3://bucket/out").put("one", b"1")
    assert type(caught.value) is expected
    assert len(scripted.requests) == 1 if expected is StorageError else 4 <= len(scripted.requests) <= 12


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.ENOSPC, "no space left"), (errno.EROFS, "read-only")]
)
def test_local_failures_are_sentences(
    number: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, "m")

    monkeypatch.setattr("os.fsync", fail)
    store = open_store(str(tmp_path))
    with pytest.raises(
        StorageError, match=f"{tmp_path}/part: {expected}|{tmp_path}/part: the file system is {expected}"
    ):
        store.create_exclusive("part", b"x")
    assert list(tmp_path.iterdir()) == []


def test_listing_looks_at_no_folder_beside_the_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    keys = ["part-00001", "part-00002", "claims/00001/0001.json", "claims/00102/0001.json", "claimsx/1"]
    for key in keys:
        store.put(key, b"x")
    seen: list[str] = []
    scandir = os.scandir

    def counted(folder: str) -> Any:
        seen.append(os.path.relpath(folder, tmp_path))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", counted)
    for prefix, folders in [
        ("part-00", ["."]),
        ("claims/00", ["claims", "claims/00001", "claims/00102"]),
        ("claims/001", ["claims", "claims/00102"]),
        ("claims", [".", "claims", "claims/00001", "claims/00102", "claimsx"]),
    ]:
        seen.clear()
        assert [info.key for info in store.list(prefix)] == [
            key for key in sorted(keys) if key.startswith(prefix)
        ]
        assert sorted(seen) == folders


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"a file")
    for key in ("part", "claims/0"):
        with pytest.raises(StorageError, match="no folder"):
            open_store(str(tmp_path / "out")).create_exclusive(key, b"x")


def test_a_file_system_without_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    with pytest.raises(StorageError, match="no hard links"):
        probe(open_store(str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_local_objects_are_never_seen_half_written(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    contents = {b"a" * 200_000, b"b" * 300_000}
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for content in sorted(contents):
                store.put("object", content)

    store.put("object", b"a" * 200_000)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(write)
        try:
            for _ in range(200):
                assert store.get("object") in contents
                assert [info.key for info in store.list("")] == ["object"]
        finally:
            stop.set()
