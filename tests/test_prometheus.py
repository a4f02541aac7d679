"""A worker's metrics file: what Prometheus' own parser reads of it, and that it is whole at any time."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from batchinfer.jobs.prometheus import MetricsFile, exposition, metrics
from batchinfer.jobs.records import Bill, WorkerRecord

BILL = Bill(startup=1_500_000_000, rows=2_000_000_000, idle=3, storage=4, waste=5)


def record(price: float | None = 3.6) -> WorkerRecord:
    return WorkerRecord(
        worker="w1",
        state="running",
        beat=3,
        usd_per_hour=price,
        bill=BILL,
        started="",
        rows_done=7,
        prompt_tokens=70,
        cached_tokens=20,
        completion_tokens=9,
    )


def samples(text: str) -> dict[tuple[str, str], float]:
    """Values by name and by the labels but job and worker, which every sample must have."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("job") and labels.pop("worker") == "w1"
            key = (sample.name, ",".join(labels.values()))
            assert key not in found
            found[key] = sample.value
    return found


def test_prometheus_reads_the_figures(tmp_path: Path) -> None:
    path = tmp_path / "batchinfer.prom"
    MetricsFile(path, "docs").write(record(), {"too_long": 2, "bad_line": 1}, 4, 33)
    assert samples(path.read_text()) == {
        ("batchinfer_rows_total", ""): 7,
        ("batchinfer_rows_failed_total", "bad_line"): 1,
        ("batchinfer_rows_failed_total", "too_long"): 2,
        ("batchinfer_shards_total", ""): 4,
        ("batchinfer_prompt_tokens_total", ""): 70,
        ("batchinfer_cached_prompt_tokens_total", ""): 20,
        ("batchinfer_completion_tokens_total", ""): 9,
        ("batchinfer_worker_time_seconds", "startup"): 1.5,
        ("batchinfer_worker_time_seconds", "rows"): 2.0,
        ("batchinfer_worker_time_seconds", "idle"): 3e-9,
        ("batchinfer_worker_time_seconds", "storage"): 4e-9,
        ("batchinfer_worker_time_seconds", "waste"): 5e-9,
        ("batchinfer_rows_in_engine", ""): 33,
        ("batchinfer_heartbeat_timestamp_seconds", ""): pytest.approx(path.stat().st_mtime, abs=5),
        ("batchinfer_worker_state", "running"): 1,
        ("batchinfer_cost_usd_total", ""): pytest.approx(BILL.total * 1e-12),
    }
    assert list(tmp_path.iterdir()) == [path]


def test_in_a_folder_each_worker_has_a_file(tmp_path: Path) -> None:
    MetricsFile(tmp_path, "docs").write(record(), {}, 0, 0)
    [path] = tmp_path.iterdir()
    assert path.name == "batchinfer-w1.prom"
    assert samples(path.read_text())


def test_names_follow_the_conventions() -> None:
    for metric in metrics(record(), {"a": 1}, 0, 0, 0.0):
        assert re.fullmatch(r"[a-z][a-z_]*", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")


def test_without_a_price_there_is_no_cost(tmp_path: Path) -> None:
    assert "usd" not in exposition(metrics(record(None), {}, 0, 0, 0.0), {})


@given(st.text(), st.text())
def test_any_name_and_code_survive(job: str, code: str) -> None:
    # The parser of the client splits lines as Python does, though only \n ends one.
    job, code = ("".join(part.splitlines()) for part in (job, code))
    text = exposition(metrics(record(), {code: 1}, 0, 0, 0.0), {"job": job, "worker": "w1"})
    [failed] = [
        sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "batchinfer_rows_failed_total"
    ]
    assert failed.labels == {"job": job, "worker": "w1", "code": code}


def test_a_file_that_cannot_be_written_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = MetricsFile(tmp_path / "none" / "x.prom", "docs")
    with caplog.at_level(logging.WARNING):
        file.write(record(), {}, 0, 0)
        file.write(record(), {}, 0, 0)
    assert caplog.text.count("can't be written") == 1
