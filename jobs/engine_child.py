"""The engine's process: loads the model, then makes steps and says what they finished.

    python -P -m batchinfer.jobs.engine_child SOCKET PARENT

Another engine is used where ``BATCHINFER_ENGINE_FACTORY`` names a function, as ``module:function`` or
``path/to/file.py:function``, that takes an EngineConfig and returns an object with the methods of
:class:`ServedEngine`.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from multiprocessing.connection import Connection
from typing import Any, Protocol

from batchinfer.connectors.types import StorageError, TransientStorageError
from batchinfer.engine.config import EngineConfig
from batchinfer.engine.types import Completion, Decoded, ModelError, Rejection, Request
from batchinfer.jobs.engine_process import Load
from batchinfer.jobs.link import (
    Add,
    Drop,
    Dropped,
    Failed,
    Inflight,
    Ready,
    Results,
    Snapshot,
    Spent,
    Stop,
    ToEngine,
)
from batchinfer.jobs.models import local_model
from batchinfer.jobs.processes import end_with_parent
from batchinfer.jobs.samples import SampleKey
from batchinfer.jobs.types import JobError

FACTORY = "BATCHINFER_ENGINE_FACTORY"
REPORT_NS = 50_000_000
SIGN_OF_LIFE_NS = 1_000_000_000


class Account(Protocol):
    """What an engine has charged since it started; nanoseconds on ``time.perf_counter_ns``."""

    @property
    def rows_ns(self) -> int:
        """To samples, finished or not."""
        ...

    @property
    def waste_ns(self) -> int:
        """To tokens computed again or for nothing."""
        ...

    @property
    def accounted_until_ns(self) -> int:
        """When its last step was complete."""
        ...


class ServedEngine(Protocol):
    """What a job needs of an engine; see :class:`batchinfer.engine.engine.Engine`."""

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything left to do."""
        ...

    @property
    def stats(self) -> Account:
        """The account."""
        ...

    def add(self, requests: Sequence[Request]) -> None:
        """Queue requests."""
        ...

    def step(self) -> list[Completion | Rejection]:
        """Make one step; returns what finished."""
        ...

    def settle(self) -> list[Completion | Rejection]:
        """Wait for steps in flight without planning more; returns what finished."""
        ...

    def in_flight(self) -> list[tuple[int, int, Decoded]]:
        """(row, sample, decoded part) of unfinished samples that hold anything."""
        ...

    def drop(self, index: int) -> None:
        """Forget a request; what it cost becomes waste."""
        ...


def main() -> None:
    """Serve the supervisor at the other end of the socket until it says stop, or is gone."""
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    end_with_parent(parent, signal.SIGKILL)
    # A signal to the whole group is for the supervisor: it asks for our last word.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(descriptor)
    try:
        load = connection.recv()
        engine = load_engine(load)
        # What is loaded stays: no later collection needs to look through it.
        gc.freeze()
        connection.send(Ready(load.config.window + load.config.max_sequences))
        serve(connection, engine)
    except (EOFError, ConnectionError):
        os._exit(0)
    except (ModelError, JobError) as error:
        connection.send(Failed(str(error), True))
    except StorageError as error:
        connection.send(Failed(str(error), not isinstance(error, TransientStorageError)))
    except Exception as error:
        connection.send(Failed(f"{type(error).__name__}: {error}", False))
        raise


def serve(connection: Connection, engine: ServedEngine) -> None:
    """Make steps as long as there is work; between them do what the supervisor says."""
    finished: list[Completion | Rejection] = []
    reported = time.perf_counter_ns()
    while True:
        while connection.poll(0 if engine.has_work else None):
            message: ToEngine = connection.recv()
            if isinstance(message, Add):
                engine.add(message.requests)
            elif isinstance(message, Drop):
                for row in message.rows:
                    engine.drop(row)
                connection.send(Dropped(message.rows, _spent(engine)))
            elif isinstance(message, Snapshot):
                connection.send(_inflight(engine, final=False))
            elif isinstance(message, Stop):
                finished += engine.settle()
                connection.send(Results(tuple(finished), _spent(engine)))
                connection.send(_inflight(engine, final=True))
                return
        finished += engine.step()
        since = time.perf_counter_ns() - reported
        if since >= (REPORT_NS if finished else SIGN_OF_LIFE_NS) or not engine.has_work:
            connection.send(Results(tuple(finished), _spent(engine)))
            finished.clear()
            reported = time.perf_counter_ns()


def _spent(engine: ServedEngine) -> Spent:
    account = engine.stats
    return Spent(account.rows_ns, account.waste_ns, account.accounted_until_ns)


def _inflight(engine: ServedEngine, final: bool) -> Inflight:
    samples = tuple((SampleKey(row, sample), decoded) for row, sample, decoded in engine.in_flight())
    return Inflight(samples, _spent(engine), final)


def load_engine(load: Load) -> ServedEngine:
    """The engine that a job asks for, or the one that the environment names instead.

    Raises ModelError, JobError and StorageError where it can not be had.
    """
    factory = os.environ.get(FACTORY)
    if factory:
        engine: ServedEngine = _named(factory)(load.config)
        return engine
    from batchinfer.engine.engine import Engine

    config = replace(load.config, model=local_model(load.source, load.storage))
    settings = {
        field.name: getattr(config, field.name) for field in fields(config) if field.name != "model"
    }
    loaded = Engine(config.model, **settings)
    if loaded.loaded.fingerprint != load.fingerprint:
        raise JobError(
            f"the model {load.source} is not the one that the job was submitted with (fingerprint "
            f"{load.fingerprint}, here {loaded.loaded.fingerprint}): bring that model back"
        )
    return loaded


def _named(factory: str) -> Callable[[EngineConfig], Any]:
    """The function that ``module:function`` or ``path.py:function`` names."""
    place, _, name = factory.rpartition(":")
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location("batchinfer_engine_factory", place)
        if spec is None or spec.loader is None:
            raise JobError(f"{FACTORY} is {factory}, but {place} can't be imported")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    function: Callable[[EngineConfig], Any] = getattr(module, name)
    return function


if __name__ == "__main__":
    main()
