"""A worker as a container has it: process 1 of its namespace, probed by its health file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_jobs import FakeJob, submit_fake_job
from image_builder import container_process

from batchinfer.jobs import health
from batchinfer.jobs.clock import SystemClock
from batchinfer.jobs.cost import Ledger
from batchinfer.jobs.heartbeat import Renewer
from batchinfer.jobs.processes import python_command
from batchinfer.jobs.workbench import Workbench

# Whoever isn't root is root in a user namespace of their own, where the kernel lets them.
ALONE = ["unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
ALONE += ["--pid", "--fork", "--kill-child", "--mount-proc"]
PATIENCE = 180.0

# Its first engine leaves a child that has ended, and dies; later ones answer.
ORPHANING = """
import os, subprocess
from fake_engine import fake_engine

def engine(config):
    try:
        os.close(os.open({marker!r}, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return fake_engine(config)
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    os._exit(1)
"""


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def probe(**environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != health.HEALTH}
    return subprocess.run(
        python_command("batchinfer.jobs.health"),
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def grow_old(path: Path, seconds: float) -> None:
    past = time.time() - seconds
    os.utime(path, (past, past))


def test_the_probe_says_whether_a_worker_lives(tmp_path: Path) -> None:
    file = tmp_path / "alive"
    done = probe(BATCHINFER_HEALTH=str(file))
    assert done.returncode == 1
    assert done.stderr == f"no worker has shown life in {file}: No such file or directory\n"
    file.touch()
    done = probe(BATCHINFER_HEALTH=str(file))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    grow_old(file, health.LIMIT_SECONDS + 60)
    done = probe(BATCHINFER_HEALTH=str(file))
    assert done.returncode == 1
    assert "the worker has shown no life for 66" in done.stderr and str(file) in done.stderr
    done = probe()
    assert done.returncode == 1
    assert done.stderr.startswith("BATCHINFER_HEALTH names no file")


def test_the_probe_imports_the_standard_library_alone() -> None:
    script = "import sys, batchinfer.jobs.health; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    ours = {name.partition(".")[0] for name in done.stdout.split()} - set(sys.stdlib_module_names)
    by_the_machine = {"_distutils_hack", "sitecustomize"}
    assert {name for name in ours if not name.startswith("__")} <= {"batchinfer"} | by_the_machine


def test_a_file_that_cannot_be_touched_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(health.HEALTH, str(tmp_path / "absent" / "alive"))
    health.show_life()
    assert "BATCHINFER_HEALTH is" in caplog.text and "No such file" in caplog.text
    assert health.find_fault() is not None


def test_only_a_worker_whose_engine_moves_shows_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The renewer writes heartbeats all the time, but touches the file only while nothing is stalled."""
    file = tmp_path / "alive"
    monkeypatch.setenv(health.HEALTH, str(file))
    job = submit_fake_job(str(tmp_path / "out"), tmp_path, monkeypatch)
    clock = SystemClock()
    bench = Workbench(clock, Ledger(clock.now_ns()), "w", None, 1)
    stalled, beats = [True], [0]

    class Heartbeat:
        def beat(self) -> None:
            beats[0] += 1

    renewer = Renewer(job.folder, bench, clock, None, Heartbeat(), 0.2, lambda: stalled[0])  # type: ignore[arg-type]
    thread = clock.spawn("renewer", renewer.run)
    until(lambda: beats[0] > 4, "heartbeats")
    assert not file.exists()
    stalled[0] = False
    until(file.exists, "a sign of life")
    grow_old(file, 3600)
    until(lambda: health.find_fault() is None, "another")
    renewer.close()
    thread.join()


@pytest.fixture
def alone() -> None:
    """Skips where no namespaces can be made."""
    done = subprocess.run([*ALONE, "true"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no process can be process 1 here: {done.stderr.strip()}")


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeJob:
    return submit_fake_job(str(tmp_path / "out"), tmp_path, monkeypatch, step=0.1, tokens=20)


@pytest.fixture
def start(alone: None) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts the command line as process 1 of a namespace of its own."""
    started: list[subprocess.Popen[bytes]] = []

    def run(*arguments: str) -> subprocess.Popen[bytes]:
        command = [*ALONE, *python_command("batchinfer", *arguments)]
        started.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def catches(process: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{process}/status").read_text()
    (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def in_namespace(process: int) -> list[int]:
    """A process's ids, from this namespace's to the innermost."""
    status = Path(f"/proc/{process}/status").read_text()
    (found,) = (line.split()[1:] for line in status.splitlines() if line.startswith("NSpid"))
    return [int(number) for number in found]


def children(process: int) -> dict[int, str]:
    """A process's children and their states."""
    found = {}
    for number in Path(f"/proc/{process}/task").iterdir():
        for child in (number / "children").read_text().split():
            stat = Path(f"/proc/{child}/stat").read_text()
            found[int(child)] = stat.rpartition(")")[2].split()[0]
    return found


def test_as_process_1_a_worker_saves_its_work_on_sigterm(
    job: FakeJob,
    start: Callable[..., subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    file = tmp_path / "alive"
    monkeypatch.setenv(health.HEALTH, str(file))
    engine = start("worker", job.uri)
    first = container_process(engine)
    assert in_namespace(first)[-1] == 1
    until(lambda: any(record.rows_done > 0 for record in job.workers()), "answers")
    assert health.find_fault() is None
    os.kill(first, signal.SIGTERM)
    assert engine.wait(PATIENCE) == 75
    (record,) = job.workers()
    assert (record.state, record.exit_code) == ("left", 75)
    assert start("worker", job.uri).wait(PATIENCE) == 0
    job.check_complete()


def test_as_process_1_any_command_ends_on_sigterm(
    job: FakeJob, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """The kernel has no default for process 1: without a handler the signal would be lost."""
    engine = start("status", "--watch", job.uri)
    first = container_process(engine)
    until(lambda: catches(first, signal.SIGTERM), "a handler")
    os.kill(first, signal.SIGTERM)
    assert engine.wait(PATIENCE) == 75


def test_as_process_1_a_worker_buries_what_a_dead_engine_leaves(
    job: FakeJob,
    start: Callable[..., subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    marker, factory = tmp_path / "marker", tmp_path / "orphaning.py"
    factory.write_text(ORPHANING.format(marker=str(marker)))
    monkeypatch.setenv("BATCHINFER_ENGINE_FACTORY", f"{factory}:engine")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    )
    engine = start("worker", job.uri)
    first = container_process(engine)
    until(lambda: job.running(), "the second engine")
    assert marker.exists()
    assert "Z" not in children(first).values()
    os.kill(first, signal.SIGTERM)
    assert engine.wait(PATIENCE) == 75
