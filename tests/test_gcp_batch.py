"""Workers on Google Cloud Batch: its job as the client's own types take it, and the calls that it gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fake_jobs import submit_fake_job

from batchinfer.jobs.backends import gcp_batch
from batchinfer.jobs.backends.request import Active, Place, Request, make_request
from batchinfer.jobs.spec import parse_spec
from batchinfer.jobs.types import JobError

batch_v1 = pytest.importorskip("google.cloud.batch_v1")

PLACE = {"project": "mine", "location": "europe-west4"}


def request(count: int = 3, options: dict[str, Any] | None = None, **workers: Any) -> Request:
    spec = parse_spec(
        {
            "model": "org/model",
            "input": {"uri": "gs://bucket/in/"},
            "prompt": "{{ text }}",
            "output": {"uri": "gs://bucket/out"},
            "workers": {
                "backend": "gcp_batch",
                "image": "registry/batchinfer:1",
                "gpus": 0,
                "options": {"gcp_batch": {**PLACE, **(options or {})}},
                **workers,
            },
        }
    )
    return make_request(spec, "gs://bucket/out", count)


FULL: dict[str, Any] = {
    "gpus": 2,
    "cpus": 3.5,
    "memory": "16GiB",
    "spot": False,
    "options": {
        "machine_type": "g2-standard-24",
        "accelerator": "nvidia-l4",
        "service_account": "reader@mine.iam.gserviceaccount.com",
        "boot_disk_gib": 100,
        "env": {"A": "1"},
        "secrets": {"HF_TOKEN": "projects/mine/secrets/hub/versions/1"},
    },
}


def test_the_job_is_one_that_the_client_knows() -> None:
    shown = json.loads(gcp_batch.render(request(**FULL)))
    assert shown["parent"] == "projects/mine/locations/europe-west4"
    job = batch_v1.Job.from_json(json.dumps(shown["job"]))
    [group] = job.task_groups
    assert (group.task_count, group.parallelism, group.task_count_per_node) == (3, 3, 1)
    task = group.task_spec
    assert (task.compute_resource.cpu_milli, task.compute_resource.memory_mib) == (3500, 16384)
    assert task.compute_resource.boot_disk_mib == 102400
    assert task.runnables[0].container.entrypoint == "batchinfer"
    assert list(task.runnables[0].container.commands) == ["worker", "gs://bucket/out"]
    assert dict(task.environment.variables) == {"A": "1"}
    assert "HF_TOKEN" in task.environment.secret_variables
    assert task.max_retry_count == 4
    [policy] = task.lifecycle_policies
    assert policy.action == batch_v1.LifecyclePolicy.Action.RETRY_TASK
    codes = set(policy.action_condition.exit_codes)
    assert {75, 50001} <= codes and not {0, 77, 78} & codes
    [instances] = job.allocation_policy.instances
    assert instances.policy.provisioning_model == batch_v1.AllocationPolicy.ProvisioningModel.STANDARD
    assert instances.policy.accelerators[0].count == 2 and instances.install_gpu_drivers
    assert job.allocation_policy.service_account.email.startswith("reader@")


def test_interruptible_machines_are_asked_for_unless_the_spec_says_otherwise() -> None:
    job = batch_v1.Job.from_json(json.dumps(gcp_batch.job(request())))
    spot = batch_v1.AllocationPolicy.ProvisioningModel.SPOT
    assert job.allocation_policy.instances[0].policy.provisioning_model == spot
    assert job.task_groups[0].task_spec.max_retry_count == 4


def test_the_client_refuses_what_is_wrong() -> None:
    job = gcp_batch.job(request())
    job["taskGroups"][0]["taskCounts"] = 3
    with pytest.raises(Exception, match="taskCounts"):
        batch_v1.Job.from_json(json.dumps(job))


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ({"image": None}, r"workers\.image is missing"),
        ({"options": {"project": None}}, r"workers\.options\.gcp_batch\.project is missing"),
        ({"options": {"location": None}}, r"workers\.options\.gcp_batch\.location is missing"),
        ({"max_attempts": 12}, r"workers\.max_attempts is 12, but Google Cloud Batch allows 11"),
        ({"gpus": 1}, r"workers\.options\.gcp_batch\.accelerator is missing"),
    ],
)
def test_what_the_service_needs_must_be_given(workers: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        gcp_batch.render(request(**workers))


class Client:
    """Keeps jobs as the service does."""

    def __init__(self) -> None:
        self.jobs: dict[str, Any] = {}

    def create_job(self, parent: str, job_id: str, job: Any) -> Any:
        made = batch_v1.Job(job, name=f"{parent}/jobs/{job_id}")
        made.status = batch_v1.JobStatus(state="QUEUED")
        self.jobs[made.name] = made
        return made

    def list_jobs(self, request: Any) -> list[Any]:
        assert isinstance(request, batch_v1.ListJobsRequest)
        return [job for name, job in self.jobs.items() if name.startswith(request.parent)]

    def delete_job(self, name: str) -> None:
        self.jobs[name].status.state = "DELETION_IN_PROGRESS"


def test_jobs_are_made_counted_and_deleted_by_their_label(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client()
    monkeypatch.setattr(batch_v1, "BatchServiceClient", lambda: client)
    wanted = request(3)
    [name] = gcp_batch.submit(wanted)
    assert name.endswith(f"/jobs/{wanted.unique_name}")
    assert gcp_batch.active(wanted.place) == Active(3, 0)
    group = batch_v1.JobStatus.TaskGroupStatus(counts={"RUNNING": 1, "PENDING": 1, "SUCCEEDED": 1})
    client.jobs[name].status = batch_v1.JobStatus(state="RUNNING", task_groups={"group0": group})
    assert gcp_batch.active(wanted.place) == Active(1, 1)
    other = make_request(
        parse_spec(
            {
                "model": "m",
                "input": {"uri": "gs://b/i"},
                "prompt": "x",
                "output": {"uri": "gs://b/o"},
                "workers": wanted.workers.model_dump(mode="json"),
            }
        ),
        "gs://b/o",
        1,
    )
    assert gcp_batch.active(other.place) == Active()
    gcp_batch.cancel(other.place)
    assert client.jobs[name].status.state.name == "RUNNING"
    gcp_batch.cancel(wanted.place)
    assert gcp_batch.active(wanted.place) == Active()


def test_what_the_service_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from google.api_core.exceptions import PermissionDenied

    class Refusing(Client):
        def create_job(self, parent: str, job_id: str, job: Any) -> Any:
            raise PermissionDenied("no batch.jobs.create")

    monkeypatch.setattr(batch_v1, "BatchServiceClient", Refusing)
    with pytest.raises(JobError, match=r"Google Cloud Batch refused the job: .*no batch\.jobs\.create"):
        gcp_batch.submit(request())


class Task:
    """One task of a job, run on this machine as the service documents it."""

    def __init__(self, job: Any, index: int, logs: Path) -> None:
        [group] = job.task_groups
        self.spec, self.count, self.index = group.task_spec, group.task_count, index
        self._log = logs / f"task-{index}.log"
        self.codes: list[int] = []
        self.preempted = False
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        container = self.spec.runnables[0].container
        own = {
            "BATCH_TASK_INDEX": str(self.index),
            "BATCH_TASK_COUNT": str(self.count),
            "BATCH_TASK_RETRY_ATTEMPT": str(len(self.codes)),
        }
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [container.entrypoint, *container.commands],
                env={**os.environ, **self.spec.environment.variables, **own},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def preempt(self) -> None:
        self.preempted = True
        self.process.kill()

    def over(self) -> bool:
        """Take in how it ended, and start it again where the one policy says so."""
        code = self.process.poll()
        if code is None:
            return False
        code = 50001 if self.preempted else code if code >= 0 else 128 - code
        self.preempted = False
        self.codes.append(code)
        [policy] = self.spec.lifecycle_policies
        retried = code != 0 and code in policy.action_condition.exit_codes
        if retried and len(self.codes) <= self.spec.max_retry_count:
            self.process = self._start()
            return False
        return True


def run_tasks(tasks: list[Task], disturb: Any) -> None:
    deadline = time.monotonic() + 240
    left = list(tasks)
    try:
        while left:
            assert time.monotonic() < deadline, [task.codes for task in tasks]
            disturb()
            left = [task for task in left if not task.over()]
            time.sleep(0.05)
    finally:
        for task in tasks:
            task.process.kill()
            task.process.wait()


@pytest.mark.slow
@pytest.mark.chaos
def test_a_job_goes_through_a_preemption_and_a_drain(
    s3_seaweed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    asked = {**request().workers.model_dump(mode="json"), "count": 2}
    made = submit_fake_job(
        f"{s3_seaweed.uri}/out",
        tmp_path,
        monkeypatch,
        workers=asked,
        rows=120,
        shard_rows=6,
        step=0.15,
        tokens=8,
    )
    wanted = json.dumps(gcp_batch.job(make_request(made.spec, made.uri, 2)))
    tasks = [Task(batch_v1.Job.from_json(wanted), index, tmp_path) for index in range(2)]
    disturbed: list[bool] = []

    def disturb() -> None:
        if not disturbed and len(made.running()) == 2:
            disturbed.append(True)
            tasks[0].preempt()
            tasks[1].process.terminate()

    run_tasks(tasks, disturb)
    assert [task.codes for task in tasks] == [[50001, 0], [75, 0]]
    made.check_complete()


def test_a_wrong_job_is_not_tried_again(
    s3_seaweed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    uri = f"{s3_seaweed.uri}/nothing"
    wrong = json.dumps(
        gcp_batch.job(Request(Place(uri, request().place.options), 1, request().workers, {}))
    )
    task = Task(batch_v1.Job.from_json(wrong), 0, tmp_path)
    run_tasks([task], lambda: None)
    assert task.codes == [78]
