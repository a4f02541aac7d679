"""What submit and retry do once a job stands: start its workers, follow them, tell the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from batchinfer.commands.frame import emit, say
from batchinfer.commands.status import status_document

if TYPE_CHECKING:
    from batchinfer.jobs.job import Job
    from batchinfer.jobs.status import JobStatus
    from batchinfer.jobs.submit import Submitted


def run_workers(submitted: Submitted, wait: bool, as_json: bool, news: Mapping[str, Any]) -> int:
    """Start a job's workers and leave them to it, or follow them to the end."""
    from batchinfer.jobs.backends.local import LocalWorkers
    from batchinfer.jobs.live import follow
    from batchinfer.jobs.submit import begin_work
    from batchinfer.jobs.view import started_line

    job = submitted.job
    found = job.status()
    if found.state == "budget":
        return tell_end(job, found, as_json)
    with begin_work(submitted, attached=wait) as started:
        if not wait:
            say(f"{started_line(started)}; `batchinfer status {job.uri}` tells how they do.")
            if as_json:
                emit({"uri": job.uri, **news, "workers": started.count})
            return 0
        return tell_end(job, follow(job, started if isinstance(started, LocalWorkers) else None), as_json)


def tell_end(job: Job, found: JobStatus, as_json: bool) -> int:
    """Say how a job that is over has ended."""
    from batchinfer.jobs.plan_view import comparison_lines
    from batchinfer.jobs.view import bill_lines

    if found.state == "done":
        bill = job.bill()
        for line in [*bill_lines(bill), *comparison_lines(job.prediction(), bill)]:
            say(line)
        say(f"The answers are in {job.uri}/*.parquet; `batchinfer results {job.uri}` shows them.")
    elif found.message:
        say(f"batchinfer: {found.message}")
    if as_json:
        emit(status_document(job, found))
    return found.exit_code
