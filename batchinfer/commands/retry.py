"""``batchinfer retry``: failed rows once more."""

from __future__ import annotations

from typing import Annotated

import typer

from batchinfer.commands.follow import run_workers
from batchinfer.commands.frame import AsJson, JobUri, command, say


@command
def retry(
    job_uri: JobUri,
    codes: Annotated[
        list[str] | None,
        typer.Option(
            "--code", metavar="CODE", help="Rows that failed so; default: all whose failure may pass."
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show progress until they are done.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Workers to start; default: the job's.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Try a complete job's failed rows again."""
    from batchinfer.jobs.submit import retry_job

    submitted, plan = retry_job(job_uri, codes or (), workers)
    rows = "1 row" if plan.rows == 1 else f"{plan.rows:,} rows"
    say(f"Trying {rows} of the job at {submitted.job.uri} again.")
    return run_workers(submitted, wait, as_json, {"rows": plan.rows})
