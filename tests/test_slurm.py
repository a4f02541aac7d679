"""Workers on a real Slurm cluster: requeued, signalled, and on a node that dies."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
from fake_jobs import FakeJob, submit_fake_job
from slurm_cluster import Cluster

import batchinfer.jobs.job
from batchinfer.jobs.backends import slurm
from batchinfer.jobs.backends.local import start_workers
from batchinfer.jobs.backends.request import Active, Place, Request, make_request
from batchinfer.jobs.job import Job
from batchinfer.jobs.placement import place_workers
from batchinfer.jobs.spec import parse_spec

ARRAY_SIZE = 3


def until(condition: Callable[[], object], what: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.3)


def request(count: int = 1, uri: str = "s3://bucket/out", **workers: object) -> Request:
    spec = parse_spec(
        {
            "model": "org/model",
            "input": {"uri": "s3://bucket/in/"},
            "prompt": "{{ text }}",
            "output": {"uri": uri},
            "workers": {"backend": "slurm", **workers},
        }
    )
    return make_request(spec, uri, count)


def directives(script: str) -> dict[str, str]:
    found = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in found)}


def test_resources_and_options_become_directives() -> None:
    [script] = slurm.scripts(
        request(
            4,
            gpus=2,
            cpus=3.5,
            memory="16GiB",
            options={
                "slurm": {"partition": "gpu", "time": "4:00:00", "sbatch": ["--constraint=a100"]},
                "kubernetes": {"namespace": "other"},
            },
        ),
        1001,
    )
    found = directives(script)
    assert found["array"] == "0-3"
    assert (found["gres"], found["cpus-per-task"], found["mem"]) == ("gpu:2", "4", "16384M")
    assert (found["partition"], found["time"], found["constraint"]) == ("gpu", "4:00:00", "a100")
    assert found["signal"] == "B:USR1@120" and "requeue" in found and found["open-mode"] == "append"
    assert "other" not in script
    assert not {"qos", "account"} & found.keys()


def test_arrays_are_cut_at_the_largest_size_and_numbers_go_on() -> None:
    scripts = slurm.scripts(request(7), 3)
    assert [directives(script)["array"] for script in scripts] == ["0-2", "0-2", "0-0"]
    for script, first in zip(scripts, (0, 3, 6), strict=True):
        assert f"--index $((SLURM_ARRAY_TASK_ID + {first}))" in script


def test_a_script_is_one_that_bash_reads(tmp_path: Path) -> None:
    path = tmp_path / "script"
    path.write_text(slurm.render(request(2, "s3://bucket/with space/'quoted'/$x", gpus=0)))
    subprocess.run(["bash", "-n", path], check=True)
    assert "gres" not in directives(path.read_text())


def run_script(tmp_path: Path, exits: list[int], attempts: int = 5, state: str = "RUNNING") -> list[str]:
    """Run a script as a task of a Slurm that we play; returns the commands that it gave."""
    programs, log = tmp_path / "bin", tmp_path / "log"
    programs.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    plays = {
        "batchinfer": f'echo batchinfer "$@" >>{log}; exit ' + str(exits[0]),
        "squeue": f"echo {state}",
        "scontrol": f'echo scontrol "$@" >>{log}; [ "$1" = requeue ] || exit 1',
        "sleep": "true",
    }
    for name, body in plays.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    [script] = slurm.scripts(request(2, max_attempts=attempts), 1001)
    environment = {
        "PATH": f"{programs}:/usr/bin:/bin",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_RESTART_COUNT": "2",
    }
    done = subprocess.run(["bash"], input=script, text=True, env=environment, timeout=240, cwd=tmp_path)
    assert done.returncode == exits[0]
    return log.read_text().splitlines()


@pytest.mark.parametrize(
    ("code", "requeued"), [(0, False), (77, False), (78, False), (75, True), (70, True), (137, True)]
)
def test_a_task_is_requeued_after_what_may_pass(tmp_path: Path, code: int, requeued: bool) -> None:
    found = run_script(tmp_path, [code])
    assert found[0] == "batchinfer worker s3://bucket/out --index 1"
    assert found[1:] == (["scontrol requeue 7_1"] if requeued else [])


def test_a_task_is_not_requeued_for_ever_nor_when_slurm_ends_it(tmp_path: Path) -> None:
    assert len(run_script(tmp_path, [75], attempts=3)) == 1
    assert len(run_script(tmp_path, [75], attempts=4)) == 2
    assert len(run_script(tmp_path, [75], state="COMPLETING")) == 1


@pytest.fixture(scope="module")
def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = slurm_cluster.missing()
    if reason:
        pytest.skip(reason)
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm"), ARRAY_SIZE) as found:
        yield found


@pytest.fixture
def on_cluster(running_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, with this test's environment set for it; logs go to the test's folder."""
    programs = str(Path(sys.executable).parent)
    monkeypatch.setenv("SLURM_CONF", running_cluster.environment["SLURM_CONF"])
    monkeypatch.setenv("PATH", f"{programs}:{running_cluster.environment['PATH']}")
    monkeypatch.chdir(tmp_path)
    return running_cluster


def slurm_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, **sizes: Any) -> FakeJob:
    asked = {"backend": "slurm", "count": workers, "gpus": 0, "cpus": 1.0}
    return submit_fake_job(f"file://{tmp_path}/out", tmp_path, monkeypatch, workers=asked, **sizes)


def place(job: FakeJob) -> tuple[Place, tuple[str, ...]]:
    placed = place_workers(job.spec, job.uri)
    return Place(job.uri, job.spec.workers.options), placed.ids


