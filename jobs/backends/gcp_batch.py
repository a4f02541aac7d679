"""Google Cloud Batch: workers as the tasks of one task group."""

from __future__ import annotations

import json
from typing import Any

from batchinfer.jobs.backends.request import Active, Place, Request, required
from batchinfer.jobs.types import JobError

# What the service allows.
MOST_RETRIES = 10
# After these exit codes another start may help, and after no other: the worker's own (internal, drained),
# killed, and the service's: the machine was preempted, silent, rebooted, or made anew.
RETRIED = (70, 75, 137, 50001, 50002, 50003, 50006)
_WAITING = ("PENDING", "ASSIGNED")
_ENDED = ("SUCCEEDED", "FAILED", "CANCELLED", "DELETION_IN_PROGRESS", "CANCELLATION_IN_PROGRESS")
LABEL = "batchinfer-job"


def render(request: Request) -> str:
    """The request of CreateJob as JSON."""
    return (
        json.dumps(
            {"parent": _parent(request.place), "jobId": request.unique_name, "job": job(request)}, indent=2
        )
        + "\n"
    )


def submit(request: Request) -> tuple[str, ...]:
    """Create the job; returns its name."""
    wanted, parent = job(request), _parent(request.place)
    batch, client = _client()
    try:
        made = client.create_job(
            parent=parent, job_id=request.unique_name, job=batch.Job.from_json(json.dumps(wanted))
        )
    except _failures() as error:
        raise JobError(f"Google Cloud Batch refused the job: {error}") from error
    return (str(made.name),)


def active(place: Place) -> Active:
    """The tasks of the job's jobs by their state."""
    waiting = running = 0
    for found in _jobs(place):
        counts: dict[str, int] = {}
        for group in found.status.task_groups.values():
            for state, count in group.counts.items():
                counts[state] = counts.get(state, 0) + count
        if not any(counts.values()):  # queued: its tasks are not counted yet
            waiting += sum(group.task_count for group in found.task_groups)
        waiting += sum(counts.get(state, 0) for state in _WAITING)
        running += counts.get("RUNNING", 0)
    return Active(waiting, running)


def cancel(place: Place) -> None:
    """Delete the job's jobs, which ends their tasks."""
    _, client = _client()
    for found in _jobs(place):
        try:
            client.delete_job(name=found.name)
        except _failures() as error:
            raise JobError(f"Google Cloud Batch can't end {found.name}: {error}") from error


def _jobs(place: Place) -> list[Any]:
    """The job's jobs that have not ended."""
    batch, client = _client()
    request = batch.ListJobsRequest(parent=_parent(place), filter=f'labels.{LABEL}="{place.tag}"')
    try:
        found = list(client.list_jobs(request=request))
    except _failures() as error:
        raise JobError(f"Google Cloud Batch can't be asked: {error}") from error
    return [
        item
        for item in found
        if item.labels.get(LABEL) == place.tag and item.status.state.name not in _ENDED
    ]


def _parent(place: Place) -> str:
    options = place.options.gcp_batch
    why = "Google Cloud Batch keeps jobs by project and region"
    project = required(options.project, "workers.options.gcp_batch.project", why)
    location = required(options.location, "workers.options.gcp_batch.location", why)
    return f"projects/{project}/locations/{location}"


def job(request: Request) -> dict[str, Any]:
    """The Job as the API's JSON. Raises JobError where the spec lacks what it needs."""
    place, workers = request.place, request.workers
    options = place.options.gcp_batch
    if workers.max_attempts > MOST_RETRIES + 1:
        raise JobError(
            f"workers.max_attempts is {workers.max_attempts}, but Google Cloud Batch allows "
            f"{MOST_RETRIES + 1}: lower it"
        )
    resource: dict[str, Any] = {}
    if request.cpus is not None:
        resource["cpuMilli"] = round((workers.cpus or 0) * 1000)
    if request.memory_mib is not None:
        resource["memoryMib"] = request.memory_mib
    if options.boot_disk_gib is not None:
        resource["bootDiskMib"] = options.boot_disk_gib * 1024
    container: dict[str, Any] = {
        "imageUri": request.image("Google Cloud Batch"),
        "entrypoint": request.command[0],
        "commands": request.command[1:],
    }
    environment = {
        "variables": request.environment(options.env),
        "secretVariables": dict(options.secrets),
    }
    task: dict[str, Any] = {
        "runnables": [{"container": container}],
        "computeResource": resource,
        "maxRetryCount": workers.max_attempts - 1,
        "lifecyclePolicies": [{"action": "RETRY_TASK", "actionCondition": {"exitCodes": list(RETRIED)}}],
        "environment": {name: value for name, value in environment.items() if value},
    }
    labels = {LABEL: place.tag}
    allocation: dict[str, Any] = {"instances": [_instances(request)], "labels": labels}
    if options.service_account is not None:
        allocation["serviceAccount"] = {"email": options.service_account}
    return {
        "taskGroups": [
            {
                "taskCount": request.count,
                "parallelism": request.count,
                "taskCountPerNode": 1,
                "taskSpec": {name: value for name, value in task.items() if value or value == 0},
            }
        ],
        "allocationPolicy": allocation,
        "labels": labels,
        "logsPolicy": {"destination": "CLOUD_LOGGING"},
    }


def _instances(request: Request) -> dict[str, Any]:
    options, workers = request.place.options.gcp_batch, request.workers
    policy: dict[str, Any] = {"provisioningModel": "SPOT" if workers.spot else "STANDARD"}
    if options.machine_type is not None:
        policy["machineType"] = options.machine_type
    instances: dict[str, Any] = {"policy": policy}
    if workers.gpus:
        if options.accelerator is not None:
            policy["accelerators"] = [{"type": options.accelerator, "count": str(workers.gpus)}]
        elif options.machine_type is None:
            raise JobError(
                "workers.options.gcp_batch.accelerator is missing, but a worker has workers.gpus: "
                f"{workers.gpus}: name the type of GPU, or a machine_type that has them"
            )
        instances["installGpuDrivers"] = True
    return instances


def _client() -> tuple[Any, Any]:
    """The client library, and a client."""
    try:
        from google.cloud import batch_v1
    except ImportError as error:
        raise JobError(
            "the backend gcp_batch needs the package google-cloud-batch; install batchinfer-jobs[gcp]"
        ) from error
    try:
        return batch_v1, batch_v1.BatchServiceClient()
    except Exception as error:
        raise JobError(f"Google Cloud Batch can't be reached: {error}") from error


def _failures() -> tuple[type[Exception], ...]:
    """What the client raises where the service refuses or can't be reached."""
    try:
        from google.api_core.exceptions import GoogleAPIError
        from google.auth.exceptions import GoogleAuthError
    except ImportError:
        return ()
    return GoogleAPIError, GoogleAuthError
