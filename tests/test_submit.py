"""Submit: one job a folder, committed by one create; the same again resumes, anything else is refused."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchinfer.jobs.plan as planning
import batchinfer.jobs.submit as submitting
from batchinfer.connectors.storage import open_store
from batchinfer.connectors.types import StorageError
from batchinfer.jobs.budget import Cap, cap_of
from batchinfer.jobs.folder import JobFolder, ShardName
from batchinfer.jobs.inspection import InspectedModel
from batchinfer.jobs.spec import parse_spec
from batchinfer.jobs.spec_source import apply_override
from batchinfer.jobs.submit import Submitted, commit_job
from batchinfer.jobs.types import JobError


class Words(InspectedModel):
    """A model whose tokens are words."""

    def encode(self, prompts: Any) -> list[Any]:
        return [np.ones(len(str(prompt).split()), np.int32) for prompt in prompts]


class Setting:
    """A data set, a model, and a spec that asks for both."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.write(range(100))
        self.use_model("fingerprint-1", monkeypatch)
        self.spec: dict[str, Any] = {
            "model": "org/model",
            "input": {"uri": str(path / "in")},
            "prompt": "{{ text }}",
            "shards": {"rows": 25},
            "output": {"uri": str(path / "out")},
            "price": {"usd_per_hour": 2.0},
        }
        self.folder = JobFolder(open_store(str(path / "out")))

    def write(self, rows: range, name: str = "a.parquet") -> None:
        (self.path / "in").mkdir(exist_ok=True)
        table = pa.table({"id": list(rows), "text": [f"row {row}" for row in rows]})
        pq.write_table(table, self.path / "in" / name)

    def use_model(self, fingerprint: str, monkeypatch: pytest.MonkeyPatch) -> None:
        words = Words("m", fingerprint, 10**6, 100, None)
        monkeypatch.setattr(planning, "inspect_model", lambda spec: words)
        monkeypatch.setattr(submitting, "inspect_model", lambda spec: words)

    def submit(self, *overrides: str) -> Submitted:
        spec = self.spec
        for override in overrides:
            spec = apply_override(spec, override)
        return commit_job(parse_spec(spec))

    def keys(self) -> set[str]:
        return {info.key for info in open_store(str(self.path / "out")).list("")}


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    return Setting(tmp_path, monkeypatch)


def test_a_submit_is_a_plan_and_a_record_and_nothing_else(setting: Setting) -> None:
    submitted = setting.submit()
    record = setting.folder.read_job()
    assert record is not None
    assert setting.keys() == {"_batchinfer/job.json", f"_batchinfer/{record.plan}"}
    assert (record.rows, record.shards, record.fingerprint) == (100, 4, "fingerprint-1")
    assert record.spec["output"]["uri"] == str(setting.path / "out")
    assert record.schema.names[:3] == ["id", "text", "row_index"]
    assert record.input_schema.names == ["id", "text"]
    shards = setting.folder.read_plan(record.plan)
    assert submitted.plan is not None
    assert shards == list(submitted.plan.shards)
    assert [shard.first_row for shard in shards] == [0, 25, 50, 75]
    assert not submitted.complete
    assert submitted.job.status().state == "starting"


