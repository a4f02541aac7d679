"""A deterministic world for the job protocol: virtual time, a strongly consistent store, and faults.

The workers run the product's own code. Their threads pass one baton at every storage call and every
wait, in an order that the seed alone decides, so a failing seed fails again:

    python tests/job_simulator.py SEED [--trace]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import heapq
import io
import logging
import random
import re
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.connectors.batches import RowBatch
from batchinfer.connectors.types import (
    BadRow,
    InputFile,
    ObjectInfo,
    Split,
    TransientStorageError,
)
from batchinfer.engine.types import Completion, Decoded, Rejection, Request, SamplingParams
from batchinfer.jobs.columns import output_schema
from batchinfer.jobs.cost import settle
from batchinfer.jobs.feeder import Work
from batchinfer.jobs.folder import JobFolder, ShardName
from batchinfer.jobs.link import (
    Add,
    Drop,
    Dropped,
    Ended,
    FromEngine,
    Inflight,
    Ready,
    Results,
    Snapshot,
    Spent,
    Stop,
    ToEngine,
)
from batchinfer.jobs.records import Bill, Control, PartFooter, WorkerRecord
from batchinfer.jobs.samples import SampleKey
from batchinfer.jobs.supervisor import EXIT_DONE, EXIT_RETRY, EXIT_STOPPED, Pace, Supervisor
from batchinfer.jobs.types import RowError, Shard

SECOND = 1_000_000_000
EPOCH = 1_800_000_000


class Killed(BaseException):
    """The process is gone: unwinds its threads, whose storage calls have no effect any more."""


class Broken(AssertionError):
    """An invariant does not hold."""


# -- threads and time -----------------------------------------------------------------------------


class SimThread:
    """A real thread that runs only while it holds the world's baton."""

    def __init__(
        self, world: World, process: Process | None, name: str, function: Callable[[], None]
    ) -> None:
        self.world, self.process, self.name, self._function = world, process, name, function
        self.baton = threading.Lock()
        self.baton.acquire()
        self.turn = 0  # entries of the agenda made for an earlier turn are void
        self.waits_on: SimCondition | None = None
        self.notified = False
        self.holding = 0
        self.done = False
        self.joiners: list[SimThread] = []
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def _main(self) -> None:
        self.baton.acquire()
        try:
            if self.process is None or self.process.alive:
                self._function()
        except Killed:
            pass
        except BaseException as error:
            self.world.crash(error)
        self.done = True
        for joiner in self.joiners:
            self.world.schedule(joiner, 0)
        self.world.pass_baton(self, ends=True)

    def join(self, timeout: float | None = None) -> None:
        me = self.world.current
        if not self.done:
            self.joiners.append(me)
            if timeout is not None:
                self.world.schedule(me, int(timeout * SECOND))
            self.world.pass_baton(me)

    def is_alive(self) -> bool:
        return not self.done

    def finish(self) -> None:
        self._thread.join(20)
        if self._thread.is_alive():
            raise Broken(f"{self.name} does not end")


class SimCondition:
    """threading.Condition in the world. Only one thread runs, so there is nothing to lock; it only
    checks that nobody waits for anything else while holding it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._waiters: list[SimThread] = []

    def __enter__(self) -> SimCondition:
        self._world.current.holding += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._world.current.holding -= 1

    def wait(self, timeout: float | None = None) -> bool:
        me = self._world.current
        if me.holding != 1:
            raise Broken(f"{me.name} waits while it holds a condition twice or not at all")
        me.holding, me.notified = 0, False
        self._waiters.append(me)
        if timeout is not None:
            self._world.schedule(me, int(timeout * SECOND))
        try:
            self._world.pass_baton(me)
        finally:
            me.holding = 1
            if me in self._waiters:
                self._waiters.remove(me)
        return me.notified

    def notify_all(self) -> None:
        if self._world.current.holding < 1:
            raise Broken("notified without holding the condition")
        for thread in self._waiters:
            thread.notified = True
            self._world.schedule(thread, self._world.chance.randrange(2_000_000))
        self._waiters.clear()


class Process:
    """One worker's processes: all its threads live, freeze and die together."""

    def __init__(self, name: str, started_ns: int) -> None:
        self.name, self.started_ns = name, started_ns
        self.alive = True
        self.frozen_until = 0
        self.ended_ns: int | None = None
        self.exit_code: int | None = None
        self.threads: list[SimThread] = []


