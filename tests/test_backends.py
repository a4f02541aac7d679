"""What holds for every backend: dry runs, addresses, what a job remembers of its services, the docs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

import batchinfer.jobs.plan as planning
import batchinfer.jobs.submit as submitting
from batchinfer.cli import app
from batchinfer.jobs.backends import slurm
from batchinfer.jobs.backends.options import OptionsSpec
from batchinfer.jobs.backends.request import Active, Place, Request
from batchinfer.jobs.backends.service import SERVICES
from batchinfer.jobs.inspection import InspectedModel, _check_formats
from batchinfer.jobs.job import Job
from batchinfer.jobs.placement import check_placeable, show_request
from batchinfer.jobs.spec import parse_spec
from batchinfer.jobs.spec_source import load_spec
from batchinfer.jobs.submit import begin_work, commit_job, retry_job
from batchinfer.jobs.types import JobError

ROOT = Path(__file__).parent.parent
EXAMPLES = [ROOT / "examples" / f"{name}.yaml" for name in SERVICES]


def command(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line where there are no credentials and no clients of services."""
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-P", "-m", "batchinfer", *arguments],
        env={**clean, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_says_how_it_is_run_and_a_dry_run_shows_it(path: Path, tmp_path: Path) -> None:
    assert path.read_text().startswith(f"# batchinfer submit examples/{path.name}\n")
    done = command("submit", str(path), "--dry-run", cwd=tmp_path, PATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    spec = load_spec(path)
    assert spec.workers.backend == path.stem
    assert spec.output.uri.removeprefix("file://") in done.stdout
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


def test_a_dry_run_here_shows_the_commands(tmp_path: Path) -> None:
    asked = ["submit", str(EXAMPLES[1]), "--backend", "local", "--workers", "2", "--dry-run", "--json"]
    document = json.loads(command(*asked, cwd=tmp_path).stdout)
    assert document["backend"] == "local"
    lines = document["request"].splitlines()
    assert len(lines) == 2
    assert lines[1].endswith("batchinfer worker s3://documents/summaries --index 1")


ADDRESSES: dict[str, Any] = {
    "model": "org/model",
    "input": {"uri": "s3://b/in"},
    "prompt": "x",
    "output": {"uri": "s3://b/out"},
    "workers": {
        "image": "i",
        "gpus": 0,
        "cpus": 1.0,
        "memory": "1GiB",
        "options": {"aws_batch": {"queue": "q"}, "gcp_batch": {"project": "p", "location": "l"}},
    },
}


@pytest.mark.parametrize("backend", SERVICES)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("output", {"uri": "out"}),
        ("output", {"uri": "/shared/out"}),
        ("input", {"uri": ["s3://b/in", "in/*.parquet"]}),
        ("input", {"uri": "memory://in"}),
        ("model", "./model"),
        ("model", "file:///shared/model"),
    ],
)
def test_what_workers_elsewhere_do_not_see_is_refused(backend: str, field: str, value: Any) -> None:
    workers = {**ADDRESSES["workers"], "backend": backend}
    check_placeable(parse_spec({**ADDRESSES, "workers": workers}))
    spec = parse_spec({**ADDRESSES, field: value, "workers": workers})
    if backend in ("slurm", "ray") and value == "file:///shared/model":
        check_placeable(spec)
        return
    with pytest.raises(JobError, match=rf"{field}\.\w+ is .*, which workers on {backend} don't see"):
        check_placeable(spec)


def test_one_spec_runs_on_every_backend() -> None:
    for backend in ("local", *SERVICES):
        spec = parse_spec({**ADDRESSES, "workers": {**ADDRESSES["workers"], "backend": backend}})
        assert "s3://b/out" in show_request(spec)


