"""Requests that were read and wait for the engine, in order, bounded by their number and their size."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence

from batchinfer.engine.types import Request

QUEUE_BYTES = 64 << 20


class RequestQueue:
    """A queue of requests, at most one a row, that has room for about ``limit`` of them.

    Invariant (``check``): ``size`` is what the prompts of its requests take.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._requests: deque[Request] = deque()
        self._size = 0

    def __len__(self) -> int:
        return len(self._requests)

    def has_room(self) -> bool:
        """Whether more may be read."""
        return len(self._requests) < self._limit and self._size < QUEUE_BYTES

    def extend(self, requests: Iterable[Request]) -> None:
        """Take requests for rows that come after those in it."""
        for request in requests:
            self._requests.append(request)
            self._size += _size(request)

    def put_back(self, requests: Sequence[Request]) -> None:
        """Take requests, in their order, that come before all others."""
        self._requests.extendleft(reversed(requests))
        self._size += sum(map(_size, requests))

    def pop(self) -> Request:
        """The first request, which is no longer in it."""
        request = self._requests.popleft()
        self._size -= _size(request)
        return request

    def bring_forward(self, rows: Collection[int]) -> int:
        """Put the requests for these rows before all others; returns how many there are."""
        found = [request for request in self._requests if request.index in rows]
        if found:
            self._requests = deque(request for request in self._requests if request.index not in rows)
            self._requests.extendleft(reversed(found))
        return len(found)

    def remove(self, gone: Callable[[int], bool]) -> None:
        """Forget the requests for rows for which ``gone`` holds."""
        self._requests = deque(request for request in self._requests if not gone(request.index))
        self._size = sum(map(_size, self._requests))

    def rows(self) -> list[int]:
        """The rows that wait, in order."""
        return [request.index for request in self._requests]

    def check(self) -> None:
        """Raise AssertionError where the invariant is broken."""
        rows = self.rows()
        assert len(set(rows)) == len(rows), f"rows wait twice: {sorted(rows)}"
        assert self._size == sum(map(_size, self._requests))


def _size(request: Request) -> int:
    """About how many bytes a request's prompt takes."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return len(prompt)
    return sum(8 if isinstance(part, int) else len(str(part.get("content"))) for part in prompt)
