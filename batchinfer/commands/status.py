"""``batchinfer status``: where a job stands."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchinfer.commands.frame import INTERRUPTED, AsJson, JobUri, LogOption, Voice, command, emit
from batchinfer.jobs.events import LogFormat

if TYPE_CHECKING:
    from batchinfer.jobs.job import Job
    from batchinfer.jobs.status import JobStatus


@command
def status(
    job_uri: JobUri,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job until it is over.")] = False,
    log_format: LogOption = LogFormat.TEXT,
    as_json: AsJson = False,
) -> int:
    """Where a job stands: rows, failures, tokens, spend, workers."""
    from batchinfer.jobs.job import Job
    from batchinfer.jobs.live import follow
    from batchinfer.jobs.plan_view import comparison_lines
    from batchinfer.jobs.view import bill_lines, end_figures, service_lines, status_lines

    job = Job(job_uri)
    voice = Voice(log_format)
    lines = []
    if watch:
        try:
            found = follow(job, form=log_format)
        except KeyboardInterrupt:
            voice.tell("unwatched", ["batchinfer: no longer watching; the job goes on by itself"])
            return INTERRUPTED
    else:
        found = job.status()
        lines += status_lines(found)
    bill = job.bill()
    lines += bill_lines(bill)
    if found.state == "done":
        lines += comparison_lines(job.prediction(), bill)
    services = [] if found.state == "done" else job.services()
    lines += service_lines(services)
    voice.tell("end" if found.over else "progress", lines, **end_figures(found, bill))
    if as_json:
        emit({**status_document(job, found), "services": [asdict(report) for report in services]})
    return found.exit_code if watch else 0


def status_document(job: Job, status: JobStatus) -> dict[str, Any]:
    """The status, the bill and what was predicted as one document."""
    from batchinfer.jobs.cost import summary
    from batchinfer.jobs.prediction import prediction_values
    from batchinfer.jobs.status import status_values

    prediction = job.prediction()
    return {
        **status_values(status),
        "bill": json.loads(summary(job.bill(), status.shards, job.record.spec["sampling"]["n"])),
        "prediction": None if prediction is None else prediction_values(prediction),
    }
