"""``batchinfer cancel``: ask a job's workers to stop."""

from __future__ import annotations

from batchinfer.commands.frame import AsJson, JobUri, command, emit, say


@command
def cancel(job_uri: JobUri, as_json: AsJson = False) -> None:
    """Ask a job's workers to stop; what is done is kept, and `submit` goes on from there."""
    from batchinfer.jobs.job import Job

    job = Job(job_uri)
    failed = job.cancel()
    say("The job is cancelled: its workers save what they have and leave within a minute.")
    for sentence in failed:
        say(f"batchinfer: {sentence}")
    if as_json:
        emit({"uri": job.uri, "cancelled": True})
