"""A service's own command line program, run and understood."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from batchinfer.jobs.types import JobError

_SECONDS = 120.0


def run_program(command: Sequence[str], text: str = "") -> str:
    """The output of a command that gets ``text`` to read.

    Raises JobError with the program's last words where it fails, and where it is not installed.
    """
    program = command[0]
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except FileNotFoundError:
        raise JobError(
            f"{program} is not installed on this machine: run this where it is, or choose another "
            "workers.backend"
        ) from None
    except subprocess.TimeoutExpired:
        raise JobError(
            f"{program} gave no answer in {_SECONDS:.0f} s: see whether its service is up"
        ) from None
    if done.returncode:
        words = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise JobError(f"{' '.join(command[:2])} failed: {words}")
    return done.stdout