def test_relative_addresses_mean_the_same_to_every_worker(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(setting.path)
    (setting.path / "model").mkdir()
    setting.submit("input.uri=in", "output.uri=out", "model=model")
    record = setting.folder.read_job()
    assert record is not None
    assert record.spec["input"]["uri"] == [str(setting.path / "in")]
    assert record.spec["model"]["source"] == str(setting.path / "model")


def test_submitting_the_same_again_resumes_with_the_stored_plan(setting: Setting) -> None:
    setting.submit()
    before = setting.keys()
    record = setting.folder.read_job()
    again = setting.submit()
    assert again.plan is None
    assert not again.complete
    assert setting.folder.read_job() == record
    assert setting.keys() == before


@pytest.mark.parametrize(
    ("override", "control"),
    [
        ("workers.count=7", {"workers": 7, "usd_per_hour": None}),
        ("workers.cpus=2.5", {"workers": None, "usd_per_hour": None}),
        ("price.usd_per_hour=3.5", {"workers": None, "usd_per_hour": 3.5}),
    ],
)
def test_workers_and_price_may_change(setting: Setting, override: str, control: dict[str, Any]) -> None:
    setting.submit()
    setting.submit(override)
    found = setting.folder.read_control()
    assert {"workers": found.workers, "usd_per_hour": found.usd_per_hour} == control
    setting.submit()
    found = setting.folder.read_control()
    assert (found.workers, found.usd_per_hour) == (None, None)


def test_the_budget_may_change_and_is_never_forgotten(setting: Setting) -> None:
    begun = ("budget.max_usd=1", "price.usd_per_hour=2.0", "workers.count=2")
    setting.submit(*begun)
    record = setting.folder.read_job()
    assert record is not None
    # Two slots for each worker would be more than five minutes, so it is that.
    assert record.slot_ns == 300_000_000_000
    setting.submit(*begun, "budget.max_usd=3", "budget.max_worker_hours=2")
    cap = cap_of(setting.folder.read_control(), record)
    assert (cap.usd, cap.nanoseconds) == (3.0, 7_200_000_000_000)
    setting.submit(*begun)
    assert cap_of(setting.folder.read_control(), record) == Cap(None, 1.0)
    with pytest.raises(JobError, match=r"budget.max_usd is not set, but .* is 1.0: give a number"):
        setting.submit("price.usd_per_hour=2.0", "workers.count=2", "budget.max_worker_hours=1")


def test_a_job_that_began_without_a_budget_may_get_one_and_then_keeps_it(setting: Setting) -> None:
    setting.submit()
    setting.submit("budget.max_worker_hours=0.05", "workers.count=3")
    record, control = setting.folder.read_job(), setting.folder.read_control()
    assert record is not None
    assert cap_of(control, record) == Cap(180_000_000_000, None)
    assert control.slot_ns == 29_999_999_999  # two for each of three workers
    with pytest.raises(
        JobError, match=r"budget.max_worker_hours is not set, but .* is 0.05: give a number"
    ):
        setting.submit()
    setting.submit("budget.max_worker_hours=2")
    assert setting.folder.read_control().slot_ns == control.slot_ns


def test_a_job_that_stopped_itself_goes_on_when_more_may_fail(setting: Setting) -> None:
    setting.submit("failures.max_share=0.1")
    reason = "12 of the first 50 rows have failed; submit again with a higher failures.max_share"
    setting.folder.append_control(lambda control: replace(control, state="stop", message=reason))
    for same in ("failures.max_share=0.1", "failures.max_share=0.05"):
        with pytest.raises(JobError, match=rf"^the job at .* has stopped itself: {reason}$"):
            setting.submit(same)
    setting.submit("failures.max_share=0.3")
    control = setting.folder.read_control()
    assert (control.state, control.message, control.failures["max_share"]) == ("run", "", 0.3)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("name=other", ["name is None", "'other'"]),
        ("model=org/other", ["model.source", "'org/model'", "'org/other'"]),
        ("model.dtype=fp32", ["model.dtype", "'bf16'", "'fp32'"]),
        ("model.max_context=50", ["model.max_context", "None", "50"]),
        ("prompt=Say {{ text }}", ["prompt", "'Say {{ text }}'"]),
        ("sampling.temperature=0.5", ["sampling.temperature", "0.0", "0.5"]),
        ("sampling.logit_bias={3: 1.0}", ["sampling.logit_bias"]),
        ("output.tokens=true", ["output.tokens", "False", "True"]),
        ("shards.rows=10", ["shards.rows", "25", "10"]),
        ("input.columns=[id]", ["input.columns", "None", "'id'"]),
        ("storage.'s3://x/'.region=eu", ["storage"]),
    ],
)
def test_anything_else_is_another_job(setting: Setting, override: str, words: list[str]) -> None:
    setting.submit()
    before = setting.keys()
    with pytest.raises(JobError) as refused:
        setting.submit(override)
    message = str(refused.value)
    assert "holds another job" in message
    assert "choose another output.uri" in message
    assert "\n" not in message
    for word in words:
        assert word in message
    assert setting.keys() == before


def test_a_job_that_its_failure_limit_stopped_goes_on_with_another_limit(setting: Setting) -> None:
    setting.submit()
    setting.folder.append_control(lambda control: replace(control, state="stop", message="too many"))
    setting.submit("failures.max_share=0.5")
    found = setting.folder.read_control()
    assert (found.state, found.message) == ("run", "")
    assert found.failures == {"max_share": 0.5, "after_rows": 200}


