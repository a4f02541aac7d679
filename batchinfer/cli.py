"""The command line. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec

import typer

if TYPE_CHECKING:
    from batchinfer.jobs.job import Job
    from batchinfer.jobs.status import JobStatus
    from batchinfer.jobs.submit import Submitted

P = ParamSpec("P")

USAGE, INTERNAL, TRANSIENT, JOB = 2, 70, 75, 78
INTERRUPTED = 130

app = typer.Typer(
    help="LLM batch inference over data sets in object storage, exactly once, at a known cost.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Measure the engine.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench, name="bench")

SpecFile = Annotated[str, typer.Argument(metavar="SPEC", help="The job spec: a YAML or JSON file.")]
JobUri = Annotated[str, typer.Argument(metavar="JOB_URI", help="The job's address: its output.uri.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the spec, such as sampling.seed=1."),
]


def say(text: str) -> None:
    """Print a line for people: stderr."""
    print(text, file=sys.stderr, flush=True)


def emit(document: Any) -> None:
    """Print the command's one JSON document: stdout."""
    print(json.dumps(document, ensure_ascii=False), flush=True)


def command(function: Callable[P, int | None]) -> Callable[P, NoReturn]:
    """A command that leaves with the exit code that ``function`` returns, or with its error's.

    An error is one sentence on stderr, and with ``--json`` also the document on stdout. The environment
    variable BATCHINFER_DEBUG=1 shows the traceback.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> NoReturn:
        try:
            code = function(*args, **kwargs) or 0
            sys.stdout.flush()
        except typer.BadParameter:
            raise  # wrong usage: exit code 2
        except BrokenPipeError:
            # Whoever read our output has seen enough.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 0
        except (Exception, KeyboardInterrupt) as error:
            if os.environ.get("BATCHINFER_DEBUG") == "1":
                raise
            code, message = explain(error)
            say(f"batchinfer: {message}")
            if kwargs.get("as_json"):
                emit({"error": message, "exit_code": code})
        sys.exit(code)

    return run


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code of an error and the one sentence that people read."""
    from batchinfer.connectors.types import StorageError, TransientStorageError
    from batchinfer.engine.types import EngineError, ModelError
    from batchinfer.jobs.types import JobError

    message = " ".join(str(error).split())
    if isinstance(error, TransientStorageError):
        return TRANSIENT, message
    if isinstance(error, JobError | StorageError | ModelError):
        return JOB, message
    if isinstance(error, EngineError):
        return INTERNAL, message
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted; what is done is kept, submit again to go on"
    kind = type(error).__name__
    return INTERNAL, f"internal error: {kind}: {message}; BATCHINFER_DEBUG=1 shows where it happened"


@app.command()
@command
def plan(spec: SpecFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Rows, tokens, shards, time and price of a job; spends nothing."""
    from batchinfer.jobs.plan import make_plan, plan_values
    from batchinfer.jobs.spec_source import load_spec, located
    from batchinfer.jobs.view import plan_lines

    made = make_plan(located(load_spec(spec, overrides or ())))
    for line in plan_lines(made):
        say(line)
    if as_json:
        emit(plan_values(made))


@app.command()
@command
def submit(
    spec: SpecFile,
    wait: Annotated[bool, typer.Option("--wait", help="Show progress until the job is done.")] = False,
    workers: Annotated[int | None, typer.Option(help="Workers to start: workers.count.")] = None,
    backend: Annotated[str | None, typer.Option(help="Who starts them: workers.backend.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the backend would be sent, and do nothing.")
    ] = False,
    overrides: Overrides = None,
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
    submitted = commit_job(asked)
    job = submitted.job
    for line in submit_lines(submitted):
        say(line)
    if submitted.complete:
        return _tell_end(job, job.status(), as_json)
    return _run_workers(submitted, wait, as_json, {"resumed": submitted.plan is None})


def _run_workers(submitted: Submitted, wait: bool, as_json: bool, news: Mapping[str, Any]) -> int:
    """Start a job's workers and leave them to it, or follow them to the end."""
    from batchinfer.jobs.backends.local import LocalWorkers
    from batchinfer.jobs.live import follow
    from batchinfer.jobs.submit import begin_work
    from batchinfer.jobs.view import started_line

    job = submitted.job
    found = job.status()
    if found.state == "budget":
        return _tell_end(job, found, as_json)
    with begin_work(submitted, attached=wait) as started:
        if not wait:
            say(f"{started_line(started)}; `batchinfer status {job.uri}` tells how they do.")
            if as_json:
                emit({"uri": job.uri, **news, "workers": started.count})
            return 0
        return _tell_end(job, follow(job, started if isinstance(started, LocalWorkers) else None), as_json)


def _tell_end(job: Job, found: JobStatus, as_json: bool) -> int:
    """Say how a job that is over has ended."""
    from batchinfer.jobs.view import bill_lines

    if found.state == "done":
        for line in bill_lines(job.bill()):
            say(line)
        say(f"The answers are in {job.uri}/*.parquet; `batchinfer results {job.uri}` shows them.")
    elif found.message:
        say(f"batchinfer: {found.message}")
    if as_json:
        emit(_status_document(job, found))
    return found.exit_code


@app.command()
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
    as_json: AsJson = False,
) -> int:
    """Claim shards and run them until none is left: what a container runs."""
    from batchinfer.jobs.worker import run_worker

    code = run_worker(job_uri, usd_per_hour=usd_per_hour, index=index)
    if as_json:
        emit({"uri": job_uri, "exit_code": code})
    return code


