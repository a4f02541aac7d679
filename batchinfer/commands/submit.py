"""``batchinfer submit``: start or resume a job."""

from __future__ import annotations

from typing import Annotated

import typer

from batchinfer.commands.follow import run_workers, tell_end
from batchinfer.commands.frame import AsJson, LogOption, Overrides, SpecFile, Voice, command, emit
from batchinfer.commands.plan import PilotRows
from batchinfer.jobs.events import LogFormat


@command
def submit(
    spec: SpecFile,
    wait: Annotated[bool, typer.Option("--wait", help="Show progress until the job is done.")] = False,
    workers: Annotated[int | None, typer.Option(help="Workers to start: workers.count.")] = None,
    backend: Annotated[str | None, typer.Option(help="Who starts them: workers.backend.")] = None,
    pilot: PilotRows = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the backend would be sent, and do nothing.")
    ] = False,
    overrides: Overrides = None,
    log_format: LogOption = LogFormat.TEXT,
    as_json: AsJson = False,
) -> int:
    """Start a job, or resume it where it stands."""
    from batchinfer.jobs.placement import show_request
    from batchinfer.jobs.spec_source import load_spec
    from batchinfer.jobs.submit import commit_job
    from batchinfer.jobs.view import submit_lines

    changes = list(overrides or ())
    if workers is not None:
        changes.append(f"workers.count={workers}")
    if backend is not None:
        changes.append(f"workers.backend={backend}")
    asked = load_spec(spec, changes)
    if dry_run:
        text = show_request(asked)
        if as_json:
            emit({"backend": asked.workers.backend, "request": text})
        else:
            print(text, end="")
        return 0
    submitted = commit_job(asked, pilot)
    job = submitted.job
    voice, resumed = Voice(log_format), submitted.plan is None
    figures = {"rows": job.record.rows, "shards": job.record.shards, "resumed": resumed}
    voice.tell("submitted", submit_lines(submitted), uri=job.uri, **figures)
    if submitted.complete:
        return tell_end(job, job.status(), as_json, voice)
    return run_workers(submitted, wait, as_json, {"resumed": resumed}, voice)
