"""The commit of a shard: its failures, then its part, whose create-if-absent decides."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchinfer.connectors.errors import translate
from batchinfer.engine.types import SamplingParams
from batchinfer.jobs.columns import part_table, usd
from batchinfer.jobs.folder import JobFolder, ShardName, new_nonce
from batchinfer.jobs.records import Failure, PartFooter
from batchinfer.jobs.samples import Finished


def commit(
    folder: JobFolder,
    shard: ShardName,
    worker: str,
    schema: pa.Schema,
    passed: pa.Table,
    samples: Sequence[Finished],
    failures: Mapping[int, Failure],
    before_publishing: Callable[[], None],
) -> bool:
    """Publish a shard whose rows are all answered or failed: True when our part is the shard's.

    ``passed`` holds the input's columns, row i those of ``samples[i]``, sorted by row and sample. The
    failures go first, under a name that only a committed part makes count.
    ``before_publishing`` makes durable what the part relies on: a heartbeat whose bill covers its rows.
    """
    nonce = new_nonce()
    footer = footer_of(nonce, worker, samples, failures, retry=shard.round > 0)
    table = part_table(schema, passed, samples)
    table = table.replace_schema_metadata({**(schema.metadata or {}), b"batchinfer": footer.to_bytes()})
    with tempfile.TemporaryDirectory(prefix="batchinfer-") as scratch:
        path = Path(scratch) / "part.parquet"
        try:
            pq.write_table(table, path, compression="zstd")
        except OSError as error:
            raise translate(error, f"{path} (TMPDIR says where)") from error
        before_publishing()
        if failures:
            folder.write_failures(shard, [failures[row] for row in sorted(failures)], nonce)
        return folder.create_part(shard, path, nonce)


def footer_of(
    nonce: str, worker: str, samples: Sequence[Finished], failures: Mapping[int, Failure], retry: bool
) -> PartFooter:
    """What a part's footer says about these rows; ``retry`` when they belong to a retry round."""
    nanoseconds: dict[str, int] = {}
    prefill_usd = decode_usd = 0.0
    for sample in samples:
        for charge in sample.charges:
            nanoseconds[charge.worker] = nanoseconds.get(charge.worker, 0) + charge.nanoseconds
            prefill_usd += usd(charge.prefill_ns, charge.usd_per_hour) or 0.0
            decode_usd += usd(charge.decode_ns, charge.usd_per_hour) or 0.0
    done = [sample.completion for sample in samples]
    return PartFooter(
        nonce=nonce,
        worker=worker,
        rows=len(done),
        failed_rows=len(failures),
        retried_rows=len(failures) + len({item.index for item in done}) if retry else 0,
        failures=nonce if failures else None,
        codes=dict(Counter(failure.code for failure in failures.values())),
        nanoseconds=nanoseconds,
        prompt_tokens=sum(item.prompt_tokens for item in done),
        cached_tokens=sum(item.cached_tokens for item in done),
        completion_tokens=sum(len(item.token_ids) for item in done),
        prefill_ns=sum(item.prefill_ns for item in done),
        decode_ns=sum(item.decode_ns for item in done),
        prefill_usd=prefill_usd,
        decode_usd=decode_usd,
    )


def answered(samples: Mapping[object, Finished], sampling: SamplingParams) -> list[Finished]:
    """The samples of rows all of whose ``n`` samples are finished, sorted by row and sample."""
    counts: dict[int, int] = {}
    for sample in samples.values():
        counts[sample.completion.index] = counts.get(sample.completion.index, 0) + 1
    whole = [sample for sample in samples.values() if counts[sample.completion.index] == sampling.n]
    return sorted(whole, key=lambda sample: sample.key)


def take_rows(passed: pa.Table, indexes: pa.ChunkedArray, rows: Sequence[int]) -> pa.Table:
    """Rows of ``passed``, whose positions in the whole input are ``indexes`` (ascending), by position."""
    places = pc.index_in(pa.array(rows, pa.int64()), value_set=indexes)
    if places.null_count:
        raise AssertionError("a finished row is not among the rows that were read")
    return passed.take(places)