@app.command()
@command
def status(
    job_uri: JobUri,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job until it is over.")] = False,
    as_json: AsJson = False,
) -> int:
    """Where a job stands: rows, failures, tokens, spend, workers."""
    from batchinfer.jobs.job import Job
    from batchinfer.jobs.live import follow
    from batchinfer.jobs.view import bill_lines, service_lines, status_lines

    job = Job(job_uri)
    if watch:
        found = follow(job)
    else:
        found = job.status()
        for line in status_lines(found):
            say(line)
    for line in bill_lines(job.bill()):
        say(line)
    services = [] if found.state == "done" else job.services()
    for line in service_lines(services):
        say(line)
    if as_json:
        emit({**_status_document(job, found), "services": [asdict(report) for report in services]})
    return found.exit_code if watch else 0


@app.command()
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


@app.command()
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
    return _run_workers(submitted, wait, as_json, {"rows": plan.rows})


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


@app.command()
@command
def run_batch(
    input_file: Annotated[
        str, typer.Option("-i", "--input-file", help="OpenAI batch lines: a path, s3:// or https://.")
    ],
    output_file: Annotated[
        str, typer.Option("-o", "--output-file", help="Where the answers go: a path, s3:// or gs://.")
    ],
    model: Annotated[str, typer.Option("--model", help="A model, as in a job spec.")],
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Prompt and answer together, in tokens; default: the model's.")
    ] = None,
    quantization: Annotated[
        str | None, typer.Option("-q", "--quantization", help="int8, int4 or fp8.")
    ] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, bfloat16, int8 or fp8.")] = "auto",
    as_json: AsJson = False,
) -> int:
    """Answer an OpenAI batch file; run it again to go on after an interruption."""
    from batchinfer.jobs.batch_run import run_batch
    from batchinfer.jobs.view import bill_lines

    short = {"auto": "bf16", "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32"}
    short |= {"float": "fp32", "bf16": "bf16", "fp16": "fp16", "fp32": "fp32"}
    if dtype not in short:
        raise typer.BadParameter(f"{dtype} is none of {', '.join(short)}", param_hint="--dtype")
    settings = {
        "source": model,
        "dtype": short[dtype],
        "max_context": max_model_len,
        "quantize": quantization,
        "kv_dtype": "bf16" if kv_cache_dtype == "bfloat16" else kv_cache_dtype,
    }
    result = run_batch(input_file, output_file, settings, say)
    if result.status.state == "done":
        for line in bill_lines(result.bill):
            say(line)
        say(f"{result.answered:,} answers and {result.failed:,} errors are in {output_file}")
        if result.repeated:
            say(f"{result.repeated:,} lines have a custom_id that an earlier line has; all were answered.")
    elif result.status.message:
        say(f"batchinfer: {result.status.message}")
    if as_json:
        emit(
            {
                "input": input_file,
                "output": output_file,
                "state": result.status.state,
                "answered": result.answered,
                "failed": result.failed,
                "repeated": result.repeated,
                "usage": {
                    "prompt_tokens": result.status.prompt_tokens,
                    "cached_tokens": result.status.cached_tokens,
                    "completion_tokens": result.status.completion_tokens,
                },
            }
        )
    return result.status.exit_code


@app.command()
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


@app.command()
@command
def schema(as_json: AsJson = False) -> None:
    """The job spec's JSON Schema."""
    from batchinfer.jobs.spec import JobSpec

    document = JobSpec.model_json_schema()
    if as_json:
        emit(document)
    else:
        print(json.dumps(document, indent=2))


@bench.command()
@command
def throughput(
    model: Annotated[str, typer.Option(help="A model, as in a job spec.")],
    dataset: Annotated[Path, typer.Option(help='Lines of {"prompt": text, "max_tokens": number}.')],
    dtype: Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="int8, int4 or fp8.")] = None,
    max_context: Annotated[int | None, typer.Option(min=1, help="Default: the model's own.")] = None,
    as_json: AsJson = False,
) -> None:
    """Generate exactly max_tokens for each prompt, greedily, and report the rates."""
    from batchinfer.engine.bench import measure_throughput
    from batchinfer.jobs.models import local_model
    from batchinfer.jobs.types import JobError

    for name, value, known in (
        ("--dtype", dtype, ("auto", "bf16", "fp16", "fp32")),
        ("--quantize", quantize, (None, "int8", "int4", "fp8")),
    ):
        if value not in known:
            raise typer.BadParameter(
                f"{value} is none of {', '.join(filter(None, known))}", param_hint=name
            )
    settings = {"dtype": dtype, "quantize": quantize, "max_context": max_context}
    try:
        report = measure_throughput(local_model(model), dataset, **settings)
    except ValueError as error:
        raise JobError(str(error)) from error
    for name, figure in asdict(report).items():
        say(f"{name:<20} {figure:,}")
    if as_json:
        emit(asdict(report))


def _status_document(job: Job, status: JobStatus) -> dict[str, Any]:
    """The status and the bill as one document."""
    from batchinfer.jobs.cost import summary
    from batchinfer.jobs.status import status_values

    return {
        **status_values(status),
        "bill": json.loads(summary(job.bill(), status.shards, job.record.spec["sampling"]["n"])),
    }


def main() -> None:
    """Run the command line; leaves with the exit code."""
    app()


if __name__ == "__main__":
    main()
