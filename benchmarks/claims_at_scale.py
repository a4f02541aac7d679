"""Thousands of simulated workers on a job of many shards: what claiming costs, and whether anybody herds.

    python benchmarks/claims_at_scale.py --workers 2000 --shards 100000

The claims and the summary are the project's own code; the store and the time are simulated: every request
takes ``--latency`` seconds and a page of a listing 1,000 keys, so a look at the folder is as old as it
took, and two workers may want the same shard. Workers start within ``--ramp`` seconds, hold two shards
each, renew their leases and save their progress; a shard takes ``--shard-seconds``, more or less. Some are
preempted and replaced. Those that are too many for the open shards leave. Nobody helps at the tail, but
idle workers look whether they may.
Prices are those of Amazon S3: 0.005 USD for 1,000 writes or pages of listings, 0.0004 USD for 1,000 reads.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from batchinfer.connectors.types import ObjectInfo
from batchinfer.jobs.claims import GLANCES, LEASE_SECONDS, REGION_DIGITS, RENEWALS_PER_LEASE, Claims, Lease
from batchinfer.jobs.feeder import Patience
from batchinfer.jobs.folder import ShardName
from batchinfer.jobs.parallel import THREADS
from batchinfer.jobs.records import Bill, Claim, CommittedCount, PartFooter, WorkerRecord
from batchinfer.jobs.summary import SummaryWriter
from batchinfer.jobs.supervisor import Pace
from batchinfer.jobs.workbench import OPEN_SHARDS

USD = {"write": 5e-6, "list": 5e-6, "read": 4e-7}
PAGE = 1000
PERIODS = 40
FLUSH_SECONDS = Pace().flush


class Readers:
    """A clock whose threads read side by side: what the first of them does takes a fraction of the time."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def condition(self) -> threading.Condition:
        return threading.Condition()

    def spawn(self, name: str, function: Callable[[], None]) -> Readers:
        self._folder.latency /= THREADS
        function()
        self._folder.latency *= THREADS
        return self

    def join(self) -> None:
        pass


