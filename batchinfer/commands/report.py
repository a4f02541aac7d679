"""``batchinfer report``: a job as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from batchinfer.commands.frame import AsJson, JobUri, command, emit, say


@command
def report(
    job_uri: JobUri,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE.html", help="The page to write.")
    ] = Path("report.html"),
    as_json: AsJson = False,
) -> None:
    """A self-contained HTML page: cost, throughput, lengths, failures, the spec."""
    from batchinfer.connectors.storage import open_store
    from batchinfer.jobs.folder import JobFolder
    from batchinfer.jobs.report import read_report, render_report
    from batchinfer.jobs.results import write_lines

    folder = JobFolder(open_store(job_uri))
    found = read_report(folder)
    write_lines(output, [render_report(found)])
    say(f"The report is in {output}")
    if as_json:
        emit({"uri": folder.uri, "output": str(output), "state": found.status.state})
