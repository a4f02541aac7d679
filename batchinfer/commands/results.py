"""``batchinfer results``: a job's rows as a table, JSON lines, Parquet or an OpenAI batch file."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchinfer.commands.frame import AsJson, JobUri, command, emit, say

if TYPE_CHECKING:
    from batchinfer.jobs.job import Job


@command
def results(
    job_uri: JobUri,
    format: Annotated[
        str | None,
        typer.Option(help="table, jsonl, parquet or openai; default: by the name of --output, or table."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=0, help="Rows at most; default: 20 of a table, else all.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="A file to write instead of stdout.")] = None,
    failures: Annotated[bool, typer.Option("--failures", help="Failed rows instead of answers.")] = False,
    as_json: AsJson = False,
) -> None:
    """The rows of a job's committed shards, in the order of the input."""
    from batchinfer.jobs.job import Job
    from batchinfer.jobs.results import json_rows, rows_of, show_table, write_file

    form = format or {".jsonl": "jsonl", ".parquet": "parquet"}.get(
        output.suffix if output else "", "table"
    )
    if form not in ("table", "jsonl", "parquet", "openai"):
        raise typer.BadParameter(
            f"{form} is no format: choose table, jsonl, parquet or openai", param_hint="--format"
        )
    if form == "openai" and failures:
        raise typer.BadParameter("openai has failed rows among the answers: leave --failures out")
    if (form == "parquet") > (output is not None) or (form == "table" and output is not None):
        wanted = "Parquet needs a file" if form == "parquet" else "a file is jsonl or parquet"
        raise typer.BadParameter(f"{wanted}: give --output FILE.{form.replace('table', 'jsonl')}")
    job = Job(job_uri)
    if limit is None and output is None and (form == "table" or as_json):
        limit = 20
    schema, batches = rows_of(job, failures, limit)
    if form == "openai":
        _batch_lines(job, output, limit, as_json)
    elif output is not None:
        count = write_file(output, form, schema, batches)
        say(f"{count:,} rows are in {output}")
        if as_json:
            emit({"uri": job.uri, "output": str(output), "format": form, "rows": count})
    elif as_json:
        emit({"uri": job.uri, "rows": [json.loads(line) for line in json_rows(batches)]})
    elif form == "jsonl":
        for line in json_rows(batches):
            print(line)
    else:
        show_table(schema, batches)


def _batch_lines(job: Job, output: Path | None, limit: int | None, as_json: bool) -> None:
    """A job's rows as the lines of an OpenAI batch output file."""
    from batchinfer.jobs.batch_answers import answer_lines
    from batchinfer.jobs.results import write_lines

    lines = (line.text for line in islice(answer_lines(job), limit))
    if output is not None:
        count = write_lines(output, lines)
        say(f"{count:,} lines are in {output}")
        if as_json:
            emit({"uri": job.uri, "output": str(output), "format": "openai", "rows": count})
    elif as_json:
        emit({"uri": job.uri, "rows": [json.loads(line) for line in lines]})
    else:
        for line in lines:
            print(line)
