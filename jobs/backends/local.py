"""Workers as processes of this machine, which share out its GPUs, or its cores and memory."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from batchinfer.jobs.processes import (
    MEMORY_SHARE,
    PARENT,
    child_environment,
    python_command,
    storage_environment,
)

MEMORY_OF_HOST = 0.8
STOP_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class LocalWorkers:
    """Workers that were started together, and the files that hold what they say.

    As a context manager it stops them at the end of the block, if they were started as attached.
    """

    processes: tuple[subprocess.Popen[bytes], ...]
    logs: tuple[Path, ...]
    attached: bool

    @property
    def count(self) -> int:
        """How many were started."""
        return len(self.processes)

    def running(self) -> bool:
        """Whether any of them still runs."""
        return any(process.poll() is None for process in self.processes)

    def stop(self) -> None:
        """Have them save what they have and leave; whoever does not within 30 seconds is killed."""
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def __enter__(self) -> LocalWorkers:
        """The workers."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop those that are attached."""
        if self.attached:
            self.stop()


def start_workers(
    job_uri: str,
    count: int,
    gpus: int,
    storage: Mapping[str, Mapping[str, Any]],
    attached: bool,
    cpus: float | None = None,
) -> LocalWorkers:
    """Start ``count`` workers on the job at ``job_uri``, with ``gpus`` GPUs each where there are any.

    Without GPUs each gets its part of the cores (or ``cpus`` of them) and of the memory. Attached ones
    leave in order when the calling thread ends, whatever ends it; others outlive it. ``storage`` holds
    settings of stores by URI prefix.
    """
    logs = _log_folder()
    processes, files = [], []
    for index, shares in enumerate(worker_shares(count, gpus, cpus)):
        environment = {**child_environment(), **storage_environment(storage), **shares}
        if attached:
            environment[PARENT] = str(os.getpid())
        with tempfile.NamedTemporaryFile(
            dir=logs, prefix=f"worker-{index}-", suffix=".log", delete=False
        ) as log:
            processes.append(
                subprocess.Popen(
                    [*python_command("batchinfer", "worker", job_uri), "--index", str(index)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=not attached,
                )
            )
            files.append(Path(log.name))
    return LocalWorkers(tuple(processes), tuple(files), attached)


def render(
    job_uri: str,
    count: int,
    gpus: int,
    storage: Mapping[str, Mapping[str, Any]],
    cpus: float | None = None,
) -> str:
    """The commands that ``start_workers`` runs, one a line, with what it adds to the environment."""
    lines = []
    for index, shares in enumerate(worker_shares(count, gpus, cpus)):
        environment = {**storage_environment(storage), **shares}
        words = [f"{name}={shlex.quote(value)}" for name, value in sorted(environment.items())]
        command = [*python_command("batchinfer", "worker", job_uri), "--index", str(index)]
        lines.append(" ".join([*words, shlex.join(command)]))
    return "\n".join(lines) + "\n"


def worker_shares(count: int, gpus: int, cpus: float | None) -> list[dict[str, str]]:
    """The environment that gives each worker its part of the machine; none where all are there already."""
    if count == 0:
        return []
    devices = _gpus() if gpus else []
    if devices:
        # Where there are fewer than asked for, workers share them in turn.
        groups = [devices[start : start + gpus] for start in range(0, len(devices), gpus)]
        shared = -(-count // len(groups))
        return [
            {
                "CUDA_VISIBLE_DEVICES": ",".join(groups[index % len(groups)]),
                MEMORY_SHARE: str(MEMORY_OF_HOST / shared),
            }
            for index in range(count)
        ]
    threads = max(1, int(cpus or len(os.sched_getaffinity(0)) // count))
    share = {MEMORY_SHARE: str(MEMORY_OF_HOST / count)}
    if "OMP_NUM_THREADS" not in os.environ:
        share["OMP_NUM_THREADS"] = str(threads)
    return [share] * count


def _gpus() -> Sequence[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name not in ("", "-1")]
    driver = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number in range(len(list(driver.iterdir())))] if driver.is_dir() else []


def _log_folder() -> Path:
    folder = Path(os.environ.get("BATCHINFER_CACHE") or Path.home() / ".cache" / "batchinfer") / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.gettempdir())
    return folder