class PlayedService:
    """A service that takes everything and remembers it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Request] = []
        self.cancelled: list[Place] = []
        self.there = Active()
        for name in ("submit", "active", "cancel"):
            monkeypatch.setattr(slurm, name, getattr(self, name))

    def submit(self, request: Request) -> tuple[str, ...]:
        self.asked.append(request)
        return ("17",)

    def active(self, place: Place) -> Active:
        return self.there

    def cancel(self, place: Place) -> None:
        self.cancelled.append(place)


class Words(InspectedModel):
    def encode(self, prompts: Any) -> list[Any]:
        return [np.ones(1, np.int32) for _ in prompts]


@pytest.fixture
def submit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "in.parquet")
    words = Words("m", "fingerprint", 10**6, 100, None)
    monkeypatch.setattr(planning, "inspect_model", lambda spec: words)
    monkeypatch.setattr(submitting, "inspect_model", lambda spec: words)

    def run(**workers: Any) -> Any:
        fields = {
            **ADDRESSES,
            "prompt": "{{ text }}",
            "input": {"uri": f"file://{tmp_path}/in.parquet"},
            "output": {"uri": f"file://{tmp_path}/out"},
            "workers": workers,
        }
        return commit_job(parse_spec(fields))

    return run


def test_a_job_remembers_the_services_of_later_submits(
    submit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = PlayedService(monkeypatch)
    submit(gpus=0)
    options = {"slurm": {"partition": "night"}}
    submitted = submit(gpus=0, backend="slurm", count=5, options=options)
    placed = begin_work(submitted, attached=False)
    assert (placed.count, placed.ids) == (5, ("17",))
    service.there = Active(1, 2)
    assert begin_work(submitted, attached=False).count == 2, "three are there already"
    service.there = Active(5, 0)
    assert begin_work(submitted, attached=False).ids == ()
    assert [request.count for request in service.asked] == [5, 2]
    [report] = submitted.job.services()
    assert (report.backend, report.message) == ("slurm", "5 waiting, 0 running")
    assert submitted.job.cancel() == []
    [place] = service.cancelled
    assert place.uri == submitted.job.uri and place.options.slurm.partition == "night"


def test_a_retry_is_placed_as_the_last_submit_was(
    submit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = PlayedService(monkeypatch)
    monkeypatch.setattr(Job, "begin_retry", lambda job, codes: (1, None))
    uri = submit(gpus=0, cpus=1.0).job.uri

    def retried(workers: int | None = None) -> Any:
        return retry_job(uri, (), workers)[0]

    assert retried().spec.workers.backend == "local"
    submit(gpus=0, backend="slurm", count=5, cpus=3.0, options={"slurm": {"partition": "night"}})
    begin_work(retried(), attached=False)
    begin_work(retried(2), attached=False)
    assert [request.count for request in service.asked] == [5, 2]
    for request in service.asked:
        assert (request.workers.cpus, request.place.options.slurm.partition) == (3.0, "night")
    submit(gpus=0, cpus=1.0)
    assert (retried().spec.workers.backend, retried(3).spec.workers.count) == ("local", 3)


def test_a_service_that_can_not_be_told_leaves_the_job_cancelled(
    submit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    submitted = submit(gpus=0, backend="slurm")
    monkeypatch.setenv("PATH", str(tmp_path))
    [sentence] = submitted.job.cancel()
    assert "slurm could not be told" in sentence and "scancel is not installed" in sentence
    assert submitted.job.status().state == "cancelled"
    [report] = submitted.job.services()
    assert report.active is None and "squeue is not installed" in report.message


def test_a_spec_that_its_service_refuses_makes_no_job(submit: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(JobError, match="don't see"):
        submit(gpus=0, backend="kubernetes", image="i")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX", "AWS_BATCH_JOB_ARRAY_INDEX", "BATCH_TASK_INDEX"]
)
def test_a_worker_takes_its_number_from_its_service(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(
        "batchinfer.jobs.worker.run_worker", lambda uri, usd_per_hour, index, *_: found.append(index) or 0
    )
    for number in ("3", "0"):
        done = CliRunner().invoke(app, ["worker", "out"], env={name: number})
        assert done.exit_code == 0, done.output
    assert found == [3, 0]


def options() -> Mapping[str, Any]:
    return {
        f"{backend}.{name}": field.description
        for backend, part in OptionsSpec.model_fields.items()
        for name, field in type(part.default).model_fields.items()
    }


def test_the_documentation_has_every_option_and_every_example() -> None:
    text = (ROOT / "docs" / "backends.md").read_text()
    for name, description in options().items():
        assert f"| `{name}` | {description} |" in text
    rows = re.findall(r"^\| `(\w+\.\w+)` \|", text, re.MULTILINE)
    assert sorted(rows) == sorted(options())
    for path in EXAMPLES:
        assert f"examples/{path.name}" in text
        assert yaml.safe_load(path.read_text())["workers"]["backend"] == path.stem


def formats(backend: str, gpus: int, **model: str) -> None:
    asked = {**ADDRESSES, "model": {"source": "org/model", **model}}
    _check_formats(parse_spec({**asked, "workers": {"gpus": gpus, "backend": backend}}), 2, 64)


def test_formats_are_tried_here_for_workers_of_this_machine() -> None:
    with pytest.raises(
        JobError, match=r"model\.kv_dtype is 'fp8', but here it can't be: .*choose kv_dtype"
    ):
        formats("local", 0, kv_dtype="fp8")
    with pytest.raises(
        JobError, match=r"model\.quantize is 'int4', but here it can't be: .*choose quantize"
    ):
        formats("local", 0, quantize="int4")
    formats("local", 0, kv_dtype="int8", quantize="int8")


@pytest.mark.parametrize(
    ("gpus", "model", "remedy"),
    [
        (1, {"kv_dtype": "int8"}, "workers.gpus is 1: choose auto, bf16 or fp8"),
        (0, {"kv_dtype": "fp8"}, "workers.gpus is 0: choose auto, bf16 or int8"),
        (0, {"quantize": "int4"}, "workers.gpus is 0: choose int8 or leave it out"),
        (0, {"quantize": "fp8"}, "workers.gpus is 0: choose int8 or leave it out"),
    ],
)
def test_formats_that_workers_elsewhere_lack_are_refused(
    gpus: int, model: dict[str, str], remedy: str
) -> None:
    [(field, value)] = model.items()
    for backend in ("slurm", "kubernetes", "aws_batch", "gcp_batch", "ray"):
        with pytest.raises(JobError, match=f"^model.{field} is '{value}', which .*{remedy}$"):
            formats(backend, gpus, **model)
        formats(backend, 1 - gpus, **model)
    formats("slurm", 0, quantize="int8", kv_dtype="int8")
    formats("slurm", 2, quantize="int8", kv_dtype="fp8")
