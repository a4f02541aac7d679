"""An engine in the simulated world: its steps take virtual time, its answers are a function of the row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from simulated_store import Faults
from simulated_world import SECOND, Broken, Process, SimCondition, World

from batchinfer.engine.types import Completion, Decoded, Rejection, Request
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
from batchinfer.jobs.samples import SampleKey


class Bench(Protocol):
    """What engines share: their size, when they fail, and counts of what they did."""

    faults: Faults
    capacity: int
    poison: bool
    engine_deaths: int
    decoded_tokens: int
    resumed_tokens: int

    def engine_fails(self, share: float) -> bool: ...

    def rejects(self, row: int) -> bool: ...


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


def crashing(row: int) -> bool:
    """Whether an engine dies of the row, where a simulation has poison."""
    return _hash(row, 80) % 14 == 0


def stalling(row: int) -> bool:
    """Whether an engine hangs on the row, where a simulation has poison."""
    return _hash(row, 81) % 31 == 0


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
        self, world: World, process: Process, deliver: Callable[[FromEngine], None], plan: Bench
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
            if not self._survives():
                break
            self._step()
            if self._plan.engine_fails(self._plan.faults.crash):
                self._world.log("the engine dies")
                break
            if self._plan.engine_fails(self._plan.faults.hang):
                self._world.log("the engine hangs")
                self._hang()
                break
        self._deliver(Ended("it was killed"))

    def _survives(self) -> bool:
        """Admit rows; the engine ends at those that are poison."""
        while self._waiting and len(self._running) < 4:
            self._running.append(self._waiting.pop(0))
        rows = [sample.request.index for sample in self._running] if self._plan.poison else []
        deadly, hanging = any(map(crashing, rows)), any(map(stalling, rows))
        if deadly or hanging:
            self._plan.engine_deaths += 1
            self._world.log(f"poison among {rows}")
            self._world.pause(self._world.chance.randrange(300_000_000, 3 * SECOND))
            if not deadly:
                self._hang()
        return not (deadly or hanging)

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
                    if self._plan.rejects(request.index):
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
