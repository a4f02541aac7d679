"""AWS Batch: workers as the children of array jobs, one worker as a plain job."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from batchinfer.jobs.backends.request import FINAL_EXITS, Active, Place, Request, required
from batchinfer.jobs.types import JobError

# What the service allows.
LARGEST_ARRAY = 10_000
MOST_ATTEMPTS = 10
_WAITING = ("SUBMITTED", "PENDING", "RUNNABLE", "STARTING")
_DESCRIBED_AT_ONCE = 100


def render(request: Request) -> str:
    """The calls and their parameters as JSON; the job's definition gets its revision from the service."""
    name = request.place.name
    calls = [
        {"call": "RegisterJobDefinition", "parameters": definition(request)},
        *(
            {"call": "SubmitJob", "parameters": job}
            for job in jobs(request, f"{name}:<revision returned by RegisterJobDefinition>")
        ),
    ]
    return json.dumps(calls, indent=2) + "\n"


def submit(request: Request) -> tuple[str, ...]:
    """Register the definition and submit the jobs; returns their ids."""
    parameters = definition(request)
    jobs(request, "")  # what is missing is said before anything is registered
    batch = _client(request.place)
    try:
        definition_arn = batch.register_job_definition(**parameters)["jobDefinitionArn"]
        return tuple(batch.submit_job(**job)["jobId"] for job in jobs(request, definition_arn))
    except _failures() as error:
        raise JobError(f"AWS Batch refused the job: {error}") from error


def active(place: Place) -> Active:
    """The jobs, and the children of array jobs, by their status."""
    waiting = running = 0
    try:
        batch = _client(place)
        for job in _jobs(batch, place):
            counts = job.get("arrayProperties", {}).get("statusSummary") or {job["status"]: 1}
            waiting += sum(counts.get(status, 0) for status in _WAITING)
            running += counts.get("RUNNING", 0)
            if not any(counts.values()):  # an array whose children do not exist yet
                waiting += job["arrayProperties"]["size"]
    except _failures() as error:
        raise JobError(f"AWS Batch can't be asked: {error}") from error
    return Active(waiting, running)


def cancel(place: Place) -> None:
    """Terminate the job's jobs; running workers get SIGTERM."""
    try:
        batch = _client(place)
        for job in list(_jobs(batch, place)):
            batch.terminate_job(jobId=job["jobId"], reason="the job was cancelled")
    except _failures() as error:
        raise JobError(f"AWS Batch can't end the job's workers: {error}") from error


def _jobs(batch: Any, place: Place) -> Iterator[dict[str, Any]]:
    """Descriptions of the job's jobs that have not ended."""
    ids = []
    pages = batch.get_paginator("list_jobs").paginate(
        jobQueue=_queue(place), filters=[{"name": "JOB_NAME", "values": [place.name]}]
    )
    for page in pages:
        ids += [job["jobId"] for job in page["jobSummaryList"] if job["jobName"] == place.name]
    for start in range(0, len(ids), _DESCRIBED_AT_ONCE):
        for job in batch.describe_jobs(jobs=ids[start : start + _DESCRIBED_AT_ONCE])["jobs"]:
            if job["status"] not in ("SUCCEEDED", "FAILED"):
                yield job


def definition(request: Request) -> dict[str, Any]:
    """The parameters of RegisterJobDefinition. Raises JobError where the spec lacks what it needs.

    A job is tried again where its machine was taken away and after exit code 75. The service would also
    do so after any exit code that no rule names, so those that are final are named.
    """
    place, workers = request.place, request.workers
    options = place.options.aws_batch
    if workers.max_attempts > MOST_ATTEMPTS:
        raise JobError(
            f"workers.max_attempts is {workers.max_attempts}, but AWS Batch allows "
            f"{MOST_ATTEMPTS}: lower it"
        )
    why = "AWS Batch places workers by it"
    cpus = required(None if request.cpus is None else str(request.cpus), "workers.cpus", why)
    memory = required(
        None if request.memory_mib is None else str(request.memory_mib), "workers.memory", why
    )
    resources = [{"type": "VCPU", "value": cpus}, {"type": "MEMORY", "value": memory}]
    if workers.gpus:
        resources.append({"type": "GPU", "value": str(workers.gpus)})
    container: dict[str, Any] = {
        "image": request.image("AWS Batch"),
        "command": request.command[1:],
        "resourceRequirements": resources,
        "environment": [
            {"name": name, "value": value}
            for name, value in sorted(request.environment(options.env).items())
        ],
        "secrets": [{"name": name, "valueFrom": arn} for name, arn in sorted(options.secrets.items())],
        "jobRoleArn": options.job_role,
        "executionRoleArn": options.execution_role,
    }
    rules = [
        {"action": "RETRY", "onStatusReason": "Host EC2*"},
        {"action": "RETRY", "onExitCode": "75"},
        *({"action": "EXIT", "onExitCode": str(code)} for code in FINAL_EXITS),
    ]
    return {
        "jobDefinitionName": place.name,
        "type": "container",
        "containerProperties": {name: value for name, value in container.items() if value},
        "retryStrategy": {"attempts": workers.max_attempts, "evaluateOnExit": rules},
        "tags": {"batchinfer-job": place.tag},
    }


def jobs(request: Request, definition_name: str) -> list[dict[str, Any]]:
    """The parameters of each SubmitJob: arrays of at most 10,000, a plain job for one worker."""
    place = request.place
    found = []
    for first in range(0, request.count, LARGEST_ARRAY):
        size = min(LARGEST_ARRAY, request.count - first)
        job: dict[str, Any] = {
            "jobName": place.name,
            "jobQueue": _queue(place),
            "jobDefinition": definition_name,
            "tags": {"batchinfer-job": place.tag},
        }
        if size > 1:
            job["arrayProperties"] = {"size": size}
        found.append(job)
    return found


def _queue(place: Place) -> str:
    return required(
        place.options.aws_batch.queue, "workers.options.aws_batch.queue", "AWS Batch takes jobs by queue"
    )


def _client(place: Place) -> Any:
    try:
        import boto3
    except ImportError as error:
        raise JobError(
            "the backend aws_batch needs the package boto3; install batchinfer-jobs[aws]"
        ) from error
    return boto3.client("batch", region_name=place.options.aws_batch.region)


def _failures() -> tuple[type[Exception], ...]:
    """What the client raises where the service refuses or can't be reached."""
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return ()
    return BotoCoreError, ClientError
