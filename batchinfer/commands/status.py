"""``batchinfer status``: where a job stands."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchinfer.commands.frame import AsJson, JobUri, command, emit, say

if TYPE_CHECKING:
    from batchinfer.jobs.job import Job
    from batchinfer.jobs.status import JobStatus


@command
def status(
    job_uri: JobUri,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job until it is over.")] = False,
    as_json: AsJson = False,
) -> int:
    """Where a job stands: rows, failures, tokens, spend, workers."""
    from batchinfer.jobs.job import Job
    from batchinfer.jobs.live import follow
    from batchinfer.jobs.plan_view import comparison_lines
    from batchinfer.jobs.view import bill_lines, service_lines, status_lines

    job = Job(job_uri)
    if watch:
        found = follow(job)
    else:
        found = job.status()
        for line in status_lines(found):
            say(line)
    bill = job.bill()
    predicted = comparison_lines(job.prediction(), bill) if found.state == "done" else []
    for line in [*bill_lines(bill), *predicted]:
        say(line)
    services = [] if found.state == "done" else job.services()
    for line in service_lines(services):
        say(line)
    if as_json:
        emit({**status_document(job, found), "services": [asdict(report) for report in services]})
    return found.exit_code if watch else 0


def status_document(job: Job, status: JobStatus) -> dict[str, Any]:
    """The status, the bill and what was predicted as one document."""
    prediction = job.prediction()
    from batchinfer.jobs.cost import summary
    from batchinfer.jobs.prediction import prediction_values
    from batchinfer.jobs.status import status_values

    return {
        **status_values(status),
        "bill": json.loads(summary(job.bill(), status.shards, job.record.spec["sampling"]["n"])),
        "prediction": None if prediction is None else prediction_values(prediction),
    }
