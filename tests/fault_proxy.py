"""An HTTP proxy on loopback between a client and an object store that does what networks and stores do.

Requests pass unchanged, with the Host that the client signed, so signatures stay valid. Bodies are
streamed. Which request meets which fault is drawn from a seed, or scripted.
"""

from __future__ import annotations

import http.client
import os
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit

Kind = Literal["create", "put", "get", "head", "list", "delete", "other"]
Effect = Literal[
    "conflict",  # 409, nothing stored
    "exists",  # 412, nothing stored
    "internal",  # 500, nothing stored
    "slow_down",  # 503, nothing stored
    "reset",  # the connection breaks before the request reaches the store
    "timeout",  # no answer for ``seconds``, nothing stored
    "lost_reply",  # the store has done it, and the connection breaks
    "internal_after",  # the store has done it, and the answer is 500
    "late_reply",  # the store has done it, and no answer comes for ``seconds``
    "truncated",  # the answer's body ends half way
    "slow",  # both bodies pass at ``bytes_per_second``
    "duplicate",  # the request reaches the store twice; the answer is that to the second
    "unconditional",  # the store does not see the condition; where it checks signatures it will refuse
]
# What networks do, and stores that keep their promises.
EFFECTS: tuple[Effect, ...] = (
    *("conflict", "exists", "internal", "slow_down", "reset", "timeout"),
    *("lost_reply", "internal_after", "late_reply", "truncated", "slow", "duplicate"),
)
_ANSWERS = {
    "conflict": (409, "ConditionalRequestConflict"),
    "exists": (412, "PreconditionFailed"),
    "internal": (500, "InternalError"),
    "internal_after": (500, "InternalError"),
    "slow_down": (503, "SlowDown"),
}
_HOP = {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
_PIECE = 1 << 16
_LARGEST_DUPLICATE = 1 << 20


@dataclass(frozen=True)
class Fault:
    """What happens to requests of these kinds whose path matches, each with probability ``share``.

    The first ``skip`` of them pass, and no more than ``times`` are hit.
    """

    effect: Effect
    kinds: frozenset[Kind]
    path: str = ""
    share: float = 1.0
    skip: int = 0
    times: int = 1_000_000
    seconds: float = 2.0
    bytes_per_second: int = 20_000


@dataclass(frozen=True)
class Passed:
    """One request that the store answered: when it came, what it asked, and what was said."""

    at_ns: int
    kind: Kind
    path: str
    status: int
    etag: str | None
    fault: Effect | None


@dataclass
class FaultProxy:
    """The proxy's script and its record. ``budget`` bounds all faults, so that the world calms down."""

    upstream: str
    faults: Sequence[Fault] = ()
    seed: int = 0
    budget: int = 1_000_000
    endpoint_url: str = ""
    hits: Counter[Effect] = field(default_factory=Counter)
    passed: list[Passed] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._lock = threading.Lock()
        self._matched: Counter[int] = Counter()
        self._hit: Counter[int] = Counter()
        address = urlsplit(self.upstream)
        assert address.hostname is not None and address.port is not None
        self.address = (address.hostname, address.port)

    def script(self, *faults: Fault) -> None:
        """From now on these faults, counted anew."""
        with self._lock:
            self.faults = faults
            self._matched.clear()
            self._hit.clear()

    def draw(self, kind: Kind, path: str) -> Fault | None:
        """The fault that the next request of this kind meets."""
        with self._lock:
            for place, fault in enumerate(self.faults):
                if kind not in fault.kinds or not re.search(fault.path, path):
                    continue
                self._matched[place] += 1
                if self._matched[place] <= fault.skip or self._hit[place] >= fault.times:
                    continue
                if self._chance.random() < fault.share and self.hits.total() < self.budget:
                    self._hit[place] += 1
                    self.hits[fault.effect] += 1
                    return fault
        return None

    def record(self, passed: Passed) -> None:
        with self._lock:
            self.passed.append(passed)


def kind_of(method: str, target: str, headers: Iterable[str]) -> Kind:
    """What a request of S3, Google Cloud Storage or Azure Blob asks for."""
    query = parse_qs(urlsplit(target).query, keep_blank_values=True)
    if method == "HEAD":
        return "head"
    if method == "DELETE":
        return "delete"
    if method == "GET":
        return "list" if {"list-type", "comp", "prefix"} & query.keys() else "get"
    if method in ("PUT", "POST"):
        if "if-none-match" in headers or query.get("ifGenerationMatch") == ["0"]:
            return "create"
        return "put" if method == "PUT" else "other"
    return "other"


@contextmanager
def fault_proxy(
    upstream: str, *faults: Fault, seed: int = 0, budget: int = 1_000_000
) -> Iterator[FaultProxy]:
    """A running proxy before the server at ``upstream``, for the time of the block."""
    proxy = FaultProxy(upstream, faults, seed, budget)

    class Handler(_Handler):
        pass

    Handler.proxy = proxy
    server = _Server(("127.0.0.1", 0), Handler)
    proxy.endpoint_url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=lambda: server.serve_forever(0.05), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that is killed breaks its connections; that is what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: FaultProxy

    def log_message(self, *arguments: object) -> None:
        pass

    def handle_any(self) -> None:
        arrived = time.perf_counter_ns()
        path = unquote(urlsplit(self.path).path)
        kind = kind_of(self.command, self.path, {name.lower() for name in self.headers})
        fault = self.proxy.draw(kind, path)
        effect = fault.effect if fault is not None else None
        speed = fault.bytes_per_second if fault is not None and effect == "slow" else None
        if fault is not None and effect in ("conflict", "exists", "internal", "slow_down"):
            for _ in self._body():
                pass
            self._answer_error(fault.effect)
            return
        if fault is not None and effect in ("reset", "timeout"):
            if effect == "timeout":
                time.sleep(fault.seconds)
            self._break()
            return
        if effect == "duplicate" and self._length() <= _LARGEST_DUPLICATE:
            body = b"".join(self._body())
            with suppress(OSError, http.client.HTTPException):
                first = self._forward(iter([body]))
                self._note(first, arrived, kind, path, effect)
                first.read()
                first.close()
            reply = self._forward(iter([body]))
        else:
            reply = self._forward(self._body(speed), unconditional=effect == "unconditional")
        self._note(reply, arrived, kind, path, effect)
        if fault is not None and effect in ("lost_reply", "late_reply", "internal_after"):
            reply.read()
            if effect == "internal_after":
                self._answer_error("internal_after")
                return
            if effect == "late_reply":
                time.sleep(fault.seconds)
            self._break()
            return
        self._answer(reply, speed, truncated=effect == "truncated")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = do_OPTIONS = handle_any

    def _note(
        self, reply: http.client.HTTPResponse, arrived: int, kind: Kind, path: str, effect: Effect | None
    ) -> None:
        self.proxy.record(Passed(arrived, kind, path, reply.status, reply.headers.get("ETag"), effect))

    def _length(self) -> int:
        return int(self.headers.get("Content-Length", _LARGEST_DUPLICATE + 1 if self._chunked() else 0))

    def _chunked(self) -> bool:
        return self.headers.get("Transfer-Encoding", "").lower() == "chunked"

    def _body(self, speed: int | None = None) -> Iterator[bytes]:
        """The request's body in pieces."""
        if self._chunked():
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            piece = self.rfile.read(min(left, _PIECE))
            if not piece:
                raise ConnectionError("the client went away")
            left -= len(piece)
            yield from _paced(piece, speed)

    def _forward(self, body: Iterator[bytes], unconditional: bool = False) -> http.client.HTTPResponse:
        dropped = _HOP | {"expect"} | ({"if-none-match"} if unconditional else set())
        connection = http.client.HTTPConnection(*self.proxy.address, timeout=60)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in dropped:
                connection.putheader(name, value)
        connection.putheader("Connection", "close")
        if self._chunked():
            connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        for piece in body:
            connection.send(b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked() else piece)
        if self._chunked():
            connection.send(b"0\r\n\r\n")
        return connection.getresponse()

    def _answer(self, reply: http.client.HTTPResponse, speed: int | None, truncated: bool) -> None:
        with reply:
            has_body = self.command != "HEAD" and reply.status not in (204, 304)
            length = reply.headers.get("Content-Length")
            self.send_response_only(reply.status, reply.reason)
            for name, value in reply.headers.items():
                if name.lower() not in _HOP:
                    self.send_header(name, value)
            if has_body and length is None:
                self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            if not has_body:
                return
            if truncated:
                whole = reply.read()
                part = whole[: len(whole) // 2]
                self.wfile.write(
                    part if length is not None else b"%x\r\n%b\r\n" % (len(part), part) if part else b""
                )
                self.close_connection = True
                return
            while piece := reply.read(_PIECE):
                for some in _paced(piece, speed):
                    self.wfile.write(some if length is not None else b"%x\r\n%b\r\n" % (len(some), some))
            if length is None:
                self.wfile.write(b"0\r\n\r\n")

    def _answer_error(self, effect: Effect) -> None:
        status, code = _ANSWERS[effect]
        body = (
            b""
            if self.command == "HEAD"
            else f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode()
        )
        self.send_response_only(status, code)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _break(self) -> None:
        """End the connection with a reset, whatever of it is still unread."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())


def _paced(piece: bytes, speed: int | None) -> Iterator[bytes]:
    if speed is None:
        yield piece
        return
    step = max(1, speed // 20)
    for start in range(0, len(piece), step):
        time.sleep(len(piece[start : start + step]) / speed)
        yield piece[start : start + step]
