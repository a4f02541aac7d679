"""Workers on AWS Batch: its calls as moto takes them, and jobs on a service that we play."""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aws_batch_service
import boto3
import pytest
from aws_batch_service import BatchJob, Running
from fake_jobs import FakeJob, submit_fake_job

from batchinfer.jobs.backends import aws_batch
from batchinfer.jobs.backends.local import start_workers
from batchinfer.jobs.backends.request import Active, Place, Request, make_request
from batchinfer.jobs.job import Job
from batchinfer.jobs.placement import place_workers
from batchinfer.jobs.spec import parse_spec
from batchinfer.jobs.types import JobError

QUEUE = {"aws_batch": {"queue": "spot"}}


def until(condition: Callable[[], object], what: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def request(count: int = 2, **workers: Any) -> Request:
    sizes = {"image": "registry/batchinfer:1", "cpus": 4.0, "memory": "16GiB", "options": QUEUE}
    spec = parse_spec(
        {
            "model": "org/model",
            "input": {"uri": "s3://bucket/in/"},
            "prompt": "{{ text }}",
            "output": {"uri": "s3://bucket/out"},
            "workers": {"backend": "aws_batch", **sizes, **workers},
        }
    )
    return make_request(spec, "s3://bucket/out", count)


def test_the_definition_says_what_a_worker_needs_and_when_to_try_again() -> None:
    found = aws_batch.definition(
        request(
            gpus=2,
            cpus=3.5,
            options={
                "aws_batch": {
                    "queue": "spot",
                    "job_role": "arn:aws:iam::1:role/reader",
                    "env": {"A": "1"},
                    "secrets": {"HF_TOKEN": "arn:aws:secretsmanager:eu-west-1:1:secret:token"},
                }
            },
        )
    )
    container = found["containerProperties"]
    assert {item["type"]: item["value"] for item in container["resourceRequirements"]} == {
        "VCPU": "4",
        "MEMORY": "16384",
        "GPU": "2",
    }
    assert container["command"] == ["worker", "s3://bucket/out"]
    assert container["environment"] == [{"name": "A", "value": "1"}]
    assert container["jobRoleArn"].endswith("reader") and container["secrets"][0]["name"] == "HF_TOKEN"
    assert found["retryStrategy"] == {
        "attempts": 5,
        "evaluateOnExit": [
            {"action": "RETRY", "onStatusReason": "Host EC2*"},
            {"action": "RETRY", "onExitCode": "75"},
            {"action": "EXIT", "onExitCode": "77"},
            {"action": "EXIT", "onExitCode": "78"},
        ],
    }


@pytest.mark.parametrize(
    ("count", "sizes"),
    [
        (1, [None]),
        (2, [2]),
        (10_000, [10_000]),
        (10_001, [10_000, None]),
        (25_000, [10_000, 10_000, 5_000]),
    ],
)
def test_one_worker_is_a_plain_job_and_many_are_several_arrays(count: int, sizes: list[int | None]) -> None:
    jobs = aws_batch.jobs(request(count), "definition")
    assert [job.get("arrayProperties", {}).get("size") for job in jobs] == sizes


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ({"image": None}, r"workers\.image is missing"),
        ({"cpus": None}, r"workers\.cpus is missing"),
        ({"memory": None}, r"workers\.memory is missing"),
        ({"options": {}}, r"workers\.options\.aws_batch\.queue is missing"),
        ({"max_attempts": 11}, r"workers\.max_attempts is 11, but AWS Batch allows 10"),
    ],
)
def test_what_the_service_needs_must_be_given(workers: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        aws_batch.render(request(**workers))


def test_moto_takes_the_calls_that_a_dry_run_shows(
    moto_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in moto_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    configuration = json.dumps({"batch": {"use_docker": False}}).encode()
    url = f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/config"
    urllib.request.urlopen(urllib.request.Request(url, configuration, method="POST")).close()
    batch = boto3.client("batch")
    role = boto3.client("iam").create_role(RoleName="batch", AssumeRolePolicyDocument="{}")["Role"]["Arn"]
    environment = batch.create_compute_environment(
        computeEnvironmentName="spot", type="UNMANAGED", state="ENABLED", serviceRole=role
    )["computeEnvironmentArn"]
    batch.create_job_queue(
        jobQueueName="spot",
        state="ENABLED",
        priority=1,
        computeEnvironmentOrder=[{"order": 1, "computeEnvironment": environment}],
    )
    wanted = request(3)
    [job_id] = aws_batch.submit(wanted)
    [definition] = batch.describe_job_definitions(jobDefinitionName=wanted.place.name)["jobDefinitions"]
    shown = json.loads(aws_batch.render(wanted))
    assert [call["call"] for call in shown] == ["RegisterJobDefinition", "SubmitJob"]
    strategy = json.dumps(shown[0]["parameters"]["retryStrategy"], sort_keys=True)
    # moto writes actions in lower case; the service takes either.
    assert json.dumps(definition["retryStrategy"], sort_keys=True).lower() == strategy.lower()
    assert definition["containerProperties"]["command"] == ["worker", "s3://bucket/out"]
    [job] = batch.describe_jobs(jobs=[job_id])["jobs"]
    assert job["jobName"] == shown[1]["parameters"]["jobName"] == wanted.place.name
    aws_batch.active(wanted.place)
    aws_batch.cancel(wanted.place)


class BatchSetting:
    """A job on S3 whose workers our service runs."""

    def __init__(self, job: FakeJob, running: Running) -> None:
        self.job = job
        self.running = running
        self.place = Place(job.uri, job.spec.workers.options)

    def placed(self) -> BatchJob:
        [job_id] = place_workers(self.job.spec, self.job.uri).ids
        return self.running.service.jobs[job_id]


@pytest.fixture
def make_setting(
    s3_seaweed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., BatchSetting]]:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    contexts = []

    def make(workers: int, attempts: int = 5, **sizes: Any) -> BatchSetting:
        asked = {
            "backend": "aws_batch",
            "count": workers,
            "gpus": 0,
            "cpus": 1.0,
            "memory": "1GiB",
            "image": "batchinfer:test",
            "max_attempts": attempts,
            "options": QUEUE,
        }
        job = submit_fake_job(f"{s3_seaweed.uri}/out", tmp_path, monkeypatch, workers=asked, **sizes)
        context = aws_batch_service.serve(dict(os.environ), tmp_path)
        contexts.append(context)
        running = context.__enter__()
        monkeypatch.setenv("AWS_ENDPOINT_URL_BATCH", running.url)
        return BatchSetting(job, running)

    yield make
    for context in contexts:
        context.__exit__(None, None, None)


@pytest.mark.slow
@pytest.mark.chaos
def test_a_job_goes_through_spot_reclaims_and_kills(make_setting: Callable[..., BatchSetting]) -> None:
    setting = make_setting(3, rows=120, shard_rows=6, step=0.15, tokens=8)
    made = setting.placed()
    until(lambda: len(setting.job.running()) == 3, "three workers")
    assert sorted(record.index or 0 for record in setting.job.running()) == [0, 1, 2]
    assert aws_batch.active(setting.place) == Active(0, 3)
    assert place_workers(setting.job.spec, setting.job.uri).ids == ()
    with setting.running.service.lock:
        setting.running.service.reclaim(made.children[0])
        for child, end in ((made.children[1], "terminate"), (made.children[2], "kill")):
            assert child.process is not None
            getattr(child.process, end)()
    setting.running.wait()
    assert made.status == "SUCCEEDED"
    codes = [[attempt.exit_code for attempt in child.attempts] for child in made.children]
    assert codes == [[None, 0], [75, 0], [137, 0]]
    assert aws_batch.active(setting.place) == Active()
    setting.job.check_complete()


@pytest.mark.slow
def test_a_cancel_ends_the_workers_and_they_save_their_work(
    make_setting: Callable[..., BatchSetting],
) -> None:
    setting = make_setting(1, rows=40, step=0.5)
    made = setting.placed()
    until(lambda: setting.job.running(), "the worker")
    assert [record.index for record in setting.job.running()] == [None], "a plain job has no number"
    assert Job(setting.job.uri).cancel() == []
    setting.running.wait()
    assert len(made.children[0].attempts) == 1
    assert {record.state for record in setting.job.workers()} == {"left"}


@pytest.mark.slow
def test_workers_of_aws_batch_and_of_this_machine_share_a_job(
    make_setting: Callable[..., BatchSetting],
) -> None:
    setting = make_setting(1, rows=200, shard_rows=5, step=0.15, tokens=8)
    setting.placed()
    job = setting.job
    with start_workers(job.uri, 1, 0, {}, attached=True, cpus=1.0) as here:
        setting.running.wait()
        until(lambda: not here.running(), "the worker here")
    job.check_complete()
    assert len({job.folder.read_footer(shard).worker for shard in job.folder.committed()}) == 2


def test_a_wrong_job_is_not_tried_again_and_one_that_drains_is_as_often_as_the_spec_says(
    make_setting: Callable[..., BatchSetting], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "image"
    image.mkdir()
    program = image / "batchinfer"
    program.write_text('#!/bin/sh\ncase "$2" in *out) exit 75 ;; *) exit 78 ;; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{image}:{os.environ['PATH']}")
    setting = make_setting(2, attempts=3, rows=4)
    drained = setting.placed()
    [job_id] = aws_batch.submit(make_request(setting.job.spec, f"{setting.job.uri}-wrong", 1))
    setting.running.wait()
    assert [len(child.attempts) for child in drained.children] == [3, 3]
    [child] = setting.running.service.jobs[job_id].children
    assert [attempt.exit_code for attempt in child.attempts] == [78]


def test_what_the_service_refuses_is_said(
    make_setting: Callable[..., BatchSetting], monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = make_setting(1, rows=4)
    monkeypatch.setattr(aws_batch, "MOST_ATTEMPTS", 99)
    wanted = request(1, max_attempts=50)
    with pytest.raises(JobError, match=r"AWS Batch refused the job: .*retryStrategy is out of range"):
        aws_batch.submit(wanted)
    assert setting.running.service.jobs == {}
