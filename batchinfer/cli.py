"""The command line. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import os
import signal

import typer

from batchinfer.commands.cancel import cancel
from batchinfer.commands.frame import TRANSIENT
from batchinfer.commands.plan import plan
from batchinfer.commands.report import report
from batchinfer.commands.results import results
from batchinfer.commands.retry import retry
from batchinfer.commands.run_batch import run_batch
from batchinfer.commands.schema import schema
from batchinfer.commands.status import status
from batchinfer.commands.submit import submit
from batchinfer.commands.throughput import throughput
from batchinfer.commands.worker import worker

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

# In the order of a job's life, which is the order of the help.
for function in (plan, submit, worker, status, results, report, retry, run_batch, cancel, schema):
    app.command()(function)
bench.command()(throughput)


def main() -> None:
    """Run the command line; leaves with the exit code."""
    if os.getpid() == 1:  # of a container: the kernel drops signals that it has no handler for
        signal.signal(signal.SIGTERM, lambda *_: os._exit(TRANSIENT))
    app()


if __name__ == "__main__":
    main()