@dataclass
class Folder:
    """What a job's folder holds, as one worker sees it when it is at ``at``: listings of claims show it as
    it was when they began, all else acts and is seen at once."""

    latency: float
    at: float = 0.0
    claims: dict[str, dict[str, dict[int, ObjectInfo]]] = field(default_factory=dict)
    records: dict[tuple[str, int], Claim] = field(default_factory=dict)
    parts: dict[ShardName, ObjectInfo] = field(default_factory=dict)
    workers: dict[str, ObjectInfo] = field(default_factory=dict)
    states: dict[str, WorkerRecord] = field(default_factory=dict)
    summary: bytes | None = None
    done: dict[str, dict[ShardName, ObjectInfo]] = field(default_factory=dict)
    counted: CommittedCount | None = None
    listed: dict[str, dict[str, dict[int, ObjectInfo]]] = field(default_factory=dict)
    unlisted: deque[tuple[float, ShardName, int]] = field(default_factory=deque)
    requests: Counter[str] = field(default_factory=Counter)
    by_second: Counter[int] = field(default_factory=Counter)
    creates: int = 0
    won: int = 0
    looks: int = 0
    longest_look: float = 0.0

    def count(self, kind: str, number: int = 1) -> None:
        self.requests[kind] += number
        for _ in range(number):
            self.at += self.latency
            self.by_second[int(self.at)] += 1

    @property
    def clock(self) -> Readers:
        return Readers(self)

    def beat(self, worker: str, state: Any = "running") -> None:
        self.count("write")
        self.workers[worker] = ObjectInfo(worker, 1000, str(self.at), self.at)
        if worker not in self.states or self.states[worker].state != state:
            self.states[worker] = WorkerRecord(
                worker=worker, state=state, beat=0, usd_per_hour=1.0, bill=Bill(rows=1), started=""
            )

    def now(self, worker: str) -> float:
        """A heartbeat, and its time."""
        self.beat(worker)
        self.count("read")
        return self.at

    def list_workers(self) -> dict[str, ObjectInfo]:
        self.count("list", 1 + len(self.workers) // PAGE)
        return self.workers

    def read_worker(self, worker: str) -> WorkerRecord:
        self.count("read")
        return self.states[worker]

    def read_footer(self, shard: ShardName, size: int) -> PartFooter:
        self.count("read")
        return PartFooter(nonce="n", worker="w", rows=1, nanoseconds={"w": 1})

    def read_summary(self) -> bytes:
        self.count("read")
        if self.summary is None:
            raise FileNotFoundError
        return self.summary

    def write_summary(self, data: bytes) -> None:
        self.count("write")
        self.summary = data

    def list_leases(
        self, start: str
    ) -> tuple[dict[str, dict[int, ObjectInfo]], dict[str, dict[int, ObjectInfo]]]:
        self.looks += 1
        began = self.at
        while self.unlisted and self.unlisted[0][0] <= began:
            _, shard, generation = self.unlisted.popleft()
            leases = self.listed.setdefault(_region(shard), {})
            leases.setdefault(shard.label, {})[generation] = self.claims[_region(shard)][shard.label][
                generation
            ]
        found = self.listed.get(start, {})
        self.count("list", 1 + sum(map(len, found.values())) // PAGE)
        return found, {}

    def committed(self, start: str = "") -> dict[ShardName, ObjectInfo]:
        found = self.done.get(start, {}) if len(start) == len(_region(ShardName(0, 0, 1))) else self.parts
        self.count("list", 1 + len(found) // PAGE)
        return found

    def commit(self, shard: ShardName) -> None:
        self.count("write")
        if shard not in self.parts:
            info = ObjectInfo(shard.part, 1000, "", self.at)
            self.parts[shard] = self.done.setdefault(_region(shard), {})[shard] = info

    def read_count(self) -> CommittedCount | None:
        self.count("read")
        return self.counted

    def write_count(self, count: CommittedCount) -> None:
        self.count("write")
        self.counted = count

    def is_committed(self, shard: ShardName) -> bool:
        self.count("read")
        return shard in self.parts

    def create_claim(self, shard: ShardName, generation: int, claim: Claim, helper: bool = False) -> bool:
        self.count("write")
        self.creates += 1
        if generation in self.claims.get(_region(shard), {}).get(shard.label, {}):
            self.count("read")  # whose is it?
            return False
        self.won += 1
        self._write(shard, generation, claim)
        self.unlisted.append((self.at, shard, generation))
        return True

    def rewrite_claim(self, shard: ShardName, generation: int, claim: Claim, helper: bool = False) -> None:
        self.count("write")
        self._write(shard, generation, claim)
        region = _region(shard)
        if generation in self.listed.get(region, {}).get(shard.label, {}):
            self.listed[region][shard.label][generation] = self.claims[region][shard.label][generation]

    def _write(self, shard: ShardName, generation: int, claim: Claim) -> None:
        self.records[shard.label, generation] = claim
        info = ObjectInfo(f"{shard.label}/{generation}", 100, "", self.at)
        self.claims.setdefault(_region(shard), {}).setdefault(shard.label, {})[generation] = info

    def read_claim(self, shard: ShardName, generation: int, helper: bool = False) -> Claim:
        self.count("read")
        try:
            return self.records[shard.label, generation]
        except KeyError:
            raise FileNotFoundError(shard.label) from None


def _region(shard: ShardName) -> str:
    return shard.region(REGION_DIGITS)


class Worker:
    """A worker's place in the simulation."""

    def __init__(self, folder: Folder, shards: list[ShardName], name: str) -> None:
        view: Any = folder
        self.name = name
        self.claims = Claims(view, shards, name, lambda: folder.now(name))
        pace = Pace()
        self.summary = SummaryWriter(
            view, name, lambda: shards, 1, pace.lease, pace.summary_shards, pace.summary_others
        )
        self.leases: dict[ShardName, Lease] = {}
        self.patience = Patience(LEASE_SECONDS / RENEWALS_PER_LEASE / (GLANCES + 1))
        self.alive = True
        self.saved = 0.0
        self.free_at = 0.0
        """When its engine, which does one shard after the other, will be done with those it has."""


def simulate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the job to its end; returns the figures."""
    chance = random.Random(arguments.seed)
    folder = Folder(arguments.latency)
    shards = [ShardName(0, index, arguments.shards) for index in range(arguments.shards)]
    events: list[tuple[float, int, str, Worker, Any]] = []
    numbers = iter(range(1 << 60))
    renewal = LEASE_SECONDS / RENEWALS_PER_LEASE
    idle_seconds = 0.0
    ended = 0.0
    summary_requests = too_many = 0

    def plan(at: float, what: str, worker: Worker, about: Any = None) -> None:
        heapq.heappush(events, (at, next(numbers), what, worker, about))

    def hire(at: float) -> None:
        worker = Worker(folder, shards, f"worker {next(numbers)}")
        plan(at, "claim", worker)
        plan(at + chance.uniform(0, renewal), "renew", worker)
        if chance.random() < arguments.preempted:
            whole = arguments.shards / arguments.workers * arguments.shard_seconds
            plan(at + chance.uniform(0, whole), "preempt", worker)

    def leave(worker: Worker) -> None:
        nonlocal summary_requests
        worker.alive = False
        folder.beat(worker.name, "left")
        before = folder.requests.total()
        worker.summary.leave()
        summary_requests += folder.requests.total() - before

    for _ in range(arguments.workers):
        hire(chance.uniform(0, arguments.ramp))
    while events:
        at, _, what, worker, about = heapq.heappop(events)
        if not worker.alive:
            continue
        folder.at = at
        if what == "claim":
            while len(worker.leases) < OPEN_SHARDS:
                looks, began = folder.looks, folder.at
                lease = worker.claims.claim(worker.leases.keys())
                if folder.looks > looks:
                    folder.longest_look = max(folder.longest_look, folder.at - began)
                if lease is None:
                    break
                worker.leases[lease.shard] = lease
                worker.patience.reset()
                folder.count("list")  # its progress
                took = arguments.shard_seconds * chance.lognormvariate(0, 0.3)
                worker.free_at = max(worker.free_at, folder.at) + took
                plan(worker.free_at, "done", worker, lease.shard)
            if len(worker.leases) == OPEN_SHARDS:
                continue
            if not worker.leases:
                for _ in worker.claims.helpable():
                    folder.count("list")  # its owner's progress, and what that is
                    folder.count("read", round(arguments.shard_seconds / FLUSH_SECONDS / 2))
            surplus = not worker.claims.all_committed() and not worker.leases and worker.claims.is_surplus()
            done = worker.claims.all_committed()
            if done or surplus:
                too_many += surplus
                leave(worker)
                continue
            wait = worker.patience.next(worker.claims.least_wait())
            if not worker.leases:
                idle_seconds += wait
            plan(folder.at + wait, "claim", worker)
        elif what == "done":
            waiting = len(worker.leases) < OPEN_SHARDS
            lease = worker.leases.pop(about)
            folder.beat(worker.name)
            folder.commit(about)
            folder.count("list")
            ended = folder.at
            before = folder.requests.total()
            worker.summary.committed(about)
            summary_requests += folder.requests.total() - before
            if not waiting:
                plan(folder.at, "claim", worker)
        elif what == "renew":
            for lease in worker.leases.values():
                worker.claims.renew(lease)
            folder.beat(worker.name)
            folder.count("list")  # control
            if worker.leases and folder.at - worker.saved >= FLUSH_SECONDS - 1:
                worker.saved = folder.at
                folder.beat(worker.name)
                folder.count("write", 2)  # finished rows, and what is in flight
                folder.count("list", len(worker.leases))  # what others have saved
            plan(at + renewal, "renew", worker)
        else:
            worker.alive = False
            hire(at + arguments.ramp)
    assert len(folder.parts) == arguments.shards
    found = json.loads(folder.summary or b"{}")
    assert found["complete"]
    assert len(found["workers"]) == len(folder.workers)
    by_time = [folder.by_second[second] for second in range(max(folder.by_second) + 1)]
    rates, period = sorted(by_time), -(-len(by_time) // PERIODS)
    tens = [sum(by_time[second : second + 10]) / 10 for second in range(len(by_time))]
    periods = [by_time[start : start + period] for start in range(0, len(by_time), period)]
    usd = sum(USD[kind] * number for kind, number in folder.requests.items())
    fleet_hours = arguments.workers * ended / 3600
    return {
        "workers": arguments.workers,
        "shards": arguments.shards,
        "hours": ended / 3600,
        "claims_per_useful_shard": folder.creates / arguments.shards,
        "claims_lost": folder.creates - folder.won,
        "left_as_too_many": too_many,
        "requests_for_the_summary": summary_requests,
        "looks_per_worker": folder.looks / arguments.workers,
        "longest_look_seconds": folder.longest_look,
        "requests": dict(folder.requests),
        "requests_per_shard": folder.requests.total() / arguments.shards,
        "requests_per_second": {
            "mean": folder.requests.total() / ended,
            "median": rates[len(rates) // 2],
            "p99": rates[int(len(rates) * 0.99)],
            "most": rates[-1],
            "most_in_ten_seconds": max(tens),
            "most_after_the_start": max(by_time[int(arguments.ramp) + 60 :]),
        },
        "seconds_a_period": period,
        "mean_and_most_requests_per_second_by_period": [
            [round(sum(seconds) / len(seconds)), max(seconds)] for seconds in periods
        ],
        "usd": usd,
        "usd_per_worker_hour": usd / fleet_hours,
        "idle_share": idle_seconds / (arguments.workers * ended),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workers", type=int, default=2000)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--shard-seconds", type=float, default=180.0)
    parser.add_argument("--latency", type=float, default=0.03, help="seconds a request takes")
    parser.add_argument("--ramp", type=float, default=60.0, help="seconds in which the workers start")
    parser.add_argument("--preempted", type=float, default=0.2, help="share of the workers")
    parser.add_argument("--seed", type=int, default=0)
    began = time.monotonic()
    figures = simulate(parser.parse_args())
    print(json.dumps(figures | {"simulated_in_seconds": time.monotonic() - began}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