def test_several_differences_are_all_named(setting: Setting) -> None:
    setting.submit()
    with pytest.raises(JobError, match=r"model.dtype.*\(and sampling.seed, output.tokens\)"):
        setting.submit("model.dtype=fp16", "sampling.seed=3", "output.tokens=true")


def test_another_content_of_the_model_is_another_job(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting.submit()
    setting.use_model("fingerprint-2", monkeypatch)
    with pytest.raises(JobError, match=r"org/model.*fingerprint-1.*fingerprint-2"):
        setting.submit()


def test_a_changed_input_is_refused_by_name(setting: Setting) -> None:
    setting.submit()
    setting.write(range(101))
    with pytest.raises(JobError, match=r"a\.parquet was changed"):
        setting.submit()
    (setting.path / "in" / "a.parquet").rename(setting.path / "in" / "b.parquet")
    with pytest.raises(JobError, match=r"a\.parquet is gone"):
        setting.submit()


def test_a_file_more_is_refused_by_name(setting: Setting) -> None:
    setting.submit()
    setting.write(range(3), "b.parquet")
    with pytest.raises(JobError, match=r"b\.parquet was added"):
        setting.submit()


def test_a_complete_job_needs_its_input_no_more(setting: Setting) -> None:
    setting.submit()
    for index in range(4):
        part = ShardName(0, index, 4).part
        setting.folder.store.put(part, b"PAR1")
    (setting.path / "in" / "a.parquet").unlink()
    again = setting.submit()
    assert again.complete
    with pytest.raises(JobError, match="holds another job"):
        setting.submit("sampling.seed=4")


def test_submitting_again_takes_back_a_cancel(setting: Setting) -> None:
    job = setting.submit().job
    job.cancel()
    assert job.status().state == "cancelled"
    again = setting.submit().job
    assert setting.folder.read_control().state == "run"
    assert again.status().state == "starting"


@pytest.mark.parametrize(
    "name", ["theirs.parquet", "deep/below/theirs.parquet", "part-00000-of-00004.parquet"]
)
def test_foreign_parquet_is_never_mixed_with_answers(setting: Setting, name: str) -> None:
    setting.folder.store.put(name, b"PAR1")
    with pytest.raises(JobError, match=name):
        setting.submit()
    assert setting.keys() == {name}


def test_what_is_no_parquet_may_stay(setting: Setting) -> None:
    setting.folder.store.put("notes.txt", b"mine")
    setting.submit()


def test_a_store_without_create_if_absent_is_refused(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    from batchinfer.connectors.local import LocalStore

    def overwriting(store: LocalStore, key: str, data: bytes) -> bool:
        store.put(key, data)
        return True

    monkeypatch.setattr(LocalStore, "create_exclusive", overwriting)
    with pytest.raises(StorageError, match="overwrites"):
        setting.submit()
    assert setting.folder.read_job() is None


def test_of_two_submits_at_once_one_makes_the_job(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    barrier = threading.Barrier(2)
    real = JobFolder.create_job

    def together(folder: JobFolder, record: Any) -> bool:
        barrier.wait(timeout=240)
        return real(folder, record)

    monkeypatch.setattr(JobFolder, "create_job", together)
    results: list[Submitted | BaseException] = []

    def submit(*overrides: str) -> None:
        try:
            results.append(setting.submit(*overrides))
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=submit) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(isinstance(found, Submitted) and found.plan is not None for found in results) == [
        False,
        True,
    ]
    assert all(isinstance(found, Submitted) for found in results)


def test_of_two_different_jobs_at_once_one_is_refused(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = JobFolder.create_job

    def later(folder: JobFolder, record: Any) -> bool:
        monkeypatch.setattr(JobFolder, "create_job", real)
        setting.submit("sampling.seed=1")
        return real(folder, record)

    monkeypatch.setattr(JobFolder, "create_job", later)
    with pytest.raises(JobError, match=r"sampling\.seed is 1, here it is 2"):
        setting.submit("sampling.seed=2")


def test_a_job_of_another_version_is_refused(setting: Setting) -> None:
    setting.submit()
    path = setting.path / "out" / "_batchinfer" / "job.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"protocol": 99}))
    with pytest.raises(JobError, match="protocol 99"):
        setting.submit()
