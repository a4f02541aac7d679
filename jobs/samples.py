"""Finished and unfinished samples of rows, who was charged for them, and their form in storage."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa

from batchinfer.engine.types import Completion, Decoded, TokenLogprobs
from batchinfer.jobs.records import Failure, table_from_bytes, table_to_bytes
from batchinfer.jobs.suspects import UNSUSPECTED, Suspicion


class SampleKey(NamedTuple):
    """One sample of one row: the row's position in the whole input, and the sample's index."""

    row: int
    sample: int


@dataclass(frozen=True, slots=True)
class Charge:
    """What one worker charged to one sample: nanoseconds of its prompt, and of ``tokens`` tokens.

    Charges are in the order in which the tokens were decoded. ``usd_per_hour`` is the worker's price,
    None where nobody named one.
    """

    worker: str
    usd_per_hour: float | None
    prefill_ns: int
    decode_ns: int
    tokens: int

    @property
    def nanoseconds(self) -> int:
        """All of it."""
        return self.prefill_ns + self.decode_ns


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished sample; its charges add up to the completion's nanoseconds and tokens."""

    completion: Completion
    charges: tuple[Charge, ...]

    @property
    def key(self) -> SampleKey:
        """Which sample."""
        return SampleKey(self.completion.index, self.completion.sample_index)


@dataclass(frozen=True, slots=True)
class Partial:
    """A sample in flight: what is decoded so far, and the charges that add up to it."""

    decoded: Decoded
    charges: tuple[Charge, ...]


NOTHING = Partial(Decoded(), ())


@dataclass(frozen=True, slots=True)
class Flight:
    """What one worker has in flight of a shard: samples with what is decoded of them, the rows that its
    engine has begun, and what it holds against rows."""

    partials: Mapping[SampleKey, Partial] = field(default_factory=dict)
    running: frozenset[int] = frozenset()
    suspicion: Suspicion = UNSUSPECTED

    def __bool__(self) -> bool:
        return bool(self.partials or self.running or self.suspicion)


def charges_after(
    base: Partial, worker: str, usd_per_hour: float | None, prefill_ns: int, token_ns: tuple[int, ...]
) -> tuple[Charge, ...]:
    """The charges of a sample that ``worker`` continued from ``base`` up to these totals.

    The engine reports a resumed sample's nanoseconds with those it began with, so the difference is
    the worker's own; with none of its own it is not named.
    """
    done = len(base.decoded.token_ns)
    own = Charge(
        worker,
        usd_per_hour,
        prefill_ns - base.decoded.prefill_ns,
        sum(token_ns[done:]),
        len(token_ns) - done,
    )
    if own.nanoseconds == 0 and own.tokens == 0:
        return base.charges
    if base.charges and base.charges[-1].worker == worker:
        last = base.charges[-1]
        own = Charge(
            worker,
            usd_per_hour,
            last.prefill_ns + own.prefill_ns,
            last.decode_ns + own.decode_ns,
            last.tokens + own.tokens,
        )
        return (*base.charges[:-1], own)
    return (*base.charges, own)


_LOGPROB = pa.struct(
    [
        ("logprob", pa.float64()),
        ("top", pa.list_(pa.struct([("token_id", pa.int32()), ("logprob", pa.float64())]))),
    ]
)
_CHARGE = pa.struct(
    [
        ("worker", pa.string()),
        ("usd_per_hour", pa.float64()),
        ("prefill_ns", pa.int64()),
        ("decode_ns", pa.int64()),
        ("tokens", pa.int64()),
    ]
)
_SAMPLE = [
    ("row_index", pa.int64()),
    ("sample_index", pa.int32()),
    ("token_ids", pa.list_(pa.int32())),
    ("token_ns", pa.list_(pa.int64())),
    ("prefill_ns", pa.int64()),
    ("logprobs", pa.list_(_LOGPROB)),
    ("charges", pa.list_(_CHARGE)),
]
_FINISHED_SCHEMA = pa.schema(
    [
        *_SAMPLE,
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("cached_tokens", pa.int32()),
        ("prompt_logprobs", pa.list_(_LOGPROB)),
        ("code", pa.string()),
        ("message", pa.string()),
        ("attempts", pa.int32()),
        ("input", pa.string()),
    ]
)
_INFLIGHT_SCHEMA = pa.schema(_SAMPLE)
_RUNNING, _SUSPICION = b"running", b"suspicion"


