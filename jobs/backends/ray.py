"""Ray: workers as detached actors of a cluster that is there already, each with a process of its own.

Actors are detached, so whoever submitted may go: a laptop, or a Ray job that only submits. They hold
nothing but the process, and nothing goes through Ray's object store.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from batchinfer.jobs.backends.request import FINAL_EXITS, Active, Place, Request, required
from batchinfer.jobs.processes import MEMORY_SHARE, PARENT, child_environment, python_command
from batchinfer.jobs.types import JobError

NAMESPACE = "batchinfer"
# What the workers of one machine may take of its memory together.
MEMORY_OF_HOST = 0.8
# The longest that an actor which runs needs for an answer, and one that is placed at once for its start.
ANSWER_SECONDS = 10.0
START_SECONDS = 10.0
# Before a worker's second start; doubled before each further one.
PAUSE_SECONDS = 5.0
# Without it Ray would kill a worker together with its actor. A worker that gets SIGTERM saves its work.
_LEAVE_CHILDREN = {"RAY_kill_child_processes_on_worker_exit": "false"}


def render(request: Request) -> str:
    """The actors and the cluster's address as JSON; null: RAY_ADDRESS, or the cluster of this machine."""
    return json.dumps({"address": _address(request.place), "actors": actors(request)}, indent=2) + "\n"


def submit(request: Request) -> tuple[str, ...]:
    """Create the actors; returns their names. Those for which there is room now are seen to start."""
    wanted = actors(request)
    with _connected(request.place) as ray:
        made = [
            ray.remote(WorkerActor).options(**actor["options"]).remote(**actor["arguments"])
            for actor in wanted
        ]
        _see_them_start(ray, made)
    return tuple(str(actor["options"]["name"]) for actor in wanted)


def active(place: Place) -> Active:
    """The job's actors: those that answer run, the others wait for room or for a start elsewhere."""
    waiting = running = 0
    with _connected(place) as ray:
        for _, answer in _ask(ray, _handles(ray, place), "alive"):
            if answer is None or isinstance(answer, ray.exceptions.ActorUnavailableError):
                waiting += 1
            elif answer is True:
                running += 1
    return Active(waiting, running)


def cancel(place: Place) -> None:
    """Have the job's workers save their work and leave, each with its actor; end what has not begun."""
    with _connected(place) as ray:
        for handle, answer in _ask(ray, _handles(ray, place), "stop"):
            if answer is not True:
                ray.kill(handle, no_restart=True)


def actors(request: Request) -> list[dict[str, Any]]:
    """Each actor: the options it is created with, and the arguments of WorkerActor.

    A lost node costs no attempt: Ray starts its actors again elsewhere, for as long as the job has work.
    Raises JobError where the spec lacks what Ray places workers by.
    """
    place, workers = request.place, request.workers
    options = place.options.ray
    if not workers.gpus:
        cpus = None if workers.cpus is None else str(workers.cpus)
        required(cpus, "workers.cpus", "Ray places workers without GPUs by it")
    resources: dict[str, Any] = {
        "num_gpus": workers.gpus,
        "num_cpus": 1 if workers.cpus is None else workers.cpus,
        "memory": workers.memory,
        "resources": options.resources or None,
    }
    share = None
    if not workers.gpus:
        # Workers that share a machine share out its memory by what Ray packs them by.
        share = ["CPU", workers.cpus] if workers.memory is None else ["memory", workers.memory]
    return [
        {
            "options": {
                "name": f"{request.unique_name}-{index}",
                "namespace": NAMESPACE,
                "lifetime": "detached",
                "max_restarts": -1,
                **{name: value for name, value in resources.items() if value is not None},
                "runtime_env": {"env_vars": {**request.environment(options.env), **_LEAVE_CHILDREN}},
            },
            "arguments": {
                "command": [*request.command[1:], "--index", str(index)],
                "attempts": workers.max_attempts,
                "share": share,
            },
        }
        for index in range(request.count)
    ]


class WorkerActor:
    """The actor: runs ``batchinfer COMMAND`` until that has ended for good, and ends with it.

    It is started ``attempts`` times at most, and not again after 0, 77 and 78. ``share`` is the resource
    by which its node's memory is shared out, and how much of it is this worker's; None: not shared out.
    The process gets SIGTERM when the actor ends, in whatever way.
    """

    def __init__(self, command: Sequence[str], attempts: int, share: tuple[str, float] | None) -> None:
        """Start the worker."""
        import ray

        self._itself = ray.get_runtime_context().current_actor
        self._command = python_command("batchinfer", *command)
        self._attempts = attempts
        self._environment = {**child_environment(), PARENT: str(os.getpid())}
        if share is not None:
            whole = _of_this_node(share[0])
            self._environment[MEMORY_SHARE] = str(MEMORY_OF_HOST * min(1.0, share[1] / whole))
        self._stopped = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = threading.Lock()
        threading.Thread(target=self._keep, daemon=True).start()

    def alive(self) -> bool:
        """True."""
        return True

    def stop(self) -> bool:
        """Have the worker save its work and leave, and don't start it again; returns True at once."""
        with self._starting:
            self._stopped.set()
            if self._process is not None:
                self._process.terminate()
        return True

    def _keep(self) -> None:
        import ray

        pause = PAUSE_SECONDS
        for attempt in range(self._attempts):
            if attempt:
                self._stopped.wait(pause)
                pause *= 2
            with self._starting:
                if self._stopped.is_set():
                    break
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.DEVNULL, env=self._environment
                )
            if self._process.wait() in (0, *FINAL_EXITS):
                break
        ray.kill(self._itself, no_restart=True)


