"""What all commands share: arguments, streams, exit codes and how an error is told."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn, ParamSpec

import typer

from batchinfer.jobs.events import LogFormat, print_event

P = ParamSpec("P")

USAGE, INTERNAL, TRANSIENT, JOB = 2, 70, 75, 78
INTERRUPTED = 130

_ENGINE_PACKAGES = frozenset({"numpy", "safetensors", "tokenizers", "torch", "transformers"})

SpecFile = Annotated[str, typer.Argument(metavar="SPEC", help="The job spec: a YAML or JSON file.")]
JobUri = Annotated[str, typer.Argument(metavar="JOB_URI", help="The job's address: its output.uri.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the spec, such as sampling.seed=1."),
]


LogOption = Annotated[
    LogFormat,
    typer.Option(
        "--log-format",
        envvar="BATCHINFER_LOG_FORMAT",
        help="Lines for people, or one JSON object a line, on stderr.",
    ),
]


def say(text: str) -> None:
    """Print a line for people: stderr."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Voice:
    """How a command tells people, or a log collector, what goes on: on stderr."""

    form: LogFormat = LogFormat.TEXT

    def tell(self, event: str, lines: Iterable[str], **figures: Any) -> None:
        """Say the lines, or the event of that name with its figures."""
        if self.form is LogFormat.JSON:
            print_event(event, **figures)
        else:
            for line in lines:
                say(line)


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
            if kwargs.get("log_format") is LogFormat.JSON:
                print_event("error", message=message, exit_code=code)
            else:
                say(f"batchinfer: {message}")
            if kwargs.get("as_json"):
                emit({"error": message, "exit_code": code})
        sys.exit(code)

    return run


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code of an error and the one sentence that people read."""
    if isinstance(error, ModuleNotFoundError) and error.name in _ENGINE_PACKAGES:
        return JOB, f"this needs the package {error.name}; install batchinfer-jobs[engine]"
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
        return INTERRUPTED, "interrupted; what is done is kept: run it again to go on"
    kind = type(error).__name__
    return INTERNAL, f"internal error: {kind}: {message}; BATCHINFER_DEBUG=1 shows where it happened"
