"""Jobs that the engine of ``fake_engine`` answers, for tests of who starts their workers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fake_engine
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.connectors.readers import discover, scan_input
from batchinfer.connectors.storage import open_store
from batchinfer.jobs.columns import output_schema
from batchinfer.jobs.cost import settle
from batchinfer.jobs.folder import JobFolder, new_nonce
from batchinfer.jobs.records import JobRecord, WorkerRecord
from batchinfer.jobs.spec import JobSpec, parse_spec
from batchinfer.jobs.spec_source import located
from batchinfer.jobs.types import Shard


@dataclass(frozen=True)
class FakeJob:
    """A job that was submitted."""

    spec: JobSpec
    folder: JobFolder
    record: JobRecord

    @property
    def uri(self) -> str:
        return self.folder.uri

    def workers(self) -> list[WorkerRecord]:
        return [record for record, _ in self.folder.read_workers()]

    def running(self) -> list[WorkerRecord]:
        return [record for record in self.workers() if record.state == "running"]

    def check_complete(self) -> None:
        """Every row is answered once, with the right answer, and the bill adds up."""
        parts = self.folder.committed()
        assert len(parts) == self.record.shards
        tables = [
            pq.read_table(pa.BufferReader(self.folder.store.get(shard.part))) for shard in sorted(parts)
        ]
        table = pa.concat_tables(tables)
        rows = list(range(self.record.rows))
        assert table["row_index"].to_pylist() == rows
        assert table["completion"].to_pylist() == [fake_engine.text_of(row, 0) for row in rows]
        settlement = settle(self.workers(), [self.folder.read_footer(shard) for shard in parts])
        settlement.check()


def submit_fake_job(
    uri: str,
    tmp: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    rows: int = 40,
    shard_rows: int = 10,
    step: float = 0.0,
    tokens: int = 5,
    **spec: Any,
) -> FakeJob:
    """Put a job at ``uri``, its input beside it; ``spec`` are further fields of its spec.

    What its workers need is set in this process's environment.
    """
    data = open_store(f"{uri}-input")
    columns = {"id": [f"id {row}" for row in range(rows)], "text": [f"text {row}" for row in range(rows)]}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, row_group_size=shard_rows)
    data.put("in.parquet", sink.getvalue().to_pybytes())
    fields = {
        "model": "fake",
        "input": {"uri": f"{uri}-input/in.parquet"},
        "prompt": "Say: {{ text }}",
        "output": {"uri": uri},
        "price": {"usd_per_hour": 3.6},
    }
    parsed = parse_spec({**fields, **spec})
    scan = scan_input(discover(parsed.input.uri), None, shard_rows)
    shards = [Shard(index, (split,), 1) for index, split in enumerate(scan.splits(shard_rows))]
    parsed = located(parsed)
    folder = JobFolder(open_store(uri))
    record = JobRecord(
        spec=parsed.model_dump(mode="json"),
        schema=output_schema(scan.schema, parsed.sampling_params(), False),
        input_schema=scan.schema,
        fingerprint="",
        plan=folder.write_plan(shards),
        shards=len(shards),
        rows=scan.rows,
        created="2026-01-01T00:00:00+00:00",
        nonce=new_nonce(),
    )
    assert folder.create_job(record)
    own = {
        "BATCHINFER_ENGINE_FACTORY": f"{fake_engine.__file__}:fake_engine",
        "BATCHINFER_PACE": json.dumps({"lease": 4.0, "flush": 0.5}),
        "BATCHINFER_CACHE": str(tmp / "cache"),
        "FAKE_STEP": str(step),
        "FAKE_TOKENS": str(tokens),
        "OMP_NUM_THREADS": "1",
    }
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    return FakeJob(parsed, folder, record)
