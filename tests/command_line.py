"""Runs commands of the command line in the process of a test."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from batchinfer import cli


class Ran(NamedTuple):
    """How a command ended and what it said."""

    code: int
    out: str
    err: str


def run_command(capfd: pytest.CaptureFixture[str], *arguments: str) -> Ran:
    """Run a command, which must leave by itself."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as left:
        cli.app(list(arguments))
    code = left.value.code
    assert code is None or isinstance(code, int)
    return Ran(code or 0, *capfd.readouterr())