class World:
    """The agenda of threads, the time, the store's content, and the seed's decisions."""

    def __init__(self, seed: int, limit_seconds: int = 24 * 3600) -> None:
        self.chance = random.Random(seed)
        self.now_ns = 0
        self.current: SimThread
        self.threads: list[SimThread] = []
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.trace: list[str] = []
        self.operations = 0
        self._agenda: list[tuple[int, float, int, SimThread, int]] = []
        self._entries = 0
        self._limit = limit_seconds * SECOND
        self._error: BaseException | None = None
        self._over = threading.Event()

    def run(self, function: Callable[[], None]) -> None:
        """Run ``function`` as the world's first thread, to its end; re-raises what any thread raised."""
        thread = self.spawn(None, "harness", function)
        _, _, _, first, _ = heapq.heappop(self._agenda)
        assert first is thread
        self.current = thread
        thread.turn += 1
        thread.baton.release()
        self._over.wait()
        for thread in self.threads:
            if not thread.done:
                # Nothing runs any more: wake the leftovers one after another to unwind.
                thread.process = thread.process or Process("harness", 0)
                thread.process.alive = False
                self.current = thread
                thread.baton.release()
            thread.finish()
        if self._error is not None:
            raise self._error

    def spawn(self, process: Process | None, name: str, function: Callable[[], None]) -> SimThread:
        thread = SimThread(self, process, name, function)
        self.threads.append(thread)
        if process is not None:
            process.threads.append(thread)
        self.schedule(thread, self.chance.randrange(1_000_000))
        return thread

    def schedule(self, thread: SimThread, delay_ns: int) -> None:
        self._entries += 1
        entry = (self.now_ns + delay_ns, self.chance.random(), self._entries, thread, thread.turn)
        heapq.heappush(self._agenda, entry)

    def pause(self, delay_ns: int) -> None:
        me = self.current
        self.schedule(me, delay_ns)
        self.pass_baton(me)

    def pass_baton(self, me: SimThread, ends: bool = False) -> None:
        """Let the next thread of the agenda run; returns when it is this one's turn again."""
        if self._over.is_set():
            if ends:
                return
            raise Killed
        following = self._next()
        if following is None:
            self._over.set()
            if ends:
                return
            me.baton.acquire()
            raise Killed
        self.current = following
        following.turn += 1
        if following is not me:
            following.baton.release()
            if ends:
                return
            me.baton.acquire()
        if self._over.is_set() or (me.process is not None and not me.process.alive):
            raise Killed

    def _next(self) -> SimThread | None:
        if self._error is not None:
            return None
        while self._agenda:
            when, _, _, thread, turn = heapq.heappop(self._agenda)
            if thread.done or turn != thread.turn:
                continue
            process = thread.process
            if process is not None and process.alive and process.frozen_until > when:
                self._entries += 1
                again = (process.frozen_until, self.chance.random(), self._entries, thread, turn)
                heapq.heappush(self._agenda, again)
                continue
            self.now_ns = max(self.now_ns, when)
            if self.now_ns > self._limit:
                self._error = Broken("the job does not come to an end")
                return None
            return thread
        if any(not thread.done for thread in self.threads):
            waiting = [thread.name for thread in self.threads if not thread.done]
            self._error = Broken(f"everybody waits: {waiting}")
        return None

    def crash(self, error: BaseException) -> None:
        self._error = self._error or error

    def kill(self, process: Process) -> None:
        process.alive = False
        process.ended_ns = self.now_ns
        for thread in process.threads:
            if not thread.done and thread is not self.current:
                self.schedule(thread, 0)

    def log(self, text: str) -> None:
        self.trace.append(f"{self.now_ns / SECOND:10.3f} {self.current.name:18} {text}")


