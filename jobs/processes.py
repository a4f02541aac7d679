"""Python processes of our own: how they are started, what they are told, and with whom they end."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import batchinfer

# What a worker's environment says. Settings of stores by URI prefix as JSON, for the job's own address,
# as the spec is behind it; the share of the host's memory, where several workers run on one host; the
# id of the process to leave with.
STORAGE = "BATCHINFER_STORAGE"
MEMORY_SHARE = "BATCHINFER_MEMORY_SHARE"
PARENT = "BATCHINFER_PARENT"

_PR_SET_PDEATHSIG = 1


def python_command(module: str, *arguments: str) -> list[str]:
    """The command that runs one of our modules with this Python.

    ``-P`` keeps the working directory off the import path: a folder there that is named like one of
    the packages we use would take its place.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def child_environment() -> dict[str, str]:
    """This process's environment, in which the package is found where it was found here.

    Threads that wait for each other in it sleep: spinning takes the cores that they wait for, wherever
    something else runs on the machine.
    """
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    root = str(Path(batchinfer.__file__).parent.parent)
    if "site-packages" not in root:
        paths = [root, *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment


def storage_environment(storage: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The environment by which a worker reaches a job whose stores have these settings."""
    return {STORAGE: json.dumps({prefix: dict(options) for prefix, options in storage.items()})}


def end_with_parent(parent: int, number: signal.Signals) -> None:
    """Get the signal ``number`` when the thread that started this process ends; ``parent`` is the id of
    its process. Where it ended before, the signal comes at once."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def bury_orphans() -> None:
    """Wait for what the processes that we started have left behind and that has ended. As process 1 of
    a container we are its parent, and nobody else does; to be called while no child of ours runs."""
    if os.getpid() == 1:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def process_started_ns() -> int:
    """When this process was started, on the clock of ``time.perf_counter_ns`` (to 10 ms)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    since_boot = int(fields[19]) * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    return time.perf_counter_ns() - max(0, time.clock_gettime_ns(time.CLOCK_BOOTTIME) - since_boot)
