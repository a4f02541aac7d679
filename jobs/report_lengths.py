"""How long prompts and completions are: histograms over the token counts of a job's rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchinfer.connectors.inputs import ObjectFile
from batchinfer.jobs.folder import JobFolder, ShardName

# Of how many parts the rows are read at most, spread evenly over the job.
PARTS = 64
_BINS = 20
_BATCH_ROWS = 1 << 16
_PARALLEL_READS = 8


@dataclass(frozen=True, slots=True)
class Bin:
    """Lengths from ``first`` to ``last`` tokens, both included, and how many there are; None: no end."""

    first: int
    last: int | None
    count: int


@dataclass(frozen=True, slots=True)
class Histogram:
    """Lengths in tokens: bins of equal width, of which the last may be open; some quantiles."""

    count: int
    mean: float
    p10: int
    p50: int
    p90: int
    longest: int
    bins: tuple[Bin, ...]


@dataclass(frozen=True, slots=True)
class Lengths:
    """The lengths of answered rows in ``parts_read`` of ``parts`` parts, ``rows`` of them; None where
    there are none."""

    parts: int
    parts_read: int
    rows: int
    prompts: Histogram | None
    completions: Histogram | None


def lengths(folder: JobFolder, shards: Collection[ShardName]) -> Lengths:
    """The lengths of the rows of these committed parts, or of ``PARTS`` of them where there are more.

    Only the columns of token counts are read, a bounded number of rows at a time.
    """
    chosen = spread(sorted(shards), PARTS)
    prompts: Counter[int] = Counter()
    completions: Counter[int] = Counter()
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        for counted in pool.map(lambda shard: _count(folder, shard), chosen):
            prompts += counted[0]
            completions += counted[1]
    return Lengths(
        parts=len(shards),
        parts_read=len(chosen),
        rows=prompts.total(),
        prompts=histogram(prompts),
        completions=histogram(completions),
    )


def spread(items: Sequence[ShardName], most: int) -> list[ShardName]:
    """At most so many of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[place * (len(items) - 1) // (most - 1)] for place in range(most)]


def _count(folder: JobFolder, shard: ShardName) -> tuple[Counter[int], Counter[int]]:
    """How many prompts and how many completions there are of each length in a part."""
    prompts: Counter[int] = Counter()
    completions: Counter[int] = Counter()
    file = ObjectFile(folder.store, shard.part)
    part = pq.ParquetFile(pa.PythonFile(file, mode="r"), pre_buffer=False)
    samples = "sample_index" in part.schema_arrow.names
    columns = ["prompt_tokens", "completion_tokens", *(["sample_index"] if samples else [])]
    for batch in part.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False):
        _add(completions, batch.column("completion_tokens"))
        asked = batch.column("prompt_tokens")
        if samples:  # the samples of a row have one prompt
            asked = asked.filter(pc.equal(batch.column("sample_index"), 0))
        _add(prompts, asked)
    return prompts, completions


def _add(counter: Counter[int], lengths: pa.Array) -> None:
    for item in lengths.value_counts().to_pylist():
        counter[item["values"]] += item["counts"]


def histogram(counts: Counter[int]) -> Histogram | None:
    """The histogram of lengths, given how many there are of each; None of nothing.

    The bins cover 99% of the lengths in round widths; a long tail is the last bin, which is open.
    """
    total = counts.total()
    if not total:
        return None
    ordered = sorted(counts.items())

    def quantile(share: float) -> int:
        seen = 0
        for length, count in ordered:
            seen += count
            if seen >= share * total:
                return length
        return ordered[-1][0]

    longest = ordered[-1][0]
    typical = quantile(0.99)
    width = round_up(max(1, -(-(typical + 1) // _BINS)))
    # Open only where it saves something: a tail that takes a few more bins is shown as it is.
    number = longest // width + 1
    opened = number > _BINS + _BINS // 4
    if opened:
        number = typical // width + 2
    sizes = [0] * number
    for length, count in ordered:
        sizes[min(length // width, number - 1)] += count
    bins = [
        Bin(place * width, None if opened and place == number - 1 else (place + 1) * width - 1, size)
        for place, size in enumerate(sizes)
    ]
    mean = sum(length * count for length, count in ordered) / total
    return Histogram(total, mean, quantile(0.1), quantile(0.5), quantile(0.9), longest, tuple(bins))


def round_up(value: int) -> int:
    """The next of 1, 2, 5, 10, 20, 50, … that is not smaller."""
    step = 1
    while True:
        for factor in (1, 2, 5):
            if factor * step >= value:
                return factor * step
        step *= 10