class SimClock:
    """The product's Clock in the world, for one process."""

    def __init__(self, world: World, process: Process) -> None:
        self._world, self._process = world, process

    def now_ns(self) -> int:
        return self._world.now_ns

    def sleep(self, seconds: float) -> None:
        self._world.pause(int(seconds * SECOND))

    def condition(self) -> SimCondition:
        return SimCondition(self._world)

    def spawn(self, name: str, function: Callable[[], None]) -> SimThread:
        return self._world.spawn(self._process, f"{self._process.name}.{name}", function)


# -- the store ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Faults:
    """What may happen at a storage call, as shares; ``kills`` and the like bound their number, so that
    the world calms down. ``kill_at`` kills at one numbered call instead, before or after its effect."""

    kill: float = 0.0
    freeze: float = 0.0
    lost_reply: float = 0.0
    error: float = 0.0
    slow: float = 0.0
    crash: float = 0.0
    hang: float = 0.0
    kill_at: tuple[int, bool] | None = None
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
        fault, delay = self._faults.decide(kind, key, world.operations)
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
        return ObjectInfo(key, len(content), "", float(EPOCH + modified // SECOND))

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
    elif key != "_batchinfer/summary.json":
        raise Broken(f"{process.name} rewrites {key}, which is immutable")


def check_delete(world: World, key: str) -> None:
    """Only progress is deleted: of committed shards, or what was in flight and is replaced."""
    match = re.fullmatch(r"_batchinfer/progress/(\d+)/.*\.arrow", key)
    if match is None:
        raise Broken(f"{key} is deleted")
    committed = any(other.startswith(f"part-{match[1]}-") for other in world.objects)
    if not committed and not key.endswith(".inflight.arrow"):
        raise Broken(f"{key} is deleted before its shard is committed")


class FaultPlan:
    """Decides what happens at each storage call."""

    def __init__(self, world: World, faults: Faults) -> None:
        self._world, self._faults, self._left = world, faults, faults.budget
        self.seen: set[tuple[str, str]] = set()

    def decide(self, kind: str, key: str, number: int) -> tuple[str, int]:
        """The fault ("" for none) and the nanoseconds that the call takes."""
        chance, faults = self._world.chance, self._faults
        delay = chance.randrange(5_000_000, 300_000_000)
        upload = kind in ("create", "put") and kind_of(key) in ("part", "progress", "inflight", "failures")
        if upload and chance.random() < faults.slow:
            delay = chance.randrange(20, 150) * SECOND
        if faults.kill_at is not None:
            at, after = faults.kill_at
            fault = ("kill_after" if after else "kill_before") if number == at else ""
            return fault, delay
        draw = chance.random()
        for fault, share in (
            ("kill_before", faults.kill / 2),
            ("kill_after", faults.kill / 2),
            ("freeze", faults.freeze),
            ("lost_reply", faults.lost_reply),
            ("error", faults.error),
        ):
            if draw < share:
                if self._left == 0:
                    return "", delay
                self._left -= 1
                self.seen.add((fault, f"{kind} {kind_of(key)}"))
                return fault, delay
            draw -= share
        return "", delay


def kind_of(key: str) -> str:
    """The sort of object that a key names."""
    if key.startswith("part-"):
        return "part"
    name = key.removeprefix("_batchinfer/").partition("/")[0]
    return "inflight" if key.endswith(".inflight.arrow") else name


# -- the engine -----------------------------------------------------------------------------------


def words(row: int, sample: int) -> tuple[int, ...]:
    """The tokens that the model gives for a sample: a function of the row, as it must be."""
    length = 1 + _hash(row, sample) % 7
    return tuple(_hash(row, sample, place) % 1000 for place in range(length))


def rejected(row: int) -> bool:
    return _hash(row, 77) % 13 == 0


def unreadable(row: int) -> bool:
    return _hash(row, 78) % 17 == 0


def unrendered(row: int) -> bool:
    return _hash(row, 79) % 19 == 0


def _hash(*values: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=6).digest(), "big")


@dataclass
class SimSample:
    request: Request
    sample: int
    tokens: list[int]
    token_ns: list[int]
    prefill_ns: int
    fresh: bool = True
    own_ns: int = 0


class SimEngine:
    """An engine whose steps take virtual time. Charges every nanosecond that it has work."""

    def __init__(
        self, world: World, process: Process, deliver: Callable[[FromEngine], None], plan: Simulation
    ) -> None:
        self._world, self._process, self._deliver, self._plan = world, process, deliver, plan
        self._changed = SimCondition(world)
        self._inbox: list[ToEngine] = []
        self._killed = False
        self._waiting: list[SimSample] = []
        self._running: list[SimSample] = []
        self._charged = self._waste = 0
        self._at = world.now_ns
        world.spawn(process, f"{process.name}.engine", self._main)

    def send(self, message: ToEngine) -> None:
        with self._changed:
            self._inbox.append(message)
            self._changed.notify_all()

    def kill(self) -> None:
        with self._changed:
            self._killed = True
            self._changed.notify_all()

    def _main(self) -> None:
        self._world.pause(self._world.chance.randrange(1, 20) * SECOND)
        self._deliver(Ready(self._plan.capacity))
        while self._take():
            self._step()
            if self._plan.engine_fails(self._plan.faults.crash):
                self._world.log("the engine dies")
                break
            if self._plan.engine_fails(self._plan.faults.hang):
                self._world.log("the engine hangs")
                self._hang()
                break
        self._deliver(Ended("it was killed"))

    def _hang(self) -> None:
        with self._changed:
            while not self._killed:
                self._changed.wait()

    def _take(self) -> bool:
        with self._changed:
            while not self._inbox and not self._killed and not (self._waiting or self._running):
                self._changed.wait()
            messages, self._inbox = self._inbox, []
        if self._killed:
            return False
        if not (self._waiting or self._running):
            self._at = self._world.now_ns
        rejections = []
        for message in messages:
            if isinstance(message, Add):
                for request in message.requests:
                    if rejected(request.index):
                        rejections.append(Rejection(request.index, "too_long", "it is too long"))
                    else:
                        self._admit(request)
            elif isinstance(message, Drop):
                for sample in self._running + self._waiting:
                    if sample.request.index in message.rows:
                        self._charged -= sample.own_ns
                        self._waste += sample.own_ns
                self._running = [s for s in self._running if s.request.index not in message.rows]
                self._waiting = [s for s in self._waiting if s.request.index not in message.rows]
                self._deliver(Dropped(message.rows, self._spent()))
            else:
                samples = []
                for sample in self._running + self._waiting:
                    key = SampleKey(sample.request.index, sample.sample)
                    decoded = Decoded(tuple(sample.tokens), tuple(sample.token_ns), sample.prefill_ns)
                    samples.append((key, decoded))
                self._deliver(Inflight(tuple(samples), self._spent(), isinstance(message, Stop)))
                if isinstance(message, Stop):
                    return False
                assert isinstance(message, Snapshot)
        if rejections:
            self._deliver(Results(tuple(rejections), self._spent()))
        return True

    def _admit(self, request: Request) -> None:
        for sample in request.samples or range(request.sampling.n):
            resume = request.resume.get(sample, Decoded())
            tokens = list(resume.token_ids)
            if tuple(tokens) != words(request.index, sample)[: len(tokens)] or len(tokens) != len(
                resume.token_ns
            ):
                raise Broken(f"row {request.index} is resumed from tokens that are not its own")
            self._plan.resumed_tokens += len(tokens)
            self._waiting.append(
                SimSample(request, sample, tokens, list(resume.token_ns), resume.prefill_ns)
            )

    def _step(self) -> None:
        while self._waiting and len(self._running) < 4:
            self._running.append(self._waiting.pop(0))
        if not self._running:
            return
        self._world.pause(self._world.chance.randrange(300_000_000, 3 * SECOND))
        now = self._world.now_ns
        spent, self._at = now - self._at, now
        done = []
        for place, sample in enumerate(self._running):
            share = spent // len(self._running) + (place < spent % len(self._running))
            if sample.fresh and sample.tokens:
                self._waste += share // 3
                share -= share // 3
            elif sample.fresh:
                sample.prefill_ns += share // 2
                self._charged += share // 2
                sample.own_ns += share // 2
                share -= share // 2
            sample.fresh = False
            goal = words(sample.request.index, sample.sample)
            if len(sample.tokens) < len(goal):
                sample.tokens.append(goal[len(sample.tokens)])
                sample.token_ns.append(0)
                self._plan.decoded_tokens += 1
            sample.token_ns[-1] += share
            self._charged += share
            sample.own_ns += share
            if len(sample.tokens) == len(goal):
                done.append(sample)
        self._running = [sample for sample in self._running if sample not in done]
        self._deliver(Results(tuple(self._complete(sample) for sample in done), self._spent()))

    def _complete(self, sample: SimSample) -> Completion:
        return Completion(
            index=sample.request.index,
            sample_index=sample.sample,
            text=" ".join(map(str, sample.tokens)),
            token_ids=tuple(sample.tokens),
            finish_reason="stop",
            prompt_tokens=5,
            cached_tokens=0,
            prefill_ns=sample.prefill_ns,
            token_ns=tuple(sample.token_ns),
        )

    def _spent(self) -> Spent:
        return Spent(self._charged, self._waste, self._at)


# -- a job in the world ---------------------------------------------------------------------------

PASSED = pa.schema([("id", pa.string()), ("value", pa.int64())])


@dataclass
class Simulation:
    """One job, its workers, and what is to hold in the end."""

    seed: int
    faults: Faults
    workers: int = 2
    shards: int = 4
    rows: int = 6
    n: int = 1
    drains: int = 0
    cancels: int = 0
    capacity: int = 8
    read_ahead: int = 5
    world: World = field(init=False)
    resumed_tokens: int = 0
    decoded_tokens: int = 0

    def __post_init__(self) -> None:
        self.world = World(self.seed)
        self.plan = FaultPlan(self.world, self.faults)
        self.sampling = SamplingParams(n=self.n)
        self.processes: list[Process] = []
        self.supervisors: dict[str, Supervisor] = {}
        self._failures_left = 2
        file = InputFile("sim://input", 1, "", "jsonl", "none")
        names = [ShardName(0, index, self.shards) for index in range(self.shards)]
        self.job = {
            name: Shard(
                name.index,
                (Split(file, "rows", 0, 0, name.index * self.rows, self.rows),),
                1,
            )
            for name in names
        }

    def engine_fails(self, share: float) -> bool:
        if share and self._failures_left and self.world.chance.random() < share:
            self._failures_left -= 1
            return True
        return False

    def run(self) -> Simulation:
        """Run the job to its end and check everything that must hold."""
        self.world.run(self._harness)
        self._check_workers()
        self._check_rows()
        self._check_cost()
        return self

    # -- what happens

    def _harness(self) -> None:
        chance = self.world.chance
        for _ in range(self.workers):
            self._start(chance.randrange(0, 40 * SECOND))
        drains, cancels = self.drains, self.cancels
        while not self._all_done():
            self.world.pause(chance.randrange(1, 30) * SECOND)
            running = [process for process in self.processes if process.ended_ns is None]
            if drains and running and chance.random() < 0.3:
                drains -= 1
                victim = chance.choice(running)
                if victim.name in self.supervisors:
                    self.world.log(f"SIGTERM to {victim.name}")
                    self.supervisors[victim.name].drain()
            if cancels and chance.random() < 0.1:
                cancels -= 1
                self._control("cancel")
                while any(process.ended_ns is None for process in self.processes):
                    self.world.pause(5 * SECOND)
                self._control("run")
            while len([1 for process in self.processes if process.ended_ns is None]) < self.workers:
                if self._all_done():
                    break
                self._start(chance.randrange(0, 60 * SECOND))
        while any(process.ended_ns is None for process in self.processes):
            self.world.pause(10 * SECOND)

    def _control(self, state: str) -> None:
        number = len([key for key in self.world.objects if key.startswith("_batchinfer/control/")]) + 1
        content = Control(state=state, nonce="harness").to_bytes()  # type: ignore[arg-type]
        self.world.objects[f"_batchinfer/control/{number:04d}.json"] = (content, self.world.now_ns)
        self.world.log(state)

    def _all_done(self) -> bool:
        return any(process.exit_code == EXIT_DONE for process in self.processes)

    def _start(self, delay: int) -> None:
        process = Process(f"w{len(self.processes):02d}", self.world.now_ns + delay)
        self.processes.append(process)

        def main() -> None:
            self.world.pause(max(0, process.started_ns - self.world.now_ns))
            process.exit_code = self._worker(process)
            process.ended_ns = self.world.now_ns
            self.world.log(f"exit {process.exit_code}")

        self.world.spawn(process, f"{process.name}.main", main)

    def _worker(self, process: Process) -> int:
        clock = SimClock(self.world, process)
        store = SimStore(self.world, process, self.plan)
        folder = JobFolder(store, clock, random.Random(self.world.chance.random()), attempts=12)
        schema = output_schema(PASSED, self.sampling, True)
        work = Work(
            self.job, schema, PASSED, self.sampling, lambda split: self._read(store, split), self._render
        )
        record = WorkerRecord(
            worker=process.name, state="starting", beat=0, usd_per_hour=2.0, bill=Bill(), started=""
        )
        supervisor = Supervisor(
            folder,
            clock,
            work,
            record,
            process.started_ns,
            lambda deliver: SimEngine(self.world, process, deliver, self),
            Pace(flush=10.0, stall=200.0, read_ahead=self.read_ahead, engine_restarts=3),
        )
        self.supervisors[process.name] = supervisor
        code = supervisor.run()
        supervisor.bench.check()
        if supervisor.bench.error is not None:
            raise supervisor.bench.error
        return code

    def _read(self, store: SimStore, split: Split) -> Iterator[RowBatch]:
        # Reading has no retries of its own here, so only kills and freezes strike.
        with contextlib.suppress(TransientStorageError):
            store.read_input(f"input-{split.first_row}")
        rows = range(split.first_row, split.first_row + split.rows)
        for start in range(0, split.rows, 4):
            some = rows[start : start + 4]
            good = [index for index in some if not unreadable(index)]
            bad = tuple(
                BadRow(index, "bad_line", "it is bad", f"raw {index}")
                for index in some
                if unreadable(index)
            )
            columns = {
                "id": [f"id-{index}" for index in good],
                "value": [index * 3 for index in good],
                "prompt": [f"prompt of {index}" for index in good],
            }
            yield RowBatch(good, pa.RecordBatch.from_pydict(columns), bad)

    @staticmethod
    def _render(values: Any) -> str:
        if unrendered(int(values["prompt"].rpartition(" ")[2])):
            raise RowError("render_error", "it can't be rendered")
        return str(values["prompt"])

    # -- what must hold

    def _check_workers(self) -> None:
        for process in self.processes:
            if process.alive and process.exit_code not in (EXIT_DONE, EXIT_RETRY, EXIT_STOPPED):
                raise Broken(f"{process.name} left with {process.exit_code}")

    def parts(self) -> Iterator[tuple[pa.Table, PartFooter]]:
        """The committed parts."""
        for name in self.job:
            if name.part not in self.world.objects:
                raise Broken(f"{name.part} is missing")
            file = pq.ParquetFile(io.BytesIO(self.world.objects[name.part][0]))
            yield file.read(), PartFooter.from_bytes(file.metadata.metadata[b"batchinfer"])

    def _check_rows(self) -> None:
        seen: dict[int, str] = {}
        for (table, footer), name in zip(self.parts(), self.job, strict=True):
            rows = table.to_pylist()
            keys = [(row["row_index"], row.get("sample_index", 0)) for row in rows]
            if keys != sorted(set(keys)) or footer.rows != len(rows):
                raise Broken(f"the rows of {name.part} are not sorted, or not as many as its footer says")
            failed = []
            if footer.failures is not None:
                folder = JobFolder(_Plain(self.world))
                failed = folder.read_failures(name, footer.failures)
            if len(failed) != footer.failed_rows:
                raise Broken(f"the failures of {name.part} are not as many as its footer says")
            for failure in failed:
                self._once(seen, failure.row_index, failure.code)
            for index in sorted({row for row, _ in keys}):
                self._once(seen, index, "answered")
            for row in rows:
                index, sample = row["row_index"], row.get("sample_index", 0)
                tokens = words(index, sample)
                expected = {
                    "id": f"id-{index}",
                    "value": index * 3,
                    "completion": " ".join(map(str, tokens)),
                    "finish_reason": "stop",
                    "prompt_tokens": 5,
                    "completion_tokens": len(tokens),
                    "token_ids": list(tokens),
                }
                if any(row[column] != value for column, value in expected.items()):
                    raise Broken(f"row {index} is answered by {row}")
                if abs(sum(row["token_cost_usd"]) - row["decode_cost_usd"]) > 1e-12:
                    raise Broken(f"the tokens of row {index} do not add up to its cost")
            if len(keys) != self.n * len({row for row, _ in keys}):
                raise Broken(f"{name.part} holds a row with some of its samples")
        for index in range(self.shards * self.rows):
            if unreadable(index):
                expected_code = "bad_line"
            elif unrendered(index):
                expected_code = "render_error"
            else:
                expected_code = "too_long" if rejected(index) else "answered"
            if seen.get(index) != expected_code:
                raise Broken(f"row {index} is {seen.get(index)}, not {expected_code}")

    @staticmethod
    def _once(seen: dict[int, str], index: int, what: str) -> None:
        if index in seen:
            raise Broken(f"row {index} is there twice: {seen[index]} and {what}")
        seen[index] = what

    def _check_cost(self) -> None:
        folder = JobFolder(_Plain(self.world))
        records = {record.worker: record for record, _ in folder.read_workers()}
        settlement = settle(records.values(), [footer for _, footer in self.parts()])
        settlement.check()
        in_rows = sum(
            sum(table["prefill_ns"].to_pylist()) + sum(table["decode_ns"].to_pylist())
            for table, _ in self.parts()
        )
        if settlement.bill.rows != in_rows:
            raise Broken(f"rows cost {in_rows} ns, but {settlement.bill.rows} ns were charged to them")
        for process in self.processes:
            if process.name not in records:
                continue  # it died before its first heartbeat
            assert process.ended_ns is not None
            life = process.ended_ns - process.started_ns
            if records[process.name].bill.total > life:
                raise Broken(f"{process.name} billed more than its life")
        self.settlement = settlement
        self.records = records


class _Plain:
    """The world's objects with no time and no faults."""

    root = "sim://job"

    def __init__(self, world: World) -> None:
        self._world = world

    def get(self, key: str) -> bytes:
        return self._world.objects[key][0]

    def list(self, prefix: str) -> list[ObjectInfo]:
        return [
            ObjectInfo(key, 0, "", 0.0) for key in sorted(self._world.objects) if key.startswith(prefix)
        ]


def from_seed(seed: int) -> Simulation:
    """The simulation that a seed stands for: its size, its faults, and everything that happens."""
    chance = random.Random(f"shape {seed}")
    faults = Faults(
        kill=chance.choice([0.0, 0.01, 0.03, 0.08]),
        freeze=chance.choice([0.0, 0.01, 0.02]),
        lost_reply=chance.choice([0.0, 0.02, 0.1]),
        error=chance.choice([0.0, 0.02, 0.1]),
        slow=chance.choice([0.0, 0.05]),
        crash=chance.choice([0.0, 0.0, 0.05]),
        hang=chance.choice([0.0, 0.0, 0.05]),
        budget=chance.choice([3, 10, 40]),
    )
    return Simulation(
        seed,
        faults,
        workers=chance.randint(1, 4),
        shards=chance.randint(1, 5),
        rows=chance.choice([1, 4, 9]),
        n=chance.choice([1, 1, 2]),
        drains=chance.choice([0, 0, 1, 3]),
        cancels=chance.choice([0, 0, 0, 1]),
        capacity=chance.choice([2, 8, 100]),
        read_ahead=chance.choice([1, 5, 100]),
    )


def undisturbed(simulation: Simulation) -> Simulation:
    """The same job with no fault at all."""
    return replace(simulation, faults=Faults(), drains=0, cancels=0)


def main() -> None:
    """Run one seed, and show what happened."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("--trace", action="store_true", help="print every storage call")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    simulation = from_seed(arguments.seed)
    try:
        simulation.run()
        print(f"seed {arguments.seed}: good")
    except Exception:
        traceback.print_exc()
        print(f"seed {arguments.seed}: BROKEN")
    if arguments.trace:
        print("\n".join(simulation.world.trace))


if __name__ == "__main__":
    main()
