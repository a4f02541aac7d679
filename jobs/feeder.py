"""Claims shards and turns their rows into requests, ahead of the engine by a bounded number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from batchinfer.connectors.types import BadRow, Row, Split
from batchinfer.engine.types import Request, SamplingParams
from batchinfer.jobs.bench import Bench
from batchinfer.jobs.claims import Claims, Lease
from batchinfer.jobs.folder import JobFolder, ShardName
from batchinfer.jobs.open_shard import OpenShard
from batchinfer.jobs.progress import ProgressWriter, read_progress
from batchinfer.jobs.records import Failure, input_as_json
from batchinfer.jobs.samples import SampleKey
from batchinfer.jobs.types import JobError, RowError, Shard

CHUNK_ROWS = 256


@dataclass(frozen=True, slots=True)
class Work:
    """What a worker does: the job's shards, how to read and to prompt their rows, and how to sample.

    ``schema`` is that of the parts, ``passed`` the input's columns in it. ``render`` raises RowError.
    """

    shards: Mapping[ShardName, Shard]
    schema: pa.Schema
    passed: pa.Schema
    sampling: SamplingParams
    read: Callable[[Split], Iterable[Row | BadRow]]
    render: Callable[[Mapping[str, Any]], Any]


class Feeder:
    """Keeps the bench supplied: claims a shard, reads what is known of it, and queues the rest."""

    def __init__(
        self, folder: JobFolder, bench: Bench, claims: Claims, work: Work, worker: str, patience: float
    ) -> None:
        self._folder = folder
        self._bench = bench
        self._claims = claims
        self._work = work
        self._worker = worker
        self._patience = patience

    def run(self) -> None:
        """Feed until the worker stops, or every shard is committed."""
        while self._bench.wait_for_room():
            lease = self._claims.claim(self._bench.held())
            if lease is not None:
                self._feed(lease)
            elif self._claims.all_committed():
                self._bench.request_stop("done")
            else:
                # The others' leases may still go stale, so there may be work for us later.
                self._bench.wait_for_work(self._patience)

    def _feed(self, lease: Lease) -> None:
        planned = self._work.shards[lease.shard]
        writer = ProgressWriter(self._folder, lease.shard, self._worker)
        shard = OpenShard(planned, lease, self._work.sampling.n, writer)
        self._bench.add(shard)  # from here on the lease is renewed
        progress = read_progress(self._folder, lease.shard)
        if progress is None:
            self._bench.lose(shard)
            return
        shard.load(progress)
        for split in planned.splits:
            for chunk in _chunks(self._work.read(split)):
                if not self._bench.enqueue(shard, *self._prepare(shard, chunk)):
                    return
        if shard.rows_read != planned.rows:
            raise JobError(
                f"shard {lease.shard.label} was planned with {planned.rows} rows, but {shard.rows_read} "
                f"were read from {planned.splits[0].file.uri}: the input was changed, so choose another "
                "output.uri for a new job"
            )
        self._bench.finish_reading(shard)

    def _prepare(
        self, shard: OpenShard, chunk: list[Row | BadRow]
    ) -> tuple[list[Request], dict[int, Mapping[str, Any]], list[Failure]]:
        """Requests for the rows of a chunk that are not settled, their values, and failures."""
        rows, failures = [], []
        for item in chunk:
            if isinstance(item, BadRow):
                failures.append(Failure(item.index, item.code, item.message, 1, item.raw))
            else:
                rows.append(item)
        rows, passed, misfits = fit_rows(self._work.passed, rows)
        failures += misfits
        shard.add_rows([row.index for row in rows], passed, len(chunk) - len(rows))
        requests, inputs = [], {}
        for row in rows:
            missing = shard.missing(row.index)
            if not missing:
                continue
            try:
                prompt = self._work.render(row.values)
            except RowError as error:
                values = input_as_json(row.values)
                failures.append(Failure(row.index, error.code, error.message, 1, values))
                continue
            keys = ((sample, SampleKey(row.index, sample)) for sample in missing)
            resume = {sample: shard.partials[key].decoded for sample, key in keys if key in shard.partials}
            samples = None if len(missing) == shard.n else missing
            requests.append(Request(row.index, prompt, self._work.sampling, resume, samples))
            inputs[row.index] = row.values
        return requests, inputs, failures


def fit_rows(schema: pa.Schema, rows: list[Row]) -> tuple[list[Row], pa.RecordBatch, list[Failure]]:
    """The rows whose values fit ``schema``, these as a batch, and ``type_mismatch`` for the others."""
    try:
        return rows, _batch(schema, rows), []
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        fitting, failures = [], []
    for row in rows:
        field = _misfit(schema, row)
        if field is None:
            fitting.append(row)
        else:
            message = (
                f"the column {field.name} is of type {field.type}, which this row's value does not fit"
            )
            failures.append(Failure(row.index, "type_mismatch", message, 1, input_as_json(row.values)))
    return fitting, _batch(schema, fitting), failures


def _batch(schema: pa.Schema, rows: list[Row]) -> pa.RecordBatch:
    arrays = [pa.array([row.values.get(field.name) for row in rows], field.type) for field in schema]
    for field, array in zip(schema, arrays, strict=True):
        if not field.nullable and array.null_count:
            raise pa.ArrowInvalid(f"{field.name} is null")
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _misfit(schema: pa.Schema, row: Row) -> pa.Field | None:
    for field in schema:
        try:
            _batch(pa.schema([field]), [row])
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            return field
    return None


def _chunks(rows: Iterable[Row | BadRow]) -> Iterator[list[Row | BadRow]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, CHUNK_ROWS)):
        yield chunk
