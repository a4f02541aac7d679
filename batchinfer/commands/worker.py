"""``batchinfer worker``: what a container runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from batchinfer.commands.frame import AsJson, JobUri, LogOption, command, emit
from batchinfer.jobs.events import LogFormat


@command
def worker(
    job_uri: JobUri,
    usd_per_hour: Annotated[
        float | None, typer.Option(min=0, help="This worker's price; default: the job's.")
    ] = None,
    index: Annotated[
        int | None,
        typer.Option(
            min=0,
            envvar=[
                "SLURM_ARRAY_TASK_ID",
                "JOB_COMPLETION_INDEX",
                "AWS_BATCH_JOB_ARRAY_INDEX",
                "BATCH_TASK_INDEX",
            ],
            help="The batch service's number of this worker: where to start.",
        ),
    ] = None,
    log_format: LogOption = LogFormat.TEXT,
    metrics_file: Annotated[
        Path | None,
        typer.Option(
            envvar="BATCHINFER_METRICS_FILE",
            help="A .prom file to rewrite with each heartbeat, for Prometheus, or a folder for it.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Claim shards and run them until none is left: what a container runs."""
    from batchinfer.jobs.worker import run_worker

    code = run_worker(job_uri, usd_per_hour, index, log_format, metrics_file)
    if as_json:
        emit({"uri": job_uri, "exit_code": code})
    return code
