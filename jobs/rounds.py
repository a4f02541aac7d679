"""Retry rounds: which failed rows are tried again, as a plan beside the job's own."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from batchinfer.connectors.types import Split
from batchinfer.jobs.records import table_from_bytes, table_to_bytes
from batchinfer.jobs.types import Shard

_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("row_index", pa.int64()),
        ("part", pa.dictionary(pa.int32(), pa.string())),
        ("attempts", pa.int32()),
        ("code", pa.dictionary(pa.int32(), pa.string())),
    ]
)


@dataclass(frozen=True, slots=True)
class FailedRow:
    """A reference to a failed row of a committed part: the row's position in the whole input, the part
    that names its failure, how often it was tried until then, and the code that it failed with."""

    row_index: int
    part: str
    attempts: int
    code: str


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """A retry round (rounds/NNN/plan.arrow): the rows of each of its shards, in the order of the input,
    and its writer's nonce."""

    shards: tuple[tuple[FailedRow, ...], ...]
    nonce: str

    @property
    def rows(self) -> int:
        """Rows that the round tries again."""
        return sum(len(shard) for shard in self.shards)

    def to_bytes(self) -> bytes:
        """The plan as an Arrow IPC file, one row a failed row."""
        numbered = [(index, row) for index, shard in enumerate(self.shards) for row in shard]
        columns = [
            pa.array([index for index, _ in numbered], pa.int32()),
            pa.array([row.row_index for _, row in numbered], pa.int64()),
            pa.array([row.part for _, row in numbered], pa.string()).dictionary_encode(),
            pa.array([row.attempts for _, row in numbered], pa.int32()),
            pa.array([row.code for _, row in numbered], pa.string()).dictionary_encode(),
        ]
        table = pa.Table.from_arrays(columns, schema=_SCHEMA)
        return table_to_bytes(table.replace_schema_metadata({"nonce": self.nonce}))

    @classmethod
    def from_bytes(cls, data: bytes) -> RoundPlan:
        """The inverse of :meth:`to_bytes`."""
        table = table_from_bytes(data)
        shards: list[list[FailedRow]] = []
        for index, *failed in zip(*table.to_pydict().values(), strict=True):
            if index == len(shards):
                shards.append([])
            shards[index].append(FailedRow(*failed))
        nonce = (table.schema.metadata or {}).get(b"nonce", b"").decode()
        return cls(tuple(map(tuple, shards)), nonce)


def cut_round(failed: Sequence[FailedRow], rows: int, nonce: str) -> RoundPlan:
    """A round of shards of at most ``rows`` of the ``failed`` rows, which are sorted."""
    return RoundPlan(
        tuple(tuple(failed[start : start + rows]) for start in range(0, len(failed), rows)), nonce
    )


def shards_of(plan: RoundPlan, first: Sequence[Shard]) -> list[Shard]:
    """The round's shards, which read the splits of the job's ``first`` plan that hold their rows."""
    splits = [split for shard in first for split in shard.splits]
    starts = [split.first_row for split in splits]
    tokens_a_row = sum(shard.estimated_tokens for shard in first) / sum(shard.rows for shard in first)
    shards = []
    for index, rows in enumerate(plan.shards):
        wanted: dict[int, list[int]] = {}
        for row in rows:
            wanted.setdefault(bisect_right(starts, row.row_index) - 1, []).append(row.row_index)
        cut = tuple(_only(splits[place], tuple(positions)) for place, positions in wanted.items())
        attempts = {row.row_index: row.attempts for row in rows}
        shards.append(Shard(index, cut, round(len(rows) * tokens_a_row), attempts))
    return shards


def in_order(rounds: Iterable[Iterator[pa.RecordBatch]]) -> Iterator[pa.RecordBatch]:
    """The rows of several rounds in the order of the input. Each round's batches are sorted by
    ``row_index``, and no row is in two of them."""
    heads: list[tuple[pa.RecordBatch, Iterator[pa.RecordBatch]]] = []
    for batches in rounds:
        _push(heads, batches)
    while heads:
        heads.sort(key=lambda head: _first_row(head[0]))
        batch, batches = heads.pop(0)
        count = batch.num_rows
        if heads:
            count = int(np.searchsorted(_rows(batch), _first_row(heads[0][0])))
        yield batch.slice(0, count)
        if count < batch.num_rows:
            heads.append((batch.slice(count), batches))
        else:
            _push(heads, batches)


def _push(
    heads: list[tuple[pa.RecordBatch, Iterator[pa.RecordBatch]]], batches: Iterator[pa.RecordBatch]
) -> None:
    """Put the next batch that has rows among the heads."""
    batch = next((batch for batch in batches if batch.num_rows), None)
    if batch is not None:
        heads.append((batch, batches))


def _rows(batch: pa.RecordBatch) -> np.ndarray[Any, Any]:
    rows: np.ndarray[Any, Any] = batch.column("row_index").to_numpy()
    return rows


def _first_row(batch: pa.RecordBatch) -> int:
    return int(batch.column("row_index")[0].as_py())


def _only(split: Split, positions: tuple[int, ...]) -> Split:
    """The split with these rows only, and no longer than it must be."""
    if split.unit == "bytes":
        return replace(split, only=positions)
    start, rows = positions[0] - split.first_row, positions[-1] + 1 - positions[0]
    return replace(
        split,
        start=split.start + start,
        stop=split.start + start + rows,
        first_row=positions[0],
        rows=rows,
        only=positions,
    )
