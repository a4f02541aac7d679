"""The batch services by name, and what a job asks of each."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

from batchinfer.connectors.storage import protocol_of
from batchinfer.jobs.backends.request import Active, Place, Request
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.types import JobError

SERVICES = {
    "slurm": "batchinfer.jobs.backends.slurm",
    "kubernetes": "batchinfer.jobs.backends.kubernetes",
    "aws_batch": "batchinfer.jobs.backends.aws_batch",
    "gcp_batch": "batchinfer.jobs.backends.gcp_batch",
    "ray": "batchinfer.jobs.backends.ray",
}
# Those whose workers may see one file system; the others' run in containers.
_NODES_MAY_SHARE = ("slurm", "ray")


class Service(Protocol):
    """A module that speaks with one batch service. Every function raises JobError in one sentence."""

    def render(self, request: Request) -> str:
        """Exactly what ``submit`` would send, as text; needs no credentials and writes nothing."""
        ...

    def submit(self, request: Request) -> tuple[str, ...]:
        """Ask for the workers; returns the service's ids of what it took."""
        ...

    def active(self, place: Place) -> Active:
        """How many workers of a job the service has."""
        ...

    def cancel(self, place: Place) -> None:
        """Have the service end a job's workers, and start no more."""
        ...


def service(name: str) -> Service:
    """The service that the backend ``name`` submits to."""
    return cast(Service, import_module(SERVICES[name]))


def check_reachable(spec: JobSpec) -> None:
    """Refuse a job whose data or model workers elsewhere would not find. Raises JobError.

    A path means a file of this machine. Only file://, with Slurm and Ray, says that all nodes share it.
    """
    backend = spec.workers.backend
    if backend not in SERVICES:
        return
    may_share = backend in _NODES_MAY_SHARE
    addresses = [("output.uri", spec.output.uri), *(("input.uri", uri) for uri in spec.input.uri)]
    if spec.model.source.startswith(("/", ".", "~")) or "://" in spec.model.source:
        addresses.append(("model.source", spec.model.source))
    for name, uri in addresses:
        protocol = protocol_of(uri)
        if may_share and uri.lower().startswith("file:///"):
            continue
        if protocol in ("file", "memory"):
            shared = ", or write file:///… if all nodes share it" if may_share else ""
            raise JobError(
                f"{name} is {uri}, which workers on {backend} don't see: put it into object storage{shared}"
            )
