"""What a batch service is asked: so many workers on one job, with these resources."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from batchinfer.jobs.backends.options import OptionsSpec
from batchinfer.jobs.processes import storage_environment
from batchinfer.jobs.types import JobError

if TYPE_CHECKING:
    from batchinfer.jobs.spec import JobSpec, WorkersSpec

# The exit codes of a worker after which starting it again would change nothing: stopped, and wrong.
FINAL_EXITS = (77, 78)
# The longest that a worker needs to save its work, and some.
GRACE_SECONDS = 120
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Where workers of the job ``uri`` are: the settings by which its service is reached."""

    uri: str
    options: OptionsSpec

    @property
    def tag(self) -> str:
        """What the service's own records of the job are found by: 12 hexadecimal digits of SHA-256."""
        return hashlib.sha256(self.uri.encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """The job's name at the service."""
        return f"batchinfer-{self.tag}"


@dataclass(frozen=True, slots=True)
class Request:
    """``count`` workers at a place.

    ``suffix`` tells this request from others for the same job, where names must be unique.
    """

    place: Place
    count: int
    workers: WorkersSpec
    storage: Mapping[str, Mapping[str, object]]
    suffix: str = field(default_factory=lambda: secrets.token_hex(3))

    @property
    def unique_name(self) -> str:
        """A name that no other request has."""
        return f"{self.place.name}-{self.suffix}"

    @property
    def command(self) -> list[str]:
        """What runs a worker; its number comes from the service's own environment variable."""
        return ["batchinfer", "worker", self.place.uri]

    def environment(self, given: Mapping[str, str]) -> dict[str, str]:
        """A worker's environment: how it reaches its stores, and what the spec gives."""
        return {**(storage_environment(self.storage) if self.storage else {}), **given}

    @property
    def cpus(self) -> int | None:
        """Whole cores of a worker."""
        return None if self.workers.cpus is None else math.ceil(self.workers.cpus)

    @property
    def memory_mib(self) -> int | None:
        """Memory of a worker in MiB."""
        return None if self.workers.memory is None else math.ceil(self.workers.memory / _MIB)

    def image(self, service: str) -> str:
        """The image of a worker. Raises JobError where the spec names none."""
        return required(self.workers.image, "workers.image", f"{service} runs workers in containers")


@dataclass(frozen=True, slots=True)
class Active:
    """How many workers a service has yet to start, and how many run there."""

    waiting: int = 0
    running: int = 0

    @property
    def total(self) -> int:
        """All that it has on its hands."""
        return self.waiting + self.running


def make_request(spec: JobSpec, uri: str, count: int) -> Request:
    """A request for ``count`` workers on the job at ``uri``, as its spec has them."""
    return Request(Place(uri, spec.workers.options), count, spec.workers, _given(spec))


def _given(spec: JobSpec) -> dict[str, dict[str, object]]:
    return {
        prefix: {name: value for name, value in options.items() if value is not None}
        for prefix, options in spec.storage_options().items()
    }


def required(value: str | None, field: str, why: str) -> str:
    """``value``; raises JobError naming the field where the spec has none."""
    if value is None:
        raise JobError(f"{field} is missing, but {why}: give it in the spec, or with --set {field}=…")
    return value
