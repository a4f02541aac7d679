"""A job that is followed: a live view on a terminal of any width, lines or events elsewhere."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path
from typing import Any

import pytest
from filled_jobs import SECOND, Filled

from batchinfer import cli
from batchinfer.jobs import live
from batchinfer.jobs.events import LogFormat
from batchinfer.jobs.job import Job
from batchinfer.jobs.live import follow
from batchinfer.jobs.processes import child_environment, python_command
from batchinfer.jobs.records import Bill
from batchinfer.jobs.status import JobStatus, StatusReader

FAILED = {"too_long": 2, "bad_line": 1}


def fill(folder: Path) -> Filled:
    """A job that is done, with failures."""
    job = Filled(str(folder), name="nightly summaries of all support tickets", shards=2)
    failed = {1: ("too_long", "why"), 2: ("too_long", "why"), 3: ("bad_line", "why")}
    charged = job.commit(0, failed) + job.commit(1)
    bill = Bill(startup=SECOND, rows=charged)
    job.beat(state="left", exit_code=0, bill=bill, rows_done=17, completion_tokens=60)
    return job


def on_terminal(columns: int, arguments: list[str], term: str = "xterm") -> tuple[int, str]:
    """What a command shows on a terminal of so many columns, and its exit code."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {**child_environment(), "TERM": term, "COLUMNS": str(columns)}
    process = subprocess.Popen(
        python_command("batchinfer", *arguments),
        stdin=theirs,
        stderr=theirs,
        stdout=theirs,
        env=environment,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            more = os.read(ours, 1 << 16)
        except OSError:  # how the end of a terminal's process shows
            break
        if not more:
            break
        shown += more
    os.close(ours)
    return process.wait(180), shown.decode()


@pytest.mark.parametrize("columns", [40, 100])
def test_the_live_view_fits_its_terminal(tmp_path: Path, columns: int) -> None:
    job = fill(tmp_path / "answers")
    code, shown = on_terminal(columns, ["status", job.folder.uri, "--watch"])
    assert code == 0
    assert "\x1b[" in shown
    view = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).split("cost  ")[0]
    lines = re.split(r"[\r\n]+", view)  # a frame is drawn over the last one after a carriage return
    assert max(map(len, lines)) <= columns
    text = " ".join(view.split())
    for words in ("20 of 20 rows", "bad_line 1", "too_long 2", "spent", "done"):
        assert words in text


def test_a_dumb_terminal_gets_lines(tmp_path: Path) -> None:
    job = fill(tmp_path / "answers")
    code, shown = on_terminal(80, ["status", job.folder.uri, "--watch"], term="dumb")
    assert code == 0
    assert "\x1b[" not in shown
    assert "done: 20 of 20 rows, 2 of 2 shards, 3 failed (bad_line 1, too_long 2)" in shown.replace(
        "\r\n", "\n"
    )


@pytest.fixture
def statuses(tmp_path: Path) -> list[JobStatus]:
    """A job in the course of time, the last status twice."""
    job = Filled(str(tmp_path / "answers"), shards=3)
    reader = StatusReader(job.folder)
    found = []
    for index in range(3):
        charged = job.commit(index, {index * 10: ("too_long", "why")})
        job.beat(rows_done=9 * (index + 1), bill=Bill(startup=SECOND, rows=charged * (index + 1)))
        found.append(reader.read())
    return [*found, found[-1]]


class Followed(Job):
    """A job that has these statuses, one after the other."""

    def __init__(self, statuses: list[JobStatus]) -> None:
        self._found = iter(statuses)

    def status(self) -> JobStatus:
        return next(self._found)


def test_lines_are_limited_in_rate_and_the_end_is_said_once(
    statuses: list[JobStatus], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "REFRESH_SECONDS", 0.0)
    follow(Followed(statuses))
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["running: 10 of 30 rows", "done: 30 of 30 rows"]
    monkeypatch.setattr(live, "LINE_SECONDS", 0.0)
    follow(Followed(statuses))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == len(set(lines)) == 3
    assert "2 failed (too_long 2)" in lines[1] and "$" in lines[1]


def test_events_are_lines_of_json(
    statuses: list[JobStatus], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "REFRESH_SECONDS", 0.0)
    monkeypatch.setattr(live, "LINE_SECONDS", 0.0)
    follow(Followed(statuses), form=LogFormat.JSON)
    found: list[dict[str, Any]] = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [event["event"] for event in found] == ["progress"] * 3
    assert [event["rows_failed"] for event in found] == [1, 2, 3]
    assert found[1]["failures"] == {"too_long": 2} and found[1]["state"] == "running"
    assert found[-1]["usd"] == pytest.approx(statuses[-1].usd)


def test_every_line_of_stderr_is_an_event(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job = fill(tmp_path / "answers")
    for watch in ([], ["--watch"]):
        with pytest.raises(SystemExit):
            cli.app(["status", job.folder.uri, "--log-format", "json", "--json", *watch])
        out, err = capfd.readouterr()
        events = [json.loads(line) for line in err.splitlines()]
        assert events[-1]["event"] == "end" and events[-1]["state"] == "done"
        assert events[-1]["nanoseconds"]["total"] == json.loads(out)["bill"]["nanoseconds"]["total"]
        assert all("time" in event for event in events)
    with pytest.raises(SystemExit):
        cli.app(["status", f"{job.folder.uri}/none", "--log-format", "json"])
    [error] = map(json.loads, capfd.readouterr().err.splitlines())
    assert (error["event"], error["exit_code"]) == ("error", 78) and "no job" in error["message"]