def finished_to_bytes(samples: Iterable[Finished], failures: Iterable[Failure]) -> bytes:
    """Finished samples and failed rows of an open shard as an Arrow IPC file; a row with a ``code``
    is a failure."""
    rows: list[dict[str, Any]] = []
    for sample in samples:
        done = sample.completion
        rows.append(
            {
                "row_index": done.index,
                "sample_index": done.sample_index,
                "token_ids": done.token_ids,
                "token_ns": done.token_ns,
                "prefill_ns": done.prefill_ns,
                "logprobs": _logprobs_out(done.logprobs),
                "charges": _charges_out(sample.charges),
                "text": done.text,
                "finish_reason": done.finish_reason,
                "prompt_tokens": done.prompt_tokens,
                "cached_tokens": done.cached_tokens,
                "prompt_logprobs": _logprobs_out(done.prompt_logprobs),
            }
        )
    for failure in failures:
        rows.append(
            {
                "row_index": failure.row_index,
                "code": failure.code,
                "message": failure.message,
                "attempts": failure.attempts,
                "input": failure.input,
            }
        )
    return table_to_bytes(pa.Table.from_pylist(rows, schema=_FINISHED_SCHEMA))


def finished_from_bytes(data: bytes) -> tuple[list[Finished], list[Failure]]:
    """The inverse of :func:`finished_to_bytes`."""
    samples, failures = [], []
    for row in table_from_bytes(data).to_pylist():
        if row["code"] is not None:
            failures.append(
                Failure(row["row_index"], row["code"], row["message"], row["attempts"], row["input"])
            )
            continue
        logprobs = _logprobs_in(row["logprobs"])
        completion = Completion(
            index=row["row_index"],
            sample_index=row["sample_index"],
            text=row["text"],
            token_ids=tuple(row["token_ids"]),
            finish_reason=row["finish_reason"],
            prompt_tokens=row["prompt_tokens"],
            cached_tokens=row["cached_tokens"],
            prefill_ns=row["prefill_ns"],
            token_ns=tuple(row["token_ns"]),
            logprobs=None if logprobs is None else tuple(entry for entry in logprobs if entry),
            prompt_logprobs=_logprobs_in(row["prompt_logprobs"]),
        )
        samples.append(Finished(completion, _charges_in(row["charges"])))
    return samples, failures


def inflight_to_bytes(flight: Flight) -> bytes:
    """Samples in flight as an Arrow IPC file, with the rest in its schema's metadata."""
    rows = [
        {
            "row_index": key.row,
            "sample_index": key.sample,
            "token_ids": partial.decoded.token_ids,
            "token_ns": partial.decoded.token_ns,
            "prefill_ns": partial.decoded.prefill_ns,
            "logprobs": _logprobs_out(partial.decoded.logprobs),
            "charges": _charges_out(partial.charges),
        }
        for key, partial in flight.partials.items()
    ]
    running = json.dumps(sorted(flight.running))
    metadata = {_RUNNING: running, _SUSPICION: flight.suspicion.to_json()}
    schema = _INFLIGHT_SCHEMA.with_metadata(metadata)
    return table_to_bytes(pa.Table.from_pylist(rows, schema=schema))


def inflight_from_bytes(data: bytes) -> Flight:
    """The inverse of :func:`inflight_to_bytes`."""
    table, partials = table_from_bytes(data), {}
    for row in table.to_pylist():
        decoded = Decoded(
            token_ids=tuple(row["token_ids"]),
            token_ns=tuple(row["token_ns"]),
            prefill_ns=row["prefill_ns"],
            logprobs=tuple(entry for entry in _logprobs_in(row["logprobs"]) or () if entry),
        )
        key = SampleKey(row["row_index"], row["sample_index"])
        partials[key] = Partial(decoded, _charges_in(row["charges"]))
    metadata = table.schema.metadata
    running = frozenset(json.loads(metadata[_RUNNING]))
    return Flight(partials, running, Suspicion.from_json(metadata[_SUSPICION]))


def _logprobs_out(logprobs: tuple[TokenLogprobs | None, ...] | None) -> list[Any] | None:
    if logprobs is None:
        return None
    return [
        None
        if entry is None
        else {
            "logprob": entry.logprob,
            "top": [{"token_id": token, "logprob": value} for token, value in entry.top],
        }
        for entry in logprobs
    ]


def _logprobs_in(values: list[Any] | None) -> tuple[TokenLogprobs | None, ...] | None:
    if values is None:
        return None
    return tuple(
        None
        if entry is None
        else TokenLogprobs(
            entry["logprob"], tuple((item["token_id"], item["logprob"]) for item in entry["top"])
        )
        for entry in values
    )


def _charges_out(charges: tuple[Charge, ...]) -> list[dict[str, Any]]:
    return [
        {
            "worker": charge.worker,
            "usd_per_hour": charge.usd_per_hour,
            "prefill_ns": charge.prefill_ns,
            "decode_ns": charge.decode_ns,
            "tokens": charge.tokens,
        }
        for charge in charges
    ]


def _charges_in(values: list[dict[str, Any]]) -> tuple[Charge, ...]:
    return tuple(Charge(**value) for value in values)
