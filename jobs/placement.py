"""Where a job's workers are besides this machine: asking for them at a batch service, and about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from batchinfer.connectors.storage import normalize_uri
from batchinfer.jobs.backends import local
from batchinfer.jobs.backends.options import OptionsSpec
from batchinfer.jobs.backends.request import Active, Place, make_request
from batchinfer.jobs.backends.service import SERVICES, check_reachable, service
from batchinfer.jobs.records import Control, JobRecord
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.types import JobError


@dataclass(frozen=True, slots=True)
class Placed:
    """Workers that a service was asked for: how many, and by which ids it knows them. They outlive us."""

    backend: str
    count: int
    ids: tuple[str, ...]

    def __enter__(self) -> Placed:
        """The workers."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave them to their service."""


@dataclass(frozen=True, slots=True)
class ServiceReport:
    """What a service says of a job's workers; ``active`` is None where it could not be asked."""

    backend: str
    active: Active | None
    message: str


def check_placeable(spec: JobSpec) -> None:
    """Refuse a spec whose workers can't be asked for. Raises JobError; asks nobody."""
    if spec.workers.backend in SERVICES:
        check_reachable(spec)
        show_request(spec)


def show_request(spec: JobSpec) -> str:
    """Exactly what would be sent for the spec's workers: needs no credentials and writes nothing.

    Raises JobError where the spec lacks what its backend needs.
    """
    check_reachable(spec)
    uri, workers = normalize_uri(spec.output.uri), spec.workers
    if workers.backend in SERVICES:
        return service(workers.backend).render(make_request(spec, uri, workers.count))
    return local.render(uri, workers.count, workers.gpus, spec.storage_options(), workers.cpus)


def place_workers(spec: JobSpec, uri: str) -> Placed:
    """Ask the spec's service for its workers, less those that it has already."""
    backend = spec.workers.backend
    asked = service(backend)
    request = make_request(spec, uri, spec.workers.count)
    count = max(0, request.count - asked.active(request.place).total)
    ids = asked.submit(make_request(spec, uri, count)) if count else ()
    return Placed(backend, count, ids)


def placed_options(spec: JobSpec) -> dict[str, Mapping[str, object]]:
    """The spec's backend and its options, as the job's control keeps them for a backend that is not the
    one of the first submit."""
    backend = spec.workers.backend
    if backend not in SERVICES:
        return {}
    return {backend: getattr(spec.workers.options, backend).model_dump(mode="json")}


def places(record: JobRecord, control: Control, uri: str) -> dict[str, Place]:
    """Every service that this job's workers were asked of."""
    workers = record.spec.get("workers", {})
    options = {workers.get("backend"): workers.get("options", {}).get(workers.get("backend"), {})}
    options |= control.placed
    return {
        backend: Place(uri, OptionsSpec.model_validate({backend: given}))
        for backend, given in options.items()
        if backend in SERVICES
    }


def ask_services(where: Mapping[str, Place]) -> list[ServiceReport]:
    """What each service says of the workers there."""
    reports = []
    for backend, place in where.items():
        try:
            active = service(backend).active(place)
        except JobError as error:
            reports.append(ServiceReport(backend, None, f"can't be asked: {error}"))
        else:
            reports.append(
                ServiceReport(backend, active, f"{active.waiting} waiting, {active.running} running")
            )
    return reports


def cancel_services(where: Mapping[str, Place]) -> list[str]:
    """Have each service end the workers there; returns a sentence for each that could not be told."""
    failed = []
    for backend, place in where.items():
        try:
            service(backend).cancel(place)
        except JobError as error:
            failed.append(f"{backend} could not be told, so its workers leave by themselves: {error}")
    return failed
