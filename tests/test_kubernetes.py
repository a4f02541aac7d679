"""Workers on Kubernetes: the manifest against the official schemas, and what a Job makes of its pods."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import job_controller
import kubernetes_validate
import pytest
import yaml
from fake_jobs import FakeJob, submit_fake_job
from hypothesis import given, settings
from hypothesis import strategies as st
from job_controller import Controller, IndexedJob

from batchinfer.jobs.backends import kubernetes
from batchinfer.jobs.backends.local import start_workers
from batchinfer.jobs.backends.request import Active, Place, Request, make_request
from batchinfer.jobs.job import Job
from batchinfer.jobs.placement import place_workers
from batchinfer.jobs.spec import parse_spec
from batchinfer.jobs.types import JobError

VERSIONS = ("1.30", "1.33", "1.37")


def until(condition: Callable[[], object], what: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def request(count: int = 2, uri: str = "s3://bucket/out", **workers: Any) -> Request:
    spec = parse_spec(
        {
            "model": "org/model",
            "input": {"uri": "s3://bucket/in/"},
            "prompt": "{{ text }}",
            "output": {"uri": uri},
            "workers": {"backend": "kubernetes", "image": "registry/batchinfer:1", **workers},
            "storage": {"s3://bucket/": {"endpoint_url": "http://store:9000"}},
        }
    )
    return make_request(spec, uri, count)


def check_semantics(job: dict[str, Any]) -> None:
    """What the API server refuses beyond its schemas."""
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    longest = f"{job['metadata']['name']}-{spec['completions'] - 1}"
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", longest) and len(longest) <= 63
    assert pod["restartPolicy"] == "Never", "a pod failure policy asks for it"
    assert spec["completionMode"] == "Indexed", "limits per index ask for it"
    assert 0 < spec["parallelism"] <= spec["completions"] <= 100_000
    assert spec["parallelism"] <= 10_000 or spec["completions"] <= 100_000
    assert "backoffLimit" not in spec, "it would end the Job for one index's failures"
    for rule in spec["podFailurePolicy"]["rules"]:
        assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
        assert rule["action"] in ("FailJob", "FailIndex", "Ignore", "Count")
        codes = rule.get("onExitCodes")
        if codes:
            assert codes["containerName"] == container["name"]
            assert codes["operator"] in ("In", "NotIn")
            assert codes["values"] == sorted(set(codes["values"])) and 0 < len(codes["values"]) <= 255
            assert codes["operator"] != "In" or 0 not in codes["values"]
        for condition in rule.get("onPodConditions", ()):
            assert condition["status"] == "True", "versions before 1.37 have no default"
    labels = {**job["metadata"]["labels"], **spec["template"]["metadata"]["labels"]}
    for value in labels.values():
        assert re.fullmatch(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?", value) and len(value) <= 63
    names = [item["name"] for item in container.get("env", ())]
    assert len(names) == len(set(names)), "a variable twice"
    resources = container.get("resources", {})
    for name, amount in resources.get("limits", {}).items():
        assert isinstance(amount, str)
        assert resources["requests"][name] == amount, "extended resources can't be overcommitted"
    for item in pod.get("tolerations", ()):
        assert item["operator"] in ("Exists", "Equal")
        assert (item["operator"] == "Exists") == ("value" not in item)
        assert item["effect"] in ("NoSchedule", "PreferNoSchedule", "NoExecute")
    assert pod["terminationGracePeriodSeconds"] >= 120
    check_health(container)


def check_health(container: dict[str, Any]) -> None:
    """The probe and the worker are told of one file, and the probe is one of our modules."""
    probe = container["livenessProbe"]
    names = {item["name"]: item["value"] for item in container["env"]}
    assert Path(names["BATCHINFER_HEALTH"]).is_absolute()
    *flags, module = probe["exec"]["command"][1:]
    assert flags == ["-P", "-m"] and importlib.util.find_spec(module) is not None
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 120, "one late look ends no worker"
    assert probe.get("successThreshold", 1) == 1, "the API server takes no other for liveness"


FULL = {
    "gpus": 2,
    "cpus": 3.5,
    "memory": "16GiB",
    "options": {
        "kubernetes": {
            "namespace": "batch",
            "service_account": "reader",
            "node_selector": {"cloud.google.com/gke-accelerator": "nvidia-l4"},
            "tolerations": [{"key": "team", "operator": "Equal", "value": "ml", "effect": "NoSchedule"}],
            "env": {"AWS_REGION": "eu-west-1", "PRICE": "$(HOME)"},
            "secrets": ["hub"],
        }
    },
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("workers", [{"gpus": 0}, {"spot": False}, FULL], ids=["cpu", "gpu", "full"])
def test_manifests_are_what_the_official_schemas_ask_for(version: str, workers: dict[str, Any]) -> None:
    job = yaml.safe_load(kubernetes.render(request(**workers)))
    kubernetes_validate.validate(job, version, strict=True)
    check_semantics(job)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "completion"), 3),
        (("spec", "completions"), "3"),
        (("spec", "template", "spec", "containers"), None),
        (("spec", "podFailurePolicy", "rule"), []),
    ],
)
def test_the_schemas_refuse_what_is_wrong(version: str, path: tuple[str, ...], value: Any) -> None:
    job = yaml.safe_load(kubernetes.render(request()))
    part = job
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, version, strict=True)


@settings(max_examples=50, deadline=None)
@given(
    count=st.integers(1, 10_000),
    gpus=st.integers(0, 16),
    cpus=st.none() | st.floats(0.1, 256),
    memory=st.none() | st.integers(1, 2**45),
    attempts=st.integers(1, 1000),
    spot=st.booleans(),
    bucket=st.text("abc-$()'\"", min_size=1, max_size=8),
)
def test_every_spec_makes_a_sound_manifest(
    count: int, gpus: int, cpus: float | None, memory: int | None, attempts: int, spot: bool, bucket: str
) -> None:
    made = request(
        count, f"s3://b/{bucket}", gpus=gpus, cpus=cpus, memory=memory, max_attempts=attempts, spot=spot
    )
    job = yaml.safe_load(kubernetes.render(made))
    check_semantics(job)
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert job_controller._expanded(container["command"][2], {"a": "x", "": "y"}) == f"s3://b/{bucket}"


def test_resources_options_and_settings_of_stores_arrive() -> None:
    job = kubernetes.manifest(request(3, **FULL))
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert (spec["completions"], spec["parallelism"], spec["backoffLimitPerIndex"]) == (3, 3, 4)
    assert container["resources"]["limits"] == {"memory": "16384Mi", "nvidia.com/gpu": "2"}
    assert container["resources"]["requests"]["cpu"] == "3.5"
    assert container["envFrom"] == [{"secretRef": {"name": "hub"}}]
    environment = {item["name"]: item["value"] for item in container["env"]}
    assert json.loads(environment["BATCHINFER_STORAGE"]) == {
        "s3://bucket/": {"endpoint_url": "http://store:9000"}
    }
    assert environment["PRICE"] == "$$(HOME)"
    assert (job["metadata"]["namespace"], pod["serviceAccountName"]) == ("batch", "reader")
    keys = [item["key"] for item in pod["tolerations"]]
    assert keys == [
        "nvidia.com/gpu",
        "cloud.google.com/gke-spot",
        "kubernetes.azure.com/scalesetpriority",
        "team",
    ]
    steady = kubernetes.manifest(request(gpus=0, spot=False))
    assert "tolerations" not in steady["spec"]["template"]["spec"]


def test_an_image_must_be_given() -> None:
    with pytest.raises(JobError, match=r"workers\.image is missing.*containers"):
        kubernetes.render(request(image=None))


class KubernetesSetting:
    """A job on S3 whose workers a controller of ours runs."""

    def __init__(self, job: FakeJob, found: Controller) -> None:
        self.job = job
        self.controller = found
        self.place = Place(job.uri, job.spec.workers.options)

    def placed(self) -> IndexedJob:
        """Submit, and the Job that it made."""
        [name] = place_workers(self.job.spec, self.job.uri).ids
        until(lambda: name in self.controller.jobs, "the controller")
        return self.controller.jobs[name]

    def running(self, count: int) -> None:
        until(lambda: len(self.job.running()) == count, f"{count} workers: {self.controller.logs()}")


@pytest.fixture
def make_setting(
    s3_seaweed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., KubernetesSetting]]:
    folder = tmp_path / "kubernetes"
    folder.mkdir()
    programs = job_controller.install_kubectl(folder)
    monkeypatch.setenv("PATH", f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    open_controllers = []

    def make(workers: int, attempts: int = 3, **sizes: Any) -> KubernetesSetting:
        asked = {
            "backend": "kubernetes",
            "count": workers,
            "gpus": 0,
            "image": "batchinfer:test",
            "max_attempts": attempts,
        }
        job = submit_fake_job(f"{s3_seaweed.uri}/out", tmp_path, monkeypatch, workers=asked, **sizes)
        context = job_controller.controller(folder, dict(os.environ))
        open_controllers.append(context)
        return KubernetesSetting(job, context.__enter__())

    yield make
    for context in open_controllers:
        context.__exit__(None, None, None)


@pytest.mark.slow
@pytest.mark.chaos
def test_a_job_goes_through_evictions_lost_nodes_and_kills(
    make_setting: Callable[..., KubernetesSetting],
) -> None:
    setting = make_setting(3, rows=120, shard_rows=6, step=0.15, tokens=8)
    made = setting.placed()
    setting.running(3)
    assert kubernetes.active(setting.place) == Active(0, 3)
    assert sorted(record.index or 0 for record in setting.job.running()) == [0, 1, 2]
    assert place_workers(setting.job.spec, setting.job.uri).ids == ()
    with setting.controller.lock:
        made.evict(0)
        made.lose_node(1)
        made.kill(2)
    setting.controller.wait()
    assert (made.succeeded, made.failed) == ({0, 1, 2}, set())
    assert (0, 75) in made.exits and (1, 137) in made.exits and (2, 137) in made.exits
    assert made.counted == {2: 1}, "a disruption costs no attempt"
    assert kubernetes.active(setting.place) == Active()
    setting.job.check_complete()


@pytest.mark.slow
def test_workers_of_kubernetes_and_of_this_machine_share_a_job(
    make_setting: Callable[..., KubernetesSetting],
) -> None:
    setting = make_setting(1, rows=200, shard_rows=5, step=0.15, tokens=8)
    setting.placed()
    job = setting.job
    with start_workers(job.uri, 1, 0, {}, attached=True, cpus=1.0) as here:
        setting.controller.wait()
        until(lambda: not here.running(), "the worker here")
    assert [process.returncode for process in here.processes] == [0]
    job.check_complete()
    assert len({job.folder.read_footer(shard).worker for shard in job.folder.committed()}) == 2


@pytest.mark.slow
def test_a_cancel_deletes_the_job_and_its_workers_save_their_work(
    make_setting: Callable[..., KubernetesSetting],
) -> None:
    setting = make_setting(2, rows=40, step=0.5)
    setting.placed()
    setting.running(2)
    assert Job(setting.job.uri).cancel() == []
    setting.controller.wait()
    assert {record.state for record in setting.job.workers()} == {"left"}
    calls = [json.loads(line) for line in (setting.controller.folder / "calls").read_text().splitlines()]
    assert calls[-1][0:2] == ["delete", "jobs"]


def test_an_index_whose_worker_says_that_the_job_is_wrong_is_not_tried_again(
    make_setting: Callable[..., KubernetesSetting],
) -> None:
    setting = make_setting(2, rows=4)
    wrong = make_request(setting.job.spec, f"{setting.job.uri}-nothing", 2)
    [name] = kubernetes.submit(wrong)
    setting.controller.wait()
    made = setting.controller.jobs[name]
    assert made.failed == {0, 1} and made.starts == {0: 1, 1: 1}
    assert "there is no job at" in setting.controller.logs()
    assert kubernetes.active(wrong.place) == Active()


def test_an_index_is_tried_as_often_as_the_spec_says(
    make_setting: Callable[..., KubernetesSetting], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "image"
    image.mkdir()
    (image / "batchinfer").write_text("#!/bin/sh\nexit 75\n")
    (image / "batchinfer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{image}:{os.environ['PATH']}")
    setting = make_setting(1, attempts=3, rows=4)
    made = setting.placed()
    setting.controller.wait()
    assert made.exits == [(0, 75)] * 3 and made.failed == {0}


def test_what_kubectl_says_is_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "kubectl"
    program.write_text('#!/bin/sh\necho "error: no such\nnamespace" >&2\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(JobError, match="kubectl create failed: error: no such namespace"):
        kubernetes.submit(request())
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(JobError, match="kubectl is not installed"):
        kubernetes.submit(request())
