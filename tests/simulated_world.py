"""Virtual time and threads that pass one baton: a world in which the seed decides what happens when."""

from __future__ import annotations

import heapq
import random
import threading
from collections.abc import Callable

SECOND = 1_000_000_000


class Killed(BaseException):
    """The process is gone: unwinds its threads, whose storage calls have no effect any more."""


class Broken(AssertionError):
    """An invariant does not hold."""


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
        if process.ended_ns is None:  # its last threads may outlive it for a call
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
