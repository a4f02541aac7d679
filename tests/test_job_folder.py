"""The job folder's names and records: what is written is read back, and create-if-absent is sound."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.connectors.types import InputFile, ObjectInfo, Split, TransientStorageError
from batchinfer.jobs.folder import JobFolder, ShardName
from batchinfer.jobs.records import (
    Bill,
    Claim,
    Control,
    Failure,
    JobRecord,
    WorkerRecord,
    failures_from_bytes,
    failures_to_bytes,
    plan_from_bytes,
    plan_to_bytes,
)
from batchinfer.jobs.types import JobError, Shard


class DictStore:
    """The smallest store there can be; ``lose`` makes the next create lose its reply."""

    root = "memory://job"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.lose = False

    def create_exclusive(self, key: str, data: bytes | Path) -> bool:
        if key in self.objects:
            return False
        self.put(key, data)
        if self.lose:
            self.lose = False
            raise TransientStorageError(f"reply to {key} lost")
        return True

    def put(self, key: str, data: bytes | Path) -> None:
        self.objects[key] = data if isinstance(data, bytes) else data.read_bytes()

    def get(self, key: str) -> bytes:
        if key not in self.objects:
            raise FileNotFoundError(key)
        return self.objects[key]

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        return self.get(key)[start:stop]

    def head(self, key: str) -> ObjectInfo:
        return ObjectInfo(key, len(self.get(key)), "", 0.0)

    def list(self, prefix: str) -> list[ObjectInfo]:
        return [self.head(key) for key in sorted(self.objects) if key.startswith(prefix)]

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)


files = st.builds(
    InputFile,
    uri=st.sampled_from(["s3://b/a.parquet", "s3://b/ä.jsonl.gz"]),
    size=st.integers(0, 2**40),
    etag=st.text(max_size=8),
    format=st.sampled_from(["parquet", "jsonl", "csv"]),
    compression=st.sampled_from(["none", "gzip", "zstd"]),
)
counts = st.integers(0, 2**50)
splits = st.builds(
    Split,
    file=files,
    unit=st.sampled_from(["rows", "bytes"]),
    start=counts,
    stop=counts,
    first_row=counts,
    rows=counts,
    first_line=counts,
)


@settings(deadline=None)
@given(st.lists(st.tuples(st.lists(splits, min_size=1, max_size=3), counts), max_size=5))
def test_a_plan_survives_its_file(parts: list[tuple[list[Split], int]]) -> None:
    shards = [Shard(index, tuple(items), tokens) for index, (items, tokens) in enumerate(parts)]
    assert plan_from_bytes(plan_to_bytes(shards)) == shards
    assert plan_to_bytes(shards) == plan_to_bytes(shards)


def test_a_damaged_plan_is_refused() -> None:
    store = DictStore()
    folder = JobFolder(store)
    name = folder.write_plan([])
    assert folder.read_plan(name) == []
    file = InputFile("a", 1, "", "csv", "none")
    store.objects[f"_batchinfer/{name}"] = plan_to_bytes([Shard(0, (Split(file, "rows", 0, 1, 0, 1),), 1)])
    with pytest.raises(JobError, match="damaged"):
        folder.read_plan(name)


def record(nonce: str) -> JobRecord:
    return JobRecord(
        spec={"name": "größe", "input": {"uri": "s3://b/*"}},
        schema=pa.schema([pa.field("when", pa.timestamp("ns", "UTC"), nullable=False)], {"k": "v"}),
        input_schema=pa.schema([pa.field("when", pa.string())]),
        fingerprint="f",
        plan="plan-0.arrow",
        shards=1,
        rows=2,
        created="2026-01-01T00:00:00Z",
        nonce=nonce,
    )


def test_the_first_submit_is_the_job() -> None:
    folder = JobFolder(DictStore())
    assert folder.read_job() is None
    assert folder.create_job(record("a"))
    assert folder.create_job(record("a")), "a lost reply, asked again, is still ours"
    assert not folder.create_job(record("b"))
    stored = folder.read_job()
    assert stored == record("a")
    assert stored.schema.equals(record("a").schema, check_metadata=True)


def test_a_job_of_another_protocol_is_refused() -> None:
    data = record("a").to_bytes().replace(b'"protocol": 1', b'"protocol": 2')
    with pytest.raises(JobError, match="protocol 2"):
        JobRecord.from_bytes(data)


def test_a_lost_reply_is_no_lost_race() -> None:
    store = DictStore()
    folder = JobFolder(store)
    shard = ShardName(0, 1, 4)
    store.lose = True
    assert folder.create_claim(shard, 1, Claim(worker="w", nonce="n"))
    assert not folder.create_claim(shard, 1, Claim(worker="v", nonce="m"))
    assert folder.read_claim(shard, 1).worker == "w"


class Contradicting(DictStore):
    """Refuses some creates as "already exists", of objects that are not there."""

    refusals = 0

    def create_exclusive(self, key: str, data: bytes | Path) -> bool:
        if self.refusals:
            self.refusals -= 1
            return False
        return super().create_exclusive(key, data)


def test_a_race_is_not_lost_to_an_object_that_is_not_there() -> None:
    store = Contradicting()
    folder, shard = JobFolder(store, attempts=1), ShardName(0, 1, 4)
    store.refusals = 2
    assert folder.create_claim(shard, 1, Claim(worker="a", nonce="ours"))
    store.refusals = 1
    assert not folder.create_claim(shard, 1, Claim(worker="b", nonce="theirs"))
    store.refusals = 100
    with pytest.raises(TransientStorageError, match="says that it exists, and that it doesn't"):
        folder.create_part(shard, b"part", "ours")
    assert not folder.is_committed(shard)


def test_control_is_append_only_and_the_highest_wins() -> None:
    store = DictStore()
    folder = JobFolder(store)
    assert folder.read_control() == Control()
    folder.append_control(lambda control: replace(control, workers=3))
    before = dict(store.objects)

    def cancel(control: Control) -> Control:
        if control.workers == 3:
            # Somebody else appends between our read and our write.
            store.objects.setdefault("_batchinfer/control/0002.json", Control(workers=5).to_bytes())
        return replace(control, state="cancel")

    folder.append_control(cancel)
    control = folder.read_control()
    assert (control.state, control.workers) == ("cancel", 5)
    assert all(store.objects[key] == value for key, value in before.items())
    for number in range(4, 12):
        folder.append_control(lambda control, number=number: replace(control, workers=number))
    assert folder.read_control().workers == 11


@pytest.mark.parametrize(
    ("shard", "part"),
    [
        (ShardName(0, 12, 64), "part-00012-of-00064.parquet"),
        (ShardName(1, 0, 2), "part-r001-00000-of-00002.parquet"),
        (ShardName(0, 123456, 200000), "part-123456-of-200000.parquet"),
    ],
)
def test_parts_are_named_as_the_contract_says(shard: ShardName, part: str) -> None:
    assert shard.part == part
    assert ShardName.of_part(part) == shard
    assert ShardName.of_part("_batchinfer/" + part) is None


def test_claims_and_progress_list_what_is_theirs() -> None:
    store = DictStore()
    folder = JobFolder(store)
    shard = ShardName(0, 12, 64)
    folder.create_claim(shard, 1, Claim(worker="w", nonce="n"))
    folder.create_claim(shard, 2, Claim(worker="w", nonce="n"))
    store.put("_batchinfer/claims/00012/helper-0001.json", b"{}")
    assert {label: list(found) for label, found in folder.list_claims().items()} == {"00012": [1, 2]}
    assert list(folder.list_claims(ShardName(0, 1, 64))) == []
    store.put(folder.progress_key(shard, "a-b", 7), b"")
    store.put(folder.progress_key(shard, "a-b", 8, inflight=True), b"")
    assert [(item.worker, item.sequence, item.inflight) for item in folder.list_progress(shard)] == [
        ("a-b", 7, False),
        ("a-b", 8, True),
    ]


def test_other_records_survive_their_file() -> None:
    folder = JobFolder(DictStore())
    worker = WorkerRecord(
        worker="w",
        state="running",
        beat=3,
        usd_per_hour=1.5,
        bill=Bill(startup=1, rows=2, idle=3, storage=4, waste=5),
        started="",
        index=0,
    )
    folder.write_worker(worker)
    assert [found for found, _ in folder.read_workers()] == [worker]
    assert worker.bill.total == 15
    failures = [Failure(3, "too_long", "it is", 2, '{"a": "ü"}'), Failure(4, "x", "y", 1, None)]
    assert failures_from_bytes(failures_to_bytes(failures, "n")) == failures