def started_again(cluster: Cluster, task: str) -> bool:
    details = cluster.details(task)
    assert "held" not in details["Reason"].lower(), details
    return details["JobState"] in ("RUNNING", "COMPLETED")


@pytest.mark.slow
def test_workers_of_slurm_and_of_this_machine_share_a_job(
    on_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = slurm_job(tmp_path, monkeypatch, 2, rows=200, shard_rows=5, step=0.15, tokens=8)
    where, _ = place(job)
    assert place_workers(job.spec, job.uri).ids == (), "they are there already"
    with start_workers(job.uri, 1, 0, {}, attached=True, cpus=1.0) as here:
        until(lambda: len(job.workers()) == 3, "three workers")
        until(lambda: not here.running() and slurm.active(where).total == 0, "the end")
    assert [process.returncode for process in here.processes] == [0]
    job.check_complete()
    authors = {job.folder.read_footer(shard).worker for shard in job.folder.committed()}
    on_this_machine = {record.worker for record in job.workers() if record.pid == here.processes[0].pid}
    assert authors & on_this_machine and authors - on_this_machine


@pytest.mark.slow
def test_a_cancelled_job_leaves_slurm_and_goes_on_later(
    on_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = slurm_job(tmp_path, monkeypatch, 2, rows=40, step=0.5)
    where, [array] = place(job)
    until(lambda: len(job.running()) == 2, "two workers")
    seen = Job(job.uri)
    [report] = seen.services()
    assert (report.backend, report.active) == ("slurm", Active(0, 2))
    assert seen.cancel() == []
    until(lambda: slurm.active(where).total == 0, "the workers to leave")
    assert {on_cluster.details(f"{array}_{index}")["Restarts"] for index in (0, 1)} == {"0"}
    assert {record.state for record in job.workers()} == {"left"}
    assert seen.status().state == "cancelled"

    job.folder.append_control(lambda control: replace(control, state="run"))
    place(job)
    until(lambda: slurm.active(where).total == 0, "the end")
    job.check_complete()


@pytest.mark.slow
def test_a_wrong_job_is_not_requeued_and_one_that_waits_is_not_stalled(
    on_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = slurm_job(tmp_path, monkeypatch, 1, rows=4)
    [array] = slurm.submit(make_request(job.spec, str(tmp_path / "nothing"), 1))
    until(lambda: on_cluster.details(f"{array}_0")["JobState"] == "FAILED", "its end")
    details = on_cluster.details(f"{array}_0")
    assert (details["ExitCode"], details["Restarts"]) == ("78:0", "0")
    assert "there is no job at" in next(tmp_path.glob(f"*{array}_0.log")).read_text()

    seen = Job(job.uri)
    monkeypatch.setattr(batchinfer.jobs.job, "ASK_SECONDS", 0.0)
    assert seen.status().state == "stalled"
    on_cluster.run("scontrol", "update", "PartitionName=batch", "State=DOWN")
    try:
        where, _ = place(job)
        assert slurm.active(where) == Active(1, 0)
        assert seen.status().state == "starting"
    finally:
        on_cluster.run("scontrol", "update", "PartitionName=batch", "State=UP")
    assert seen.wait().state == "done"
    until(lambda: slurm.active(where).total == 0, "the end")


@pytest.mark.slow
@pytest.mark.chaos
def test_a_job_goes_through_requeues_signals_and_the_loss_of_a_node(
    on_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = slurm_job(tmp_path, monkeypatch, 4, rows=400, shard_rows=4, step=0.25, tokens=12)
    where, arrays = place(job)
    assert len(arrays) == 2, "four workers are more than MaxArraySize"
    tasks = [f"{arrays[0]}_0", f"{arrays[0]}_1", f"{arrays[0]}_2", f"{arrays[1]}_0"]
    until(lambda: len(job.running()) == 4, "four workers")
    assert sorted(record.index or 0 for record in job.running()) == [0, 1, 2, 3]
    assert slurm.active(where) == Active(0, 4)
    nodes = {task: on_cluster.details(task)["NodeList"] for task in tasks}
    assert sorted(nodes.values()) == ["n1", "n1", "n2", "n2"]
    staying = [task for task in tasks if nodes[task] == "n1"]

    on_cluster.run("scancel", "--signal=TERM", "--full", staying[0])
    on_cluster.run("scancel", "--signal=USR1", "--batch", staying[1])
    for task in staying:
        until(lambda task=task: on_cluster.details(task)["Restarts"] == "1", f"{task} to requeue itself")
        until(lambda task=task: started_again(on_cluster, task), f"{task} to start again")
    until(lambda: len(job.workers()) >= 6, "the requeued workers")
    left = [record for record in job.workers() if record.state == "left"]
    assert [record.exit_code for record in left] == [75, 75]

    on_cluster.run("scontrol", "requeue", staying[0])
    until(lambda: on_cluster.details(staying[0])["Restarts"] == "2", "its requeue")
    until(lambda: started_again(on_cluster, staying[0]), f"{staying[0]} to start again")
    until(lambda: len(job.workers()) >= 7, "the worker that an administrator requeued")

    assert on_cluster.kill_node("n2") > 0
    lost = [task for task in tasks if nodes[task] == "n2"]
    for task in lost:
        until(lambda task=task: on_cluster.details(task)["Restarts"] == "1", f"{task} to leave its node")
        until(lambda task=task: started_again(on_cluster, task), f"{task} to start again")
    until(lambda: slurm.active(where).total == 0, "the end")
    assert {on_cluster.details(task)["JobState"] for task in tasks} == {"COMPLETED"}
    job.check_complete()
