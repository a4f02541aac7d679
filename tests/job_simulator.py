"""Jobs in a deterministic world: the product's own workers, killed, frozen and lied to by a seed.

Their threads pass one baton at every storage call and every wait, in an order that the seed alone
decides, so a failing seed fails again:

    python tests/job_simulator.py SEED [--trace]
    python tests/job_simulator.py --seeds 10000
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import random
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import simulated_budget
import simulated_people
from simulated_engine import SimEngine, crashing, rejected, stalling, unreadable, unrendered, words
from simulated_retry import PlainStore, check_rounds, heals, retried_rows
from simulated_store import AIMS, FaultPlan, Faults, SimStore
from simulated_world import SECOND, Broken, Process, SimClock, World

from batchinfer.connectors.batches import RowBatch
from batchinfer.connectors.types import BadRow, InputFile, Split, TransientStorageError
from batchinfer.engine.types import SamplingParams
from batchinfer.jobs.budget import BudgetSpent
from batchinfer.jobs.columns import output_schema
from batchinfer.jobs.cost import settle
from batchinfer.jobs.failure_limit import NO_LIMIT, FailureLimit, JobStopped
from batchinfer.jobs.feeder import Work
from batchinfer.jobs.folder import JobFolder, ShardName
from batchinfer.jobs.records import Bill, Control, PartFooter, WorkerRecord
from batchinfer.jobs.retry import last_round, round_shards
from batchinfer.jobs.supervisor import EXIT_DONE, EXIT_RETRY, EXIT_STOPPED, Pace, Supervisor
from batchinfer.jobs.types import RowError, Shard

PASSED = pa.schema([("id", pa.string()), ("value", pa.int64())])
READ = pa.schema([*PASSED, ("prompt", pa.string())])


@dataclass
class Simulation:
    """One job, its workers, and what is to hold in the end."""

    seed: int
    faults: Faults
    workers: int = 2
    shards: int = 4
    rows: int = 6
    n: int = 1
    limit: FailureLimit = NO_LIMIT
    drains: int = 0
    cancels: int = 0
    retries: int = 0
    capacity: int = 8
    read_ahead: int = 5
    poison: bool = False
    budget: simulated_budget.Budget | None = None
    summary_shards: int = 1024
    region_digits: int = 3
    world: World = field(init=False)
    engine_deaths: int = 0
    stops: int = 0
    surplus: int = 0
    summaries: int = 0
    resumed_tokens: int = 0
    decoded_tokens: int = 0

    def __post_init__(self) -> None:
        self.world = World(self.seed)
        self.plan = FaultPlan(self.world, self.faults)
        self.sampling = SamplingParams(n=self.n)
        self.processes: list[Process] = []
        self.supervisors: dict[str, Supervisor] = {}
        self._failures_left = 2
        self.rounds = 0
        self.people = 0
        self.prices: dict[str, float] = {}
        if self.budget is not None:
            self.budget.begin(self.workers)
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
        self.first = list(self.job.values())
        self.record = simulated_people.submit(self)

    def rejects(self, row: int) -> bool:
        return rejected(row) and not (heals(row) and row in retried_rows(self.world))

    def expected_code(self, row: int) -> str:
        """What must become of a row."""
        if unreadable(row):
            return "bad_line"
        if unrendered(row):
            return "render_error"
        if self.rejects(row):
            return "too_long"
        if self.poison and crashing(row):
            return "engine_crash"
        return "engine_stall" if self.poison and stalling(row) else "answered"

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
        self._check_summary()
        simulated_budget.check_budget(self)
        return self

    # -- what happens

    def _harness(self) -> None:
        chance = self.world.chance
        for _ in range(self.workers):
            self._start(chance.randrange(0, 40 * SECOND))
        drains, cancels = self.drains, self.cancels
        while not self._all_done() or simulated_people.retry(self, self.record):
            self.world.pause(chance.randrange(1, 30) * SECOND)
            running = [process for process in self.processes if process.ended_ns is None]
            if drains and running and chance.random() < 0.3:
                drains -= 1
                victim = chance.choice(running)
                if victim.name in self.supervisors:
                    self.world.log(f"SIGTERM to {victim.name}")
                    self.supervisors[victim.name].drain()
            if cancels and chance.random() < 0.2:
                cancels -= 1
                self.ask("cancel", lambda control: replace(control, state="cancel"))
                while any(process.ended_ns is None for process in self.processes):
                    self.world.pause(5 * SECOND)
                self.ask("go on", lambda control: replace(control, state="run"))
            late = self.budget is not None and self.budget.to_add(self.world.now_ns)
            if self.budget is not None and late and chance.random() < 0.2:
                self.budget.add(self)
            if self._stopped():
                self.stops += 1
                while any(process.ended_ns is None for process in self.processes):
                    self.world.pause(5 * SECOND)
                self.ask("go on", _without_limit)
            while self._running() < max(1, self.workers - self.surplus):
                if self._all_done() or simulated_budget.is_used_up(self):
                    break
                self._start(chance.randrange(0, 60 * SECOND))
        while any(process.ended_ns is None for process in self.processes):
            self.world.pause(10 * SECOND)

    def ask(self, what: str, change: Callable[[Control], Control]) -> None:
        simulated_people.ask(self, what, change)

    def _running(self) -> int:
        return len([1 for process in self.processes if process.ended_ns is None])

    def _stopped(self) -> bool:
        controls = [key for key in self.world.objects if key.startswith("_batchinfer/control/")]
        return bool(controls) and b'"stop"' in self.world.objects[max(controls)][0]

    def _all_done(self) -> bool:
        return all(name.part in self.world.objects for name in self.job)

    def _start(self, delay: int) -> None:
        process = Process(f"w{len(self.processes):02d}", self.world.now_ns + delay)
        self.processes.append(process)
        self.prices[process.name] = self.world.chance.choice([2.0, 2.0, 1.0, 3.0]) if self.budget else 2.0

        def main() -> None:
            self.world.pause(max(0, process.started_ns - self.world.now_ns))
            process.exit_code = self._worker(process)
            process.ended_ns = self.world.now_ns
            self.world.log(f"exit {process.exit_code}")
            if process.exit_code == EXIT_DONE and not self._all_done():
                self.surplus += 1

        self.world.spawn(process, f"{process.name}.main", main)

    def _worker(self, process: Process) -> int:
        clock = SimClock(self.world, process)
        store = SimStore(self.world, process, self.plan)
        folder = JobFolder(store, clock, random.Random(self.world.chance.random()), attempts=12)
        schema = output_schema(PASSED, self.sampling, True)
        work = Work(
            last_round(folder, self.first),
            schema,
            PASSED,
            self.sampling,
            lambda split: self._read(store, split),
            self._render,
            lambda number: round_shards(folder, self.first, number),
            limit=self.limit if self.poison else NO_LIMIT,  # without poison nothing disturbs
        )
        allowance = simulated_budget.allowance(self, process, folder)
        record = WorkerRecord(
            worker=process.name,
            state="starting",
            beat=0,
            usd_per_hour=self.prices[process.name],
            bill=Bill(),
            started="",
            bought=allowance is not None,
        )
        supervisor = Supervisor(
            folder,
            clock,
            work,
            record,
            process.started_ns,
            lambda deliver: SimEngine(self.world, process, deliver, self),
            Pace(
                flush=10.0,
                stall=200.0,
                read_ahead=self.read_ahead,
                engine_restarts=3,
                summary_shards=self.summary_shards,
                region_digits=self.region_digits,
            ),
            allowance,
        )
        self.supervisors[process.name] = supervisor
        code = supervisor.run()
        if isinstance(supervisor.bench.error, JobStopped):
            return code
        supervisor.bench.check()
        if supervisor.bench.error is not None and not isinstance(supervisor.bench.error, BudgetSpent):
            raise supervisor.bench.error
        return code

    def _read(self, store: SimStore, split: Split) -> Iterator[RowBatch]:
        # Reading has no retries of its own here, so only kills and freezes strike.
        with contextlib.suppress(TransientStorageError):
            store.read_input(f"input-{split.first_row}")
        rows = split.only or range(split.first_row, split.first_row + split.rows)
        for start in range(0, split.given, 4):
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
            yield RowBatch(good, pa.RecordBatch.from_pydict(columns, READ), bad)

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
                folder = JobFolder(PlainStore(self.world))
                failed = folder.read_failures(name, footer.failures)
            if len(failed) != footer.failed_rows:
                raise Broken(f"the failures of {name.part} are not as many as its footer says")
            if name.round:
                for index in self.job[name].attempts or ():
                    seen.pop(index)
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
            expected = self.expected_code(index)
            if seen.get(index) != expected:
                raise Broken(f"row {index} is {seen.get(index)}, not {expected}")
        left = {index: failure.code for index, failure in check_rounds(self).items()}
        if left != {index: what for index, what in seen.items() if what != "answered"}:
            raise Broken(f"the failures left are {left}")

    @staticmethod
    def _once(seen: dict[int, str], index: int, what: str) -> None:
        if index in seen:
            raise Broken(f"row {index} is there twice: {seen[index]} and {what}")
        seen[index] = what

    def _check_cost(self) -> None:
        folder = JobFolder(PlainStore(self.world))
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

    def _check_summary(self) -> None:
        """Where the last worker to leave left in order, and nobody was killed meanwhile, the summary holds
        every part and every worker's last heartbeat."""
        records = self.records
        known = [process for process in self.processes if process.name in records]
        last = max(known, key=lambda process: process.ended_ns or 0)
        if (
            not last.alive
            or records[last.name].exit_code is None
            or records[last.name].exit_code != last.exit_code
        ):
            return
        leaving_ns = self.world.objects[f"_batchinfer/workers/{last.name}.json"][1]
        if any(not process.alive and (process.ended_ns or 0) >= leaving_ns for process in self.processes):
            return
        found = json.loads(self.world.objects["_batchinfer/summary.json"][0])
        settled = self.settlement
        expected = {
            "shards": {"committed": len(self.job), "total": len(self.job)},
            "rows": {"answered": settled.rows // self.n, "failed": settled.failed_rows},
            "nanoseconds": {**asdict(settled.bill), "total": settled.bill.total},
        }
        if not found["complete"] or {name: found[name] for name in expected} != expected:
            raise Broken(f"the summary is {found}, not {expected}")
        if (
            abs(found["usd"]["total"] - (settled.usd or 0.0)) > 1e-9
            or found["workers"].keys() != records.keys()
        ):
            raise Broken(f"the summary bills {found['usd']} for {sorted(found['workers'])}")
        self.summaries += 1


def _without_limit(control: Control) -> Control:
    return replace(control, state="run", failures={"max_share": 1.0, "after_rows": 1})


def a_budget(chance: random.Random) -> simulated_budget.Budget:
    return simulated_budget.Budget(
        chance.choice([30.0, 200.0, 1000.0, 5000.0]),
        chance.choice(["time", "usd", "both"]),
        late=chance.random() < 0.3,
    )


def from_seed(seed: int) -> Simulation:
    """The simulation that a seed stands for: its size, its faults, and everything that happens."""
    chance = random.Random(f"shape {seed}")
    # Every fault is aimed at every kind of call in turn; the shares add more of them anywhere.
    fault, call = AIMS[seed % len(AIMS)]
    # There are few calls of these kinds in a job, so it is the first one that is struck.
    few = call == "put failures" or "committed.json" in call
    by_people, stops = "of a person" in call, call in ("create control", "get failures")
    faults = Faults(
        kill=chance.choice([0.0, 0.01, 0.03, 0.08]),
        freeze=chance.choice([0.0, 0.01, 0.02]),
        lost_reply=chance.choice([0.0, 0.02, 0.1]),
        error=chance.choice([0.0, 0.02, 0.1]),
        slow=chance.choice([0.0, 0.05]),
        crash=chance.choice([0.0, 0.0, 0.05]),
        hang=chance.choice([0.0, 0.0, 0.05]),
        phantom=chance.choice([0.0, 0.05]),
        budget=chance.choice([3, 10, 40]),
        aimed=(fault, call),
        aimed_skips=0 if by_people or stops or few else chance.choice([0, 0, 1, 4]),
    )
    retries = 2 if "rounds" in call or by_people else chance.choice([0, 0, 1, 2])
    return Simulation(
        seed,
        faults,
        workers=6 if few else chance.randint(2, 6),
        shards=chance.randint(3, 5) if by_people or stops or few else chance.randint(1, 5),
        rows=9 if by_people or stops else chance.choice([1, 4, 4, 9, 9, 25]),
        n=chance.choice([1, 1, 2]),
        limit=FailureLimit(0.1, 24 if call == "get failures" else 5)  # once there are parts, or at once
        if stops
        else chance.choice([NO_LIMIT, NO_LIMIT, FailureLimit(0.1, 10)]),
        drains=3 if "get progress" in call or "inflight" in call else chance.choice([0, 0, 1, 3]),
        cancels=1 if "get control" in call or by_people else chance.choice([0, 0, retries]),
        retries=retries,
        capacity=chance.choice([2, 8, 100]),
        read_ahead=chance.choice([1, 5, 100]),
        poison=stops or chance.random() < 0.4,
        budget=a_budget(chance) if "budget" in call or chance.random() < 0.25 else None,
        summary_shards=chance.choice([1, 2, 1024]),
        region_digits=0 if few else chance.choice([0, 3]),
    )


def _run_many(first: int, seeds: int) -> int:
    """Run seeds in two processes; returns the exit code."""
    totals: Counter[str] = Counter()
    context = multiprocessing.get_context("spawn")  # with threads about, a fork may hang
    with context.Pool(2) as pool:
        for number, (seed, error, counts) in enumerate(
            pool.imap_unordered(_run_one, range(first, first + seeds), chunksize=8), 1
        ):
            totals.update(counts)
            if error:
                print(f"seed {seed}: BROKEN: {error}", flush=True)
            if number % 500 == 0:
                print(f"{number} seeds: {dict(totals)}", flush=True)
    print(f"{seeds} seeds from {first} on: {dict(totals)}")
    return 1 if totals["broken"] else 0


def _run_one(seed: int) -> tuple[int, str, dict[str, int]]:
    logging.disable(logging.CRITICAL)
    simulation = from_seed(seed)
    try:
        simulation.run()
    except Exception as error:
        return seed, f"{type(error).__name__}: {error}", {"broken": 1}
    helpers = sum("/helper-" in key for key in simulation.world.objects)
    return (
        seed,
        "",
        {
            "good": 1,
            "storage calls": simulation.world.operations,
            "processes": len(simulation.processes),
            "helpers": helpers,
            "engine deaths": simulation.engine_deaths,
            "stops": simulation.stops,
            "rounds": simulation.rounds,
            "surplus workers": simulation.surplus,
            "summaries": simulation.summaries,
        },
    )


def main() -> None:
    """Run one seed and show what happened, or many and show which are broken."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("seed", type=int, nargs="?")
    parser.add_argument("--seeds", type=int, help="run that many, from SEED or 0 on, in two processes")
    parser.add_argument("--trace", action="store_true", help="print every storage call")
    arguments = parser.parse_args()
    if arguments.seeds is not None:
        raise SystemExit(_run_many(arguments.seed or 0, arguments.seeds))
    if arguments.seed is None:
        parser.error("give a seed, or --seeds")
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
