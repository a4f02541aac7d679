"""A worker's figures as a file for Prometheus, in the format of node_exporter's textfile collector.

The format is a line a sample, so it is written here: every worker would else need a package for it.
https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from batchinfer.jobs.columns import usd
from batchinfer.jobs.records import WorkerRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its name without ``batchinfer_``, what it says, and its samples, each with its labels."""

    name: str
    kind: Literal["counter", "gauge"]
    meaning: str
    samples: tuple[tuple[Mapping[str, str], float], ...]


class MetricsFile:
    """The file at ``path``, rewritten whole for each heartbeat of the worker of a job; in a folder a file
    of the worker's own, as several workers on one host need it.

    A file that can't be written is said once in the log; the job goes on.
    """

    def __init__(self, path: Path, job: str) -> None:
        self._path = path
        self._job = job
        self._complained = False

    def write(
        self, record: WorkerRecord, failures: Mapping[str, int], shards: int, rows_in_engine: int
    ) -> None:
        """Write the figures of a heartbeat; ``failures`` are the worker's failed rows by code, ``shards``
        those that it committed, ``rows_in_engine`` those that its engine has now."""
        found = metrics(record, failures, shards, rows_in_engine, time.time())
        # The collector reads *.prom only, so it never sees the file that is being written.
        path = self._path / f"batchinfer-{record.worker}.prom" if self._path.is_dir() else self._path
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            aside.write_text(exposition(found, {"job": self._job, "worker": record.worker}))
            os.replace(aside, path)
        except OSError as error:
            if not self._complained:
                logger.warning("%s can't be written: %s", path, error.strerror or error)
            self._complained = True


def metrics(
    record: WorkerRecord, failures: Mapping[str, int], shards: int, rows_in_engine: int, now: float
) -> list[Metric]:
    """A worker's metrics ``now``, in seconds since the epoch.

    Time by bucket is a gauge: what was charged to rows becomes waste when it turns out to help nobody.
    """

    def one(name: str, kind: Literal["counter", "gauge"], meaning: str, value: float) -> Metric:
        return Metric(name, kind, meaning, (({}, value),))

    found = [
        one("rows_total", "counter", "Rows that the worker has finished.", record.rows_done),
        Metric(
            "rows_failed_total",
            "counter",
            "Rows that can't be answered, by code.",
            tuple(({"code": code}, count) for code, count in sorted(failures.items())),
        ),
        one("shards_total", "counter", "Shards that the worker has committed.", shards),
        one("prompt_tokens_total", "counter", "Prompt tokens of finished rows.", record.prompt_tokens),
        one(
            "cached_prompt_tokens_total",
            "counter",
            "Prompt tokens of finished rows that were not computed again.",
            record.cached_tokens,
        ),
        one(
            "completion_tokens_total",
            "counter",
            "Completion tokens of finished rows.",
            record.completion_tokens,
        ),
        Metric(
            "worker_time_seconds",
            "gauge",
            "The worker's time since it started, by what it went to.",
            tuple(({"bucket": name}, spent / 1e9) for name, spent in asdict(record.bill).items()),
        ),
        one("rows_in_engine", "gauge", "Rows that the engine has at the moment.", rows_in_engine),
        one("heartbeat_timestamp_seconds", "gauge", "When this file was written.", now),
        Metric("worker_state", "gauge", "What the worker does.", (({"state": record.state}, 1),)),
    ]
    cost = usd(record.bill.total, record.usd_per_hour)
    if cost is not None:
        found.append(one("cost_usd_total", "counter", "What the worker has cost, in USD.", cost))
    return found


def exposition(found: Iterable[Metric], labels: Mapping[str, str]) -> str:
    """Metrics as text, each sample with these labels as well."""
    lines = []
    for metric in found:
        name = f"batchinfer_{metric.name}"
        lines += [f"# HELP {name} {metric.meaning}", f"# TYPE {name} {metric.kind}"]
        for own, value in metric.samples:
            pairs = ",".join(f'{key}="{_escaped(text)}"' for key, text in {**labels, **own}.items())
            lines.append(f"{name}{{{pairs}}} {value!r}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
