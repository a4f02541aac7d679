"""LLM batch inference over data sets in object storage: exactly once, with the cost of every token.

Names are loaded when they are first used: the engine needs neither pydantic nor fsspec, and a job's
submitter no torch until a model is looked at.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchinfer.engine.engine import Engine
    from batchinfer.engine.types import Completion, Request, SamplingParams
    from batchinfer.jobs.job import Job
    from batchinfer.jobs.pipeline import MapBatches, map_batches
    from batchinfer.jobs.spec import JobSpec
    from batchinfer.jobs.submit import plan, submit

__all__ = [
    "Completion",
    "Engine",
    "Job",
    "JobSpec",
    "MapBatches",
    "Request",
    "SamplingParams",
    "__version__",
    "map_batches",
    "plan",
    "submit",
]

_HOMES = {
    "Completion": "batchinfer.engine.types",
    "Engine": "batchinfer.engine.engine",
    "Job": "batchinfer.jobs.job",
    "JobSpec": "batchinfer.jobs.spec",
    "MapBatches": "batchinfer.jobs.pipeline",
    "Request": "batchinfer.engine.types",
    "SamplingParams": "batchinfer.engine.types",
    "map_batches": "batchinfer.jobs.pipeline",
    "plan": "batchinfer.jobs.submit",
    "submit": "batchinfer.jobs.submit",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return version("batchinfer-jobs")
        except PackageNotFoundError:
            return "unknown"  # a clone that is used without being installed
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
