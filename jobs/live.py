"""A job followed until it is over: a live view on a terminal, lines elsewhere."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from batchinfer.jobs.backends.local import LocalWorkers
from batchinfer.jobs.events import LogFormat, print_event
from batchinfer.jobs.job import Job
from batchinfer.jobs.status import JobStatus
from batchinfer.jobs.view import progress_figures, status_fields, status_line

REFRESH_SECONDS = 2.0
LINE_SECONDS = 10.0
_WAKE_SECONDS = 0.1
_LOGGED = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+ (?=\S)")


def follow(job: Job, workers: LocalWorkers | None = None, form: LogFormat = LogFormat.TEXT) -> JobStatus:
    """Show where the job stands, on stderr, until it is over; returns the last status.

    With ``workers`` it is over when they have ended: what became of them says more than their
    heartbeats do.
    """
    running = workers.running if workers is not None and workers.processes else None
    console = Console(stderr=True)
    if form is LogFormat.TEXT and sys.stderr.isatty() and not console.is_dumb_terminal:
        with Live(console=console, auto_refresh=False) as live:
            status = _until_over(job, running, lambda status: live.update(_table(status), refresh=True))
    else:
        news = _News(form)
        status = _until_over(job, running, news.show)
        news.show(status, at_once=True)
    return status if workers is None else _with_last_words(status, workers)


def _table(status: JobStatus) -> Table:
    """The status as two columns, of which the second wraps in a narrow window."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, min_width=12)
    table.add_column(overflow="fold")
    for name, text in status_fields(status):
        table.add_row(Text(name), Text(text))
    return table


def _with_last_words(status: JobStatus, workers: LocalWorkers) -> JobStatus:
    """The status of a job that its workers left undone, without a word about it in the folder."""
    if status.state in ("done", "failed", "cancelled", "budget"):
        return status
    ended = {process.returncode: log for process, log in zip(workers.processes, workers.logs, strict=True)}
    code = next((code for code in (78, 70, 77, 75) if code in ended), None)
    if code is None:
        return status
    words = _last_sentence(ended[code]) or f"{ended[code]} says why; submit again to go on"
    message = f"a worker ended with exit code {code}: {words}"
    return replace(status, state="failed" if code != 75 else "stalled", message=message, exit_code=code)


def _last_sentence(log: Path) -> str:
    """What a worker's log ends with, where that is a sentence of its own and no traceback."""
    try:
        last = log.read_text(errors="replace").splitlines()[-1]
    except (OSError, IndexError):
        return ""
    begin = _LOGGED.match(last)
    return last[begin.end() :] if begin else ""


class _News:
    """Prints a status as a line when it is news, and not too often."""

    def __init__(self, form: LogFormat) -> None:
        self._form = form
        self._last = ""
        self._at = float("-inf")

    def show(self, status: JobStatus, at_once: bool = False) -> None:
        """Print it, unless the same was printed last, or anything in the last ``LINE_SECONDS``."""
        line = status_line(status)
        if line == self._last or (time.monotonic() - self._at < LINE_SECONDS and not at_once):
            return
        if self._form is LogFormat.JSON:
            print_event("progress", **progress_figures(status))
        else:
            print(line, file=sys.stderr, flush=True)
        self._last, self._at = line, time.monotonic()


def _until_over(
    job: Job, running: Callable[[], bool] | None, show: Callable[[JobStatus], None]
) -> JobStatus:
    while True:
        # Asked first: workers that end in between have written their last words by the time we read.
        more = running() if running is not None else None
        status = job.status()
        show(status)
        if status.over if more is None else not more:
            return status
        deadline = time.monotonic() + REFRESH_SECONDS
        while time.monotonic() < deadline and (running is None or running()):
            time.sleep(_WAKE_SECONDS)
