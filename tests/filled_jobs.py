"""Jobs whose folders are filled step by step by the protocol's own writers, without workers."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from batchinfer.connectors.storage import open_store
from batchinfer.engine.types import Completion, SamplingParams
from batchinfer.jobs.columns import output_schema
from batchinfer.jobs.commit import commit
from batchinfer.jobs.folder import JobFolder, ShardName
from batchinfer.jobs.records import Bill, Failure, JobRecord, WorkerRecord
from batchinfer.jobs.samples import Charge, Finished
from batchinfer.jobs.spec import parse_spec

SECOND = 10**9


class Filled:
    """A job whose folder is filled step by step, as workers would."""

    def __init__(
        self, uri: str, shards: int = 4, rows: int = 10, price: float | None = 3.6, **spec: Any
    ) -> None:
        self.folder = JobFolder(open_store(uri))
        self.shards, self.rows, self.price = shards, rows, price
        fields = {"model": "org/model", "input": {"uri": "in.jsonl"}, "prompt": "{{ text }}"}
        parsed = parse_spec({"name": "docs", **fields, "output": {"uri": uri}, **spec})
        self.samples = parsed.sampling.n
        self.schema = output_schema(pa.schema([]), SamplingParams(n=self.samples), tokens=False)
        record = JobRecord(
            spec=parsed.model_dump(mode="json"),
            schema=self.schema,
            input_schema=pa.schema([]),
            fingerprint="f",
            plan="plan-x.arrow",
            shards=shards,
            rows=shards * rows,
            created=datetime.now(UTC).isoformat(),
            nonce="n",
        )
        assert self.folder.create_job(record)

    def commit(self, index: int, failed: dict[int, tuple[str, str]] | None = None, of: Any = None) -> int:
        """Commit a shard; ``failed`` gives code and message by row. Returns what its rows were charged."""
        failed = failed or {}
        shard = of or ShardName(0, index, self.shards)
        rows = range(index * self.rows, (index + 1) * self.rows) if of is None else []
        samples = [
            Finished(
                Completion(
                    index=row,
                    sample_index=sample,
                    text="x",
                    token_ids=tuple(range(1 + row % 7)),
                    finish_reason="stop",
                    prompt_tokens=5 + row,
                    cached_tokens=3,
                    prefill_ns=SECOND,
                    token_ns=(SECOND,) * (1 + row % 7),
                ),
                (Charge("a", self.price, SECOND, (1 + row % 7) * SECOND, 1 + row % 7),),
            )
            for row in rows
            if row not in failed
            for sample in range(self.samples)
        ]
        empty = pa.Table.from_arrays([], schema=pa.schema([]))
        failures = {
            row: Failure(row, code, message, 1, f"input of {message}")
            for row, (code, message) in failed.items()
        }
        assert commit(self.folder, shard, "a", self.schema, empty, samples, failures, lambda: None)
        return sum(sample.charges[0].nanoseconds for sample in samples)

    def beat(self, worker: str = "a", **fields: Any) -> None:
        values: dict[str, Any] = {
            "worker": worker,
            "state": "running",
            "beat": 1,
            "usd_per_hour": self.price,
            "bill": Bill(startup=SECOND),
            "started": "",
        }
        self.folder.write_worker(WorkerRecord(**(values | fields)))
