"""What happened in a run of tests/chaos.py, for whoever must explain why it failed."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from batchinfer.connectors.types import StorageError
from batchinfer.jobs.types import JobError

if TYPE_CHECKING:
    from chaos import Run

SECOND = 1_000_000_000
_LAST_REQUESTS = 40
_LAST_BYTES = 6000


def killed_for_memory() -> int:
    """How many processes of this machine the kernel has killed because memory ran out."""
    for line in Path("/proc/vmstat").read_text().splitlines():
        if line.startswith("oom_kill "):
            return int(line.split()[1])
    return 0


def story(run: Run) -> str:
    """Everything that tells what happened, in seconds since the run began."""
    lines = [f"=== seed {run.script.seed}: what happened (seconds since the run began)"]
    lines += _machine(run) + _events(run) + _requests(run)
    try:
        lines += _folder(run)
    except (StorageError, JobError, OSError) as error:
        lines.append(f"the folder can't be read any more: {type(error).__name__}: {error}")
    for path in sorted(run.scratch.glob("*.err")):
        lines += [f"--- {path.name}", path.read_text(errors="replace")[-_LAST_BYTES:]]
    return "\n".join(lines)


def _machine(run: Run) -> list[str]:
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    memory = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    killed = killed_for_memory() - run.killed_before
    return [
        f"it took {_at(run, time.perf_counter_ns())} s; load {load}; "
        f"memory available {memory['MemAvailable'].strip()}",
        f"killed by the kernel as memory ran out, on the whole machine: {killed}"
        + (" (a worker or an engine may be among them: run the seed again)" if killed else ""),
    ]


def _events(run: Run) -> list[str]:
    events: list[tuple[int, str]] = []
    for number, worker in enumerate(run.workers):
        who = f"worker {number} (process {worker.pid})"
        events.append((worker.started_ns, f"{who} started"))
        events += [(at, f"{action} for {who}") for at, action in worker.signals]
        if worker.died_ns is not None:
            events.append((worker.died_ns, f"{who} ended with {worker.process.returncode}"))
    if run.logs.is_dir():
        for path in run.logs.iterdir():
            tokens = [int(line.split()[0]) for line in path.read_text().splitlines()]
            if tokens:
                what = f"engine of process {path.stem} decoded its"
                events += [
                    (tokens[0], f"{what} first token"),
                    (tokens[-1], f"{what} {len(tokens)}th, its last"),
                ]
    return [f"{_at(run, at)}  {what}" for at, what in sorted(events)]


def _requests(run: Run) -> list[str]:
    passed = list(run.proxy.passed)
    kinds = Counter(request.kind for request in passed)
    lines = [f"requests that the store answered: {dict(kinds)}; faults: {dict(run.proxy.hits)}"]
    lines += [
        f"{_at(run, request.at_ns)}  {request.kind} {request.path} -> {request.status}"
        + (f" ({request.fault})" if request.fault else "")
        for request in passed[-_LAST_REQUESTS:]
    ]
    return lines


def _folder(run: Run) -> list[str]:
    folder = run.folder
    lines = [
        f"worker {record.worker}: process {record.pid}, {record.state}, beat {record.beat}, exit code "
        f"{record.exit_code}, billed {record.bill.total / SECOND:.2f} s, last heard of at {modified:.0f} "
        f"{record.message}"
        for record, modified in folder.read_workers()
    ]
    parts = folder.committed()
    for shard in sorted(parts):
        footer = folder.read_footer(shard)
        lines.append(f"{shard.part}: by {footer.worker}, {footer.rows} rows, {footer.failed_rows} failed")
    for kind, leases in zip(("owner", "helper"), folder.list_leases(), strict=True):
        for label, generations in sorted(leases.items()):
            times = [f"{number} at {info.modified:.0f}" for number, info in sorted(generations.items())]
            lines.append(f"leases of {label}, as {kind}: {', '.join(times)}")
    lines.append(f"control: {folder.read_control()}")
    return lines


def _at(run: Run, at_ns: int) -> str:
    return f"{(at_ns - run.began_ns) / SECOND:8.2f}"
