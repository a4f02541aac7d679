"""The engine's process, as its supervisor sees it: started, spoken to through a socket, ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from batchinfer.engine.config import EngineConfig
from batchinfer.jobs.link import Ended, FromEngine, ToEngine
from batchinfer.jobs.processes import bury_orphans, child_environment, python_command


@dataclass(frozen=True, slots=True)
class Load:
    """The first message to an engine's process: what to load.

    ``source`` is the model as the job names it, ``storage`` the settings of stores to fetch it from,
    ``fingerprint`` what its content must be.
    """

    config: EngineConfig
    source: str
    storage: Mapping[str, Mapping[str, Any]]
    fingerprint: str


class EngineProcess:
    """An EngineLink to a child process.

    The child dies with the thread that makes this object, and when the socket closes. Its standard
    output goes to our standard error.
    """

    def __init__(self, load: Load, deliver: Callable[[FromEngine], None]) -> None:
        """Start the process; what it says goes to ``deliver``, in order, on a thread of its own."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*python_command("batchinfer.jobs.engine_child"), str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                env=child_environment(),
                pass_fds=[theirs.fileno()],
            )
        self._connection = Connection(ours.detach())
        self._deliver = deliver
        self._send(load)
        threading.Thread(target=self._listen, name="engine-link", daemon=True).start()

    def send(self, message: ToEngine) -> None:
        """See EngineLink."""
        self._send(message)

    def kill(self) -> None:
        """See EngineLink."""
        self._process.kill()

    def _send(self, message: object) -> None:
        try:
            self._connection.send(message)
        except OSError:
            return  # it is gone, and Ended says so

    def _listen(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                break
            self._deliver(message)
        code = self._process.wait()
        bury_orphans()
        self._deliver(Ended(_how(code)))


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    hint = "; it may have run out of memory" if code == -signal.SIGKILL else ""
    return f"signal {signal.Signals(-code).name}{hint}"
