"""What submit and retry do once a job stands: start its workers, follow them, tell the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from batchinfer.commands.frame import Voice, emit
from batchinfer.commands.status import status_document

if TYPE_CHECKING:
    from batchinfer.jobs.job import Job
    from batchinfer.jobs.status import JobStatus
    from batchinfer.jobs.submit import Submitted


def run_workers(
    submitted: Submitted, wait: bool, as_json: bool, news: Mapping[str, Any], voice: Voice | None = None
) -> int:
    """Start a job's workers and leave them to it, or follow them to the end."""
    from batchinfer.jobs.backends.local import LocalWorkers
    from batchinfer.jobs.live import follow
    from batchinfer.jobs.submit import begin_work
    from batchinfer.jobs.view import started_line

    voice = voice or Voice()
    job = submitted.job
    found = job.status()
    if found.state == "budget":
        return tell_end(job, found, as_json, voice)
    with begin_work(submitted, attached=wait) as started:
        if not wait:
            line = f"{started_line(started)}; `batchinfer status {job.uri}` tells how they do."
            voice.tell("started", [line], uri=job.uri, workers=started.count)
            if as_json:
                emit({"uri": job.uri, **news, "workers": started.count})
            return 0
        voice.tell("started", [], uri=job.uri, workers=started.count)
        ended = follow(job, started if isinstance(started, LocalWorkers) else None, voice.form)
        return tell_end(job, ended, as_json, voice)


def tell_end(job: Job, found: JobStatus, as_json: bool, voice: Voice) -> int:
    """Say how a job that is over has ended."""
    from batchinfer.jobs.plan_view import comparison_lines
    from batchinfer.jobs.view import bill_lines, end_figures

    lines = [f"batchinfer: {found.message}"] if found.message else []
    bill = job.bill()
    if found.state == "done":
        lines = [*bill_lines(bill), *comparison_lines(job.prediction(), bill)]
        lines.append(f"The answers are in {job.uri}/*.parquet; `batchinfer results {job.uri}` shows them.")
    voice.tell("end", lines, **end_figures(found, bill))
    if as_json:
        emit(status_document(job, found))
    return found.exit_code