def _of_this_node(resource: str) -> float:
    """How much of a resource the node of this actor has in all."""
    import ray

    known: Any = ray
    node = known.get_runtime_context().get_node_id()
    return next(float(found["Resources"][resource]) for found in known.nodes() if found["NodeID"] == node)


def _see_them_start(ray: Any, made: Sequence[Any]) -> None:
    """Wait a little for new actors. Raises JobError where one can't start, as where their nodes have no
    batchinfer; then none is left."""
    asked = [actor.alive.remote() for actor in made]
    started, _ = ray.wait(asked, num_returns=len(asked), timeout=START_SECONDS)
    for answer in started:
        try:
            ray.get(answer)
        except (ray.exceptions.ActorDiedError, ray.exceptions.RuntimeEnvSetupError) as error:
            if isinstance(error, ray.exceptions.ActorDiedError) and "creation task" not in str(error):
                continue  # it had nothing to do
            for actor in made:
                ray.kill(actor, no_restart=True)
            last = str(error).strip().splitlines()[-1].strip()
            raise JobError(
                f"Ray can't start a worker: {last}; see that the cluster's nodes have this batchinfer"
            ) from error
        except ray.exceptions.RayActorError:
            continue  # its node was lost: it starts elsewhere


def _handles(ray: Any, place: Place) -> list[Any]:
    """The job's actors that have not ended."""
    handles = []
    for found in ray.util.list_named_actors(all_namespaces=True):
        if found["namespace"] == NAMESPACE and found["name"].startswith(f"{place.name}-"):
            try:
                handles.append(ray.get_actor(found["name"], NAMESPACE))
            except ValueError:
                continue  # it has ended since
    return handles


def _ask(ray: Any, handles: Sequence[Any], method: str) -> list[tuple[Any, Any]]:
    """Each actor with what it answers: None where it gives no answer in time, else its error."""
    answers: list[tuple[Any, Any]] = []
    asked = []
    for handle in handles:
        try:
            asked.append((handle, getattr(handle, method).remote()))
        except ray.exceptions.RayError as error:  # over ray:// it has ended since
            answers.append((handle, error))
    references = [reference for _, reference in asked]
    ready = ray.wait(references, num_returns=len(asked), timeout=ANSWER_SECONDS)[0] if asked else []
    for handle, reference in asked:
        try:
            answers.append((handle, ray.get(reference) if reference in ready else None))
        except ray.exceptions.RayError as error:
            answers.append((handle, error))
    return answers


def _address(place: Place) -> str | None:
    """The address that the spec gives. Raises JobError for one that takes no actors."""
    given = place.options.ray.address
    address = given or os.environ.get("RAY_ADDRESS", "")
    if address.startswith(("http://", "https://")):
        name = "workers.options.ray.address" if given else "RAY_ADDRESS"
        raise JobError(
            f"{name} is {address}, which is the dashboard's address and takes jobs, not actors: give "
            f"ray://HOST:10001, or run `ray job submit --address {address} -- batchinfer submit …`"
        )
    return given


@contextmanager
def _connected(place: Place) -> Iterator[Any]:
    """The module ray, connected to the cluster; a connection that this process has already is used.

    Raises JobError where there is no cluster, and for what it says during the block.
    """
    try:
        import ray
    except ImportError as error:
        raise JobError("the backend ray needs the package ray; install batchinfer-jobs[ray]") from error
    address = _address(place)
    own = not ray.is_initialized()
    try:
        if own:
            with _signals_kept():
                ray.init(address or "auto", log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        raise JobError(
            f"the Ray cluster can't be reached ({_one_line(error)}): give workers.options.ray.address or "
            "RAY_ADDRESS, or start one with `ray start --head`"
        ) from error
    try:
        yield ray
    except ray.exceptions.RayError as error:
        raise JobError(f"the Ray cluster refused: {_one_line(error)}") from error
    finally:
        if own:
            with _signals_kept():
                ray.shutdown()


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself where a process connects: give it back."""
    handlers: Mapping[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {signal.SIGTERM: signal.getsignal(signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
