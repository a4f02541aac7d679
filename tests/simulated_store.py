"""A strongly consistent store in the simulated world, its faults, and the rules of the job folder."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulated_world import SECOND, Broken, Killed, Process, World

from batchinfer.connectors.types import ObjectInfo, TransientStorageError

EPOCH = 1_800_000_000

FAULTS = ("kill_before", "kill_after", "freeze", "lost_reply", "error", "phantom")
CALLS = (
    *("list claims", "create claims", "put claims", "get claims"),
    *("list progress", "create progress", "get progress", "delete progress"),
    *("create inflight", "get inflight", "delete inflight"),
    *("put failures", "create part", "head part", "get part", "list part"),
    *("put workers", "head workers", "list workers", "get workers"),
    *("put committed.json", "get committed.json"),
    *("list control", "get control", "put summary.json", "get summary.json", "read input"),
    *("list rounds", "get rounds", "list budget", "create budget", "get budget"),
    *("create control", "get failures"),  # by a worker: the job stops itself
    *("list control of a person", "get control of a person", "create control of a person"),
    *("list rounds of a person", "get rounds of a person", "create rounds of a person"),
    *("list part of a person", "head part of a person", "get part of a person"),
    *("get failures of a person", "get plan of a person"),
)

AIMS = [
    (fault, call) for call in CALLS for fault in FAULTS if fault != "phantom" or call.startswith("create")
]
"""Every fault with each kind of call that it may strike: only a create can be told that its object exists,
which is not there afterwards."""

_UPLOADS = ("create part", "create progress", "create inflight", "put failures")


@dataclass(frozen=True)
class Faults:
    """What may happen at a storage call, as shares; ``budget`` bounds their number, so that the world
    calms down. ``aimed`` is one more fault, for the call of a kind that comes after ``aimed_skips``
    others of it. ``struck_at`` is one fault at one numbered call instead."""

    kill: float = 0.0
    freeze: float = 0.0
    lost_reply: float = 0.0
    error: float = 0.0
    phantom: float = 0.0
    slow: float = 0.0
    crash: float = 0.0
    hang: float = 0.0
    aimed: tuple[str, str] | None = None
    aimed_skips: int = 0
    struck_at: tuple[int, str] | None = None
    budget: int = 1000


class SimStore:
    """One process's sight of the world's objects. Checks the rules of the folder at every write."""

    root = "sim://job"

    def __init__(self, world: World, process: Process, faults: FaultPlan) -> None:
        self._world, self._process, self._faults = world, process, faults

    def create_exclusive(self, key: str, data: bytes | Path) -> bool:
        content = _content(data)

        def effect() -> bool:
            if key in self._world.objects:
                return False
            self._store(key, content)
            return True

        return self._call("create", key, effect)

    def put(self, key: str, data: bytes | Path) -> None:
        content = _content(data)
        self._call("put", key, lambda: self._store(key, content))

    def get(self, key: str) -> bytes:
        return self._call("get", key, lambda: self._object(key)[0])

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        return self._call("get", key, lambda: self._object(key)[0][start:stop])

    def head(self, key: str) -> ObjectInfo:
        return self._call("head", key, lambda: self._info(key))

    def list(self, prefix: str) -> list[ObjectInfo]:
        def effect() -> list[ObjectInfo]:
            return [self._info(key) for key in sorted(self._world.objects) if key.startswith(prefix)]

        return self._call("list", prefix, effect)

    def delete(self, key: str) -> None:
        def effect() -> None:
            check_delete(self._world, key)
            self._world.objects.pop(key, None)

        self._call("delete", key, effect)

    def read_input(self, name: str) -> None:
        """A call that reads rows: it can fail and die as any other."""
        self._call("read", name, lambda: None)

    def _call(self, kind: str, key: str, effect: Callable[[], Any]) -> Any:
        world, process = self._world, self._process
        if not process.alive:
            raise Killed
        if world.current.holding:
            raise Broken(f"{world.current.name} waits for storage while it holds the bench")
        world.operations += 1
        person = process.name.startswith("person")
        call = f"{kind} {kind_of(key)}" + (" of a person" if person else "")
        fault, delay = self._faults.decide(call, world.operations)
        world.pause(delay // 2)
        if fault == "freeze":
            process.frozen_until = world.now_ns + world.chance.randrange(70, 300) * SECOND
            world.log(f"frozen before {kind} {key}")
            world.pause(0)
        if fault == "kill_before":
            self._die(f"killed before {kind} {key}")
        if fault == "error":
            world.log(f"error before {kind} {key}")
            raise TransientStorageError(f"{key}: 500")
        if fault == "phantom":
            world.log(f"{kind} {key} -> False, by mistake")
            world.pause(delay - delay // 2)
            return False
        try:
            result = effect()
        except FileNotFoundError:
            result = None
            missing = True
        else:
            missing = False
        world.log(f"{kind} {key}{' -> missing' if missing else ' -> False' if result is False else ''}")
        if fault == "kill_after":
            self._die(f"killed after {kind} {key}")
        world.pause(delay - delay // 2)
        if fault == "lost_reply":
            world.log(f"reply lost of {kind} {key}")
            raise TransientStorageError(f"{key}: reply lost")
        if missing:
            raise FileNotFoundError(key)
        return result

    def _die(self, how: str) -> None:
        self._world.log(how)
        self._world.kill(self._process)
        raise Killed

    def _object(self, key: str) -> tuple[bytes, int]:
        if key not in self._world.objects:
            raise FileNotFoundError(key)
        return self._world.objects[key]

    def _info(self, key: str) -> ObjectInfo:
        content, modified = self._object(key)
        # As S3 has it: whole seconds.
        tag = f"{zlib.crc32(content):08x}"
        return ObjectInfo(key, len(content), tag, float(EPOCH + modified // SECOND))

    def _store(self, key: str, content: bytes) -> None:
        check_write(self._world, self._process, key, content)
        self._world.objects[key] = (content, self._world.now_ns)


def _content(data: bytes | Path) -> bytes:
    return data if isinstance(data, bytes) else data.read_bytes()


def check_write(world: World, process: Process, key: str, content: bytes) -> None:
    """The rules of the folder: what may be rewritten, and by whom."""
    if not content:
        raise Broken(f"{key} is written empty")
    before = world.objects.get(key)
    if before is None or before[0] == content:
        return
    if key.startswith("_batchinfer/claims/"):
        if f'"worker": "{process.name}"'.encode() not in before[0]:
            raise Broken(f"{process.name} rewrites somebody else's {key}")
    elif key.startswith("_batchinfer/workers/"):
        if key != f"_batchinfer/workers/{process.name}.json":
            raise Broken(f"{process.name} rewrites somebody else's {key}")
    elif key not in ("_batchinfer/summary.json", "_batchinfer/committed.json"):
        raise Broken(f"{process.name} rewrites {key}, which is immutable")


def check_delete(world: World, key: str) -> None:
    """Only progress is deleted: of committed shards, or what was in flight and is replaced."""
    match = re.fullmatch(r"_batchinfer/progress/([^/]+)/.*\.arrow", key)
    if match is None:
        raise Broken(f"{key} is deleted")
    committed = any(other.startswith(f"part-{match[1]}-") for other in world.objects)
    if not committed and not key.endswith(".inflight.arrow"):
        raise Broken(f"{key} is deleted before its shard is committed")


class FaultPlan:
    """Decides what happens at each storage call."""

    def __init__(self, world: World, faults: Faults) -> None:
        self._world, self._faults, self._left = world, faults, faults.budget
        self._aimed_calls = 0
        self.seen: set[tuple[str, str]] = set()

    def decide(self, call: str, number: int) -> tuple[str, int]:
        """The fault ("" for none) and the nanoseconds that the call takes."""
        chance, faults = self._world.chance, self._faults
        delay = chance.randrange(5_000_000, 300_000_000)
        if call in _UPLOADS and chance.random() < faults.slow:
            delay = chance.randrange(20, 150) * SECOND
        if faults.struck_at is not None:
            at, fault = faults.struck_at
            return fault if number == at else "", delay
        if faults.aimed is not None and call == faults.aimed[1]:
            self._aimed_calls += 1
            if self._aimed_calls == faults.aimed_skips + 1:
                self.seen.add(faults.aimed)
                return faults.aimed[0], delay
        draw = chance.random()
        for fault, share in (
            ("kill_before", faults.kill / 2),
            ("kill_after", faults.kill / 2),
            ("freeze", faults.freeze),
            ("lost_reply", faults.lost_reply),
            ("error", faults.error),
            ("phantom", faults.phantom if call.startswith("create") else 0.0),
        ):
            if draw < share:
                if self._left == 0:
                    return "", delay
                self._left -= 1
                self.seen.add((fault, call))
                return fault, delay
            draw -= share
        return "", delay


def kind_of(key: str) -> str:
    """The sort of object that a key names."""
    if key.startswith("part-"):
        return "part"
    if key.startswith("_batchinfer/plan-"):
        return "plan"
    name = "input" if key.startswith("input-") else key.removeprefix("_batchinfer/").partition("/")[0]
    return "inflight" if key.endswith(".inflight.arrow") else name
