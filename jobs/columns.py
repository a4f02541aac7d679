"""The columns of a part: their types, fixed when the job is planned, and the table they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from batchinfer.engine.types import SamplingParams, TokenLogprobs
from batchinfer.jobs.samples import Charge, Finished
from batchinfer.jobs.types import JobError

NANOSECONDS_PER_HOUR = 3_600_000_000_000

_TOP_LOGPROBS = pa.list_(pa.struct([("token_id", pa.int32()), ("logprob", pa.float32())]))
_PROMPT_LOGPROBS = pa.list_(
    pa.struct(
        [
            ("logprob", pa.float32()),
            ("top", pa.list_(pa.struct([("token_id", pa.int32()), ("logprob", pa.float32())]))),
        ]
    )
)


def added_columns(sampling: SamplingParams, tokens: bool) -> pa.Schema:
    """The columns that a job adds to those of its input: ``tokens`` is ``output.tokens``."""
    fields = [pa.field("row_index", pa.int64(), nullable=False)]
    if sampling.n > 1:
        fields.append(pa.field("sample_index", pa.int32(), nullable=False))
    fields += [
        pa.field("completion", pa.string(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("cached_tokens", pa.int32(), nullable=False),
        pa.field("completion_tokens", pa.int32(), nullable=False),
        pa.field("prefill_ns", pa.int64(), nullable=False),
        pa.field("decode_ns", pa.int64(), nullable=False),
        pa.field("cost_usd", pa.float64()),
        pa.field("prefill_cost_usd", pa.float64()),
        pa.field("decode_cost_usd", pa.float64()),
        pa.field("seconds", pa.float64(), nullable=False),
    ]
    if tokens:
        fields += [
            pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
            pa.field("token_logprobs", pa.list_(pa.float32())),
            pa.field("token_cost_usd", pa.list_(pa.float64())),
        ]
    if sampling.logprobs:
        fields.append(pa.field("top_logprobs", pa.list_(_TOP_LOGPROBS)))
    if sampling.prompt_logprobs is not None:
        fields.append(pa.field("prompt_logprobs", _PROMPT_LOGPROBS))
    return pa.schema(fields)


def output_schema(passed: pa.Schema, sampling: SamplingParams, tokens: bool) -> pa.Schema:
    """The schema of a job's parts: the input's columns that pass through, then the added ones.

    Raises JobError, naming both, where an input column has the name of an added one.
    """
    added = added_columns(sampling, tokens)
    taken = [name for name in passed.names if name in added.names]
    if taken:
        raise JobError(
            f"the input's column {taken[0]} would collide with the output's column {taken[0]}: name the "
            "columns to pass through in input.columns without it, or rename it"
        )
    repeated = [name for name in passed.names if passed.names.count(name) > 1]
    if repeated:
        raise JobError(f"the input has two columns named {repeated[0]}: rename one of them")
    return pa.schema([*passed, *added])


def passed_columns(schema: pa.Schema, sampling: SamplingParams, tokens: bool) -> pa.Schema:
    """The columns of a part's schema that come from the input."""
    return pa.schema(list(schema)[: len(schema) - len(added_columns(sampling, tokens))])


def usd(nanoseconds: int, usd_per_hour: float | None) -> float | None:
    """What that much of a worker's time costs; None without a price."""
    return None if usd_per_hour is None else nanoseconds * usd_per_hour / NANOSECONDS_PER_HOUR


def part_table(schema: pa.Schema, passed: pa.Table, samples: Sequence[Finished]) -> pa.Table:
    """The table of a part: row i of ``passed`` holds the input's columns of ``samples[i]``.

    Samples must be sorted by row and sample index.
    """
    done = [sample.completion for sample in samples]
    values: dict[str, Callable[[], list[Any]]] = {
        "row_index": lambda: [item.index for item in done],
        "sample_index": lambda: [item.sample_index for item in done],
        "completion": lambda: [item.text for item in done],
        "finish_reason": lambda: [item.finish_reason for item in done],
        "prompt_tokens": lambda: [item.prompt_tokens for item in done],
        "cached_tokens": lambda: [item.cached_tokens for item in done],
        "completion_tokens": lambda: [len(item.token_ids) for item in done],
        "prefill_ns": lambda: [item.prefill_ns for item in done],
        "decode_ns": lambda: [item.decode_ns for item in done],
        "cost_usd": lambda: [_sum_usd(sample.charges, True, True) for sample in samples],
        "prefill_cost_usd": lambda: [_sum_usd(sample.charges, True, False) for sample in samples],
        "decode_cost_usd": lambda: [_sum_usd(sample.charges, False, True) for sample in samples],
        "seconds": lambda: [(item.prefill_ns + item.decode_ns) / 1e9 for item in done],
        "token_ids": lambda: [item.token_ids for item in done],
        "token_logprobs": lambda: [_chosen(item.logprobs) for item in done],
        "token_cost_usd": lambda: [token_usd(sample) for sample in samples],
        "top_logprobs": lambda: [_top(item.logprobs) for item in done],
        "prompt_logprobs": lambda: [_prompt(item.prompt_logprobs) for item in done],
    }
    arrays = [
        passed.column(field.name)
        if field.name in passed.column_names
        else pa.array(values[field.name](), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def token_usd(sample: Finished) -> list[float] | None:
    """What each token of a sample cost, at the price of the worker that decoded it."""
    prices = [charge.usd_per_hour for charge in sample.charges for _ in range(charge.tokens)]
    costs = [usd(spent, price) for spent, price in zip(sample.completion.token_ns, prices, strict=True)]
    known = [cost for cost in costs if cost is not None]
    return known if len(known) == len(costs) else None


def _sum_usd(charges: tuple[Charge, ...], prefill: bool, decode: bool) -> float | None:
    total = 0.0
    for charge in charges:
        cost = usd(charge.prefill_ns * prefill + charge.decode_ns * decode, charge.usd_per_hour)
        if cost is None:
            return None
        total += cost
    return total


def _chosen(logprobs: tuple[TokenLogprobs, ...] | None) -> list[float] | None:
    return None if logprobs is None else [entry.logprob for entry in logprobs]


def _top(logprobs: tuple[TokenLogprobs, ...] | None) -> list[list[tuple[int, float]]] | None:
    return None if logprobs is None else [list(entry.top) for entry in logprobs]


def _prompt(
    logprobs: tuple[TokenLogprobs | None, ...] | None,
) -> list[tuple[float, list[tuple[int, float]]] | None] | None:
    if logprobs is None:
        return None
    return [None if entry is None else (entry.logprob, list(entry.top)) for entry in logprobs]
